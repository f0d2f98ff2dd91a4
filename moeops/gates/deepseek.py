"""DeepSeek-V3's gate. T tokens, K experts per token, E experts, D model width, S tokens per sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked
from moeops._tracing import exporting
from moeops.comm.collectives import all_reduce_sum
from moeops.gates.functional import check_scale, router_logits
from moeops.gates.naive import NaiveGate
from moeops.gates.recording import add_up
from moeops.losses import score_shares, sequence_loss
from moeops.ops.routing import chosen_weights, topk_route
from moeops.ops.sorting import count_tokens


class DeepSeekV3Gate(NaiveGate):
    """Balance the experts with a bias on the choice instead of a loss, as in DeepSeek-V3.

    ``s = sigmoid(W x)``. The experts stand in ``num_groups`` equal groups; a token may use the ``top_groups`` groups
    whose two best ``s + bias`` have the largest sum, and in them the ``top_k`` experts with the largest ``s + bias``.
    The weights do not see the bias: ``scale * s / sum of the chosen s``. DeepSeek-V3 itself: ``top_k=8,
    num_groups=8, top_groups=4, scale=2.5``, on 256 experts.

    **The bias** is the buffer ``selection_bias``, which no gradient reaches. Training forwards count the tokens of
    each expert in the buffer ``loads``, on the device and without a graph break; recomputations by activation
    checkpointing and exported programs do not count. Call ``update_bias`` once per optimizer step, after the
    backward. Both buffers are saved in ``state_dict``. They keep their types, float32 and int64, when the module is
    cast: a step of 0.001 is lost in bfloat16.

    **Several ranks** with replicas of this gate must agree on the bias: ``gate.update_bias(0.001, group)`` with the
    ranks that hold this gate sums their loads first, and the same sums give the same bias everywhere. DDP does not sum
    buffers, but overwrites them with rank 0's, which would lose the other ranks' counts: pass
    ``broadcast_buffers=False``.

    **The loss**, with ``sequence_length``, is the sequence-wise balance loss without its factor: the mean over the
    sequences of ``sum_e f_e * P_e``; ``f_e = E / (K * S) *`` the number of the sequence's tokens that have ``e``
    among the ``top_k`` best ``s``, without bias and groups, and ``P_e`` the mean of ``s_e / sum_j s_j``. 1 at perfect
    balance; the paper's factor is 0.0001. It takes ``S`` tokens in a row as a sequence; a last one with fewer than
    ``S`` is averaged over those it has.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        num_groups: number of equal expert groups, a divisor of ``E``.
        top_groups: groups a token may use.
        scale: factor on the weights, above 0.
        sequence_length: ``S``; ``None`` for no loss.
        bias_speed: step of the bias in ``after_step``, at least 0.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.
        selection_bias: ``[E]`` float32, starts with 0.
        loads: ``[E]`` int64, tokens of each expert since the last ``update_bias``.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; the bias: arXiv:2408.15664.

    Example:
        >>> gate = DeepSeekV3Gate(8, 16, top_k=4, num_groups=4, top_groups=2, scale=2.5)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_weights.sum(-1).allclose(torch.full((5,), 2.5)), int(gate.loads.sum())
        (True, 20)
        >>> gate.update_bias(0.001)
        >>> int(gate.loads.sum())
        0
    """

    selection_bias: Tensor
    loads: Tensor
    float32_buffers = ("selection_bias",)

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        sequence_length: int | None = None,
        bias_speed: float = 0.001,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        name = type(self).__name__
        self._check_groups(name, num_groups, top_groups)
        check_scale(name, scale)
        if sequence_length is not None:
            _checks.check_int(
                name, "sequence_length", sequence_length, 1, "Use None for no sequence-wise loss."
            )
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.scale = float(scale)
        _check_speed(name, "bias_speed", bias_speed)
        self.sequence_length = sequence_length
        self.bias_speed = float(bias_speed)
        self.register_buffer("selection_bias", torch.empty(self.tot_expert, dtype=torch.float32))
        self.register_buffer("loads", torch.empty(self.tot_expert, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set bias and loads to 0; the router resets itself."""
        self.selection_bias.zero_()
        self.loads.zero_()

    def _check_groups(self, name: str, num_groups: int, top_groups: int) -> None:
        _checks.check_int(name, "num_groups", num_groups, 1, "Use 1 for no groups.")
        _checks.check_int(name, "top_groups", top_groups, 1, "Use 1 for no groups.")
        if self.tot_expert % num_groups != 0:
            raise ValueError(
                f"{name}: num_groups must divide the {self.tot_expert} experts, got {num_groups}. Choose a divisor."
            )
        if top_groups > num_groups:
            raise ValueError(
                f"{name}: top_groups must be at most num_groups = {num_groups}, got {top_groups}. Lower it."
            )
        reachable = self.tot_expert // num_groups * top_groups
        if self.top_k > reachable:
            raise ValueError(
                f"{name}: top_k must be at most the {reachable} experts of the groups, got {self.top_k}. "
                "Lower top_k or raise top_groups."
            )

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        logits = router_logits(inp, self.gate)  # [T, E]
        topk_weights, topk_ids = topk_route(
            logits,
            self.top_k,
            score="sigmoid",
            scale=self.scale,
            bias=self.selection_bias,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
        )
        topk_ids = drop_masked(topk_ids, mask)
        if self.training:
            add_up(self.loads, count_tokens(topk_ids, self.tot_expert))
        # Not skipped in recomputations, which must save the same tensors as the forward.
        if not exporting():
            self.set_loss(self._sequence_loss(logits, mask), logits, topk_ids, mask)
        return topk_ids, topk_weights

    def weights_at(self, inp: Tensor, topk_ids: Tensor) -> Tensor:
        """Weights ``[T, K]`` that the router gives to experts chosen elsewhere, see ``moeops.RoutingReplay``."""
        logits = router_logits(inp, self.gate)
        return chosen_weights(logits, topk_ids, score="sigmoid", scale=self.scale)

    def _sequence_loss(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        """The sequence-wise balance loss, its choices made without bias and groups."""
        if self.sequence_length is None:
            return None
        _, topk_ids = topk_route(logits.detach(), self.top_k, score="sigmoid")
        probs = score_shares(logits, "sigmoid")
        return sequence_loss(probs, topk_ids, self.sequence_length, mask=mask)

    @torch.no_grad()
    def update_bias(self, speed: float, group: Any = None) -> None:
        """Raise the bias of experts with less than the mean load by ``speed``, lower that of the others; clear loads.

        ``selection_bias += speed * sign(mean(loads) - loads)``: in place, without a host copy, one graph under
        ``torch.compile``. Without loads nothing moves.

        Args:
            speed: step of the bias, at least 0; the paper's is 0.001, and 0 at the end of training.
            group: sum the loads over these ranks first, a process group or ``moeops.distributed.RankGroup``; all of
                them must call this. ``None`` for the gate's own ``group``, and without one for this rank alone.

        Raises:
            ValueError: ``speed`` is negative or not finite, or no group is known with ``world_size > 1``.
        """
        if not torch.compiler.is_compiling():
            _check_speed(f"{type(self).__name__}.update_bias", "speed", speed)
        if group is None:
            group = self.group
        loads = self.loads
        if group is not None:
            loads = all_reduce_sum(loads, group)
        elif self.world_size > 1:
            raise ValueError(
                f"{type(self).__name__}.update_bias: group must be set with world_size = {self.world_size}, got None. "
                "Pass the ranks that hold this gate."
            )
        # In integers, so that a load equal to the mean is seen as such.
        above = loads * self.tot_expert - loads.sum()
        self.selection_bias.sub_(speed * torch.sign(above).to(self.selection_bias.dtype))
        self.loads.zero_()

    def after_step(self, progress: float) -> None:
        """Move the bias by ``bias_speed``; see ``update_bias``."""
        self.update_bias(self.bias_speed)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, num_groups={self.num_groups}, top_groups={self.top_groups}, "
            f"scale={self.scale}, sequence_length={self.sequence_length}"
        )


def _check_speed(op: str, name: str, speed: float) -> None:
    if not 0 <= speed < math.inf:
        raise ValueError(f"{op}: {name} must be at least 0 and finite, got {speed}. Use 0.001.")
