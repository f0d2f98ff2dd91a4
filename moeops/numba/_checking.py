"""Compare an op with its reference on awkward inputs: devices, types, strides, gradients, opcheck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeops.numba import _launch
from moeops.numba._block_op import BlockOp
from moeops.numba._ops import Op, poison_of

# Relative to the largest magnitude expected: room for a rounded intermediate or two.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# The simulator takes milliseconds per CUDA thread: larger samples are left out there.
_SIMULATED_ELEMENTS = 64


class CheckError(AssertionError):
    """An op and its reference disagree, or an output is not written."""


@dataclass
class CheckReport:
    """What ``check`` compared: one line per device and sample, and what was not run and why."""

    op: str
    lines: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = [f"not run: {line}" for line in self.skipped]
        return "\n  ".join((f"{self.op}:", *self.lines, *skipped))


def check(
    op: Op,
    reference: Callable[..., Any],
    samples: Sequence[Mapping[str, Any]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    devices: Sequence[str] | None = None,
    gradient: bool | None = None,
    opcheck: bool = True,
) -> CheckReport:
    """Compare an op with a reference, on every target this machine has.

    For every sample, as it is, with non-contiguous tensors, and in every type: the outputs against ``reference`` in
    float64 for the same rounded inputs. Outputs are filled with NaN (integers with a number that nobody means) before
    the rule runs, so that an element it never writes is found. Then gradients against autograd through the reference,
    and ``torch.library.opcheck``.

    Args:
        op: made by one of the decorators.
        reference: takes the op's arguments by name and returns its outputs; plain PyTorch.
        samples: arguments of calls, by name, in float32 on CPU; by default awkward ones for a routing op (T = 0 and 1,
            equal logits, large logits, one expert, K = E).
        dtypes: float types to run in.
        devices: where to run: ``"cpu"``, ``"cuda"``, and ``"simulator"``, which is Numba's CUDA simulator on the small
            samples in a process that was started with ``NUMBA_ENABLE_CUDASIM=1``; ``None`` for all that there are.
        gradient: compare gradients; ``None`` where the op has one.
        opcheck: run ``torch.library.opcheck``.

    Returns:
        A report to print.

    Raises:
        CheckError: the first difference, with row and both values.  RuleError: the rule does not compile or raises.
        ValueError: there are no samples.
    """
    samples = list(default_samples(op)) if samples is None else [dict(s) for s in samples]
    if not samples:
        raise ValueError(f"{op.name}: check must have samples, got none. Pass samples=[{{...}}].")
    report = CheckReport(op.name)
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    for device in _devices(op, report) if devices is None else devices:
        chosen = [s for s in samples if device != "simulator" or _largest(s) <= _SIMULATED_ELEMENTS]
        for dtype in dtypes:
            for index, sample in enumerate(chosen):
                _check_values(op, reference, sample, f"sample {index} on {device}", device, dtype)
        report.lines.append(f"{device}: {len(chosen)} samples in {names}, values agree")
        if device == "simulator":
            continue
        if gradient or (gradient is None and op._gradient is not None):
            for index, sample in enumerate(samples):
                _check_gradient(op, reference, sample, f"sample {index} on {device}", device)
            report.lines.append(f"{device}: gradients agree")
        if opcheck:
            call = _converted(samples[0], device, torch.float32)
            torch.library.opcheck(op.overload, tuple(op.bind(**call)))
            report.lines.append(f"{device}: opcheck passes")
    return report


def _devices(op: Op, report: CheckReport) -> list[str]:
    """Where this process can run the op; what it cannot goes into the report."""
    without = {
        "cpu": "the op has no CPU function"
        if isinstance(op, BlockOp) and op._cpu_function is None
        else None,
        "cuda": None if torch.cuda.is_available() and not _launch.simulating() else "no device",
        "simulator": None if _launch.simulating() else "needs NUMBA_ENABLE_CUDASIM=1",
    }
    report.skipped += [f"{device}: {reason}" for device, reason in without.items() if reason]
    return [device for device, reason in without.items() if reason is None]


def default_samples(op: Op) -> Iterator[dict[str, Any]]:
    """Calls of a routing op that break careless rules."""
    own = op.signature
    missing = None
    if own.inputs[0].name != "logits" or len(own.tensors) != 1:
        missing = "other tensors than logits"
    elif any(item.default is None and item.name != "top_k" for item in own.scalars):
        missing = "numbers without defaults"
    if missing:
        raise ValueError(
            f"{op.name}: samples must be given for what cannot be made up, got None for an op with {missing}. Pass "
            "samples=[{...}]."
        )
    generator = torch.Generator().manual_seed(0)

    def logits(*shape: int) -> Tensor:
        # Distinct, also after rounding to bfloat16: the order does not depend on the type.
        order = torch.rand(shape, generator=generator).argsort(-1).float()
        return (order - shape[-1] / 2) / 4

    for T, E in [(5, 8), (33, 6), (1, 4), (0, 4), (3, 1)]:
        for top_k in sorted({1, min(2, E), E}):
            yield {"logits": logits(T, E), "top_k": top_k}
    yield {"logits": torch.zeros(4, 6), "top_k": 3}
    yield {"logits": logits(4, 6).round(), "top_k": 4}
    yield {"logits": logits(4, 6) * 64, "top_k": 3}


def _converted(sample: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A sample's tensors on a device, floats in a type."""
    target = "cpu" if device == "simulator" else device

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(target, dtype if value.is_floating_point() else value.dtype)

    return {name: convert(value) for name, value in sample.items()}


