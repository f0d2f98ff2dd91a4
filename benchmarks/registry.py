"""What is measured: a case is inputs, a function, its check and whether it is ours; a group holds comparable cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class WrongResult(Exception):
    """A case computed something else than the reference; it is not timed."""


# Relative Frobenius error of a whole tensor, and of its worst row. The second catches one wrong row among many.
TOLERANCE = {
    torch.float64: (1e-10, 1e-8),
    torch.float32: (2e-5, 1e-3),
    torch.float16: (5e-3, 5e-2),
    torch.bfloat16: (2e-2, 2e-1),
}


@dataclass
class Case:
    """One row of a table, ready to run.

    Attributes:
        forward: runs once and returns its outputs; gradients flow to ``leaves`` when grad mode is on.
        check: takes the outputs and, after a backward, the gradients by name; returns errors by name and raises
            WrongResult.
        leaves: tensors that require grad; empty when there is no backward to time.
        grad_outputs: one per differentiable output, in order; further outputs get none.
        grads: gradients by the reference's names, for layouts that differ from the reference's.
        bytes_forward: unique bytes an ideal kernel moves; 0 where GB/s means nothing.
        bytes_backward: the same for the backward.
    """

    forward: Callable[[], Sequence[Tensor]]
    check: Callable[[Sequence[Tensor], Mapping[str, Tensor] | None], dict[str, float]]
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    grad_outputs: Sequence[Tensor] = ()
    grads: Callable[[], Mapping[str, Tensor]] | None = None
    bytes_forward: int = 0
    bytes_backward: int = 0

    def clear_grads(self) -> None:
        """Set every gradient to None, so that a backward writes and never accumulates."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def backward(self, outputs: Sequence[Tensor]) -> None:
        """Gradients of every leaf."""
        torch.autograd.backward(outputs[: len(self.grad_outputs)], self.grad_outputs)

    def read_grads(self) -> Mapping[str, Tensor]:
        """Gradients by the reference's names."""
        if self.grads is not None:
            return self.grads()
        missing = [name for name, leaf in self.leaves.items() if leaf.grad is None]
        if missing:
            raise WrongResult(f"no gradient for {', '.join(missing)}")
        return {name: leaf.grad for name, leaf in self.leaves.items()}

    def verify(self) -> dict[str, float]:
        """Run without grad, then with backward, and compare both with the reference."""
        with torch.no_grad():
            errors = self.check(self.forward(), None)
        if self.leaves:
            self.clear_grads()
            outputs = self.forward()
            self.backward(outputs)
            errors = self.check([output.detach() for output in outputs], self.read_grads())
            self.clear_grads()
        return errors


@dataclass(frozen=True)
class Entry:
    """A registered row: ``build(problem)`` gives its case."""

    key: str
    label: str
    build: Callable[[Any], Case]
    ours: bool
    default_on: tuple[str, ...]


_GROUPS: dict[str, dict[str, Entry]] = {}


def register(
    group: str,
    key: str,
    label: str,
    *,
    ours: bool = False,
    default_on: tuple[str, ...] = ("cpu", "cuda"),
) -> Callable[[Callable[[Any], Case]], Callable[[Any], Case]]:
    """Register a builder as row ``key`` of ``group``; baselines are the rows that are not ours."""

    def add(build: Callable[[Any], Case]) -> Callable[[Any], Case]:
        rows = _GROUPS.setdefault(group, {})
        if key in rows:
            raise ValueError(f"register: {group} must have one row {key!r}, got a second.")
        rows[key] = Entry(key, label, build, ours, default_on)
        return build

    return add


def entries(group: str, device: str, keys: Iterable[str] | None = None) -> list[Entry]:
    """Rows of a group: those named in ``keys``, or the ones that run by default on this kind of device."""
    rows = _GROUPS[group].values()
    if keys is None:
        return [row for row in rows if device in row.default_on]
    wanted = set(keys)
    return [row for row in rows if row.key in wanted]


def known_keys() -> set[str]:
    """Every key that ``--peers`` accepts."""
    return {key for rows in _GROUPS.values() for key in rows}


def compare(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors by name; raises WrongResult where one is over the bounds of ``dtype``."""
    bound, row_bound = TOLERANCE[dtype]
    errors = {}
    for name, expected in want.items():
        actual = got[name]
        if actual.shape != expected.shape:
            raise WrongResult(
                f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
            )
        total, worst = relative_errors(actual, expected)
        # Written so that NaN fails.
        if not (total <= bound and worst <= row_bound):
            raise WrongResult(
                f"{name}: relative error {total:.2e} (bound {bound:.0e}), "
                f"worst row {worst:.2e} (bound {row_bound:.0e})"
            )
        errors[name] = total
    return errors


def compare_exact(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Raises WrongResult unless every tensor holds the same numbers; integer types may differ in width."""
    for name, expected in want.items():
        actual = got[name]
        if actual.shape != expected.shape:
            raise WrongResult(
                f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
            )
        wrong = int((actual != expected.to(actual.dtype)).sum())
        if wrong:
            raise WrongResult(f"{name}: {wrong} of {expected.numel()} entries differ")
    return dict.fromkeys(want, 0.0)


def relative_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Frobenius error of the whole, and the largest row error over the larger of that row's norm and the mean norm."""
    if want.numel() == 0:
        return 0.0, 0.0
    width = want.shape[-1] if want.dim() > 1 else 1
    got, want = got.reshape(-1, width), want.reshape(-1, width)
    # Blocks of rows bound the temporaries: weight gradients can be several GB.
    step = max(1, (1 << 26) // width)
    row_error, row_norm = [], []
    for g, w in zip(got.split(step), want.split(step), strict=True):
        row_error.append((g.to(w.dtype) - w).square().sum(1, dtype=torch.float64))
        row_norm.append(w.square().sum(1, dtype=torch.float64))
    error, norm = torch.cat(row_error), torch.cat(row_norm)
    if not float(norm.sum()):
        return (0.0, 0.0) if not float(error.sum()) else (float("inf"), float("inf"))
    total = float((error.sum() / norm.sum()).sqrt())
    worst = float((error / norm.clamp_min(float(norm.mean()))).max().sqrt())
    return total, worst
