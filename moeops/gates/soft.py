"""Gate that mixes tokens instead of choosing. T tokens, E experts, S slots per expert, D model width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import _checks
from moeops._masks import hide_masked
from moeops._token_groups import join_token_groups, split_token_groups
from moeops.gates._variable_k import check_finite
from moeops.gates.base import BaseGate
from moeops.types import SlotRouting

_EPS = 1e-6


class SoftMoEGate(BaseGate):
    """Give every expert ``S`` weighted means of all tokens, and every token a weighted mean of all outputs: SoftMoE.

    ``z = scale * normalise(x) @ normalise(phi)``, ``[T, E * S]``: each token and each slot's column of ``phi`` is
    divided by its l2 norm (plus 1e-6). Slot ``s`` is fed ``sum_t d_ts * x_t`` with ``d`` the softmax of ``z`` over the
    tokens; token ``t`` gets ``sum_s c_ts * output_s`` with ``c`` the softmax over the slots. Everything is
    differentiable, nothing is dropped, the load is equal by construction, and there is no loss.

    **Not causal**, and tokens see each other: every output depends on every token of its sequence. The paper mixes
    within one image or sequence. A layer hands over the tokens of all sequences in one row: pass
    ``sequence_length``, or the sequences of a batch are mixed with each other. It takes that many tokens in a row for
    a sequence, the last one may be shorter. The experts work on ``E * S`` rows per sequence; the cost of mixing grows
    with ``T * E * S * D``.

    A layer's mask takes tokens out of the mix: the others are weighted as if they were alone.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: layers pass one to every gate; not used, every token gets all experts.
        num_slots: ``S``; the paper recommends as many experts as it takes for ``S = 1``.
        sequence_length: tokens per sequence; ``None`` for one sequence of all tokens.

    Attributes:
        phi: ``[D, E * S]``, starts with normal numbers of variance ``1 / D``.
        scale: scalar, starts with 1.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Puigcerver et al. 2023, arXiv:2308.00951, sections 2.1 and 2.3.

    Example:
        >>> dispatch, combine, _ = SoftMoEGate(8, 4, num_slots=2)(torch.randn(5, 8))
        >>> dispatch.sum(0).allclose(torch.ones(8)), combine.sum(1).allclose(torch.ones(5))
        (True, True)
    """

    has_logits = False

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 1,
        *,
        num_slots: int = 1,
        sequence_length: int | None = None,
    ) -> None:
        super().__init__(num_expert, world_size)
        name = type(self).__name__
        _checks.check_int(name, "d_model", d_model, 1, "Pass the width of x.")
        _checks.check_int(name, "top_k", top_k, 1, "It is not used; 1 will do.")
        _checks.check_int(name, "num_slots", num_slots, 1, "Pass the slots per expert.")
        if sequence_length is not None:
            _checks.check_int(
                name, "sequence_length", sequence_length, 1, "Use None for one sequence."
            )
        self.d_model = d_model
        self.top_k = self.tot_expert
        self.num_slots = num_slots
        self.sequence_length = sequence_length
        self.phi = nn.Parameter(torch.empty(d_model, self.tot_expert * num_slots))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new ``phi`` and set ``scale`` to 1."""
        nn.init.normal_(self.phi, std=self.d_model**-0.5)
        nn.init.ones_(self.scale)

    def forward(self, inp: Tensor, mask: Tensor | None = None) -> SlotRouting:
        """Weigh tokens and slots: ``inp [T, D]`` to a SlotRouting of two ``[T, E * S]``."""
        logits = self._logits(inp)
        check_finite(type(self).__name__, logits)
        length = self.sequence_length
        combine = torch.softmax(logits, dim=1)
        if mask is not None:
            # Finite: a sequence of masked tokens alone has no largest logit; its weights are taken away below.
            logits = logits.masked_fill((mask != 0)[:, None], torch.finfo(logits.dtype).min)
        if length is None:
            # A row of its own keeps the softmax from being over no tokens, which Inductor of torch 2.11 refuses.
            logits = F.pad(logits, (0, 0, 0, 1), value=-math.inf)
        # What fills up the last sequence takes no part.
        sequences = split_token_groups(logits, length, fill=-math.inf)
        dispatch = join_token_groups(torch.softmax(sequences, dim=1), length, inp.shape[0])
        return SlotRouting(hide_masked(dispatch[: inp.shape[0]], mask), combine, length)

    def _logits(self, inp: Tensor) -> Tensor:
        """``scale * normalise(x) @ normalise(phi)`` in float32 (float64 for float64), whatever autocast says."""
        dtype = _checks.accumulate_dtype(inp.dtype)
        x, phi, scale = inp.to(dtype), self.phi.to(dtype), self.scale.to(dtype)
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPS)
        phi = scale * (phi / (torch.linalg.vector_norm(phi, dim=0, keepdim=True) + _EPS))
        device = inp.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return x @ phi
        return x @ phi

    def extra_repr(self) -> str:
        """Sizes of the gate."""
        return (
            f"num_expert={self.num_expert}, world_size={self.world_size}, num_slots={self.num_slots}, "
            f"sequence_length={self.sequence_length}"
        )
