"""Compare an op with its reference on awkward inputs: CPU, simulator, CUDA, dtypes, gradient, opcheck."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeops.numba import _cuda
from moeops.numba._block_op import BlockOp
from moeops.numba._ops import Op, poison_of
from moeops.numba._rules import RuleError, caller_file

# Relative to the largest magnitude expected: room for a rounded intermediate or two.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


class CheckError(AssertionError):
    """An op and its reference disagree, or an output is not written."""


@dataclass
class CheckReport:
    """What ``check`` compared: one line per device and sample, and what was not run and why."""

    op: str
    lines: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.op}:",
                *(f"  {x}" for x in self.lines),
                *(f"  not run: {x}" for x in self.skipped),
            )
        )


def check(
    op: Op,
    reference: Callable[..., Any],
    samples: Sequence[Mapping[str, Any]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    devices: Sequence[str] | None = None,
    gradient: bool | None = None,
    simulator: bool = True,
    opcheck: bool = True,
) -> CheckReport:
    """Compare an op with a reference, on every target this machine has.

    For every sample, as it is, with non-contiguous tensors, and in every type: the outputs on CPU and, if there is
    one, on the CUDA device, against ``reference`` in float64 for the same rounded inputs. Outputs are filled with NaN
    (integers with a number that nobody means) before the rule runs, so that an element it never writes is found. Then
    gradients against autograd through the reference, the CUDA simulator in a process of its own, and
    ``torch.library.opcheck``.

    Args:
        op: made by one of the decorators.
        reference: takes the op's arguments by name and returns its outputs; plain PyTorch.
        samples: arguments of calls, by name, in float32 on CPU; by default awkward ones for a routing op (T = 0 and 1,
            equal logits, large logits, one expert, K = E).
        dtypes: float types to run in.
        devices: where to run; ``None`` for the CPU and, if there is one, the CUDA device.
        gradient: compare gradients; ``None`` where the op has one.
        simulator: run the simulator on the smallest samples (only if the op is at module level, which it re-imports).
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
    if devices is None:
        devices = []
        if isinstance(op, BlockOp) and op._cpu_function is None:
            report.skipped.append("cpu: the op has no CPU function")
        else:
            devices.append("cpu")
        if torch.cuda.is_available() and not _cuda.simulating():
            devices.append("cuda")
        else:
            report.skipped.append("cuda: no device")
    for device in devices:
        for dtype in dtypes:
            for index, sample in enumerate(samples):
                _check_values(op, reference, sample, f"sample {index} on {device}", device, dtype)
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        report.lines.append(f"{device}: {len(samples)} samples in {names}, values agree")
        if gradient or (gradient is None and op._gradient is not None):
            for index, sample in enumerate(samples):
                _check_gradient(op, reference, sample, f"sample {index} on {device}", device)
            report.lines.append(f"{device}: gradients agree")
        if opcheck:
            call = _convert(op, samples[0], device, torch.float32)
            torch.library.opcheck(op.overload, tuple(op.bind(**call)))
            report.lines.append(f"{device}: opcheck passes")
    if simulator:
        _check_simulator(op, reference, samples, report)
    return report


def default_samples(op: Op) -> Iterator[dict[str, Any]]:
    """Calls of a routing op that break careless rules."""
    own = op.signature
    if own.inputs[0].name != "logits" or len(own.tensors) != 1:
        raise ValueError(
            f"{op.name}: samples must be given for an op with other tensors than logits. Pass samples=[{{...}}]."
        )
    if any(item.default is None and item.name != "top_k" for item in own.scalars):
        raise ValueError(
            f"{op.name}: samples must be given for an op with numbers without defaults. Pass samples=[{{...}}]."
        )
    generator = torch.Generator().manual_seed(0)

    def logits(*shape: int) -> Tensor:
        # Distinct, also after rounding to bfloat16: the order does not depend on the type.
        order = torch.rand(shape, generator=generator).argsort(-1).float()
        return (order - shape[-1] / 2) / 4

    sizes = [(5, 8), (33, 6), (1, 4), (0, 4), (3, 1)]
    for T, E in sizes:
        for top_k in sorted({1, min(2, E), E}):
            yield {"logits": logits(T, E), "top_k": top_k}
    yield {"logits": torch.zeros(4, 6), "top_k": 3}
    yield {"logits": logits(4, 6).round(), "top_k": 4}
    yield {"logits": logits(4, 6) * 64, "top_k": 3}


