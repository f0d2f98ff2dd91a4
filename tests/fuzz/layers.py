"""Cases of layers: every gate and kind of expert, masks, nests, jagged inputs, types, against a dense mixture."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from every_gate import GATES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuzz.comparing import (
    OtherChoice,
    assert_equal_choice,
    assert_gradient,
    assert_value,
    draw_tokens,
    dtype_of,
    seed_everything,
    unless_tied,
)
from moeops import FMoE, FMoETransformerMLP, Glu, SlotRouting, reference
from moeops.dispatch import Static

E, H = 6, 5  # E has the groups that gates of ``every_gate`` have
LOSSES = ("z", "entropy", "switch", "gshard")
UNIT = Glu(alpha=1.702, offset=1.0, interleaved=True)
NOT_FUSED = {"tanh": torch.tanh, "gelu_tanh": nn.GELU(approximate="tanh")}
FUSED = {
    "swiglu": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "geglu_tanh": lambda h: reference.activate(h, Glu("gelu_tanh")),
    "unit": lambda h: reference.activate(h, UNIT),
    "gelu": F.gelu,
    "relu": torch.relu,
    "silu": F.silu,
    "relu_squared": lambda h: torch.relu(h).square(),
}
ACTIVATIONS = {**FUSED, **NOT_FUSED}
GIVEN = {**NOT_FUSED, "unit": UNIT}
# The tokens that are there where masked ones follow: noise for fewer numbers begins alike, and sequences are whole.
REAL = 16


class Nested(nn.Module):
    """An expert on a nest of tensors, which returns one."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, H)

    def forward(self, rows: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        hidden = torch.tanh(self.linear(rows["x"])) * rows["rest"][0]
        return hidden, [rows["image"] * hidden.mean(1)[:, None, None]]


class WrongGradient(AssertionError):
    """Values agree, and a gradient does not."""


def draw(rng: Random) -> dict[str, Any]:
    gate = rng.choice(list(GATES))
    _, _, draws, places = GATES[gate]
    kind = rng.choice(("mlp", "mlp", "modules", "nested"))
    options: dict[str, Any] = {
        "gate": gate,
        "kind": kind,
        "dtype": rng.choices(("float64", "float32", "bfloat16", "float16"), (8, 2, 1, 1))[0],
        "T": draw_tokens(rng),
        "D": rng.choice((1, 3, 8, 11)),
        "training": rng.random() < 0.7,
        "losses": tuple(sorted(rng.sample(LOSSES, rng.choice((0, 0, 1, 2))))),
        "masked": rng.choice(("nobody", "nobody", "some", "some", "all")),
        "recomputed": rng.random() < 0.15,
        "frozen": rng.random() < 0.1,
        "steps": rng.choice((1, 1, 2)),
        "mask_type": rng.choice(("int64", "int32", "uint8")),
        "no_grad": rng.random() < 0.1,
        # Rows that a buffer has for each expert; None for no buffers.
        "capacity": rng.choice((None, None, None, 1, 4, 1000)),
    }
    if kind == "mlp":
        options["activation"] = rng.choice(list(ACTIVATIONS))
        options["bias"] = rng.random() < 0.6
        options["layout"] = rng.choice(("flat", "flat", "strided", "batch", "jagged"))
    if kind != "nested" and gate in ("naive", "topk_sigmoid") and options["masked"] == "some":
        options["mask_dict"] = rng.choice((None, {1: 0.5}, {1: -1.0, 2: 2.0}))
    if (draws or places) and options["masked"] == "some":
        options["masked"] = "behind"
    if draws or gate == "base":
        # Float32 has other random numbers; and where one assignment weighs all tokens, every rounding moves many.
        options["dtype"] = "float64"
    options["autocast"] = options["dtype"] == "float32" and rng.random() < 0.4
    return options


def build(kind: str, gate: str, D: int, activation: str, bias: bool, mask_dict, capacity) -> FMoE:
    builder, top_k, _, _ = GATES[gate]
    options: dict[str, Any] = {
        "top_k": top_k,
        "gate": builder,
        "mask_dict": mask_dict,
        "dtype": torch.float64,
    }
    if capacity is not None:
        options["dispatch"] = Static(capacity)
    if kind == "mlp":
        return FMoETransformerMLP(
            E, D, H, activation=GIVEN.get(activation, activation), bias=bias, **options
        )
    expert = Nested if kind == "nested" else (lambda d: nn.Sequential(nn.Linear(d, 4), nn.Tanh()))
    return FMoE(E, D, expert=expert, **options)


def experts_of(layer: FMoE, activation: str) -> list:
    """The experts as functions of all tokens, each with its slice of the weights."""
    if not layer.experts_fused:
        return list(layer.experts)

    def expert(e: int):
        def apply(x: Tensor) -> Tensor:
            part = {n: p[e] for n, p in layer.experts.named_parameters()}
            hidden = F.linear(x, part["w_up"], part.get("b_up"))
            return F.linear(ACTIVATIONS[activation](hidden), part["w_down"], part.get("b_down"))

        return apply

    return [expert(e) for e in range(E)]


def leaves_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [leaf for part in parts for leaf in leaves_of(part)]


def map_leaves(function, value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_leaves(function, part) for name, part in value.items()}
    return type(value)(map_leaves(function, part) for part in value)


def weighted(weights: Tensor, leaf: Tensor) -> Tensor:
    return weights.reshape(-1, *(1,) * (leaf.dim() - 1)) * leaf


def dense_mixture(routing: Any, x: Any, experts: list) -> list[Tensor]:
    """Every expert on every token, or on every slot, weighted: no plan at all."""
    if isinstance(routing, SlotRouting):
        return slot_mixture(routing, x, experts)
    ids, weights = routing[:2]
    scale_inputs = len(routing) > 3 and routing[3]
    total: list[Tensor] = []
    for e, expert in enumerate(experts):
        for k in range(ids.shape[1]):
            here = ids[:, k] == e
            factor = torch.where(here, weights[:, k], 0)
            if scale_inputs:
                out = leaves_of(expert(scale_first_leaf(x, factor)))
                factor = here.to(weights.dtype)
            else:
                out = leaves_of(expert(x))
            parts = [weighted(factor, leaf) for leaf in out]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
    return total


def scale_first_leaf(x: Any, factor: Tensor) -> Any:
    first = leaves_of(x)[0]
    return map_leaves(lambda leaf: weighted(factor, leaf) if leaf is first else leaf, x)


def slot_mixture(routing: SlotRouting, x: Any, experts: list) -> list[Tensor]:
    dispatch, combine, length = routing
    length = length or max(1, len(dispatch))
    starts = range(0, max(1, len(dispatch)), length)
    groups = [slice(start, start + length) for start in starts]
    pieces = [slots_of_group(dispatch[g], combine[g], cut(x, g), experts) for g in groups]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def slots_of_group(dispatch: Tensor, combine: Tensor, x: Any, experts: list) -> list[Tensor]:
    slots = dispatch.shape[1] // len(experts)
    inputs = map_leaves(lambda leaf: torch.einsum("ts,t...->s...", dispatch, leaf), x)
    own = [cut(inputs, slice(e * slots, (e + 1) * slots)) for e in range(len(experts))]
    outputs = [leaves_of(expert(part)) for expert, part in zip(experts, own, strict=True)]
    joined = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return [torch.einsum("ts,s...->t...", combine, leaf) for leaf in joined]


def cut(x: Any, rows: slice) -> Any:
    return map_leaves(lambda leaf: leaf[rows], x)


def make_mask(masked: str, T: int) -> Tensor | None:
    if masked == "nobody":
        return None
    if masked == "all":
        return torch.randint(1, 3, (T,))
    if masked == "behind":
        return torch.tensor([0] * REAL + [1, 2, 1, 1, 3, 1, 1, 1])
    return torch.randint(4, (T,)) * torch.randint(2, (T,))


def make_input(kind: str, x: Tensor) -> Any:
    """Tokens, or a nest whose other leaves have nothing to differentiate."""
    if kind != "nested":
        return x
    T, generator = len(x), torch.Generator().manual_seed(len(x))
    image = torch.randn(T, 2, 3, generator=generator).to(x)
    scale = torch.randn(T, 1, generator=generator).to(x)
    return {"x": x, "image": image, "rest": [scale]}


def as_layout(layout: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same tokens in another shape, and a mask that fits."""
    T, D = x.shape
    if layout == "strided":
        return x.t().contiguous().t(), mask
    if layout == "batch":
        rows = next(n for n in (3, 2, 1) if T % n == 0)
        mask = None if mask is None else mask.view(rows, T // rows)
        return x.view(rows, T // rows, D), mask
    if layout == "jagged":
        offsets = torch.tensor([0, T // 3, T // 3, T])
        x = torch.nested.nested_tensor_from_jagged(x, offsets)
        if mask is not None and T % 2:
            mask = torch.nested.nested_tensor_from_jagged(mask, offsets)
        return x, mask
    return x, mask


def check(
    seed: int,
    *,
    gate: str,
    kind: str,
    T: int,
    D: int,
    dtype: str = "float64",
    training: bool = True,
    masked: str = "nobody",
    losses: tuple[str, ...] = (),
    activation: str = "gelu",
    bias: bool = True,
    layout: str = "flat",
    mask_dict: dict[int, float] | None = None,
    recomputed: bool = False,
    frozen: bool = False,
    steps: int = 1,
    mask_type: str = "int64",
    no_grad: bool = False,
    capacity: int | None = None,
    autocast: bool = False,
    backend: str | None = None,
) -> None:
    """A layer against its gate without masked tokens and all experts on all tokens."""

    def once(seed: int) -> None:
        seed_everything(seed, f"{kind} {gate}")
        layer = build(kind, gate, D, activation, bias, mask_dict, capacity).train(training)
        if layer.gate.has_logits:
            for name in losses:
                layer.gate.add_loss(name, 0.1)
        for parameter in layer.parameters():  # numbers that every type has
            parameter.data = parameter.data.to(dtype_of(dtype)).double()
        if frozen:
            layer.experts.requires_grad_(False)
        truth = copy.deepcopy(layer)
        layer = layer.to(dtype_of(dtype))
        call = layer
        if backend is not None:
            torch._dynamo.reset()
            call = torch.compile(layer, fullgraph=True, backend=backend)
        for step in range(steps):
            mask = make_mask(masked, T + 3 * step)
            x = torch.randn(T + 3 * step if mask is None else len(mask), D).to(dtype_of(dtype))
            if mask is not None and mask_dict is None:
                x[mask != 0] = float("nan")
            given = None if mask is None else mask.to(dtype_of(mask_type))
            torch.manual_seed(seed + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                run = _without_gradients if no_grad else _actual
                seen, actual = run(layer, call, x, given, kind, layout, recomputed)
            torch.manual_seed(seed + step)
            ids, expected = _expected(truth, x, mask, kind, activation, mask_dict, capacity)
            if ids is not None:
                assert_equal_choice(seen, ids, "ids")
            rounded = torch.bfloat16 if autocast else dtype_of(dtype)
            try:
                _assert_same(actual, expected, rounded, no_grad)
            except WrongGradient as err:
                if activation != "relu":
                    raise
                raise OtherChoice(f"a side of relu's kink: {err}") from err

    unless_tied(once, seed, dtype)


def _without_gradients(*arguments):
    with torch.no_grad():
        return _actual(*arguments)


def _actual(layer, call, x, mask, kind, layout, recomputed):
    seen = []
    layer.routing_hooks = (lambda _layer, _x, routing: seen.append(routing),)
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_(torch.is_grad_enabled())
    shaped, given = as_layout(layout, leaf, mask)
    inp = make_input(kind, shaped)
    y = checkpoint(call, inp, given, use_reentrant=False) if recomputed else call(inp, given)
    outputs = leaves_of(y)
    if layout == "jagged":
        outputs = [outputs[0].values()]
    outputs = [out.reshape(len(x), *out.shape[-1:]) if kind == "mlp" else out for out in outputs]
    with torch.autocast("cpu", enabled=False):
        results = _step(layer, outputs, leaf)
    routing = seen[0]  # recomputation sees it again
    there = slice(None) if mask is None else mask == 0
    ids = None if isinstance(routing, SlotRouting) else routing.topk_ids[there]
    return ids, results


def _expected(layer, x, mask, kind, activation, mask_dict, capacity):
    there = torch.ones(len(x), dtype=torch.bool) if mask is None else mask == 0
    layer.zero_grad(set_to_none=True)
    leaf = x.double().requires_grad_()
    inp = make_input(kind, leaf)
    real = map_leaves(lambda part: part[there], inp)
    routing = kept = layer.gate(leaves_of(real)[0])
    if capacity is not None and not isinstance(routing, SlotRouting):
        kept = (reference.limit_capacity(routing[0], E, capacity), *routing[1:])
    outputs = [
        part.new_zeros(len(x), *part.shape[1:]).index_put((there,), part)
        for part in dense_mixture(kept, real, experts_of(layer, activation))
    ]
    if mask_dict and mask is not None:
        state = {n: b.clone() for n, b in layer.gate.named_buffers()}
        held = layer.gate.get_loss()
        weights = layer.gate(leaf)[1].sum(1)
        layer.gate.get_loss()
        for name, buffer in layer.gate.named_buffers():
            buffer.copy_(state[name])
        for value, row in mask_dict.items():
            fill = (weights * row)[:, None].expand_as(outputs[0])
            outputs = [torch.where((mask == value)[:, None], fill, outputs[0])]
        results = _step(layer, outputs, leaf, held)
    else:
        results = _step(layer, outputs, leaf)
    ids = None if isinstance(routing, SlotRouting) else routing[0]
    return ids, results


NO_LOSS = object()


def _step(layer: FMoE, outputs: list[Tensor], leaf: Tensor, loss: Any = NO_LOSS) -> dict[str, Any]:
    """Outputs, loss, gradients and buffers, by name."""
    loss = layer.gate.get_loss() if loss is NO_LOSS else loss
    results: dict[str, Any] = {f"y{i}": out.detach() for i, out in enumerate(outputs)}
    total = sum(
        (out.double() * torch.linspace(0.5, 1.5, out.shape[-1])).sin().sum() for out in outputs
    )
    if loss is not None:
        results["loss"] = loss.detach()
        total = total + loss.double()
    results.update({f"buffer {n}": b.clone() for n, b in layer.named_buffers()})
    if not torch.is_grad_enabled():
        return results
    total.backward()
    results["grad x"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    for name, parameter in layer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        results[f"grad {name}"] = grad
    return results


def _assert_same(actual: dict, expected: dict, dtype: torch.dtype, no_grad: bool) -> None:
    if no_grad:
        expected = {n: value for n, value in expected.items() if not n.startswith("grad ")}
    assert actual.keys() == expected.keys(), f"{sorted(actual)}, expected {sorted(expected)}"
    for name, want in expected.items():
        got = actual[name]
        if name.startswith("grad"):
            try:
                assert_gradient(
                    got, want, dtype, name, slack=6.0
                )  # terms are rounded between calls
            except AssertionError as err:
                raise WrongGradient(*err.args) from err
        elif want.is_floating_point():
            assert_value(got, want, dtype, name)
        elif not torch.equal(got, want):
            raise OtherChoice(f"{name}: got {got.tolist()}, expected {want.tolist()}")
