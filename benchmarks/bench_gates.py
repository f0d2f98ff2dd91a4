"""Routing time of every gate: tokens [T, D] to experts and weights, loss included, eager and compiled.

D is small, so that the router's product costs little and what is left is the gate's own work; the product is measured
in a row of its own and can be subtracted. ``topk_route`` alone, at the K of each gate, is what they are set against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import moeops
from benchmarks.inputs import generator
from benchmarks.registry import Case, WrongResult, register
from benchmarks.runner import Row
from benchmarks.shapes import Shape
from moeops import SlotRouting, gates
from moeops.gates import BaseGate, RouterLinear, router_logits

GROUP = "gates"
COMPILED = "-compiled"
KS = (1, 2)  # of the gates that know only one; the shape's K is the third


@dataclass(frozen=True)
class GateSpec:
    """How a gate is measured.

    Attributes:
        cls: its class in ``moeops.gates``.
        top_k: K where the shape's is not possible.
        options: keyword arguments, from the shape.
    """

    cls: str
    top_k: int | None = None
    options: Callable[[Shape], dict[str, Any]] = lambda shape: {}


def _always(**options: Any) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: options


BALANCED = _always(balance=True)
SPECS = {
    "naive": GateSpec("NaiveGate"),
    "topk": GateSpec("TopKGate", options=BALANCED),
    "mixtral": GateSpec("MixtralGate", 2, BALANCED),
    "qwen3": GateSpec("Qwen3Gate", options=BALANCED),
    "gpt-oss": GateSpec("GptOssGate", options=BALANCED),
    "deepseek": GateSpec("DeepSeekV3Gate", options=_always(num_groups=8, top_groups=4)),
    "llama4": GateSpec("Llama4Gate", 1, BALANCED),
    "switch": GateSpec("SwitchGate", 1),
    "gshard": GateSpec("GShardGate", 2),
    "noisy": GateSpec("NoisyGate"),
    "sigmoid": GateSpec("SigmoidGate", options=BALANCED),
    "xmoe": GateSpec("XMoEGate", options=lambda shape: {"proj_dim": shape.d_model}),
    "threshold": GateSpec("ThresholdGate", options=BALANCED),
    "remoe": GateSpec("ReMoEGate"),
    "dense-to-sparse": GateSpec("DenseToSparseGate"),
    "expert-choice": GateSpec("ExpertChoiceGate"),
    "soft": GateSpec("SoftMoEGate", options=_always(num_slots=1, sequence_length=1024)),
    "ktop1": GateSpec("KTop1Gate"),
    "sam": GateSpec("SAMGate", options=_always(num_groups=4)),
    "base": GateSpec("BASEGate", 1),
    "hash": GateSpec("HashGate"),
    "tutel": GateSpec("TutelGate"),
    "deepspeed": GateSpec("DeepSpeedGate", 2),
    "dc": GateSpec("DCGate", 2),
    "swipe": GateSpec("SwipeGate"),
    "faster": GateSpec("FasterGate"),
    "zero": GateSpec("ZeroGate"),
    "forced-balance": GateSpec("ForcedBalanceGate"),
}

# Gates without a linear router, or whose product is another one.
NO_ROUTER = frozenset(("hash", "zero", "forced-balance", "soft", "xmoe"))


@dataclass
class GateProblem:
    """Tokens, logits of the same distribution, and token ids for the gate that looks them up."""

    shape: Shape
    x: Tensor  # [T, D] float32
    logits: Tensor  # [T, E] float32
    token_ids: Tensor  # [T] int64
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # of gates already compared


def make(shape: Shape, device: torch.device, dtype: torch.dtype, routing: str) -> GateProblem:
    """Normal numbers in float32, which routers compute in whatever ``dtype`` is; gates choose by themselves."""
    gen = generator(device)
    return GateProblem(
        shape,
        torch.randn(shape.num_tokens, shape.d_model, device=device, generator=gen),
        torch.randn(shape.num_tokens, shape.num_experts, device=device, generator=gen),
        torch.randint(32000, (shape.num_tokens,), device=device, generator=gen),
    )


class GateCase(Case):
    """Verified in training mode with gradients only: a compiled gate is compiled once, for what is timed."""

    def verify(self) -> dict[str, float]:
        """Forward and backward, both checked."""
        if not self.leaves:
            return super().verify()
        self.clear_grads()
        outputs = self.forward()
        self.backward(outputs)
        errors = self.check([output.detach() for output in outputs], self.read_grads())
        self.clear_grads()
        return errors


def build_gate(spec: GateSpec, shape: Shape, device: torch.device) -> BaseGate:
    """The gate in training mode, its parameters the same in every row."""
    top_k = spec.top_k or shape.top_k
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        gate = getattr(gates, spec.cls)(
            shape.d_model, shape.num_experts, 1, top_k, **spec.options(shape)
        )
        for module in gate.modules():
            if isinstance(module, nn.Linear):  # logits of order one, as the row of topk_route has
                nn.init.normal_(module.weight, std=shape.d_model**-0.5)
    return gate


def call(gate: BaseGate, problem: GateProblem, x: Tensor) -> Any:
    """The gate on these tokens."""
    if isinstance(gate, gates.HashGate):
        return gate(x, problem.token_ids)
    return gate(x)


def gate_case(spec: GateSpec, problem: GateProblem, compiled: bool) -> Case:
    """Routing, with the loss if the gate has one, and the backward if it has parameters."""
    gate = build_gate(spec, problem.shape, problem.x.device)
    x = problem.x.clone().requires_grad_()
    if spec.cls not in problem.errors:
        problem.errors[spec.cls] = compare_with_float64(gate, problem)
    run: Any = gate
    if compiled:
        # Presets of one class share code, which Dynamo counts as recompilations of one function.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        run = torch.compile(gate, fullgraph=True, dynamic=False)

    def forward() -> list[Tensor]:
        routing = run(x, problem.token_ids) if isinstance(gate, gates.HashGate) else run(x)
        loss = gate.get_loss()
        if isinstance(routing, SlotRouting):
            outputs = [routing.combine_weights, routing.dispatch_weights]
        else:
            outputs = [routing[1]]
        outputs = [t for t in outputs if t.requires_grad]
        outputs += [] if loss is None else [loss]
        # Results without a gradient last; a gate that learns nothing has only those.
        rest = [routing[0]] if not isinstance(routing, SlotRouting) else []
        return [*outputs, *(rest if outputs else [routing[1], *rest])]

    def check(outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None) -> dict[str, float]:
        for value in (*outputs, *(grads or {}).values()):
            if not bool(value.isfinite().all()):
                raise WrongResult("an output or a gradient is not finite")
        check_ids(outputs[-1], problem.shape)
        return problem.errors[spec.cls]

    outputs = forward()
    needing = [output for output in outputs if output.requires_grad]
    leaves: dict[str, Tensor] = {}
    if needing:
        torch.autograd.backward(needing, [torch.ones_like(output) for output in needing])
        candidates = {"x": x, **dict(gate.named_parameters())}
        leaves = {name: leaf for name, leaf in candidates.items() if leaf.grad is not None}
    gen = generator(x.device, 2)
    grad_outputs = [
        torch.randn(output.shape, device=x.device, generator=gen).to(output.dtype)
        for output in needing
    ]
    case = GateCase(forward, check, leaves, grad_outputs)
    case.clear_grads()
    return case


def check_ids(ids: Tensor, shape: Shape) -> None:
    """Ids in range, no expert over its share of what a router can produce."""
    if ids.is_floating_point():
        return
    if ids.shape[0] != shape.num_tokens:
        raise WrongResult(f"ids: {ids.shape[0]} rows, expected {shape.num_tokens}")
    if bool(((ids < -1) | (ids >= shape.num_experts)).any()):
        raise WrongResult("ids: out of range")


@torch.no_grad()
def compare_with_float64(gate: BaseGate, problem: GateProblem) -> dict[str, float]:
    """In evaluation mode, which draws nothing: the same choices in float64 but for ties, the same weights."""
    plain = copy.deepcopy(gate).eval()
    exact = copy.deepcopy(plain).double()
    got, want = (call(plain, problem, problem.x), call(exact, problem, problem.x.double()))
    if isinstance(got, SlotRouting):
        worst = max(float((a - b).abs().max()) for a, b in zip(got[:2], want[:2], strict=True))
        if not worst <= 1e-4:
            raise WrongResult(f"weights: off by {worst:.1e} from float64")
        return {"weights": worst}
    same = (got[0] == want[0]).all(1)  # [T]
    differing = 1 - float(same.double().mean())
    if not differing <= 2e-3:
        raise WrongResult(f"ids: {differing:.2%} of the tokens go elsewhere in float64")
    live = (got[0] >= 0) & same[:, None]
    off = (got[1].double() - want[1].double()).abs() / want[1].double().abs().clamp_min(1e-3)
    worst = float(torch.where(live, off, 0).max())
    if not worst <= 1e-3:
        raise WrongResult(f"weights: off by {worst:.1e} from float64")
    return {"ids": differing, "weights": worst}


def route_case(problem: GateProblem, top_k: int) -> Case:
    """``topk_route`` on ready logits."""
    logits = problem.logits.clone().requires_grad_()
    grad = torch.randn(
        problem.shape.num_tokens, top_k, device=logits.device, generator=generator(logits.device, 2)
    )

    def check(outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None) -> dict[str, float]:
        want = torch.topk(torch.softmax(logits.detach().double(), -1), top_k)[0]
        off = float((outputs[0].double() - want / want.sum(-1, keepdim=True)).abs().max())
        if not off <= 1e-5:
            raise WrongResult(f"weights: off by {off:.1e} from float64")
        return {"weights": off}

    return Case(lambda: moeops.topk_route(logits, top_k), check, {"logits": logits}, (grad,))


def router_case(problem: GateProblem) -> Case:
    """The router's product alone."""
    shape, device = problem.shape, problem.x.device
    x = problem.x.clone().requires_grad_()
    router = RouterLinear(shape.d_model, shape.num_experts, device=device)

    def check(outputs: Sequence[Tensor], grads: Mapping[str, Tensor] | None) -> dict[str, float]:
        want = nn.functional.linear(
            x.detach().double(), router.weight.detach().double(), router.bias.detach().double()
        )
        off = float((outputs[0].double() - want).abs().max())
        if not off <= 1e-2:  # TF32 is the user's choice
            raise WrongResult(f"logits: off by {off:.1e} from float64")
        return {"logits": off}

    grad = torch.randn(
        shape.num_tokens, shape.num_experts, device=device, generator=generator(device, 2)
    )
    leaves = {"x": x, "weight": router.weight, "bias": router.bias}
    return Case(lambda: [router_logits(x, router)], check, leaves, (grad,))


