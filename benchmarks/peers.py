"""What others would run: limits, transformers' experts, a torchtitan-style composition, loops over experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import BlockProblem, generator
from benchmarks.registry import Case, compare
from benchmarks.shapes import Shape
from moeops import reference


def block_case(problem: BlockProblem, forward: Callable[[], Tensor]) -> Case:
    """A row of the block's table that works on the problem's own tensors."""
    return Case(
        forward=lambda: (forward(),),
        check=problem.check,
        leaves=problem.leaves,
        grad_outputs=(problem.grad_y,),
    )


# What nothing that routes can beat.


def _two_products(
    rows: Tensor, hidden: Tensor, up: Tensor, down: Tensor, grads: tuple[Tensor, Tensor]
) -> Case:
    """Both projections as independent products: 2 in the forward, 6 in all, nothing between them."""

    def forward() -> tuple[Tensor, Tensor]:
        return rows @ up.mT, hidden @ down.mT

    def check(outputs: Sequence[Tensor], got: Mapping[str, Tensor] | None) -> dict[str, float]:
        # The first rows of each product, and gradients of both left sides' first rows, say enough here.
        n = 64
        sides = ((rows, up, grads[0]), (hidden, down, grads[1]))
        want = {
            f"y{i}": left[..., :n, :].double() @ right.double().mT
            for i, (left, right, _) in enumerate(sides)
        }
        have = {f"y{i}": output[..., :n, :] for i, output in enumerate(outputs)}
        if got is not None:
            want |= {
                f"grad{i}": grad[..., :n, :].double() @ right.double()
                for i, (_, right, grad) in enumerate(sides)
            }
            have |= {"grad0": got["rows"][..., :n, :], "grad1": got["hidden"][..., :n, :]}
        return compare(have, {k: v.detach() for k, v in want.items()}, rows.dtype)

    leaves = {"rows": rows, "hidden": hidden, "up": up, "down": down}
    return Case(forward=forward, check=check, leaves=leaves, grad_outputs=grads)


def _limit_tensors(
    shape: Shape, like: Tensor, groups: tuple[int, ...], num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    gen = generator(like.device, 2)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=like.device, dtype=like.dtype, generator=gen)

    D, H, U = shape.d_model, shape.d_hidden, shape.up_width
    leaves = (
        normal(*groups, num_rows, D),
        normal(*groups, num_rows, H),
        normal(*groups, U, D).mul_(D**-0.5),
        normal(*groups, D, H).mul_(H**-0.5),
    )
    for leaf in leaves:
        leaf.requires_grad_()
    return (*leaves, (normal(*groups, num_rows, U), normal(*groups, num_rows, D)))


def dense_limit(problem: BlockProblem) -> Case:
    """The block's products as one dense problem of N rows: what no grouped block can beat."""
    return dense_products(problem.shape, problem.x)


def dense_products(shape: Shape, like: Tensor) -> Case:
    """Dense products of ``shape`` in the dtype and on the device of ``like``."""
    return _two_products(*_limit_tensors(shape, like, (), shape.num_pairs))


def equal_groups(problem: BlockProblem) -> Case:
    """The block's products as one bmm: E weights are read, all groups are equal. Fits small batches better."""
    shape = problem.shape
    rows, rest = divmod(shape.num_pairs, shape.num_experts)
    if rest:
        raise ValueError(f"{shape.num_pairs} rows do not divide by {shape.num_experts} experts")
    return _two_products(*_limit_tensors(shape, problem.x, (shape.num_experts,), rows))


def weights_read(problem: BlockProblem) -> Case:
    """The weights of every chosen expert read once, and nothing else: what bounds a decoding step."""
    chosen = problem.topk_ids.unique()
    weights = [w.detach()[chosen].view(-1) for w in (problem.w_up, problem.w_down)]

    def forward() -> tuple[Tensor]:
        norms = [torch.linalg.vector_norm(w, dtype=torch.float32) for w in weights]
        return (torch.stack(norms),)

    def check(outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None) -> dict[str, float]:
        want = torch.stack([w.double().norm() for w in weights])
        return compare({"norms": outputs[0]}, {"norms": want}, torch.float32)

    return Case(forward, check)


# The experts of transformers.


