"""Driver and rank pool: processes, messages, outcomes, and reduction of failing cases. Imports no torch."""
