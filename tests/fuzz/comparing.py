"""Values and gradients of a function against its truth in float64."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from tolerances import TOLERANCES, assert_close

DTYPES = ("float64", "float32", "bfloat16", "float16")
# Gradients are sums of terms near one that may cancel; in float64 they are wrong for other reasons.
SMALLEST_GRADIENT = 1.0
REPEATS = 3


class OtherChoice(AssertionError):
    """Integers differ from those of the truth."""


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def draw_dtype(rng: Random) -> str:
    return rng.choices(DTYPES, (4, 3, 2, 2))[0]


def draw_tokens(rng: Random) -> int:
    """How many tokens: none, a few, or an odd number."""
    sizes = (0, 1, 2, rng.randint(3, 16), rng.randint(17, 70), 2 * rng.randint(40, 120) + 1)
    return rng.choices(sizes, (2, 2, 1, 8, 4, 1))[0]


def seed_everything(seed: int, what: str) -> None:
    """Random numbers that depend on the kind of case too."""
    torch.manual_seed((seed << 8) ^ zlib.crc32(what.encode()))


def unless_tied(check: Callable[[int], None], seed: int, dtype: str) -> None:
    """Run a check, and allow one of a rounded type to choose otherwise where scores nearly tie: by chance, so seldom.

    In float64 ties by chance do not happen. Exact ties, which a case draws on purpose, are there with every seed.
    """
    try:
        check(seed)
    except OtherChoice:
        if dtype == "float64":
            raise
        for repeat in range(1, REPEATS + 1):
            check(
                seed ^ (repeat << 20)
            )  # torch's generator on the CPU reads 32 bits, 8 of them are the case's name


def assert_equal_choice(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.shape == expected.shape and torch.equal(actual.cpu().long(), expected.long()):
        return
    raise OtherChoice(f"{what}: got {actual.tolist()}, expected {expected.tolist()}")


def assert_gradient(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, slack: float = 4.0
) -> None:
    """As ``assert_close``, to the rounding of terms near one; ``slack`` is for sums of rounded terms."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    if not expected.numel():
        return
    error = (actual.detach().double() - expected.detach()).abs().max()
    scale = max(SMALLEST_GRADIENT, float(expected.detach().abs().max()))
    # Not "above": NaN is an error.
    assert float(error) <= slack * TOLERANCES[dtype] * scale, (
        f"{what} in {dtype}: off by {float(error):.3e}, scale {scale:.3e}"
    )


