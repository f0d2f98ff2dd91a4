"""permute_tokens and unpermute_tokens, forward and backward, beside a plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import moeops
from benchmarks.inputs import choose_experts, generator, reference_dtype
from benchmarks.registry import Case, WrongResult, compare, compare_exact, register
from benchmarks.shapes import Shape
from moeops import reference

PERMUTE = "permute"
UNPERMUTE = "unpermute"


@dataclass
class PermuteProblem:
    """Tokens, rows, a plan and gradients; what must come out is computed at check time, choice by choice."""

    shape: Shape
    x: Tensor  # [T, D]
    rows: Tensor  # [N, D]
    topk_weights: Tensor  # [T, K] float32 (float64 for float64)
    plan: moeops.TokenPlan
    token: Tensor  # [N] int64, the token of each row
    grad_rows: Tensor  # [N, D]
    grad_y: Tensor  # [T, D]

    @property
    def unique_bytes(self) -> int:
        """Every token and every row once."""
        return (self.x.numel() + self.rows.numel()) * self.x.element_size()

    def permute_case(self, forward) -> Case:
        """A row of permute's table; its forward moves bits, so it must be exact."""

        def check(
            outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None
        ) -> dict[str, float]:
            errors = compare_exact({"rows": outputs[0]}, {"rows": self.x[self.token]})
            if grads is not None:
                want = {"x": self.sum_rows(self.grad_rows, None)}
                errors |= compare(grads, want, self.x.dtype)
            return errors

        return Case(
            forward=lambda: (forward(),),
            check=check,
            leaves={"x": self.x},
            grad_outputs=(self.grad_rows,),
            bytes_forward=self.unique_bytes,
            bytes_backward=self.unique_bytes,
        )

    def unpermute_case(self, forward) -> Case:
        """A row of unpermute's table."""

        def check(
            outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None
        ) -> dict[str, float]:
            want = {"y": self.sum_rows(self.rows, self.topk_weights)}
            got = {"y": outputs[0]}
            if grads is not None:
                want |= self.unpermute_grads()
                got |= grads
            return compare(got, want, self.x.dtype)

        return Case(
            forward=lambda: (forward(),),
            check=check,
            leaves={"rows": self.rows, "topk_weights": self.topk_weights},
            grad_outputs=(self.grad_y,),
            bytes_forward=self.unique_bytes,
            bytes_backward=self.unique_bytes + self.rows.numel() * self.rows.element_size(),
        )

    @torch.no_grad()
    def sum_rows(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Weighted sum over each token's rows, one choice at a time."""
        total = torch.zeros_like(self.x, dtype=reference_dtype(self.x.dtype, self.x.device))
        for k in range(self.shape.top_k):
            part = rows[self.plan.pair_to_row[:, k].long()].to(total.dtype)
            total += part if weights is None else part * weights[:, k, None].to(total.dtype)
        return total

    @torch.no_grad()
    def unpermute_grads(self) -> dict[str, Tensor]:
        """Gradients of the rows and of the weights, one choice at a time."""
        acc = reference_dtype(self.x.dtype, self.x.device)
        grad_y = self.grad_y.to(acc)
        grad_rows = torch.empty_like(self.rows, dtype=acc)
        grad_weights = torch.empty_like(self.topk_weights, dtype=acc)
        for k in range(self.shape.top_k):
            row = self.plan.pair_to_row[:, k].long()
            grad_rows[row] = grad_y * self.topk_weights[:, k, None].to(acc)
            grad_weights[:, k] = (grad_y * self.rows[row].to(acc)).sum(1)
        return {"rows": grad_rows, "topk_weights": grad_weights}


def make(shape: Shape, device: torch.device, dtype: torch.dtype, routing: str) -> PermuteProblem:
    """Random rows; the plan comes from the reference."""
    gen = generator(device)

    def normal(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype, generator=gen)

    T, N, D, K = shape.num_tokens, shape.num_pairs, shape.d_model, shape.top_k
    plan = reference.sort_tokens(choose_experts(shape, routing, device), shape.num_experts)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return PermuteProblem(
        shape=shape,
        x=normal(T, D).requires_grad_(),
        rows=normal(N, D).requires_grad_(),
        topk_weights=torch.softmax(normal(T, K, dtype=weight_dtype), dim=1).requires_grad_(),
        plan=plan,
        token=plan.row_to_pair.long() // K,
        grad_rows=normal(N, D),
        grad_y=normal(T, D),
    )


@register(PERMUTE, "copy", "device copy of as many bytes")
@register(UNPERMUTE, "copy", "device copy of as many bytes")
def plain_copy(problem: PermuteProblem) -> Case:
    """Reads half of the bytes and writes the other half: the speed of memory in this run."""
    source = torch.randn(
        (problem.x.numel() + problem.rows.numel()) // 2,
        device=problem.x.device,
        generator=generator(problem.x.device),
    ).to(problem.x.dtype)
    target = torch.empty_like(source)

    def check(outputs: Sequence[Tensor], _) -> dict[str, float]:
        if not torch.equal(outputs[0], source):
            raise WrongResult("copy: the target differs from the source")
        return {"copy": 0.0}

    return Case(lambda: (target.copy_(source),), check, bytes_forward=problem.unique_bytes)


@register(PERMUTE, "moeops", "moeops.permute_tokens", ours=True)
def moeops_permute(problem: PermuteProblem) -> Case:
    """Each token is read once."""
    return problem.permute_case(lambda: moeops.permute_tokens(problem.x, problem.plan))


@register(PERMUTE, "torch", "x[token]")
def torch_permute(problem: PermuteProblem) -> Case:
    """Indexing; its backward adds with atomics or a sort."""
    return problem.permute_case(lambda: problem.x[problem.token])


@register(UNPERMUTE, "moeops", "moeops.unpermute_tokens", ours=True)
def moeops_unpermute(problem: PermuteProblem) -> Case:
    """Gather-sum in float32."""
    p = problem
    return p.unpermute_case(lambda: moeops.unpermute_tokens(p.rows, p.plan, p.topk_weights))


@register(UNPERMUTE, "torch", "index_add")
def torch_index_add(problem: PermuteProblem) -> Case:
    """Weights in the rows' dtype, then index_add."""
    p = problem

    def forward() -> Tensor:
        weight = p.topk_weights.reshape(-1)[p.plan.row_to_pair.long()].to(p.rows.dtype)
        return torch.zeros_like(p.x).index_add_(0, p.token, p.rows * weight[:, None])

    return p.unpermute_case(forward)


@register(UNPERMUTE, "torch-gather", "gather, view, sum")
def torch_gather_sum(problem: PermuteProblem) -> Case:
    """Transformers' way: weight, gather into token order, sum over K."""
    p = problem
    T, K, D = p.shape.num_tokens, p.shape.top_k, p.shape.d_model

    def forward() -> Tensor:
        weight = p.topk_weights.reshape(-1)[p.plan.row_to_pair.long()]
        weighted = p.rows * weight[:, None]
        picked = weighted[p.plan.pair_to_row.reshape(-1).long()]
        return picked.view(T, K, D).sum(1).to(p.rows.dtype)

    return p.unpermute_case(forward)
