"""What a probe works with on a rank: the library as its loader gives it, operators, inputs that show mistakes.

Scope: the public calls of MoRI 624002c8 (python/mori/ops), whether the library's own or its double's. Rows hold
16 * rank + token + 1 in every element, so their sums are exact in bfloat16 and tell where a row came from.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accelerated.mori_ep.library import MoriLibrary, load_mori, load_standin
from conformance.hazards.protocol import Seen
from conformance.rank.main import Note, RankSetup
from conformance.rank.session import RankSession

#: Ids of four tokens on four ranks with two experts each: ranks {0, 1}, {2}, {3, 0} and {1}.
IDS = ((0, 2), (5, 4), (7, 1), (3, 3))
#: How many ranks each of them goes to: what a round of identity experts multiplies it by.
FACTOR = (2.0, 1.0, 2.0, 1.0)


#: Words of a device or a compiler that failed: no refusal, whatever the exception is.
_FAILED = re.compile(r"(?i)\bhip|\bcuda|\bjit\b|compil|out of memory|\bfault|failed to load")


class RefusedError(Exception):
    """The library refused the call that is the misuse: what the probe looks for is absent. The message is its own."""


class ProbeSession(RankSession):
    """The suite's own session of a rank, with the library beside it."""

    _bench: Bench | None = None

    def bench(self, kernel_types: Sequence[str], rounds: int, sequence: int) -> Bench:
        """What one probe works with. Collective after the first time."""
        self._release()
        library = load_standin() if self._backend.standin else load_mori()
        device, kinds = self._context.device, tuple(kernel_types)
        self._bench = Bench(library, self._setup, device, self._phase, kinds, rounds, sequence)
        return self._bench

    def close(self) -> None:
        """The last probe's operators, then what every session has. Collective."""
        self._release()
        super().close()

    def _release(self) -> None:
        """Drop the operators of the probe before, on every rank at the same point: peers may still be reading."""
        if self._bench is not None:
            self._phase("drop operators", 0)
            self._bench.meet()
            self._bench.built.clear()
        self._bench = None


