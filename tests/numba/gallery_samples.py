"""Samples and references of the ops of the gallery and of ``examples/prototypes``.

Also run under the simulator, as a script, in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import moeops.numba
import moeops.numba.gates as gallery
from moeops import reference
from moeops.reference import gates_prototypes
from moeops.types import TokenPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from prototypes import expert_choice, layout
from prototypes.group_limited import group_limited
from prototypes.switch import switch_jitter


@dataclass(frozen=True)
class Case:
    """An op, its reference by the op's argument names, and samples."""

    op: Any
    reference: Callable[..., Any]
    samples: Callable[[], list[dict[str, Any]]]
    options: dict[str, Any] = field(default_factory=dict)


def logits(T, E, seed=0):
    """Distinct in every row, in every float type; the same in every process."""
    order = torch.rand(T, E, generator=torch.Generator().manual_seed(seed)).argsort(-1).float()
    return (order - E / 2) / 4


def noise(T, E):
    return 1 + torch.randint(-2, 3, (T, E), generator=torch.Generator().manual_seed(5)) / 32


def ids(T, K, E, dtype=torch.int64):
    values = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(7))
    return values.to(dtype)


def plan(T, K, E):
    names = ("row_to_pair", "pair_to_row", "expert_offsets")
    return dict(zip(names, reference.sort_tokens(ids(T, K, E), E), strict=True))


def switch_reference(logits, noise, top_k):
    return reference.topk_route(logits * noise, top_k, renormalize=False)


def group_reference(logits, bias, top_k, num_groups=1, top_groups=1, scale=1.0):
    return reference.topk_route(
        logits,
        top_k,
        score="sigmoid",
        scale=scale,
        bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
    )


def sort_reference(topk_ids, num_experts):
    return reference.sort_tokens(topk_ids, num_experts)


def permute_reference(x, row_to_pair, pair_to_row, expert_offsets):
    return reference.permute_tokens(x, TokenPlan(row_to_pair, pair_to_row, expert_offsets))


