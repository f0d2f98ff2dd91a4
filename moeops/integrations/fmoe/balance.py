"""FastMoE's measures of balance, kept in a dict of lists. E experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moeops.losses import gshard_loss
from moeops.ops.sorting import count_tokens

# Of the loads of all experts: 0 or 1 at balance.
metrics: dict[str, Callable[[Tensor], Tensor]] = {
    "coefficient-variation": lambda loads: loads.std() / loads.mean(),
    "Lmax-over-Lmin": lambda loads: (loads.max() + 1) / (loads.min() + 1),
    "Lmax-over-Lmean": lambda loads: loads.max() / loads.mean(),
}


def reset_balance_profile(
    balance_dict: dict[str, list[Any]], num_layers: int, balance_strategy: str | None
) -> None:
    """Forget all measures: ``None`` for each layer, under each metric and ``<strategy>_loss``."""
    names = [*metrics, *([f"{balance_strategy}_loss"] if balance_strategy else [])]
    balance_dict.update({name: [None] * num_layers for name in names})


def update_balance_profile(
    balance_dict: dict[str, list[Any]],
    gate_top_k_idx: Tensor,
    _gate_score_top_k: Tensor,
    gate_context: Any,
    layer_idx: int,
    num_expert: int,
    balance_strategy: str | None,
) -> None:
    """Measure a layer's choices.

    Args:
        balance_dict: what ``reset_balance_profile`` made.
        gate_top_k_idx: chosen experts, int64; dropped ones, -1, do not count.
        gate_context: the logits ``[T, E]`` for the strategy "gshard", the loss for "noisy".
        layer_idx: the layer's place in the lists.
        num_expert: ``E``.
        balance_strategy: "gshard" and "noisy" keep a loss: GShard's, 1 at balance (FastMoE's is divided by
            ``num_expert ** 2``), or the given one.
    """
    loads = count_tokens(gate_top_k_idx, num_expert).float()
    for name, metric in metrics.items():
        balance_dict[name][layer_idx] = metric(loads)
    if balance_strategy == "gshard":
        top = gate_top_k_idx.reshape(gate_context.shape[0], -1)
        balance_dict["gshard_loss"][layer_idx] = gshard_loss(gate_context, top)
    elif balance_strategy == "noisy":
        balance_dict["noisy_loss"][layer_idx] = gate_context
