"""FasterMoE's schedule and shadows on moeops' own, by FastMoE's environment variables. E experts, W ranks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeops.comm.collectives import all_gather_counts
from moeops.dispatch.options import Exact
from moeops.dispatch.shadowing import ShadowPolicy, choose_shadows
from moeops.integrations.fmoe._settings import function_group

_BYTES = 4  # of a number, as in FastMoE's formula
Policy = Callable[..., Tensor]


def float_from_env(key: str, default: float = -1) -> float:
    """A number from the environment.

    Raises:
        ValueError: the variable is set to something else.
    """
    text = os.environ.get(key)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError as err:
        raise ValueError(
            f"{key} must be a number, got {text!r}. Set it right, or unset it."
        ) from err


def switch_from_env(key: str, default: bool = False) -> bool:
    """Whether a variable of the environment is "1" or "ON"."""
    text = os.environ.get(key)
    return default if text is None else text.upper() in ("1", "ON")


def shadow_policy_from_environment(
    d_model: int | None = None, d_hidden: int | None = None
) -> ShadowPolicy:
    """What ``FMOE_FASTER_GLBPLC_*`` say of the costs of experts that are MLPs.

    ``NETBW`` is in bytes per second, 50e9 / 8 by default, ``GPUTP`` in floating point operations per second, 11.5e12,
    ``ALPHA`` is ``d_hidden / d_model``, 2, and ``DMODEL`` is ``d_model``, 2048.

    Args:
        d_model: instead of the default; the variable comes first.
        d_hidden: the same.
    """
    prefix = "FMOE_FASTER_GLBPLC_"
    bandwidth = float_from_env(prefix + "NETBW", 50e9 / 8)
    throughput = float_from_env(prefix + "GPUTP", 11.5e12)
    width = float_from_env(prefix + "DMODEL", d_model or 2048)
    alpha = float_from_env(prefix + "ALPHA", d_hidden / width if d_hidden else 2)
    weights = 2 * alpha * width * width
    return ShadowPolicy(
        # Of a row forward and backward: three times a product with all weights, and four times a trip.
        row_seconds=3 * 2 * weights / throughput,
        exchange_seconds=4 * width * _BYTES / bandwidth,
        fetch_seconds=weights * _BYTES / bandwidth,
    )


def dispatch_from_environment(
    world_size: int, d_model: int | None = None, d_hidden: int | None = None
) -> dict[str, Exact]:
    """The argument ``dispatch`` that FastMoE's variables ask for; none where they ask for nothing.

    ``FMOE_FASTER_SCHEDULE_ENABLE`` cuts tokens into ``W / FMOE_FASTER_GROUP_SIZE`` chunks (4 ranks in a group by
    default), whose exchanges overlap with the experts; ``FMOE_FASTER_SHADOW_ENABLE``, beside it, brings experts with
    many tokens to all ranks. FastMoE reads them at import, this reads them when a layer is built.
    """
    if world_size == 1 or not switch_from_env("FMOE_FASTER_SCHEDULE_ENABLE"):
        return {}
    group_size = int(float_from_env("FMOE_FASTER_GROUP_SIZE", 4))
    if group_size < 1:
        raise ValueError(f"FMOE_FASTER_GROUP_SIZE must be at least 1, got {group_size}. Use 4.")
    shadowing = None
    if switch_from_env("FMOE_FASTER_SHADOW_ENABLE"):
        shadowing = shadow_policy_from_environment(d_model, d_hidden)
    return {"dispatch": Exact(n_chunks=max(1, world_size // group_size), shadowing=shadowing)}


def global_policy(
    local_expert_count: Tensor,
    _gec: Any,
    num_expert: int,
    world_size: int,
    device: Any,
    d_model: int | None = None,
) -> Tensor:
    """Choose the experts to bring to all ranks, by ``FMOE_FASTER_GLBPLC_*``.

    Args:
        local_expert_count: this rank's tokens for each expert, ``[E]``.
        num_expert: experts on a rank.
        world_size: ``W``; the group is that of ``fmoe.functions.ensure_comm``.
        device: where the ranks exchange counts.
        d_model: see ``shadow_policy_from_environment``.

    Returns:
        ``[E]`` bool on the CPU, the same on all ranks. The load of an expert is the tokens that go to it; FastMoE's
        code counts those that a rank sends.
    """
    group = function_group("global_policy", world_size)
    counts = all_gather_counts(local_expert_count.to(device, torch.int64), group)
    policy = shadow_policy_from_environment(d_model)
    return choose_shadows(counts, num_expert, policy).cpu()


def no_shadow_policy(_lec: Any, _gec: Any, num_expert: int, world_size: int, device: Any) -> Tensor:
    """Choose none: ``[E]`` bool."""
    return torch.zeros(world_size * num_expert, dtype=torch.bool)


def get_shadow_policy(d_model: int | None = None) -> Policy:
    """``global_policy`` if ``FMOE_FASTER_SHADOW_ENABLE`` is set, else ``no_shadow_policy``."""
    if not switch_from_env("FMOE_FASTER_SHADOW_ENABLE"):
        return no_shadow_policy
    return functools.partial(global_policy, d_model=d_model)


_LAYERS_DO_IT = (
    "moeops has no schedule outside of layers. Pass dispatch=moeops.distributed.Exact(n_chunks=2, "
    "shadowing=ShadowPolicy(...)) to a layer, or set FMOE_FASTER_SCHEDULE_ENABLE."
)
_WITHOUT = dict.fromkeys(
    (
        "MoEForward",
        "_fmoe_general_global_forward",
        "collect_expert_grads",
        "get_expert_param_size",
        "get_expert_params",
        "pop_expert_params",
        "set_grads",
        "stash_expert_params",
    ),
    _LAYERS_DO_IT,
)


def __getattr__(name: str) -> Any:
    if name in _WITHOUT:
        raise ImportError(f"fmoe.fastermoe: {name} has no stand-in. {_WITHOUT[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