def permute_by_row_reference(row_to_pair, x, top_k, expert_offsets):
    live = torch.arange(row_to_pair.numel()) < expert_offsets[-1]
    return torch.where(live[:, None], x[row_to_pair.long() // top_k], 0)


def unpermute_reference(rows, weights, row_to_pair, pair_to_row, expert_offsets):
    return reference.unpermute_tokens(
        rows, TokenPlan(row_to_pair, pair_to_row, expert_offsets), weights
    )


def unpermute_by_row_reference(weights, pair_to_row, rows, expert_offsets):
    return unpermute_reference(rows, weights, pair_to_row, pair_to_row, expert_offsets)


ROUTING_SIZES = [(5, 8), (33, 6), (1, 4), (0, 4), (3, 1)]
LAYOUTS = [(9, 3, 4, 5), (1, 1, 1, 1), (70, 2, 3, 33), (0, 2, 3, 4)]  # T, K, E, D


def layout_sample(T, K, E, D):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(T, D, generator=generator)
    weights = torch.randn(T, K, generator=generator)
    rows = torch.randn(T * K, D, generator=generator)
    return x, weights, rows, plan(T, K, E)


def unpermute_samples():
    result = []
    for sizes in LAYOUTS:
        _, weights, rows, maps = layout_sample(*sizes)
        result.append({"rows": rows, "weights": weights, **maps})
    return result


def by_row_samples():
    result = []
    for sizes in LAYOUTS:
        _, weights, rows, maps = layout_sample(*sizes)
        maps.pop("row_to_pair")
        result.append({"weights": weights, "rows": rows, **maps})
    return result


def permute_by_row_samples():
    result = []
    for sizes in LAYOUTS:
        x, _, _, maps = layout_sample(*sizes)
        maps.pop("pair_to_row")
        result.append({"x": x, "top_k": sizes[1], **maps})
    return result


CASES = {
    "naive_topk": Case(
        gallery.naive_topk,
        reference.topk_route,
        lambda: [
            {"logits": logits(T, E), "top_k": k}
            for T, E in ROUTING_SIZES
            for k in sorted({1, min(2, E), E})
        ]
        + [{"logits": torch.zeros(4, 6), "top_k": 3}, {"logits": logits(4, 6) * 64, "top_k": 3}],
    ),
    "switch_jitter": Case(
        switch_jitter,
        switch_reference,
        lambda: [
            {"logits": logits(T, E), "noise": noise(T, E), "top_k": 1} for T, E in ROUTING_SIZES
        ],
    ),
    "group_limited": Case(
        group_limited,
        group_reference,
        lambda: [
            {"logits": logits(5, 8), "bias": torch.arange(8.0) / 8, "top_k": 3},
            {
                "logits": logits(33, 12),
                "bias": torch.zeros(12),
                "top_k": 4,
                "num_groups": 4,
                "top_groups": 2,
                "scale": 2.5,
            },
            {
                "logits": logits(6, 4),
                "bias": torch.arange(4.0),
                "top_k": 2,
                "num_groups": 4,
                "top_groups": 3,
            },
            {"logits": torch.zeros(3, 8), "bias": torch.zeros(8), "top_k": 2, "num_groups": 2},
            {"logits": logits(0, 4), "bias": torch.zeros(4), "top_k": 1},
        ],
        # In float64 only do scores that rounding makes equal keep the reference's order.
        {"dtypes": [torch.float64]},
    ),
    "top_p": Case(
        gallery.top_p,
        gates_prototypes.top_p,
        lambda: [
            {"logits": logits(T, E), "top_k": E, "mass": mass, "margin": margin}
            for T, E in ROUTING_SIZES
            for mass, margin in ((0.73, 0.0), (0.31, 0.3), (2.0, 0.0), (0.0, 0.0))
        ],
    ),
    "hash_route": Case(
        gallery.hash_route,
        gates_prototypes.hash_route,
        lambda: [
            {"token_ids": torch.arange(17), "num_experts": 12, "top_k": 3, "seed": 5},
            {
                "token_ids": torch.tensor([0, 2**31 - 1, -1, 77], dtype=torch.int32),
                "num_experts": 7,
                "top_k": 7,
            },
            {"token_ids": torch.arange(0), "num_experts": 2, "top_k": 1},
        ],
    ),
    "expert_choice": Case(
        expert_choice.expert_choice,
        expert_choice.expert_choice_reference,
        lambda: [
            {"scores": logits(4, 9), "capacity": 3},
            {"scores": logits(2, 40), "capacity": 40},
            {"scores": torch.zeros(3, 6), "capacity": 4},
            {"scores": logits(3, 5).round(), "capacity": 3},
            {"scores": logits(1, 4), "capacity": 0},
            {"scores": logits(2, 70).round(), "capacity": 20},
            {"scores": logits(3, 1500), "capacity": 90},
        ],
    ),
    "expert_choice_by_row": Case(
        expert_choice.expert_choice_by_row,
        expert_choice.expert_choice_reference,
        lambda: [
            {"scores": logits(4, 9), "capacity": 3},
            {"scores": logits(3, 5).round(), "capacity": 5},
        ],
    ),
    "sort_tokens": Case(
        layout.sort_tokens,
        sort_reference,
        lambda: [
            {"topk_ids": ids(T, K, E, dtype), "num_experts": E}
            for T, K, E, _ in LAYOUTS
            for dtype in (torch.int64, torch.int32)
        ]
        + [{"topk_ids": torch.full((6, 2), 2), "num_experts": 4}],
    ),
    "permute": Case(
        layout.permute,
        permute_reference,
        lambda: [{"x": layout_sample(*sizes)[0], **plan(*sizes[:3])} for sizes in LAYOUTS],
        {"dtypes": [torch.float32, torch.float64, torch.bfloat16, torch.float16]},
    ),
    "unpermute": Case(
        layout.unpermute,
        unpermute_reference,
        unpermute_samples,
        {"dtypes": [torch.float32, torch.float64, torch.bfloat16, torch.float16]},
    ),
    "permute_by_row": Case(layout.permute_by_row, permute_by_row_reference, permute_by_row_samples),
    "unpermute_by_row": Case(layout.unpermute_by_row, unpermute_by_row_reference, by_row_samples),
}


def simulate() -> None:
    """The smallest samples of every op, in float32 and, for the block kernels, in bfloat16."""
    for name, case in CASES.items():
        block = name in ("sort_tokens", "permute", "unpermute")
        report = moeops.numba.check(
            case.op,
            case.reference,
            case.samples(),
            dtypes=[torch.float32, torch.bfloat16] if block else [torch.float32],
            devices=["simulator"],
        )
        print(f"{name}: {report.lines[0]}")


if __name__ == "__main__":
    simulate()
