"""Round-robin gate for debugging and benchmarks. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops._masks import drop_masked
from moeops.gates.base import BaseGate, check_top_k
from moeops.types import Routing, SlotRouting


class ForcedBalanceGate(BaseGate):
    """Send pair ``t * K + k`` to expert ``(t * K + k) % E``, whatever the token says: perfect balance, no drops.

    For benchmarks that shall not depend on how well a router balances, and to see whether imbalance is what is wrong
    with a run. The weights are ``1 / K``, without a router; with ``gate`` they are those that another gate gave to
    its own choices, so that the router, its cost and its gradients stay: slot ``k`` of a token keeps its weight and
    gets another expert. A slot that the gate left empty weighs 0. Losses and statistics are the inner gate's.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``; with ``gate`` what that gate returns counts.
        gate: ready gate, or class or function that is called like this one's constructor; ``None`` for no router.

    Attributes:
        gate: the inner gate, or ``None``.

    Raises:
        ValueError: a number does not fit.  TypeError: an argument has the wrong type; in ``forward``, if the inner
        gate mixes tokens and chooses no experts.

    Example:
        >>> topk_ids, topk_weights = ForcedBalanceGate(8, 4, top_k=2)(torch.randn(3, 8))
        >>> topk_ids.tolist(), topk_weights[0].tolist()
        ([[0, 1], [2, 3], [0, 1]], [0.5, 0.5])
    """

    gate: nn.Module | None
    has_logits = False

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        gate: nn.Module | Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(num_expert, world_size)
        name = type(self).__name__
        _checks.check_int(name, "d_model", d_model, 1, "Pass the width of x.")
        check_top_k(name, top_k, self.tot_expert)
        built = gate
        if gate is not None and not isinstance(gate, nn.Module):
            built = gate(d_model, num_expert, world_size, top_k) if callable(gate) else gate
        if built is not None and not isinstance(built, nn.Module):
            raise TypeError(
                f"{name}: gate must be a gate, a function that builds one, or None, got "
                f"{_checks.describe(built)}. Leave it out for no router."
            )
        self.d_model = d_model
        self.top_k = top_k if built is None else getattr(built, "top_k", top_k)
        self.gate = built

    def forward(self, inp: Tensor, mask: Tensor | None = None) -> Any:
        """Deal out experts: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``, or a ``Routing``."""
        if self.gate is None:
            dtype = _checks.accumulate_dtype(inp.dtype)
            shape = (inp.shape[0], self.top_k)
            weights = torch.full(shape, 1 / self.top_k, dtype=dtype, device=inp.device)
            return self._deal(weights, mask), weights
        takes_mask = mask is not None and getattr(self.gate, "takes_mask", False)
        routing = self.gate(inp, mask=mask) if takes_mask else self.gate(inp)
        if isinstance(routing, SlotRouting):
            raise TypeError(
                f"{type(self).__name__}: gate must choose experts, got {type(self.gate).__name__}, which mixes tokens. "
                "Its experts are balanced as they are."
            )
        ids, weights = routing[0], routing[1]
        empty = ids < 0 if mask is None else (ids < 0) & (mask == 0)[:, None]
        weights = weights.masked_fill(empty, 0)
        scale_inputs = isinstance(routing, Routing) and routing.scale_inputs
        return Routing(self._deal(weights, mask), weights, scale_inputs=scale_inputs)

    def _deal(self, weights: Tensor, mask: Tensor | None) -> Tensor:
        """Experts in turn, one per slot ``[T, K]``; masked tokens are passed over."""
        num_tokens, top_k = weights.shape
        if mask is None:
            slots = torch.arange(num_tokens * top_k, device=weights.device)
            return (slots % self.tot_expert).view(num_tokens, top_k)
        number = (mask == 0).to(torch.int64).cumsum(0)[:, None] - 1  # [T, 1]
        slots = number * top_k + torch.arange(top_k, device=weights.device)
        return drop_masked(slots % self.tot_expert, mask)

    def extra_repr(self) -> str:
        """Sizes of the gate."""
        return f"num_expert={self.num_expert}, world_size={self.world_size}, top_k={self.top_k}"
