"""What the double's operator refuses before it launches anything.

Scope: the exceptions of python/mori/ops/dispatch_combine.py of MoRI 624002c8, and those that replace a trap where its
switch is off. It proves nothing about what the kernels themselves check.
"""

from __future__ import annotations

import torch

from accelerated.standin.mori_ep import graphs
from accelerated.standin.mori_ep.construction import Construction
from accelerated.standin.mori_ep.fatal import die
from accelerated.standin.mori_ep.handles import EpDispatchRoutingHandle


class Refusals(Construction):
    """Checks of the arguments of dispatch and combine."""

    _cur_n: int

    def _refuse_routing(self) -> None:
        if self._rules.name not in ("IntraNode", "InterNodeV1"):
            raise NotImplementedError(
                f"kernel_type={self._rules.name} has no routing handles; only IntraNode and InterNodeV1 have"
            )

    def _handle_tokens(self, handle: EpDispatchRoutingHandle) -> int:
        return self._handles.token_count(handle, self._on("handle-without-tokens"))

    def _check_replay(self, rows: int, index_rows: int, handle: EpDispatchRoutingHandle) -> None:
        tokens = self._handle_tokens(handle)
        for what, found in (("input", rows), ("indices", index_rows)):
            if found != tokens:
                raise ValueError(f"replay: {what} has {found} rows, but the routing handle is for {tokens} tokens")

    def _check_combine_indices(self, indices: torch.Tensor, tokens: int) -> None:
        rows = int(indices.size(0))
        if rows != tokens:
            raise ValueError(
                f"combine indices have {rows} rows, but this rank dispatched {tokens} tokens; "
                "pass the ids given to dispatch, not the ones it returned"
            )

    def _check_hidden(self, hidden: int) -> None:
        if not 0 < hidden <= self.config.hidden_dim:
            message = f"hidden size {hidden} is not in 1..{self.config.hidden_dim} (config.hidden_dim)"
            if not self._on("host-assert-kills"):
                raise ValueError(message)
            die(f"host assertion: {message}")

    def _check_zero_copy(self, external: bool) -> None:
        """Nothing, as upstream; without the trap, refuse zero-copy on kernel types that read the caller's tensor."""
        if not (external or self._rules.registered_input or self._on("zero-copy-flag-ignored")):
            raise ValueError(f"{self._rules.name} has no zero-copy combine; pass use_external_inp_buf=1")

    def _check_pointers(
        self,
        rows: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> None:
        """Nothing, as upstream, which takes addresses; without the traps, refuse what would be misread."""
        if indices.dtype != torch.int32 and not self._on("int64-ids-misread"):
            raise ValueError(f"indices are {indices.dtype}, but are read as torch.int32")
        if not self._on("strided-rows-misread"):
            for name, tensor in (("input", rows), ("indices", indices), ("weights", weights), ("scales", scales)):
                if tensor is not None and not tensor.is_contiguous():
                    raise ValueError(f"{name} is strided {tensor.stride()}, but is read as if contiguous")

    def _check_weight_rows(self, weights: torch.Tensor | None, handle: EpDispatchRoutingHandle | None) -> None:
        """Nothing, as upstream; without the trap, refuse weights that do not reach the last received row."""
        if weights is None or self._on("source-layout-weights") or self._rules.asynchronous or graphs.is_capturing():
            return
        total = self._buffers.total if handle is None else handle.total_recv_token_num
        received, rows = min(int(total), self._buffers.capacity), int(weights.size(0))
        if 0 < rows < received:
            raise ValueError(
                f"weights have {rows} rows for {received} received ones; pass those that dispatch returned"
            )
