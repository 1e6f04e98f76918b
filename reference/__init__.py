"""Executable specification of expert-parallel mixture-of-experts inference in torch and torch.distributed.

Read it top to bottom: :mod:`~reference.problem` (sizes), :mod:`~reference.placement` (who owns which expert),
:mod:`~reference.dispatch_combine` (what moves where, and what is summed), :mod:`~reference.bounds` (which results are
acceptable), :mod:`~reference.oracle` (the same answer derived a second time, densely, without communication).

What a pass against this package does not prove: anything about speed, about memory ordering on hardware that was not
run, or about a combination that no module here models.
"""
