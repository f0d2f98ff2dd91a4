"""FastMoE's adapter for Megatron-LM 2.2 to 3.0 has no stand-in: each of its names says so, and what to use."""

from __future__ import annotations

from typing import Any

_NAMES = frozenset(
    (
        "DistributedDataParallel",
        "MegatronMLP",
        "add_balance_log",
        "add_fmoe_args",
        "create_moe_mlp",
        "fmoefy",
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


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        raise ImportError(
            f"fmoe.megatron: {name} has no stand-in, because it patches Megatron-LM 2.2 to 3.0. With Megatron-Core "
            "call moeops.integrations.megatron.fmoefy, which needs no patches. Elsewhere put "
            "moeops.FMoETransformerMLP in the place of each layer's MLP, wrap the model in "
            "moeops.distributed.DistributedGroupedDataParallel, and save it with moeops.distributed.save_checkpoint."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