def _convert(op: Op, sample: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A sample's tensors on a device, floats in a type."""
    result = {}
    for name, value in sample.items():
        if isinstance(value, Tensor):
            value = value.to(device)
            value = value.to(dtype) if value.is_floating_point() else value
        result[name] = value
    return result


def _scattered(value: Any) -> Any:
    """The same tensor with strides that are not those of a contiguous one."""
    if not isinstance(value, Tensor) or value.numel() < 2:
        return value
    wide = value.new_zeros((*value.shape[:-1], 2 * value.shape[-1]))
    view = wide[..., ::2]
    return view.copy_(value)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _expected(reference: Callable[..., Any], call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    exact = {
        name: value.detach().cpu().double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.cpu()
        if isinstance(value, Tensor)
        else value
        for name, value in call.items()
    }
    return _as_tuple(reference(**exact))


def _check_values(
    op: Op,
    reference: Callable[..., Any],
    sample: Mapping[str, Any],
    where: str,
    device: str,
    dtype: torch.dtype,
) -> None:
    call = _convert(op, sample, device, dtype)
    expected = _expected(reference, call)
    for kind, values in (
        (where, call),
        (f"{where}, not contiguous", {k: _scattered(v) for k, v in call.items()}),
    ):
        op.poison = True
        try:
            with torch.no_grad():
                actual = _as_tuple(op(**values))
        finally:
            op.poison = False
        compare(op, actual, expected, dtype, f"{kind} in {dtype}")


def compare(
    op: Op,
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype,
    where: str,
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
        if got.dtype != torch.bool:
            _check_written(op, name, got, want, where)
        if got.is_floating_point():
            scale = max(0.01, float(want[want.isfinite()].abs().max())) if want.numel() else 1.0
            bound = TOLERANCES[min((dtype, got.dtype), key=lambda d: torch.finfo(d).bits)] * scale
            exact, other = got.double(), want.double()
            wrong = ~((exact - other).abs() <= bound) & ~(exact == other)
        else:
            wrong = got.to(torch.int64) != want.to(torch.int64)
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            row = place[0]
            raise CheckError(
                f"{op.name}: {name} must equal the reference's, got the first difference in row {row} at {place}: "
                f"{got[tuple(place)].item()} instead of {want[tuple(place)].item()} ({where}).\n"
                f"  row {row} of the op:        {got[row].tolist()}\n"
                f"  row {row} of the reference: {want[row].tolist()}\n"
                f"  Rule: {op.rule.where}."
            )


def _check_written(op: Op, name: str, got: Tensor, want: Tensor, where: str) -> None:
    poison = poison_of(got.dtype)
    left = got.isnan() & ~want.isnan() if got.is_floating_point() else got == poison
    if bool(left.any()):
        place = [int(i) for i in left.nonzero()[0]]
        raise CheckError(
            f"{op.name}: {name} must be written by the rule in every element, got none at {place} ({where}), or NaN. "
            f"Rule: {op.rule.where}."
        )


def _check_gradient(
    op: Op,
    reference: Callable[..., Any],
    sample: Mapping[str, Any],
    where: str,
    device: str,
) -> None:
    """Gradients of all float inputs in float64, with random gradients of the float outputs."""
    generator = torch.Generator().manual_seed(1)
    results: list[dict[str, Tensor | None]] = []
    for function, target in ((reference, "cpu"), (op, device)):
        call = _convert(op, sample, target, torch.float64)
        leaves = {
            name: value.requires_grad_()
            for name, value in call.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        outputs = [out for out in _as_tuple(function(**call)) if out.is_floating_point()]
        if not results:
            grads = [
                torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs
            ]
        kept = [
            (out, grad.to(out))
            for out, grad in zip(outputs, grads, strict=True)
            if out.requires_grad
        ]
        if not kept:
            results.append({})
            continue
        found = torch.autograd.grad(
            [out for out, _ in kept],
            list(leaves.values()),
            [grad for _, grad in kept],
            allow_unused=True,
        )
        results.append(dict(zip(leaves, found, strict=True)))
    for name, want in results[0].items():
        got = results[1].get(name)
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
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            raise CheckError(
                f"{op.name}: the gradient of {name} must equal the reference's, got the first difference in row "
                f"{place[0]} at {place}: {got[tuple(place)].item()} instead of {want[tuple(place)].item()} ({where}). "
                f"Rule: {op.rule.where}."
            )


def _check_simulator(
    op: Op,
    reference: Callable[..., Any],
    samples: Sequence[Mapping[str, Any]],
    report: CheckReport,
) -> None:
    # The simulator takes milliseconds per CUDA thread.
    small = [
        s
        for s in samples
        if max((v.numel() for v in s.values() if isinstance(v, Tensor)), default=0) <= 256
    ][:6]
    if not small:
        report.skipped.append("simulator: no sample has at most 256 elements per tensor")
        return
    calls = [_convert(op, sample, "cpu", torch.float32) for sample in small]
    if _cuda.simulating():
        results = [_as_tuple(op.simulate(**call)) for call in calls]
    else:
        try:
            results = simulate_elsewhere(op, calls)
        except LookupError as err:
            report.skipped.append(f"simulator: {err}")
            return
    for index, (call, actual) in enumerate(zip(calls, results, strict=True)):
        where = f"sample {index} in the simulator"
        compare(op, actual, _expected(reference, call), torch.float32, where)
    report.lines.append(f"simulator: {len(small)} samples, values agree")


def simulate_elsewhere(op: Op, calls: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, ...]]:
    """Run calls in a new process under the simulator, which imports the module of the rule again.

    Raises:
        LookupError: the op is not made at module level.  RuleError: the process failed.
    """
    function = op.rule.function
    if "<locals>" in function.__qualname__:
        raise LookupError(
            "the rule is defined inside a function, where another process cannot find it"
        )
    path = caller_file(function)
    if not Path(path).is_file():
        raise LookupError(f"the rule is not in a file ({path})")
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pt"), Path(folder, "result.pt")
        torch.save(
            {
                "op": op.name,
                "module": function.__module__,
                "file": path,
                "calls": [dict(call) for call in calls],
            },
            job,
        )
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        done = subprocess.run(
            [sys.executable, "-m", "moeops.numba._simulate", str(job), str(result)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-12:])
            raise RuleError(
                f"{op.name}: rule {op.rule.where} must run in the simulator, got:\n{tail}\n"
                "Run the file with NUMBA_ENABLE_CUDASIM=1 and call op.simulate()."
            )
        return torch.load(result, weights_only=True)
