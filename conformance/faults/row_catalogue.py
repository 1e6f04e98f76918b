"""Seeded faults of the row operators: what each is, where it applies, which property and check catch it, its minimum.

Scope: plain data without torch. Each names the real defect that it repeats, where there is one: ``#`` is a pull request
of ROCm/aiter unless another repository is named. The minima are written down from the definition of each fault, not
read off a run; a reduction that ends elsewhere is a defect of the reducer. They do not say how likely a fault is to be
met.
"""

from __future__ import annotations

from conformance.faults.row_catalogue_norms import NORMS, REDUCTIONS
from conformance.faults.row_catalogue_quantisers import QUANTISERS
from conformance.faults.row_catalogue_routes import ROUTES

#: The faults by name.
ROW_FAULTS = {fault.name: fault for fault in (*QUANTISERS, *NORMS, *REDUCTIONS, *ROUTES)}