def _register_all() -> None:
    for top_k in (*KS, None):
        key = f"topk_route-{top_k or 'k'}"
        register(GROUP, key, f"topk_route, K = {top_k or 'that of the shape'}", ours=True)(
            lambda problem, top_k=top_k: route_case(problem, top_k or problem.shape.top_k)
        )
    register(GROUP, "router", "router's product alone", ours=True)(router_case)
    for name, spec in SPECS.items():
        for compiled in (False, True):
            register(GROUP, name + (COMPILED if compiled else ""), spec.cls, ours=True)(
                lambda problem, spec=spec, compiled=compiled: gate_case(spec, problem, compiled)
            )


_register_all()


@dataclass(frozen=True)
class GateTimes:
    """One gate's medians in microseconds; None where there is no such row or it failed.

    Attributes:
        name: key of its rows.
        top_k: K.
        forward: eager, with what autograd saves.
        backward: eager.
        ratio: forward without the router's product, over ``topk_route`` at the same K.
        compiled_forward: the same under ``torch.compile``.
        compiled_backward: the same.
        compiled_ratio: the same.
        host_syncs: of an eager forward and backward; None on CPU.
        error: of its rows.
    """

    name: str
    top_k: int
    forward: float | None
    backward: float | None
    ratio: float | None
    compiled_forward: float | None
    compiled_backward: float | None
    compiled_ratio: float | None
    host_syncs: int | None
    error: str


