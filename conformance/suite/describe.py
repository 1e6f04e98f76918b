"""A case in words, as a report shows it.

What the words leave out: rows beyond the first few; the stored case has them.
"""

from __future__ import annotations

from accelerated.operators import Family
from conformance.cases import AnyCase, Case, Cell, Explicit, GraphCase, LayerCase, SequenceCase
from conformance.row_cases import BIASES, Pattern, RowCase
from conformance.sequence_cases import told

_SHOWN_TOKENS = 12


def describe(case: AnyCase) -> list[str]:
    """Lines that say what the case is."""
    if isinstance(case, LayerCase):
        return _layer(case)
    if isinstance(case, GraphCase):
        return _graphs(case)
    if isinstance(case, SequenceCase):
        return _sequence(case)
    return _rows(case) if isinstance(case, RowCase) else _exchange(case)


def _sequence(case: SequenceCase) -> list[str]:
    lines = _exchange(case)
    lines[0] += f", a second operator of capacity {case.cell.second}" if case.cell.second else ""
    return lines + [f"  step {number}: {told(step)}" for number, step in enumerate(case.sequence)]


def _graphs(case: GraphCase) -> list[str]:
    cell, lines = case.cell, _exchange(case)
    form = "dispatch and combine in graphs of their own" if cell.halves else f"{cell.length} round(s) in a graph"
    lines[0] += f", {form}, captured {'after a warm-up' if cell.warm else 'cold'}"
    for index, a_round in enumerate(case.rounds):
        how = f"replayed by graph {a_round.graph}" if a_round.graph >= 0 else "eager"
        how += "; before it everything was dropped and made anew" if case.rebuilt and index == case.rebuilt else ""
        lines.append(f"  round {index}: {how}")
    return lines


def _layer(case: LayerCase) -> list[str]:
    cell = case.cell
    lines = _exchange(case)
    lines[0] += f", {cell.kernel_type}, intermediate {cell.intermediate}"
    if not cell.whole:
        lines[0] += f", {cell.shards} shards one after another, {cell.shared} shared experts"
    if cell.redundant:
        lines[0] += f", {cell.redundant} replicas of {cell.logical} logical experts"
    if cell.against:
        lines[0] += f", compared with {cell.against}, {cell.other.kernel_type}"
    if cell.router:
        lines[0] += f", ids and weights from {cell.router}, whose logits favour the experts named here"
    for index, a_round in enumerate(case.rounds):
        details = [f"weights {a_round.weighting}"]
        details += [f"{a_round.tail} poisoned rows beyond the valid ones"] if a_round.tail else []
        details += ["row count on the device"] if a_round.counted else []
        details += ["rows quantised before"] if a_round.quantised else []
        details += [f"relation {a_round.relation}"] if a_round.relation else []
        details += [f"physical experts hold {list(a_round.physical)}"] if a_round.physical else []
        lines.append(f"  round {index}: " + ", ".join(details))
    return lines


def _exchange(case: Case) -> list[str]:
    cell = case.cell
    lines = [
        f"case {case.id}: {cell.world_size} ranks on {cell.nodes} node(s), hidden {cell.hidden}, {cell.experts} "
        f"experts, top-{cell.top_k}, capacity {cell.capacity}, {cell.dtype}, {cell.mode}{_manner(cell)}"
    ]
    for index, a_round in enumerate(case.rounds):
        counts = case.token_counts()[index]
        delays = f", delays {list(a_round.delays_ms)} ms" if a_round.delays_ms else ""
        lines.append(
            f"  round {index}: tokens per rank {list(counts)}, values {a_round.values}, seed {a_round.seed}{delays}"
            + (f", rows of {a_round.hidden} elements" if a_round.hidden else "")
        )
        if not isinstance(a_round.routing, Explicit):
            lines.append(f"    recipe {a_round.routing.archetype}")
            continue
        tokens = [(r, t, row) for r, rows in enumerate(a_round.routing.rows) for t, row in enumerate(rows)]
        lines += [f"    rank {r}, token {t} -> experts {list(row)}" for r, t, row in tokens[:_SHOWN_TOKENS]]
        if len(tokens) > _SHOWN_TOKENS:
            lines.append(f"    and {len(tokens) - _SHOWN_TOKENS} more tokens (see case.json)")
    return lines


def _manner(cell: Cell) -> str:
    """How rows travel and calls are made, where that is not plain."""
    parts = [f"dispatched as {cell.wire}"] if cell.wire else []
    if cell.codec:
        parts.append(f"combined as {cell.codec}" + (f" in {cell.scale_dim} blocks" if cell.scale_dim else ""))
    return "".join(f", {part}" for part in (*parts, *cell.modes))


def _rows(case: RowCase) -> list[str]:
    cell = case.cell
    lines = [
        f"case {case.id}: {cell.operator} on {cell.world_size} rank(s), rows of {cell.hidden} {cell.dtype} elements, "
        f"{cell.mode}"
    ]
    for index, call in enumerate(case.calls):
        details = [f"{call.rows} rows"]
        if call.num_rows >= 0:
            details.append(f"num_rows {call.num_rows}")
        if call.scale != 1.0:
            details.append(f"scale {call.scale}")
        if cell.family is Family.ROUTE:
            details.append(f"bias {call.weight}" if call.weight in BIASES else "no bias")
        elif cell.family is not Family.QUANTISE:
            details.append(f"weight {call.weight}, epsilon {call.epsilon}")
        if call.into:
            details.append("into buffers of ours")
        if any(call.delays_ms):
            details.append(f"delays {list(call.delays_ms)} ms")
        lines.append(f"  call {index}: " + ", ".join(details))
        lines += [f"    rows {_pattern(p)}" for p in call.patterns]
        lines += [f"    residual {_pattern(p)}" for p in call.residual]
    return lines


def _pattern(pattern: Pattern) -> str:
    return f"{pattern.kind} x 2**{pattern.exponent}, position {pattern.position}, seed {pattern.seed}"
