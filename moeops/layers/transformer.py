"""The MLP of a transformer block with experts. T tokens, D model width, H hidden width of one expert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops.comm.agreement import agreement
from moeops.comm.hierarchical import Hierarchy
from moeops.dispatch.base import Block, DispatchOptions, RegionBlock
from moeops.dispatch.options import DISPATCHES
from moeops.dispatch.region import Region
from moeops.dispatch.weights import (
    ExpertWeights,
    check_fused,
    fused_weights,
)
from moeops.gates.naive import NaiveGate
from moeops.layers._jagged import jagged_like, jagged_values
from moeops.layers._moved_options import refuse_moved_options
from moeops.layers.experts import Activation, FusedExperts, Uncast, casts_arguments
from moeops.layers.moe import FMoE, GateHook
from moeops.layers.shared import SharedMLP
from moeops.ops.activations import is_gated
from moeops.types import TokenPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class FMoETransformerMLP(FMoE):
    """Replace a transformer's MLP by experts: gate, plan, and all expert MLPs as one op.

    FastMoE's layer of the same name. As there, and despite that name, it adds no residual and no norm. Departures:
    all experts' weights are fused in one tensor per projection, they start like an ``nn.Linear`` each unless ``init``
    says otherwise, and nothing is copied to the host on one rank.

    Args:
        num_expert: experts on each rank, ``E / world_size``, times ``P`` where those of a rank are shards.
        d_model: ``D``.
        d_hidden: ``H``, of a whole expert.
        activation: a name ("swiglu", "geglu_tanh", "gelu", "relu", "silu", "relu_squared"), a ``moeops.Glu``, a module
            or a function. nn.GELU(), nn.ReLU and nn.SiLU run in the fused op; any other callable runs on rows between
            two grouped products.
        expert_dp_comm: tag of the experts' parameters, see ``mark_parallel_comm``.
        expert_rank: kept as an attribute, without a meaning here.
        bias: give the experts' projections a bias.
        init: how experts start, "linear" or "fastmoe"; see ``FusedExperts``.
        expert_tensor_parallel_size: ``P``, a divisor of ``world_size`` and of ``d_hidden``: each expert is divided
            among that many neighbouring ranks, ``H / P`` hidden units each. Rank ``w * P + p`` holds shard ``p`` of
            the experts ``w * num_expert`` to ``(w + 1) * num_expert``. A token's row goes to all ``P`` of them.
        shared_expert: as for ``FMoE``, or a hidden width, for a ``SharedMLP`` with the experts' activation and bias.
            Every rank holds all of it, with ``expert_tensor_parallel_size`` too.
        world_size, mp_group, slice_group, moe_group, top_k, gate, gate_hook, mask, mask_dict, gate_bias, device_mesh,
            dispatch, slice_gradients, parallel_degrees, shared_expert_gate, dtype, device: as for ``FMoE``.

    Attributes:
        experts: a ``FusedExperts``: ``experts.w_up``, ``experts.w_down``, ``experts.b_up``, ``experts.b_down``.

    Raises:
        ValueError: a size or an option does not fit.  TypeError: an argument has the wrong type.
        RuntimeError: building the layer failed on another rank.

    Example:
        >>> layer = FMoETransformerMLP(4, 8, 16, activation="swiglu", top_k=2)
        >>> layer(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    experts: FusedExperts

    @refuse_moved_options
    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: Activation = "gelu",
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        *,
        world_size: int = 1,
        mp_group: Any = None,
        slice_group: Any = None,
        moe_group: Any = None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] | nn.Module = NaiveGate,
        gate_hook: GateHook | None = None,
        mask: Tensor | None = None,
        mask_dict: dict[int, Any] | None = None,
        gate_bias: bool | None = None,
        bias: bool = True,
        device_mesh: DeviceMesh | None = None,
        dispatch: str | DispatchOptions = "auto",
        expert_tensor_parallel_size: int = 1,
        slice_gradients: str = "mean",
        parallel_degrees: Sequence[int | Hierarchy] = (),
        shared_expert: Any = None,
        shared_expert_gate: str | None = None,
        init: str = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(dispatch, str) and dispatch in DISPATCHES:
            dispatch = DISPATCHES[dispatch]()
        if isinstance(dispatch, DispatchOptions):
            num_projections = 3 if is_gated(activation) else 2
            dtype_of_experts = dtype or torch.get_default_dtype()
            dispatch = dispatch.for_mlps(d_model, d_hidden, num_projections, dtype_of_experts)
        if isinstance(shared_expert, int):
            shared_expert = functools.partial(
                SharedMLP,
                d_hidden=shared_expert,
                activation=activation,
                bias=bias,
                dtype=dtype,
                device=device,
            )
        super().__init__(
            num_expert,
            d_model,
            world_size,
            mp_group,
            slice_group,
            moe_group,
            top_k,
            gate,
            gate_hook=gate_hook,
            mask=mask,
            mask_dict=mask_dict,
            gate_bias=gate_bias,
            device_mesh=device_mesh,
            dispatch=dispatch,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
            slice_gradients=slice_gradients,
            parallel_degrees=parallel_degrees,
            shared_expert=shared_expert,
            shared_expert_gate=shared_expert_gate,
            dtype=dtype,
            device=device,
        )
        op = "FMoETransformerMLP"
        num_shards = self.expert_tensor_parallel_size
        settings: dict[str, Any] = {}
        with agreement(op, self.moe_ranks, settings, device):
            _checks.check_int(op, "d_hidden", d_hidden, 1, "Sizes are at least 1.")
            self.d_hidden = d_hidden
            self.expert_rank = expert_rank
            self.experts = FusedExperts(
                num_expert,
                d_model,
                d_hidden,
                activation,
                bias,
                num_shards=num_shards,
                init=init,
                shard=0 if self.moe_ranks is None else self.moe_ranks.rank % num_shards,
                dtype=dtype,
                device=device,
            )
            for option in self._sharing_options():
                check_fused(op, option, self.experts)
            settings.update(
                d_hidden=d_hidden, activation=str(self.experts.fused_activation), bias=bias
            )
        self.mark_parallel_comm(expert_dp_comm)

    def _expert_weights(self) -> ExpertWeights:
        return fused_weights(self.experts)

    def _block(self) -> Block:
        if self.experts.fused_activation is None:
            return self._run_block
        return RegionBlock(self._run_block)

    def _run_block(
        self, x: Tensor, topk_weights: Tensor | None, plan: TokenPlan | Region
    ) -> Tensor:
        weights: Tensor | Uncast | None = topk_weights
        if topk_weights is not None and casts_arguments(self.experts):
            weights = Uncast(topk_weights)
        return self.experts(x, weights, plan)

    def _run_experts(
        self, rows: Tensor, expert_offsets: Tensor, rows_per_expert: list[int] | None
    ) -> Tensor:
        return self.experts(rows, expert_offsets=expert_offsets)

    def forward(
        self, inp: Tensor, mask: Tensor | None = None, *, parallel: int | None = None
    ) -> Tensor:
        """Run tokens through the gate and their experts.

        Args:
            inp: tokens, ``[..., D]``, any float type and any number of tokens, 0 included. Or sequences of different
                lengths, a nested tensor ``[B, j, D]`` of layout ``torch.jagged``, whose tokens are those of all
                sequences together.
            mask: tokens to leave out, ``inp.shape[:-1]`` or flat, nested too if ``inp`` is; overrides that of the
                constructor. See ``FMoE.forward``.
            parallel: as for ``FMoE.forward``.

        Returns:
            The shape of ``inp`` (and its offsets, if it is nested), and its dtype (under autocast the autocast type).

        Raises:
            ValueError: a shape does not fit.  TypeError: ``inp`` is not float.
            NotImplementedError: ``inp`` is nested in another way.
        Host sync: none with one rank, for "gather" and "static" none while the number of tokens stays, else one copy.
        """
        op = "FMoETransformerMLP"
        if not isinstance(inp, Tensor):
            raise TypeError(
                f"{op}: inp must be a tensor, got {type(inp).__name__}. Use FMoE for nested inputs."
            )
        if inp.is_nested:
            values = jagged_values(op, "inp", inp)
            if mask is not None and mask.is_nested:
                mask = jagged_values(op, "mask", mask)
            return jagged_like(self.forward(values, mask, parallel=parallel), inp)
        if inp.dim() == 0 or inp.shape[-1] != self.d_model:
            raise ValueError(
                f"{op}: inp must have size d_model = {self.d_model} in its last dimension, got "
                f"{_checks.describe(inp)}. Check d_model."
            )
        if not torch.compiler.is_compiling():
            _checks.check_float(op, "inp", inp)
        x = inp if inp.dim() == 2 else inp.reshape(-1, self.d_model)  # [T, D]
        return super().forward(x, mask, parallel=parallel).reshape(inp.shape)

    def extra_repr(self) -> str:
        """Sizes of the layer."""
        return f"{super().extra_repr()}, d_hidden={self.d_hidden}"
