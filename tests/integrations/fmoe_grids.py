"""Sizes, types and tolerances of FastMoE's own tests, and references for them. T tokens, E experts, D model width."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fmoe_cases import by_hand
from torch import Tensor, nn

T, D, H = 4, 16, 32
NUM_EXPERTS = (4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


class TwoLayers(nn.Module):
    """An expert of two projections, called with its rows and their number."""

    def __init__(self, d_model: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_model)
        self.down = nn.Linear(2 * d_model, d_model)

    def forward(self, inp: Tensor, count: Tensor) -> Tensor:
        return self.down(self.up(inp))


class OneLayer(nn.Linear):
    """An expert of one projection."""

    def __init__(self, d_model: int):
        super().__init__(d_model, d_model)

    def forward(self, inp: Tensor, count: Tensor) -> Tensor:
        return super().forward(inp)


KINDS = {"two": TwoLayers, "one": OneLayer}


def make_fused(num_expert: int, top_k: int, **options) -> nn.Module:
    """A subclass that sets its experts, as FastMoE's tests have it; they start with weights of ordinary size."""
    from fmoe.layers import FMoE
    from fmoe.transformer import _Expert

    class Layer(FMoE):
        def __init__(self):
            super().__init__(num_expert=num_expert, d_model=D, top_k=top_k, **options)
            self.experts = _Expert(num_expert, D, H, F.gelu)
            for linear in (self.experts.htoh4, self.experts.h4toh):
                nn.init.normal_(linear.weight, std=linear.weight.shape[2] ** -0.5)

    return Layer()


Gather = Callable[[Tensor], Tensor]


class Reference:
    """All experts in float64, one row at a time, with gradients of their own."""

    def __init__(self, layer: nn.Module, gather: Gather = lambda own: own):
        """``gather`` joins tensors of all ranks in dimension 0."""
        if isinstance(layer.experts, nn.ModuleList):
            self._of_list(layer.experts, gather)
        else:
            own = layer.experts
            self.own = [own.htoh4.weight, own.htoh4.bias, own.h4toh.weight, own.h4toh.bias]
            leaves = [gather(p.detach().double()).requires_grad_() for p in self.own]
            self.leaves = leaves
            self.experts = [self._fused(leaves, e) for e in range(leaves[0].shape[0])]

    @staticmethod
    def _fused(leaves: list[Tensor], e: int) -> Callable[[Tensor], Tensor]:
        up, b_up, down, b_down = leaves
        return lambda row: F.gelu(row @ up[e].T + b_up[e]) @ down[e].T + b_down[e]

    def _of_list(self, experts: nn.ModuleList, gather: Gather) -> None:
        names = [name for name, _ in experts[0].named_parameters()]
        alike = all(type(expert) is type(experts[0]) for expert in experts)
        if not alike:
            copies = [copy.deepcopy(expert).double() for expert in experts]
            self.own = [p for expert in experts for p in expert.parameters()]
            self.leaves = [p for expert in copies for p in expert.parameters()]
            self.experts = [lambda row, expert=expert: expert(row, 1) for expert in copies]
            return
        self.own = [[expert.get_parameter(name) for expert in experts] for name in names]
        self.leaves = [
            gather(torch.stack(own).detach().double()).requires_grad_() for own in self.own
        ]

        def run(row: Tensor, e: int) -> Tensor:
            values = {name: leaf[e] for name, leaf in zip(names, self.leaves, strict=True)}
            double = copy.deepcopy(experts[0]).double()
            return torch.func.functional_call(double, values, (row, 1))

        self.experts = [lambda row, e=e: run(row, e) for e in range(self.leaves[0].shape[0])]

    def own_gradients(self) -> list[Tensor]:
        """Those of the layer, experts in dimension 0 where there are several in one tensor."""
        return [
            torch.stack([p.grad for p in own]) if isinstance(own, list) else own.grad
            for own in self.own
        ]


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bound = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


def compare(
    layer: nn.Module,
    reference: Reference,
    x: Tensor,
    own_part: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> None:
    """Output and gradients of a layer and of its experts one by one, of the mean."""
    raw, inp = x.clone().requires_grad_(), x.clone().requires_grad_()
    ids, scores = layer.gate(raw)
    expected = by_hand(raw.double(), ids, scores.double(), reference.experts)
    out = layer(inp)
    assert out.dtype == x.dtype
    expected.mean().backward()
    out.mean().backward()
    near(out, expected, x.dtype)
    near(inp.grad, raw.grad, x.dtype)
    largest = 0.0
    for own, leaf in zip(reference.own_gradients(), reference.leaves, strict=True):
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        near(own, own_part(grad), x.dtype)
        largest = max(largest, float(grad.abs().max()))
    assert largest > TOLERANCES[torch.float32]  # zeros would be near, too
