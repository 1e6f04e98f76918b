"""The table of what the MoRI adapter uses is complete, and each way of being incomplete is reported.

Scope: names, arguments, results, variables and cited lines. A complete table does not prove the notes in it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from accelerated.mori_ep import symbols
from accelerated.mori_ep.uses import UnclearUse, collect
from reference.catalogue import KERNEL_TYPES

PLACES, SIGNATURES = symbols.load("mori_symbols"), symbols.load("mori")
OPERATOR = "mori.ops:EpDispatchCombineOp"


def found(
    body: str = "", places: dict[str, Any] = PLACES, signatures: dict[str, Any] = SIGNATURES, was: str = ""
) -> list[str]:
    """Problems of the adapter with one more function, or with ``was`` in place of ``body``."""
    texts = symbols.sources()
    if was:
        assert was in texts["adapter.py"]
        texts["adapter.py"] = texts["adapter.py"].replace(was, body)
    else:
        texts["more.py"] = body
    uses = collect(texts, symbols.parameters(signatures, places))
    return symbols.problems(uses, places, signatures)


def test_every_use_has_a_place_and_every_place_a_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert found() == []
    assert symbols.main([]) == 0
    printed = capsys.readouterr().out
    assert "| `dispatch` `indices` | adapter.py:" in printed
    assert "| `EpDispatchCombineConfig` `gpu_per_node` |" in printed


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("op.reset()", "EpDispatchCombineOp.reset, used in more.py:1: no place"),
        ("op.combine(a, b, c, use_external_inp_buf=1)", "combine use_external_inp_buf, used in more.py:1: no place"),
        ("asked = {}\nasked['block_num'] = 8\nop.dispatch(a, b, c, d, **asked)", "dispatch block_num, used in"),
        ("op.combine(a, b, c, gain=1)", "combine gain, used in more.py:1: the signature has no such argument"),
        ("library.shmem.shmem_mype()", "mori.shmem:shmem_mype, used in more.py:1: no place"),
        (
            "ops = library.ops\ngetattr(ops, 'launch_local_expert_count')",
            "launch_local_expert_count, used in more.py:2",
        ),
        ("routing.cur_rank_num_token", "EpDispatchRoutingHandle.cur_rank_num_token, used in more.py:1: no place"),
        ("os.environ['MORI_SHMEM_MODE'] = 'isolation'", "environment MORI_SHMEM_MODE, used in more.py:1: no place"),
        ("def f(mode='MORI_SHMEM_MODE'): ...", "environment MORI_SHMEM_MODE, used in more.py:1: no place"),
        ("def f(*, op=library.ops.Made()): ...", "mori.ops:Made, used in more.py:1: no place"),
        ("@library.ops.traced\ndef f(): ...", "mori.ops:traced, used in more.py:1: no place"),
        ("got = op.dispatch(a, b, c, d)\ngot[6]", "dispatch [6], used in more.py:2: no place"),
        ("op.dispatch(a, b, c, d)[6]", "dispatch [6], used in more.py:1: no place"),
        ("one, *others = op.dispatch(a, b, c, d)\nothers[5]", "dispatch [6], used in more.py:2: no place"),
        ("x = 1  # counters are cleared here (intranode.hpp:7,121)", "cited intranode.hpp:7, used in more.py:1"),
    ],
)
def test_a_use_without_a_place_is_reported(body: str, words: str) -> None:
    (line,) = found(body)
    assert words in line


@pytest.mark.parametrize(
    "body",
    [
        "import mori.ops",
        "from mori import shmem",
        "kept = [op]",
        "self.kept = op",
        "helper(op)",
        "def f(library: MoriLibrary) -> None:\n    return library.ops",
        "op.dispatch(a, b, c, d, **asked_for())",
        "op.dispatch(a, *rest)",
        "def f(made=library.ops.Made): ...",
        "got = op.dispatch(a, b, c, d)\ngot[i]",
        "got = op.dispatch(a, b, c, d)\nhelper(got)",
        "def f(op):\n    return op.dispatch(a, b, c, d)",
        "one, *others = op.dispatch(a, b, c, d)\nfor other in others: ...",
        "*some, last = op.dispatch(a, b, c, d)",
    ],
)
def test_what_cannot_be_followed_is_an_error(body: str) -> None:
    with pytest.raises(UnclearUse, match=r"more\.py:\d+ .*cannot be followed"):
        found(body)


def test_a_place_without_a_use_is_reported() -> None:
    places = copy.deepcopy(PLACES)
    places["symbols"][f"{OPERATOR}.reset"] = {"at": ["python/mori/ops/dispatch_combine.py:2137"], "note": ""}
    places["symbols"][f"{OPERATOR}.combine"]["arguments"]["block_num"] = {"at": ["a.py:1"], "note": ""}
    places["symbols"]["mori"]["at"] = ["somewhere in the package"]
    assert set(found(places=places)) == {
        "mori: 'somewhere in the package' is no place",
        f"{OPERATOR}.combine block_num: recorded, but not used",
        f"{OPERATOR}.reset: recorded, but not used",
    }


def test_a_call_that_is_gone_leaves_its_place_unused() -> None:
    lines = found("pass", was="op.combine_recv()")
    assert lines == [f"{OPERATOR}.combine_recv: recorded, but not used"]


def test_signatures_that_disagree_are_reported() -> None:
    signatures = copy.deepcopy(SIGNATURES)
    signatures["functions"][f"{OPERATOR}.combine"]["parameters"].pop()
    del signatures["functions"][f"{OPERATOR}.combine_recv"]
    signatures["commit"] = "0" * 40
    lines = found(signatures=signatures)
    assert f"{OPERATOR}.combine routing: recorded, but not in the signature" in lines
    assert f"{OPERATOR}.combine_recv: no recorded signature" in lines
    assert any("the signature has no such argument" in line and "combine routing" in line for line in lines)
    assert any(line.startswith("places are of 624002c8") for line in lines)


def test_kernel_types_are_the_members() -> None:
    assert set(KERNEL_TYPES) == set(SIGNATURES["enums"]["mori.ops:EpDispatchCombineKernelType"]["members"])


def test_lines_that_moved_are_reported(tmp_path: Path) -> None:
    places = {"symbols": {"mori.ops:f": {"at": ["a.py:2", "a.py:1 g"], "arguments": {"x": {"at": ["b.py:1"]}}}}}
    (tmp_path / "a.py").write_text("gg = 1\ndef f(x): ...\n", encoding="utf-8")
    assert symbols.moved(places, tmp_path) == [
        "mori.ops:f : g is not on a.py:1 (it is on nowhere)",
        "mori.ops:f x: no file b.py",
    ]
