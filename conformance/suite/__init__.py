"""The pytest side: options, preflight, plan, the harness that runs a cell, records and reports. Imports no torch."""
