"""Inputs and references. T tokens, D model width, H hidden width, E experts, K experts per token, N = T * K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.registry import compare
from benchmarks.shapes import Shape
from moeops import reference

ROUTINGS = ("uniform", "skewed", "one")


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator(device).manual_seed(seed)


def reference_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type references compute in: float64, but float32 for half types on CUDA, where float64 would cost seconds."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return torch.float64


def choose_experts(shape: Shape, routing: str, device: torch.device) -> Tensor:
    """``[T, K]`` int64, distinct per token.

    uniform: every expert equally likely. skewed: probability 1 / rank, drawn without replacement.
    one: every token takes experts 0 to K - 1.
    """
    if routing == "one":
        return torch.arange(shape.top_k, device=device).repeat(shape.num_tokens, 1)
    noise = torch.rand(
        shape.num_tokens, shape.num_experts, device=device, generator=generator(device, 1)
    )
    # The K largest of log p + Gumbel noise are K draws without replacement.
    scores = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
    if routing == "skewed":
        scores -= torch.arange(1, shape.num_experts + 1, device=device).log()
    return scores.topk(shape.top_k, dim=1).indices


@dataclass
class BlockProblem:
    """The expert block with given routing: all tensors, and what must come out."""

    shape: Shape
    x: Tensor  # [T, D]
    topk_ids: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K] float32 (float64 for float64)
    w_up: Tensor  # [E, 2H, D] for swiglu, else [E, H, D]
    w_down: Tensor  # [E, D, H]
    grad_y: Tensor  # [T, D]
    expected: dict[str, Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Tensors whose gradients are wanted."""
        return {
            "x": self.x,
            "topk_weights": self.topk_weights,
            "w_up": self.w_up,
            "w_down": self.w_down,
        }

    def check(
        self, outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None
    ) -> dict[str, float]:
        """``y`` and, after a backward, every gradient against the reference."""
        got = {"y": outputs[0], **({f"grad_{k}": v for k, v in grads.items()} if grads else {})}
        want = self.expected if grads else {"y": self.expected["y"]}
        return compare(got, want, self.x.dtype)


def make_block(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    routing: str,
    *,
    with_reference: bool = True,
) -> BlockProblem:
    """Random inputs scaled so that every intermediate is of order one."""
    gen = generator(device)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype, generator=gen).mul_(scale)

    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(
        shape.num_tokens, shape.top_k, device=device, dtype=weight_dtype, generator=gen
    )
    d_model, d_hidden, num_experts = shape.d_model, shape.d_hidden, shape.num_experts
    problem = BlockProblem(
        shape=shape,
        x=normal(shape.num_tokens, d_model).requires_grad_(),
        topk_ids=choose_experts(shape, routing, device),
        topk_weights=torch.softmax(logits, dim=1).requires_grad_(),
        w_up=torch.nn.Parameter(normal(num_experts, shape.up_width, d_model, scale=d_model**-0.5)),
        w_down=torch.nn.Parameter(normal(num_experts, d_model, d_hidden, scale=d_hidden**-0.5)),
        grad_y=normal(shape.num_tokens, d_model),
    )
    if with_reference:
        problem.expected = block_reference(problem)
    return problem


def block_reference(problem: BlockProblem) -> dict[str, Tensor]:
    """``y`` and every gradient, expert by expert, so that only one expert's intermediates exist at a time."""
    p = problem
    acc = reference_dtype(p.x.dtype, p.x.device)
    y = torch.zeros(p.grad_y.shape, dtype=acc, device=p.x.device)
    grads = {
        name: torch.zeros(leaf.shape, dtype=acc, device=leaf.device)
        for name, leaf in p.leaves.items()
    }
    for e in range(p.shape.num_experts):
        token, choice = torch.where(p.topk_ids == e)
        if token.numel() == 0:
            continue
        leaves = [
            part.detach().to(acc).requires_grad_()
            for part in (p.x[token], p.topk_weights[token, choice], p.w_up[e], p.w_down[e])
        ]
        rows, weight, up, down = leaves
        hidden = reference.activate(rows @ up.t(), p.shape.activation)
        out = (hidden @ down.t()) * weight[:, None]
        grad = torch.autograd.grad(out, leaves, p.grad_y[token].to(acc))
        y.index_add_(0, token, out.detach())
        grads["x"].index_add_(0, token, grad[0])
        grads["topk_weights"][token, choice] = grad[1]
        grads["w_up"][e], grads["w_down"][e] = grad[2], grad[3]
    return {"y": y, **{f"grad_{name}": grad for name, grad in grads.items()}}