def transformers_experts(problem: BlockProblem) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """An experts module on the problem's weights, and the library's grouped_mm function over it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

    if problem.shape.activation != "swiglu":
        raise NotImplementedError("only the swiglu block is compared with transformers")

    # The decorator sets the flags that the function reads, whatever its version reads.
    @use_experts_implementation
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = problem.shape.num_experts
            self.gate_up_proj = problem.w_up
            self.down_proj = problem.w_down
            self.act_fn = torch.nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError("the grouped_mm function is called instead")

    experts = Experts(SimpleNamespace(_experts_implementation="grouped_mm"))
    return experts, ALL_EXPERTS_FUNCTIONS["grouped_mm"]


def transformers_grouped_mm(problem: BlockProblem) -> Case:
    """The grouped_mm experts of transformers, eager."""
    experts, function = transformers_experts(problem)
    p = problem
    return block_case(p, lambda: function(experts, p.x, p.topk_ids, p.topk_weights))


def transformers_grouped_mm_compiled(problem: BlockProblem) -> Case:
    """The grouped_mm experts of transformers under torch.compile, sizes static."""
    experts, function = transformers_experts(problem)
    # Graphs of an earlier configuration would make this one compile with dynamic sizes.
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=False)
    p = problem
    return block_case(p, lambda: compiled(experts, p.x, p.topk_ids, p.topk_weights))


# Torchtitan's style.


def torchtitan_style(problem: BlockProblem) -> Case:
    """Torchtitan's local path, written again.

    Stable argsort, gather, three grouped_mm on separate gate and up weights, float32 weighting, scatter_add.
    """
    if problem.shape.activation != "swiglu":
        raise NotImplementedError("torchtitan's experts are swiglu")
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    p = problem
    num_experts, top_k = p.shape.num_experts, p.shape.top_k
    w1, w3 = (half.detach().clone().requires_grad_() for half in p.w_up.chunk(2, dim=1))
    w2 = p.w_down

    def forward() -> tuple[Tensor]:
        flat = p.topk_ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        offsets = count_experts(flat, num_experts).cumsum(0, dtype=torch.int32)
        token = order // top_k
        rows = p.x[token]
        gate = grouped_mm(rows, w1.mT, offs=offsets)
        up = grouped_mm(rows, w3.mT, offs=offsets)
        out = grouped_mm(F.silu(gate) * up, w2.mT, offs=offsets)
        weight = p.topk_weights.reshape(-1)[order]
        out = (out.to(weight.dtype) * weight[:, None]).to(p.x.dtype)
        index = token[:, None].expand(-1, out.shape[1])
        return (torch.zeros_like(p.x).scatter_add(0, index, out),)

    leaves = {"x": p.x, "topk_weights": p.topk_weights, "w1": w1, "w3": w3, "w_down": w2}

    def grads() -> dict[str, Tensor]:
        return {
            "x": p.x.grad,
            "topk_weights": p.topk_weights.grad,
            "w_up": torch.cat([w1.grad, w3.grad], dim=1),
            "w_down": w2.grad,
        }

    return Case(forward, p.check, leaves, (p.grad_y,), grads)


def count_experts(flat_ids: Tensor, num_experts: int) -> Tensor:
    """Rows per expert as torch users count them without a host copy; histc takes floats only on CPU."""
    ids = flat_ids if flat_ids.is_cuda else flat_ids.float()
    return torch.histc(ids, bins=num_experts, min=0, max=num_experts)


# Loops over experts.


def naive_loop(problem: BlockProblem) -> Case:
    """torch.where, two products and index_add per expert, as model code without kernels writes it."""
    p = problem

    def forward() -> Tensor:
        y = torch.zeros_like(p.x)
        for e in range(p.shape.num_experts):
            y = _add_expert(y, p, e, p.w_up[e], p.w_down[e])
        return y

    return block_case(p, forward)


def unbound_loop(problem: BlockProblem) -> Case:
    """The naive loop over unbound weights: its backward stacks their gradients instead of adding E full ones."""
    p = problem

    def forward() -> Tensor:
        y = torch.zeros_like(p.x)
        for e, (up, down) in enumerate(zip(p.w_up.unbind(), p.w_down.unbind(), strict=True)):
            y = _add_expert(y, p, e, up, down)
        return y

    return block_case(p, forward)


def _add_expert(y: Tensor, p: BlockProblem, e: int, up: Tensor, down: Tensor) -> Tensor:
    token, choice = torch.where(p.topk_ids == e)
    hidden = reference.activate(F.linear(p.x[token], up), p.shape.activation)
    out = F.linear(hidden, down) * p.topk_weights[token, choice, None]
    return y.index_add_(0, token, out.to(y.dtype))