def assert_value(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """As ``assert_close``; in half types to the rounding of terms near one, since sums of few of them may cancel."""
    if dtype in (torch.float64, torch.float32):
        assert_close(actual, expected, dtype, what)
    else:
        assert_gradient(actual, expected, dtype, what, slack=2.0)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def compare(
    function: Callable[..., Any],
    truth: Callable[..., Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    frozen: tuple[str, ...] = (),
    through_func: str | None = None,
    backend: str | None = None,
) -> None:
    """Every output of ``function(**tensors)`` and every gradient against ``truth`` in float64.

    Args:
        function: under test; returns tensors, those of integers must be equal.
        truth: the same in plain PyTorch.
        tensors: float arguments by name.
        dtype: type that ``function`` computes in.
        frozen: arguments without a gradient.
        through_func: differentiate by ``torch.func``'s "vjp" or "jvp", or run two problems by its "vmap": these run
            the ops' ATen forms.
        backend: compile ``function`` in one graph with this backend.
    """
    names = [name for name in tensors if name not in frozen]
    leaves = {n: t.detach().requires_grad_(n in names) for n, t in tensors.items()}
    exact = {n: t.detach().double().requires_grad_(n in names) for n, t in tensors.items()}
    before = [t.detach().clone() for t in leaves.values()]
    expected = as_tuple(truth(**exact))
    if backend is not None:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend=backend)
    if through_func == "vmap":
        function = _twice(function)
    pull = None
    if through_func == "vjp":
        actual, pull = _by_func(function, leaves, names)
    else:
        actual = as_tuple(function(**leaves))
    assert len(actual) == len(expected)
    moving = []
    for place, (got, want) in enumerate(zip(actual, expected, strict=True)):
        if not want.is_floating_point():
            assert_equal_choice(got, want, f"output {place}")
            continue
        assert_value(got, want, dtype, f"output {place}")
        if want.requires_grad and (got.requires_grad or pull is not None):
            moving.append(place)
        elif want.requires_grad and names:
            grads = _gradients(expected, exact, names, {place: torch.ones_like(want)})
            moves = any(bool(grad.any()) for grad in grads if grad is not None)
            assert not moves, f"output {place} has no gradient"
    if moving and names:
        # Not all outputs at once: a gradient that an op does not get is another way through its backward.
        used = [place for place in moving if torch.rand(()) < 0.7] or moving[:1]
        directions = {place: _direction(actual[place], expected[place]) for place in used}
        wanted = _gradients(expected, exact, names, {p: d.double() for p, d in directions.items()})
        if through_func == "jvp":
            _compare_tangents(function, leaves, names, directions, wanted, dtype)
        got = _gradients(actual, leaves, names, directions) if pull is None else pull(directions)
        _compare_gradients(names, tensors, got, wanted, dtype)
    for (name, tensor), old in zip(leaves.items(), before, strict=True):
        same = torch.equal(tensor.detach().nan_to_num(7.0), old.nan_to_num(7.0))
        assert same, f"{name} was written to"


def _direction(actual: Tensor, expected: Tensor) -> Tensor:
    """A gradient of an output: dense, with the strides of a transposed one, or of a sum, which has none."""
    shape, how = expected.shape, int(torch.randint(4, ()))
    if how == 0:
        return torch.randn(()).to(actual.dtype).expand(shape)
    if how == 1:
        return torch.randn(shape[::-1]).to(actual.dtype).permute(tuple(reversed(range(len(shape)))))
    return torch.randn(shape).to(actual.dtype)


def _gradients(outputs, leaves, names, directions):
    return torch.autograd.grad(
        [outputs[place] for place in directions],
        [leaves[name] for name in names],
        list(directions.values()),
        allow_unused=True,
        retain_graph=True,
    )


def _compare_gradients(names, tensors, grads, grads_expected, dtype) -> None:
    for name, got, want in zip(names, grads, grads_expected, strict=True):
        want = torch.zeros_like(tensors[name], dtype=torch.float64) if want is None else want
        if got is None:
            assert not want.any(), f"{name} has no gradient"
            continue
        assert got.dtype == tensors[name].dtype, f"gradient of {name} is {got.dtype}"
        coarser = max(dtype, got.dtype, key=TOLERANCES.__getitem__)
        assert_gradient(got, want, coarser, f"gradient of {name}")


def _compare_tangents(function, leaves, names, directions, grads, dtype) -> None:
    """What a step changes along the directions is what the gradients say of that step."""
    fixed = {name: t.detach() for name, t in leaves.items()}
    steps = [torch.randn(fixed[name].shape).to(fixed[name].dtype) for name in names]

    def run(*values):
        outputs = as_tuple(function(**{**fixed, **dict(zip(names, values, strict=True))}))
        return tuple(outputs[place] for place in directions)

    _, tangents = torch.func.jvp(run, tuple(fixed[n] for n in names), tuple(steps))
    moved = [
        (tangent.double() * direction.double())
        for tangent, direction in zip(tangents, directions.values(), strict=True)
    ]
    said = [
        step.double() * grad for step, grad in zip(steps, grads, strict=True) if grad is not None
    ]
    scale = sum(float(part.detach().abs().sum()) for part in (*moved, *said))
    error = abs(float(sum(p.sum() for p in moved)) - float(sum(p.sum() for p in said)))
    assert error <= TOLERANCES[dtype] * max(1.0, scale), f"tangents are off by {error} of {scale}"


def _twice(function):
    """Both entries of a batch of two equal problems, run by ``torch.func.vmap``: the second one."""

    def run(**tensors):
        names = list(tensors)

        def one(*values):
            return as_tuple(function(**dict(zip(names, values, strict=True))))

        stacked = [torch.stack((t.detach() * 0.5, t)) for t in tensors.values()]
        return tuple(out[1] for out in torch.func.vmap(one)(*stacked))

    return run


def _by_func(function, leaves, names):
    """Outputs, and a function of directions that returns the gradients of ``names``."""
    fixed = {name: t.detach() for name, t in leaves.items()}

    def run(*values):
        outputs = as_tuple(function(**{**fixed, **dict(zip(names, values, strict=True))}))
        floats = tuple(o for o in outputs if o.is_floating_point())
        return floats, tuple(o for o in outputs if not o.is_floating_point())

    floats, pull, integers = torch.func.vjp(run, *(fixed[n] for n in names), has_aux=True)
    places, merged = [], []
    rest = [list(integers), list(floats)]
    # Which output is which is known from a plain call.
    with torch.no_grad():
        kinds = [o.is_floating_point() for o in as_tuple(function(**fixed))]
    for place, is_float in enumerate(kinds):
        merged.append(rest[is_float].pop(0))
        if is_float:
            places.append(place)

    def gradients(directions):
        cotangents = [
            directions.get(place, torch.zeros_like(value))
            for place, value in zip(places, floats, strict=True)
        ]
        return pull(tuple(cotangents))

    return tuple(merged), gradients