def times(shape: Shape, rows: Sequence[Row]) -> list[GateTimes]:
    """A line per gate, after those of ``topk_route`` and of the router."""
    by_key = {row.key: row for row in rows}

    def median(key: str, part: str) -> float | None:
        spread = getattr(by_key[key], part) if key in by_key else None
        return None if spread is None else spread.median

    def ratio(key: str, top_k: int, has_router: bool) -> float | None:
        own, product = median(key, "forward"), median("router", "forward")
        alone = median(f"topk_route-{top_k if top_k in KS else 'k'}", "forward")
        if own is None or alone is None or (has_router and product is None):
            return None
        return max(0.0, own - product if has_router else own) / alone

    def line(key: str, top_k: int, has_router: bool) -> GateTimes:
        found = [by_key[k] for k in (key, key + COMPILED) if k in by_key]
        return GateTimes(
            key,
            top_k,
            median(key, "forward"),
            median(key, "backward"),
            ratio(key, top_k, has_router),
            median(key + COMPILED, "forward"),
            median(key + COMPILED, "backward"),
            ratio(key + COMPILED, top_k, has_router),
            found[0].host_syncs,
            "; ".join(f"{row.status.upper()} {row.key}: {row.error}" for row in found if row.error),
        )

    keys = {row.key.removesuffix(COMPILED): None for row in rows}
    lines = []
    for key in keys:
        if key in SPECS:
            top_k = SPECS[key].top_k or shape.top_k
            lines.append(line(key, top_k, key not in NO_ROUTER))
        else:
            k = key.removeprefix("topk_route-")
            lines.append(line(key, int(k) if k.isdigit() else shape.top_k, False))
    return lines