class Bench:
    """A probe's rank.

    Attributes:
        rank, world: place in the pool.
        kinds: kernel types to look at; kind: the first of them.
        rounds: how often to look; sequence: number of the question among those that the pool is asked.
        directory: the pool's own, shared by its ranks.
        built: operators, which live until every rank has answered.
    """

    def __init__(
        self,
        library: MoriLibrary,
        setup: RankSetup,
        device: torch.device,
        note: Note,
        kinds: tuple[str, ...],
        rounds: int,
        sequence: int,
    ) -> None:
        self.library, self.device = library, device
        self.rank, self.world = setup.rank, setup.world_size
        self.kinds, self.kind, self.rounds, self.sequence = kinds, kinds[0], rounds, sequence
        self.directory = Path(setup.directory)
        self._note = note
        self.round = 0
        self.built: list[Any] = []

    # ---- phases ---------------------------------------------------------------------------------------------------

    def note(self, phase: str) -> None:
        """Say what the rank is doing, for whoever finds it dead or silent."""
        self._note(phase, self.round)

    def each_round(self) -> Iterator[int]:
        """The rounds of a race, each told in the phases of its calls."""
        for index in range(self.rounds):
            self.round = index
            yield index

    def delays(self) -> random.Random:
        """Draws of this rank's own for one question, the same whenever the same command is given."""
        return random.Random(self.sequence * self.world + self.rank)

    def wait(self) -> None:
        """Wait for the device: what its kernels did belongs to the phase that launched them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def meet(self) -> None:
        """Wait for every rank, by our own collective."""
        self.wait()
        dist.all_reduce(torch.zeros(1))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of ``values`` (on the CPU) over all ranks."""
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    # ---- operators ------------------------------------------------------------------------------------------------

    @property
    def module(self) -> Any:
        """The module that defines the operator and the enumerations beside it."""
        return sys.modules[self.library.ops.EpDispatchCombineOp.__module__]

    def build(self, kind: str = "", phase: str = "build", **changes: object) -> Any:
        """Build an operator: hidden 8, two experts a rank, top-2, capacity 4, bfloat16, one node, with ``changes``."""
        ops = self.library.ops
        sizes: dict[str, object] = {
            "data_type": torch.bfloat16,
            "rank": self.rank,
            "world_size": self.world,
            "hidden_dim": 8,
            "scale_dim": 0,
            "scale_type_size": 0,
            "max_token_type_size": 4,
            "max_num_inp_token_per_rank": 4,
            "num_experts_per_rank": 2,
            "num_experts_per_token": 2,
            "kernel_type": getattr(ops.EpDispatchCombineKernelType, kind or self.kind),
            "gpu_per_node": self.world,
            **changes,
        }
        self.note(phase)
        made = ops.EpDispatchCombineOp(ops.EpDispatchCombineConfig(**sizes))
        self.built.append(made)
        self.wait()
        return made

    def asynchronous(self, op: Any) -> bool:
        """Whether calls of an operator only queue."""
        return bool(op.config.kernel_type == self.library.ops.EpDispatchCombineKernelType.AsyncLL)

    def dispatch(self, op: Any, *arguments: Any, **options: Any) -> Any:
        """Dispatch, with its receive where it has one."""
        self.note("dispatch")
        found = op.dispatch(*arguments, **options)
        if self.asynchronous(op):
            op.dispatch_recv()
        self.wait()
        return found

    def combine(
        self, op: Any, *arguments: Any, phase: str = "combine", recv: tuple[int, int] = (-1, -1), **options: Any
    ) -> Any:
        """Combine, with its receive, of ``recv`` blocks and warps, where it has one."""
        self.note(phase)
        found = op.combine(*arguments, **options)
        if self.asynchronous(op):
            op.combine_recv(*recv)
        self.wait()
        self.note("look")
        return found

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def rows(self, tokens: int, hidden: int = 8) -> torch.Tensor:
        """``[tokens, hidden]`` bfloat16, 16 * rank + token + 1 everywhere."""
        value = torch.arange(tokens) + 16 * self.rank + 1
        return value.unsqueeze(1).expand(-1, hidden).bfloat16().contiguous().to(self.device)

    def ids(self, *wanted: Sequence[int]) -> torch.Tensor:
        """Index rows, int32; those of :data:`IDS` without arguments."""
        return torch.tensor(wanted or IDS, dtype=torch.int32, device=self.device).view(-1, len((wanted or IDS)[0]))

    def factor(self) -> torch.Tensor:
        """``[4, 1]``, of :data:`FACTOR`."""
        return torch.tensor(FACTOR, device=self.device).unsqueeze(1)

    def weights(self, tokens: int, k: int = 2) -> torch.Tensor:
        """``[tokens, k]`` float32, distinct over ranks, tokens and slots."""
        made = (torch.arange(tokens * k, dtype=torch.float32).view(tokens, k) + 100 * self.rank) / 64
        return made.to(self.device)

    # ---- observations ---------------------------------------------------------------------------------------------

    def wrong_tokens(
        self, op: Any, ids: torch.Tensor, factor: torch.Tensor | float, *, misuse: bool = False
    ) -> list[int]:
        """Tokens that one round of identity experts brings back as anything but ``factor * x``.

        Raises:
            RefusedError: the library refuses to dispatch these ids with this operator, where that is the ``misuse``.
        """
        n, k = ids.shape
        x = self.rows(n)
        given = (op, x, self.weights(n, k), None, ids)
        out, out_weights, *_ = self.misuse(self.dispatch, *given) if misuse else self.dispatch(*given)
        combined, _ = self.combine(op, out, out_weights, ids)
        return unlike(combined[:n], x.float() * factor)

    def misuse(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the call returns in which the library may refuse the misuse: by an exception of whatever type.

        Raises:
            RefusedError: it did.
        """
        try:
            return call(*arguments, **options)
        except (ImportError, OSError, MemoryError):
            raise
        except Exception as error:
            if _FAILED.search(str(error)):
                raise
            raise RefusedError(f"{type(error).__name__}: {error}") from error

    def attempt(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
        """What a call that is a misuse returns, or why the library refused it."""
        try:
            return self.misuse(call, *arguments, **options), ""
        except RefusedError as error:
            return None, str(error)

    def each_kind(self, look: Callable[[str], tuple[bool, str]]) -> Seen:
        """What ``look`` sees of every kernel type; where the library refuses the misuse there is nothing to see."""
        found = []
        for kind in self.kinds:
            try:
                found.append(look(kind))
            except RefusedError as error:
                found.append((False, f"{kind}: refused: {error}"))
        return seen_of(found)


def unlike(got: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """Rows that are not bit for bit as float32 what is wanted."""
    same = (got.float() == wanted.float()).all(1)
    return [int(row) for row in (~same).nonzero().flatten()]


def told(kind: str, wrong: Sequence[int], count: int) -> str:
    """Tokens in words."""
    where = f"tokens {', '.join(map(str, wrong[:8]))}{' ...' if len(wrong) > 8 else ''}" if wrong else "none"
    return f"{kind}: {len(wrong)} of {count} tokens wrong ({where})" if wrong else f"{kind}: all {count} tokens right"


def seen(present: bool, text: str) -> Seen:
    """An observation of one round."""
    return Seen(int(present), text)


def seen_of(parts: Sequence[tuple[bool, str]]) -> Seen:
    """An observation of several kernel types; the first in which the hazard shows comes first."""
    ordered = sorted(parts, key=lambda part: not part[0])
    return Seen(int(any(present for present, _ in parts)), "; ".join(text for _, text in ordered))
