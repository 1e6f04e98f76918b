"""Hazard probes: one for each known defect and misuse trap of MoRI, each runnable alone, in processes of its own."""
