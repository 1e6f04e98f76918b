"""What the recorder of the MoRI double costs a rank.

Scope: imports. What it records, the scenarios show.
"""

from __future__ import annotations

import subprocess
import sys

_CODE = """
import sys
import torch
from accelerated.standin.mori_ep import graphs
x = torch.ones(2)
before = set(sys.modules)
with graphs.capture() as graph:
    y = x + 1
graph.replay()
assert y.tolist() == [2, 2]
print(len(set(sys.modules) - before), "torch._dynamo" in sys.modules)
"""


def test_a_capture_does_not_import_the_compiler() -> None:
    """It would take every rank of every pool more than a second, as long as all of its cases together."""
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
