"""The experts of Megatron-Core's MoE layer. R rows, E_local experts here, D width, H hidden width (of a shard)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from moeops.integrations.megatron import parameters
from moeops.ops import grouped_linear, moe_mlp
from moeops.types import Glu, TokenPlan

# Activations with a fused block, by function.
PLAIN = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", squared_relu: "relu_squared"}
GATED = {
    F.silu: Glu(),
    quick_gelu: Glu(alpha=1.702),
    fast_gelu: Glu("gelu_tanh"),
}


def fused_activation(config: Any) -> str | Glu | None:
    """The activation of a ``TransformerConfig`` in moeops, ``None`` if it has no fused block."""
    if not config.gated_linear_unit:
        return PLAIN.get(config.activation_func)
    unit = GATED.get(config.activation_func)
    if unit is None:
        return None
    return unit._replace(
        limit=config.activation_func_clamp_value, offset=float(config.glu_linear_offset)
    )


def check_config(op: str, config: Any) -> None:
    """Refuse what changes numbers or memory in Megatron's experts and is not in moeops'.

    Raises:
        NotImplementedError: an option is set that has no counterpart.
    """
    recomputes = (
        config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
    )
    offloaded = [part for part in config.offload_modules or () if part in ("expert_fc1", "moe_act")]
    refused = {
        "fp8": (config.fp8, "Leave fp8 out"),
        "fp4": (config.fp4, "Leave fp4 out"),
        "use_te_activation_func": (config.use_te_activation_func, "Set it to False"),
        "activation_func_fp8_input_store": (
            config.activation_func_fp8_input_store,
            "Set it to False: the fused block keeps the pre-activation only",
        ),
        "offload_modules": (offloaded, "Leave these out"),
        "recompute_modules": (
            ["moe_act"] if recomputes and fused_activation(config) is None else None,
            "Recompute the whole layer: only fused activations are always recomputed",
        ),
    }
    for name, (value, advice) in refused.items():
        if value:
            raise NotImplementedError(
                f"{op}: {name} must not be set for moeops' experts, got {value!r}. {advice}, or "
                "keep Megatron's experts."
            )


class MoeopsExperts(MegatronModule):
    """Experts for Megatron-Core's ``MoELayer``, in the place of ``SequentialMLP``, ``GroupedMLP`` or ``TEGroupedMLP``.

    .. code-block:: python

        MoESubmodules(experts=ModuleSpec(module=MoeopsExperts))

    All experts run as one op: SwiGLU and gated quick or fast GELU, with clamps and an offset, GELU, ReLU, squared ReLU
    and SiLU as ``moeops.moe_mlp``, which keeps rows and pre-activations for the backward, any other activation between
    two ``moeops.grouped_linear``. Nothing is copied to the host here; Megatron's dispatchers do. Biases and
    ``moe_apply_probs_on_input`` work, and so do shards of experts (``expert_tensor_parallel_size``). Weights start as
    those of ``SequentialMLP``. Checkpoints of ``megatron.core.dist_checkpointing`` are the same as its, for any number
    of ranks; a plain state dict of any of the three classes loads too.

    Args:
        num_local_experts: ``E_local``.
        config: a ``TransformerConfig``.
        submodules: not used; a spec of ``SequentialMLP`` has some.
        pg_collection: Megatron's groups, of which ``ep``, ``expt_tp``, ``expt_dp`` and ``tp`` are read; ``None`` for
            those of ``parallel_state``.

    Attributes:
        w_up: ``[E_local, 2 H, D]`` (gate rows, then up rows) where units are gated, else ``[E_local, H, D]``.
        w_down: ``[E_local, D, H]``.
        b_up, b_down: ``[E_local, 2 H or H]`` and ``[E_local, D]``, or ``None``.

    Raises:
        NotImplementedError: ``config`` has an option without a counterpart: fp8, fp4, TransformerEngine's activations,
        offloaded experts, recomputed activations that are not fused.
        ValueError: there are biases and experts in shards.
    """

    b_up: Tensor | None
    b_down: Tensor | None

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        op = type(self).__name__
        check_config(op, config)
        self.num_local_experts = num_local_experts
        self.place = parameters.find_place(op, num_local_experts, config, pg_collection)
        self.fused_activation = fused_activation(config)
        width = config.moe_latent_size or config.hidden_size
        hidden, rest = divmod(config.moe_ffn_hidden_size, self.place.num_shards)
        if rest:
            raise ValueError(
                f"{op}: moe_ffn_hidden_size must be a multiple of the {self.place.num_shards} ranks of "
                f"expert_tensor_parallel_size, got {config.moe_ffn_hidden_size}. Choose another size."
            )
        up = hidden * self.place.halves("w_up")
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shapes: dict[str, tuple[int, ...]] = {"w_up": (up, width), "w_down": (width, hidden)}
        if config.add_bias_linear:
            shapes |= {"b_up": (up,), "b_down": (width,)}
        for name in parameters.STOCK:
            weight = None
            if name in shapes:
                shape = (num_local_experts, *shapes[name])
                weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            self.register_parameter(name, weight)
        weights = dict(self.named_parameters())
        parameters.start(weights, config, self.place)
        parameters.mark(weights, self.place)
        self.register_load_state_dict_pre_hook(parameters.take_stock_state)

    def forward(
        self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run rows through their experts, and weight the results.

        Args:
            x: rows in expert order, ``[R, D]``.
            tokens_per_expert: rows of each expert, integers ``[E_local]``, here or on the CPU.
            probs: weights of the rows, ``[R]`` float.

        Returns:
            ``[R, D]``, or in a shard its part of them; and ``None``, as biases are in there.
        """
        if self.config.moe_apply_probs_on_input:
            x, probs = (probs.unsqueeze(-1) * x).to(x.dtype), torch.ones_like(probs)
        counts = tokens_per_expert.to(x.device, non_blocking=True)
        offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))  # [E_local + 1]
        if self.fused_activation is None:
            hidden = self._activate(grouped_linear(x, self.w_up, offsets, bias=self.b_up))
            out = grouped_linear(hidden, self.w_down, offsets, bias=self.b_down)
            return (out * probs.unsqueeze(-1)).to(out.dtype), None
        # Each row a token of its own, where it is.
        row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        out = moe_mlp(
            x,
            TokenPlan(row, row.unsqueeze(-1), offsets),
            probs.unsqueeze(-1),
            self.w_up,
            self.w_down,
            b_up=self.b_up,
            b_down=self.b_down,
            activation=self.fused_activation,
        )
        return out, None

    def _activate(self, hidden: Tensor) -> Tensor:
        """``[R, 2 H or H]`` to ``[R, H]``, by the function of the configuration."""
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return config.activation_func(gate) * (up + config.glu_linear_offset)

    def backward_dw(self) -> None:
        """Nothing: the backward has computed the weights' gradients."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Say which of all experts these are, in a checkpoint like that of ``SequentialMLP``."""
        return parameters.shard_for_checkpoint(
            dict(self.named_parameters()),
            prefix,
            f"{prefix}experts.",
            self.place,
            sharded_offsets,
            metadata,
        )