def _largest(sample: Mapping[str, Any]) -> int:
    return max((v.numel() for v in sample.values() if isinstance(v, Tensor)), default=0)


def _scattered(value: Any) -> Any:
    """The same tensor with strides that are not those of a contiguous one."""
    if not isinstance(value, Tensor) or value.numel() < 2:
        return value
    wide = value.new_zeros((*value.shape[:-1], 2 * value.shape[-1]))
    return wide[..., ::2].copy_(value)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _check_values(
    op: Op,
    reference: Callable[..., Any],
    sample: Mapping[str, Any],
    where: str,
    device: str,
    dtype: torch.dtype,
) -> None:
    call = _converted(sample, device, dtype)
    with torch.no_grad():
        expected = _as_tuple(reference(**_converted(call, "cpu", torch.float64)))
    run: Callable[..., Any] = op
    calls = {where: call}
    if device == "simulator":
        run = op.simulate  # gets the contiguous tensors that the CPU gets
    else:
        calls[f"{where}, not contiguous"] = {name: _scattered(v) for name, v in call.items()}
    for kind, values in calls.items():
        op.poison = True
        try:
            with torch.no_grad():
                actual = _as_tuple(run(**values))
        finally:
            op.poison = False
        _compare(op, actual, expected, dtype, f"{kind} in {dtype}")


def _compare(
    op: Op, actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, where: str
) -> None:
    """Raise CheckError at the first row in which an output is not what it must be."""
    names = [output.name for output in op.signature.returned]
    if len(expected) != len(names):
        raise CheckError(
            f"{op.name}: reference must return {names}, got {len(expected)} tensors. Return them in this order."
        )
    for name, got, want in zip(names, actual, expected, strict=True):
        got, want = got.detach().cpu(), want.detach().cpu()
        if got.shape != want.shape:
            raise CheckError(
                f"{op.name}: {name} must have shape {list(want.shape)} like the reference's, got {list(got.shape)} "
                f"({where}). Rule: {op.rule.where}."
            )
        if got.numel() == 0:
            continue
        poison = poison_of(got.dtype)
        left = got.isnan() & ~want.isnan() if got.is_floating_point() else got == poison
        if got.dtype != torch.bool and bool(left.any()):
            raise CheckError(
                f"{op.name}: {name} must be written by the rule in every element, got none at {_first(left)} "
                f"({where}), or NaN. Rule: {op.rule.where}."
            )
        if got.is_floating_point():
            # The coarser of the type that was computed in and the type of the output.
            coarse = min((dtype, got.dtype), key=lambda d: torch.finfo(d).bits)
            bound = TOLERANCES[coarse] * max(0.01, float(want[want.isfinite()].abs().max()))
            exact, other = got.double(), want.double()
            wrong = ~((exact - other).abs() <= bound) & ~(exact == other)
        else:
            wrong = got.to(torch.int64) != want.to(torch.int64)
        _refuse_difference(op, name, got, want, wrong, where)


def _refuse_difference(
    op: Op, what: str, got: Tensor, want: Tensor, wrong: Tensor, where: str
) -> None:
    if not bool(wrong.any()):
        return
    place = _first(wrong)
    row, at = place[0], tuple(place)
    raise CheckError(
        f"{op.name}: {what} must equal the reference's, got the first difference in row {row} at {place}: "
        f"{got[at].item()} instead of {want[at].item()} ({where}).\n"
        f"  row {row} of the op:        {got[row].tolist()}\n"
        f"  row {row} of the reference: {want[row].tolist()}\n"
        f"  Rule: {op.rule.where}."
    )


def _first(marks: Tensor) -> list[int]:
    return [int(i) for i in marks.nonzero()[0]]


def _check_gradient(
    op: Op, reference: Callable[..., Any], sample: Mapping[str, Any], where: str, device: str
) -> None:
    """Gradients of all float inputs in float64, with random gradients of the float outputs."""
    expected = _gradients(reference, _converted(sample, "cpu", torch.float64))
    actual = _gradients(op, _converted(sample, device, torch.float64))
    for name, want in expected.items():
        got = actual[name]
        if got is None:
            # An input that the rule uses for its choice only; a reference may know a gradient for it.
            if want is not None and bool(want.any()) and name == op.signature.inputs[0].name:
                raise CheckError(
                    f"{op.name}: {name} must have a gradient like the reference's, got none ({where}). "
                    "Name a score=, or add op.backward."
                )
            continue
        want = torch.zeros_like(got) if want is None else want
        got, want = got.cpu(), want.cpu()
        bound = 1e-8 * max(0.1, float(want.abs().max()) if want.numel() else 1.0)
        wrong = ~((got - want).abs() <= bound)
        _refuse_difference(op, f"the gradient of {name}", got, want, wrong, where)


def _gradients(function: Callable[..., Any], call: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Gradients of a call's float inputs for gradients of its float outputs that are always the same."""
    generator = torch.Generator().manual_seed(1)
    leaves = {
        name: value.requires_grad_()
        for name, value in call.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs, grads = [], []
    for output in _as_tuple(function(**call)):
        if output.is_floating_point():
            grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            if output.requires_grad:
                outputs.append(output)
                grads.append(grad.to(output))
    if not outputs:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return dict(zip(leaves, found, strict=True))
