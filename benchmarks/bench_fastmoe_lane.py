"""FastMoE's lane: a whole FMoETransformerMLP with its gate, GELU experts with biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import moeops
from benchmarks import peers
from benchmarks.inputs import generator, reference_dtype
from benchmarks.registry import Case, compare, register
from benchmarks.shapes import LaneShape

GROUP = "lane"

# Milliseconds (forward, forward + backward), synchronised medians of the whole layer with gate. Recorded elsewhere:
# FastMoE v1.1 (repository head, November 2026) built from source with torch 2.11.0+cu130 on one H200, bfloat16.
# "fused" is a subclass with one fused expert module (expert=None), as FastMoE's layer was before v1.0.
FASTMOE_MS = {
    "fastmoe_e8": {"FastMoE v1.1": (3.71, 7.93), "FastMoE v1.1, fused experts": (1.22, 3.34)},
    "fastmoe_e64": {"FastMoE v1.1": (22.43, 43.63), "FastMoE v1.1, fused experts": (2.42, 9.32)},
}

# Least distance between the K-th and the next logit: rounding cannot change the choice of experts.
MIN_GAP = 1e-3


@dataclass
class LaneProblem:
    """The layer, tokens whose routing is unambiguous, and what must come out."""

    shape: LaneShape
    layer: torch.nn.Module
    x: Tensor  # [T, D]
    grad_y: Tensor  # [T, D]
    expected: dict[str, Tensor]

    def case(
        self, layer: Callable[[Tensor], Tensor], begin: Callable[[], None] = lambda: None
    ) -> Case:
        """A row of this table; ``begin`` runs before each forward."""

        def forward() -> tuple[Tensor]:
            begin()
            return (layer(self.x),)

        return Case(
            forward=forward,
            check=self.check,
            leaves={"x": self.x, **dict(self.layer.named_parameters())},
            grad_outputs=(self.grad_y,),
        )

    def check(
        self, outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None
    ) -> dict[str, float]:
        """``y`` and the gradients of ``x`` and of every parameter."""
        got = {"y": outputs[0], **{f"grad_{name}": grad for name, grad in (grads or {}).items()}}
        want = self.expected if grads else {"y": self.expected["y"]}
        return compare(got, want, self.x.dtype)


def make(shape: LaneShape, device: torch.device, dtype: torch.dtype, routing: str) -> LaneProblem:
    """A layer with its own initialisation; routing is what its gate makes of random tokens."""
    torch.manual_seed(0)
    layer = moeops.FMoETransformerMLP(
        shape.num_experts,
        shape.d_model,
        shape.d_hidden,
        torch.nn.GELU(),
        top_k=shape.top_k,
        gate=moeops.gates.NaiveGate,
        dtype=dtype,
        device=device,
    )
    gen = generator(device)

    def normal(num_rows: int) -> Tensor:
        return torch.randn(num_rows, shape.d_model, device=device, dtype=dtype, generator=gen)

    x = normal(2 * shape.num_tokens)
    router = layer.gate.gate
    if shape.top_k < shape.num_experts:
        with torch.no_grad():
            logits = F.linear(x.double(), router.weight.double(), router.bias.double())
            best = logits.sort(dim=1, descending=True).values
            x = x[best[:, shape.top_k - 1] - best[:, shape.top_k] > MIN_GAP]
    x = x[: shape.num_tokens].clone().requires_grad_()
    if x.shape[0] != shape.num_tokens:
        raise RuntimeError(f"{shape.name}: too few tokens with clear routing, got {x.shape[0]}")
    grad_y = normal(shape.num_tokens)
    return LaneProblem(shape, layer, x, grad_y, layer_reference(layer, x, grad_y, shape))


def loop_layer(x: Tensor, parameters: Mapping[str, Tensor], top_k: int) -> Tensor:
    """The layer as a loop over its experts in plain PyTorch, the baseline of FastMoE's paper; the router in float32."""
    router = [parameters[f"gate.gate.{name}"] for name in ("weight", "bias")]
    wide = torch.promote_types(x.dtype, torch.float32)
    best, ids = F.linear(x.to(wide), *(p.to(wide) for p in router)).topk(top_k, dim=1)
    weights = torch.softmax(best, dim=1)
    experts = zip(
        *(parameters[f"experts.{name}"].unbind() for name in ("w_up", "b_up", "w_down", "b_down")),
        strict=True,
    )
    y = torch.zeros_like(x)
    for e, (w_up, b_up, w_down, b_down) in enumerate(experts):
        token, choice = torch.where(ids == e)
        hidden = F.gelu(F.linear(x[token], w_up, b_up))
        out = F.linear(hidden, w_down, b_down) * weights[token, choice, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y


def layer_reference(
    layer: torch.nn.Module, x: Tensor, grad_y: Tensor, shape: LaneShape
) -> dict[str, Tensor]:
    """The layer again as a loop, on copies of its parameters."""
    acc = reference_dtype(x.dtype, x.device)
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves = {name: leaf.detach().to(acc).requires_grad_() for name, leaf in leaves.items()}
    y = loop_layer(leaves["x"], leaves, shape.top_k)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(acc))
    named = zip(leaves, grads, strict=True)
    return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in named}}


@register(GROUP, "dense", "dense matmul limit")
def dense(problem: LaneProblem) -> Case:
    """Both products on N rows."""
    return peers.dense_products(problem.shape, problem.x)


@register(GROUP, "loop", "PyTorch, a loop over experts", default_on=())
def loop(problem: LaneProblem) -> Case:
    """What FastMoE's paper compares itself with."""
    parameters = dict(problem.layer.named_parameters())
    return problem.case(lambda x: loop_layer(x, parameters, problem.shape.top_k))


@register(GROUP, "moeops-compiled", "FMoETransformerMLP, compiled", ours=True, default_on=("cuda",))
def compiled_layer(problem: LaneProblem) -> Case:
    """One graph, sizes static."""
    torch._dynamo.reset()
    return problem.case(torch.compile(problem.layer, fullgraph=True))


@register(
    GROUP, "moeops-graphs", "FMoETransformerMLP, CUDA graphs", ours=True, default_on=("cuda",)
)
def graphed_layer(problem: LaneProblem) -> Case:
    """``mode="reduce-overhead"``: one launch for the forward, one for the backward."""
    torch._dynamo.reset()
    layer = torch.compile(problem.layer, fullgraph=True, mode="reduce-overhead")
    return problem.case(layer, begin=torch.compiler.cudagraph_mark_step_begin)


@register(
    GROUP,
    "moeops-graphed",
    "FMoETransformerMLP, compiled, graphed callable",
    ours=True,
    default_on=("cuda",),
)
def graphed_callable(problem: LaneProblem) -> Case:
    """The compiled layer under ``torch.cuda.make_graphed_callables``: the graphs again, without their tree's checks."""
    torch._dynamo.reset()
    compiled = torch.compile(problem.layer, fullgraph=True)
    sample = torch.randn_like(problem.x).requires_grad_()
    return problem.case(torch.cuda.make_graphed_callables(compiled, (sample,)))


@register(GROUP, "moeops", "FMoETransformerMLP, eager", ours=True)
def eager_layer(problem: LaneProblem) -> Case:
    """The layer as it is."""
    return problem.case(problem.layer)
