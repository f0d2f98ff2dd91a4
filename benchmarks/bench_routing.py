"""topk_route: logits [T, E] to the weights and ids of K experts per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import moeops
from benchmarks.inputs import generator
from benchmarks.registry import Case, compare, compare_exact, register
from benchmarks.shapes import Shape
from moeops import reference

GROUP = "topk_route"


@dataclass
class RoutingProblem:
    """Logits, a gradient for the weights, and what must come out."""

    shape: Shape
    logits: Tensor  # [T, E] float32
    grad_weights: Tensor  # [T, K] float32
    weights: Tensor  # [T, K] float64
    ids: Tensor  # [T, K]
    grad_logits: Tensor  # [T, E] float64

    def case(self, forward) -> Case:
        """A row of this table."""
        size = self.logits.element_size()
        T, E, K = self.shape.num_tokens, self.shape.num_experts, self.shape.top_k
        return Case(
            forward=forward,
            check=self.check,
            leaves={"logits": self.logits},
            grad_outputs=(self.grad_weights,),
            bytes_forward=T * E * size + T * K * (4 + 8),
            bytes_backward=2 * T * E * size + T * K * (4 + 8),
        )

    def check(
        self, outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None
    ) -> dict[str, float]:
        """Ids exactly, weights and the logits' gradient closely."""
        weights, ids = outputs
        errors = compare_exact({"ids": ids}, {"ids": self.ids})
        errors |= compare({"weights": weights}, {"weights": self.weights}, torch.float32)
        if grads is not None:
            errors |= compare(grads, {"logits": self.grad_logits}, torch.float32)
        return errors


def make(shape: Shape, device: torch.device, dtype: torch.dtype, routing: str) -> RoutingProblem:
    """Logits are float32 whatever ``dtype`` is, since routers compute in it; their distribution is normal.

    Every row is a permutation of the same E distinct quantiles: without ties the K best are the same for everyone.
    """
    gen = generator(device)
    T, E = shape.num_tokens, shape.num_experts
    order = torch.rand(T, E, device=device, generator=gen).argsort(dim=1)
    logits = torch.special.ndtri((order + 0.5) / E).requires_grad_()
    grad_weights = torch.randn(T, shape.top_k, device=device, generator=gen)
    exact = logits.detach().double().requires_grad_()
    weights, ids = reference.topk_route(exact, shape.top_k)
    (grad_logits,) = torch.autograd.grad(weights, exact, grad_weights.double())
    return RoutingProblem(shape, logits, grad_weights, weights.detach(), ids, grad_logits)


@register(GROUP, "moeops", "moeops.topk_route", ours=True)
def moeops_route(problem: RoutingProblem) -> Case:
    """One kernel."""
    return problem.case(lambda: moeops.topk_route(problem.logits, problem.shape.top_k))


@register(GROUP, "torch", "softmax, topk, normalise")
def torch_route(problem: RoutingProblem) -> Case:
    """Softmax over all experts, sorted topk, weights divided by their sum."""

    def forward() -> tuple[Tensor, Tensor]:
        scores = torch.softmax(problem.logits, dim=-1)
        weights, ids = torch.topk(scores, problem.shape.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    return problem.case(forward)
