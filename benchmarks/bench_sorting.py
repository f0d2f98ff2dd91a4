"""sort_tokens: chosen experts [T, K] to index maps and expert offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import moeops
from benchmarks.inputs import choose_experts
from benchmarks.peers import count_experts
from benchmarks.registry import Case, compare_exact, register
from benchmarks.shapes import Shape
from moeops import reference

GROUP = "sort_tokens"


@dataclass
class SortingProblem:
    """Ids and the plan they must give."""

    shape: Shape
    topk_ids: Tensor  # [T, K] int64
    plan: moeops.TokenPlan

    def case(self, forward, names: tuple[str, ...]) -> Case:
        """A row of this table whose outputs are the named parts of the plan."""
        want = {name: getattr(self.plan, name) for name in names}
        N, E = self.shape.num_pairs, self.shape.num_experts
        return Case(
            forward=forward,
            check=lambda outputs, _: compare_exact(dict(zip(names, outputs, strict=True)), want),
            bytes_forward=N * 8 + N * 4 + (E + 1) * 4 + ("pair_to_row" in names) * N * 4,
        )


def make(shape: Shape, device: torch.device, dtype: torch.dtype, routing: str) -> SortingProblem:
    """Int64 ids, as every router makes them."""
    topk_ids = choose_experts(shape, routing, device)
    return SortingProblem(shape, topk_ids, reference.sort_tokens(topk_ids, shape.num_experts))


def torch_sort(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Row to pair, and offsets with their leading zero."""
    flat = topk_ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    offsets = flat.new_zeros(num_experts + 1, dtype=torch.int32)
    torch.cumsum(count_experts(flat, num_experts), 0, dtype=torch.int32, out=offsets[1:])
    return order, offsets


@register(GROUP, "moeops", "moeops.sort_tokens", ours=True)
def moeops_sort(problem: SortingProblem) -> Case:
    """Counting sort; both maps."""
    return problem.case(
        lambda: moeops.sort_tokens(problem.topk_ids, problem.shape.num_experts),
        ("row_to_pair", "pair_to_row", "expert_offsets"),
    )


@register(GROUP, "torch", "argsort, histc, cumsum")
def torch_one_map(problem: SortingProblem) -> Case:
    """Stable argsort; the inverse map is left out, as torchtitan does."""
    return problem.case(
        lambda: torch_sort(problem.topk_ids, problem.shape.num_experts),
        ("row_to_pair", "expert_offsets"),
    )


@register(GROUP, "torch-inverse", "argsort, histc, cumsum, inverse")
def torch_both_maps(problem: SortingProblem) -> Case:
    """The same with the inverse map, as transformers does."""

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        order, offsets = torch_sort(problem.topk_ids, problem.shape.num_experts)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return order, inverse.view(problem.topk_ids.shape), offsets

    return problem.case(forward, ("row_to_pair", "pair_to_row", "expert_offsets"))
