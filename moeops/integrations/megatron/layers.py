"""moeops' layer in the place of the MLPs of a Megatron-Core model. K experts per token, E experts, D width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from moeops import _checks
from moeops.dispatch.base import DispatchOptions
from moeops.gates.base import BaseGate
from moeops.gates.injected_loss import inject_auxiliary_loss
from moeops.gates.naive import NaiveGate
from moeops.integrations.megatron import parameters
from moeops.integrations.megatron.experts import check_config, fused_activation
from moeops.layers.transformer import FMoETransformerMLP
from moeops.ops.activations import is_gated
from moeops.types import Routing, SlotRouting

# Names of Megatron's router, for what NaiveGate has too.
ROUTER = {"gate.weight": "weight", "gate.bias": "bias"}


class MegatronMLP(FMoETransformerMLP):
    """``moeops.FMoETransformerMLP`` as a layer of a Megatron-Core model calls its MLP.

    Tokens go over Megatron's expert-parallel group, by moeops' dispatchers. The gate's loss enters the backward through
    Megatron's ``MoEAuxLossAutoScaler``, and its log as ``load_balancing_loss``. Parameters carry Megatron's marks:
    ``allreduce=False`` for experts that other data-parallel ranks do not have, ``sequence_parallel`` for the gate.
    A checkpoint of ``megatron.core.dist_checkpointing`` has the keys of Megatron's ``MoELayer``.

    Args:
        config: a ``TransformerConfig``; ``hidden_size``, ``activation_func``, ``gated_linear_unit``,
            ``add_bias_linear``, ``params_dtype`` and its ways to start weights are read.
        num_experts: ``E``, those of all ranks together.
        top_k: ``K``.
        d_hidden: hidden width of an expert; ``None`` for ``moe_ffn_hidden_size`` or else ``ffn_hidden_size``.
        gate: as for ``moeops.FMoE``.
        balance_loss_weight: factor of the gate's loss.
        dispatch: as for ``moeops.FMoE``.
        pg_collection: Megatron's groups, ``None`` for those of ``parallel_state``.

    Raises:
        ValueError: a size does not fit, the activation cannot be had, or there are biases and experts in shards.
        NotImplementedError: ``config`` asks for fp8 or the like.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        *,
        top_k: int = 2,
        d_hidden: int | None = None,
        gate: Callable[..., nn.Module] | nn.Module = NaiveGate,
        balance_loss_weight: float = 1e-2,
        dispatch: str | DispatchOptions = "auto",
        pg_collection: Any = None,
    ) -> None:
        op = "fmoefy"
        check_config(op, config)
        _checks.check_int(op, "num_experts", num_experts, 1, "Pass the experts of all ranks.")
        groups = parameters.get_groups(pg_collection)
        if num_experts % groups.ep.size():
            raise ValueError(
                f"{op}: num_experts must be a multiple of the {groups.ep.size()} ranks of expert_model_parallel_size, "
                f"got {num_experts}. Choose another number: it counts the experts of all ranks."
            )
        activation = fused_activation(config) or config.activation_func
        if config.gated_linear_unit and not is_gated(activation):
            raise ValueError(
                f"{op}: activation_func must be torch.nn.functional.silu, or quick_gelu or fast_gelu of "
                "megatron.core.activations, where gated_linear_unit is True, got "
                f"{config.activation_func}. Use Megatron's MoELayer with "
                "ModuleSpec(module=MoeopsExperts), which takes any activation."
            )
        num_local = num_experts // groups.ep.size()
        place = parameters.find_place(op, num_local, config, groups)
        super().__init__(
            num_local,
            config.hidden_size,
            d_hidden or config.moe_ffn_hidden_size or config.ffn_hidden_size,
            activation,
            world_size=groups.tp_ep.size(),
            moe_group=groups.tp_ep,
            expert_tensor_parallel_size=place.num_shards,
            top_k=top_k,
            gate=gate,
            gate_bias=config.add_bias_linear,
            bias=config.add_bias_linear,
            dispatch=dispatch,
            dtype=config.params_dtype,
            device=torch.device(
                "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
            ),
        )
        self.config = config
        self.place = place
        self.balance_loss_weight = balance_loss_weight
        self.layer_number: int | None = None
        self._groups = groups
        weights = self._weights()
        parameters.start(weights, config, place)
        parameters.mark(weights, place)
        for parameter in self.gate.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's
        inject_auxiliary_loss(self.gate)  # to the hook, which takes losses in a recomputation too
        self.routing_hooks = (_attach_loss,)
        self.experts.register_load_state_dict_pre_hook(parameters.take_stock_state)
        self.register_load_state_dict_pre_hook(_take_router)

    def set_layer_number(self, layer_number: int) -> None:
        """Say which layer of the model this is, from 1 on, for Megatron's log of losses."""
        self.layer_number = layer_number

    def forward(  # type: ignore[override]  # as MoELayer's
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Run tokens through the gate and their experts.

        Args:
            hidden_states: ``[sequence, batch, D]``.
            padding_mask: ``[batch, sequence]``, true for padding (as Megatron's router reads it), which goes to no
                expert and counts in no loss.

        Returns:
            The shape of ``hidden_states``, zero for padding; and ``None`` for the bias, which is in there.

        Raises:
            ValueError: tensor parallelism without sequence parallelism, in training: ranks would train on the same
            tokens several times.
        """
        if self.training and self._groups.tp.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"MegatronMLP: sequence_parallel must be True to train with the {self._groups.tp.size()} ranks of "
                "tensor_model_parallel_size, got False. Set it, as for Megatron's own experts."
            )
        mask = None if padding_mask is None else padding_mask.t().bool()
        return super().forward(hidden_states, mask), None

    def _weights(self) -> parameters.Weights:
        found = dict(self.experts.named_parameters())
        return {name: found[name] for name in self.experts.weight_names if name in found}

    def _scaled_loss(self, loss: Tensor, num_tokens: int | Tensor) -> Tensor:
        """What Megatron's scaler gets: the mean over the ranks that share sequences, in its unit of a loss."""
        groups, config = self._groups, self.config
        layers = config.num_layers + (config.mtp_num_layers or 0)
        save_to_aux_losses_tracker(
            "load_balancing_loss", loss, self.layer_number, layers, avg_group=groups.tp_dp_cp
        )
        scaled = loss * (self.balance_loss_weight / groups.tp_cp.size())
        return scaled * num_tokens if config.calculate_per_token_loss else scaled

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Say what of a checkpoint this is: experts as those of ``SequentialMLP``, a router as that of ``MoELayer``."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = parameters.shard_for_checkpoint(
            self._weights(),
            f"{prefix}experts.",
            f"{prefix}experts.experts.",
            self.place,
            sharded_offsets,
            metadata,
        )
        replicated = {f"gate.{k}": v for k, v in self.gate.state_dict(keep_vars=True).items()}
        replicated |= {
            f"experts.{k}": v
            for k, v in self.experts.state_dict(keep_vars=True).items()
            if k not in self.experts.weight_names
        }
        sharded = make_sharded_tensors_for_checkpoint(
            replicated,
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self._groups.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for own, stock in ROUTER.items():
            if (entry := sharded.get(f"{prefix}gate.{own}")) is not None:
                entry.key = f"{prefix}router.{stock}"
        return state | sharded


def _attach_loss(
    layer: MegatronMLP, x: Tensor, routing: Routing | SlotRouting, mask: Tensor | None = None
) -> Routing | SlotRouting | None:
    """A routing hook: hand the losses of a gate to Megatron's scaler, at the weights that it returned."""
    weights = routing[1]
    num_tokens = x.shape[0] if mask is None else (mask == 0).sum()
    for module in layer.gate.modules():
        loss = module.take_injected() if isinstance(module, BaseGate) else None
        if loss is not None and loss.requires_grad and layer.training:
            weights = MoEAuxLossAutoScaler.apply(weights, layer._scaled_loss(loss, num_tokens))
    return None if weights is routing[1] else type(routing)(routing[0], weights, *routing[2:])


_attach_loss.takes_mask = True  # type: ignore[attr-defined]  # read by FMoE


def _take_router(_layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict``: take the router of Megatron's ``MoELayer``."""
    for own, stock in ROUTER.items():
        if (found := state.pop(f"{prefix}router.{stock}", None)) is not None:
            state[f"{prefix}gate.{own}"] = found


def fmoefy(model: Any, num_experts: int, **options: Any) -> Any:
    """Replace the MLP of every transformer layer of a Megatron-Core model by experts.

    Call it where the model has been built, in ``model_provider``, before data parallelism and the optimizer see it.
    The model may be any with Megatron-Core's ``TransformerLayer`` (GPT, BERT, T5, hybrid ones), or a list of the chunks
    of a virtual pipeline. Layers whose MLP is a ``MoELayer`` stay as they are.

    Megatron's schedules scale losses of experts where ``config.num_moe_experts`` is set, so this sets it.

    Args:
        model: a module, or a list of modules.
        num_experts: ``E``, those of all ranks together (FastMoE's function counts those of one rank).
        **options: ``top_k``, ``d_hidden``, ``gate``, ``balance_loss_weight``, ``dispatch`` and ``pg_collection`` of
            ``MegatronMLP``.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no layer with an MLP, the model is wrapped for data parallelism, a layer's MLP contains the
        norm before it, or a size does not fit.
        NotImplementedError: the configuration asks for fp8 or the like.

    Example::

        from moeops.integrations.megatron import fmoefy

        model = fmoefy(GPTModel(config, spec, vocab_size, sequence_length), num_experts=8)
    """
    op = "fmoefy"
    chunks: Sequence[nn.Module] = model if isinstance(model, (list, tuple)) else [model]
    modules = [module for chunk in chunks for module in chunk.modules()]
    for module in modules:
        if isinstance(module, _BaseDataParallel):
            raise ValueError(
                f"{op}: model must not be wrapped yet, got {type(module).__name__}, which holds buffers of the MLPs' "
                "gradients. Call fmoefy in model_provider."
            )
    layers = [
        module
        for module in modules
        if isinstance(module, BaseTransformerLayer)
        and isinstance(getattr(module, "mlp", None), MLP)
    ]
    if not layers:
        raise ValueError(
            f"{op}: model must have TransformerLayers with an MLP, got {type(chunks[0]).__name__} without one. Build "
            "it from Megatron-Core's layer specs, with dense MLPs."
        )
    for layer in layers:
        if hasattr(layer.mlp.linear_fc1, "layer_norm_weight"):
            raise ValueError(
                f"{op}: a layer's norm must be its pre_mlp_layernorm, got one inside of the MLP's "
                f"{type(layer.mlp.linear_fc1).__name__}. Build the model with a norm of its own, such as that of "
                "get_gpt_layer_local_spec."
            )
    for layer in layers:
        training = layer.mlp.training
        layer.mlp = MegatronMLP(layer.config, num_experts, **options).train(training)
        layer.mlp.set_layer_number(layer.layer_number)
    for module in modules:
        config: Any = getattr(module, "config", None)
        if hasattr(config, "num_moe_experts"):
            config.num_moe_experts = num_experts
    return model
