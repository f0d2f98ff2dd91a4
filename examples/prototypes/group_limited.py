"""Group-limited sigmoid routing as in DeepSeek-V3. E experts in equal groups, K slots."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moeops.numba import as_gate, route


def best_after(values, begin, end, last, last_index):
    """Index of the largest value behind ``(last, last_index)`` in the order by value, ties by index; -1 for none."""
    best = -1
    for i in range(begin, end):
        value = values[i]
        behind = value < last or (value == last and i > last_index)
        if behind and (best < 0 or value > values[best]):
            best = i
    return best


@route(
    "example::group_limited",
    "bias[E], num_groups: int = 1, top_groups: int = 1, scale: float = 1.0, "
    "_choice[T, E]: float, _group[T, num_groups]: float",
    score="sigmoid_topk",
    scale="scale",
    require=(
        "E % num_groups == 0",
        "1 <= top_groups <= num_groups",
        "top_k <= E // num_groups * top_groups",
    ),
)
def group_limited(
    logits, bias, weights, ids, top_k, num_groups, top_groups, scale, _choice, _group
):
    """Choose by ``sigmoid(z) + bias`` among the best groups; a group is worth the sum of its two best.

    Reference: ``moeops.reference.topk_route(score="sigmoid", bias=..., num_groups=..., top_groups=...)``.
    """
    size = len(logits) // num_groups
    for e in range(len(logits)):
        _choice[e] = 1.0 / (1.0 + math.exp(-logits[e])) + bias[e]
    for g in range(num_groups):
        first = best_after(_choice, g * size, (g + 1) * size, math.inf, -1)
        _group[g] = _choice[first]
        if size > 1:
            second = best_after(_choice, g * size, (g + 1) * size, _choice[first], first)
            _group[g] += _choice[second]
    # The worst of the groups that stay: what is behind it is out of the choice.
    worst = -1
    value = math.inf
    for _ in range(top_groups):
        worst = best_after(_group, 0, num_groups, value, worst)
        value = _group[worst]
    for g in range(num_groups):
        if _group[g] < value or (_group[g] == value and g > worst):
            for e in range(g * size, (g + 1) * size):
                _choice[e] = -math.inf
    total = 0.0
    last = -1
    value = math.inf
    for k in range(top_k):
        last = best_after(_choice, 0, len(logits), value, last)
        value = _choice[last]
        ids[k] = last
        weights[k] = 1.0 / (1.0 + math.exp(-logits[last]))
        total += weights[k]
    for k in range(top_k):
        weights[k] = weights[k] / max(total, 1e-37) * scale


def _bias(gate: Any, logits: Tensor) -> Tensor:
    return gate.selection_bias


def _add_bias(gate):
    gate.register_buffer("selection_bias", torch.zeros(gate.tot_expert))


GroupLimitedGate = as_gate(
    group_limited,
    "GroupLimitedGate",
    inputs={"bias": _bias},
    setup=_add_bias,
)
