"""FastMoE's ``fmoefy``, for Megatron-Core. The rest of its adapter patches Megatron-LM: each name says what to use."""

from __future__ import annotations

from typing import Any

_NAMES = frozenset(
    (
        "DistributedDataParallel",
        "MegatronMLP",
        "add_balance_log",
        "add_fmoe_args",
        "create_moe_mlp",
        "generate_megatron_gate_hook",
        "get_balance_profile",
        "get_checkpoint_name",
        "get_fmoe_layers_num_experts",
        "load_checkpoint",
        "patch_forward_step",
        "patch_model_provider",
        "reset_gate_hook",
        "save_checkpoint",
    )
)


def fmoefy(
    model: Any,
    fmoe_num_experts: int | None = None,
    distributed_experts: bool = True,
    hidden_hidden_size: int | None = None,
    top_k: int | None = None,
    gate: Any = None,
    megatron_version: str | None = None,
    *,
    num_experts: int | None = None,
    **options: Any,
) -> Any:
    """Call ``moeops.integrations.megatron.fmoefy`` with FastMoE's arguments, on a model of Megatron-Core.

    Args:
        model: a model, or a list of the chunks of a pipeline.
        fmoe_num_experts: experts on each rank.
        distributed_experts: other experts on other ranks; False needs ``expert_model_parallel_size=1``.
        hidden_hidden_size: width of an expert; ``None`` for ``ffn_hidden_size // top_k``, as FastMoE has it.
        top_k: experts per token; ``None`` for 2.
        gate: a gate class; ``None`` for ``NaiveGate``.
        megatron_version: FastMoE's choice among versions of Megatron-LM; only ``None`` is known here.
        num_experts: the name of ``fmoe_num_experts`` in version 0.2.
        **options: of ``moeops.integrations.megatron.fmoefy``; ``balance_loss_weight`` is FastMoE's 1 by default.

    Returns:
        ``model``.

    Raises:
        ImportError: Megatron-Core is not installed.
        ValueError: an argument does not fit, or ``moeops.integrations.megatron.fmoefy`` refuses the model.
    """
    from moeops.integrations import megatron

    per_rank = num_experts if fmoe_num_experts is None else fmoe_num_experts
    if per_rank is None or (num_experts is not None and fmoe_num_experts is not None):
        raise ValueError(
            "fmoefy: fmoe_num_experts must be given, or num_experts in its place, got "
            f"{fmoe_num_experts} and {num_experts}. Pass the experts of one rank once."
        )
    if megatron_version is not None:
        raise ValueError(
            f"fmoefy: megatron_version must be None, got {megatron_version!r}. Leave it out: the model must be one of "
            "Megatron-Core."
        )
    groups = options.setdefault("pg_collection", megatron.get_groups())
    if not distributed_experts and groups.ep.size() > 1:
        raise ValueError(
            f"fmoefy: distributed_experts must be True with the {groups.ep.size()} ranks of "
            "expert_model_parallel_size, got False. Set expert_model_parallel_size=1 for the same experts on all ranks."
        )
    top_k = 2 if top_k is None else top_k
    first = model[0] if isinstance(model, (list, tuple)) else model
    if gate is not None:
        options["gate"] = gate
    options.setdefault("balance_loss_weight", 1.0)
    return megatron.fmoefy(
        model,
        per_rank * groups.ep.size(),
        top_k=top_k,
        d_hidden=hidden_hidden_size or first.config.ffn_hidden_size // top_k,
        **options,
    )


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        raise ImportError(
            f"fmoe.megatron: {name} has no stand-in, because it patches Megatron-LM 2.2 to 3.0. With Megatron-Core "
            "call moeops.integrations.megatron.fmoefy, which needs no patches. Elsewhere put "
            "moeops.FMoETransformerMLP in the place of each layer's MLP, wrap the model in "
            "moeops.distributed.DistributedGroupedDataParallel, and save it with moeops.distributed.save_checkpoint."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
