"""In how many chunks a layer works, forward and backward, and where they begin. T tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

from moeops import _checks
from moeops.cost.model import CostModel


class Degrees(NamedTuple):
    """Chunks of a layer in each direction; neither needs to divide the other.

    Attributes:
        forward: at least 1.
        backward: at least 1.
    """

    forward: int = 1
    backward: int = 1

    @property
    def are_equal(self) -> bool:
        """Both directions have the same chunks."""
        return self.forward == self.backward

    @property
    def are_one(self) -> bool:
        """Nothing is cut. Dynamo of torch 2.11 knows no pair that equals these."""
        return self.forward == 1 and self.backward == 1

    def __str__(self) -> str:
        return f"{self.forward}" if self.are_equal else f"({self.forward}, {self.backward})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoChunks:
    """``n_chunks=`` that a cost model chooses when the layer is built, from rank 0's model for all ranks.

    Attributes:
        cost_model: of this machine and its network; ``None`` to measure them when the layer is built, see
            ``moeops.profiling.job``.
        num_tokens: ``T`` of a rank for which to choose; other numbers of tokens are cut into as many chunks. ``None``
            where the dispatcher says what is sent: ``Gather(max_tokens=...)``, ``Static`` with an int.
    """

    cost_model: CostModel | None = dataclasses.field(default=None, repr=False, compare=False)
    num_tokens: int | None = None

    def check(self, op: str) -> None:
        """Raise where a value is wrong."""
        if not isinstance(self.cost_model, CostModel | None):
            raise TypeError(
                f"{op}: cost_model must be a CostModel, or None to measure, where n_chunks is chosen, got "
                f"{_checks.describe(self.cost_model)}. Pass CostModel.load(FILE), with a file of python -m moeops "
                "profile."
            )
        if self.num_tokens is not None:
            _checks.check_int(op, "num_tokens", self.num_tokens, 1, "Pass the tokens of a rank.")


NumChunks = int | tuple[int, int] | str | AutoChunks


def as_auto(op: str, n_chunks: Any) -> AutoChunks | None:
    """Read ``n_chunks=``, if a cost model is to choose.

    Raises:
        ValueError: it is another word than "auto".
    """
    if isinstance(n_chunks, str):
        if n_chunks != "auto":
            raise ValueError(
                f'{op}: n_chunks must be an int, a pair (forward, backward) or "auto", got {n_chunks!r}. Pass one of '
                "these."
            )
        return AutoChunks()
    return n_chunks if isinstance(n_chunks, AutoChunks) else None


def as_degrees(op: str, n_chunks: Any) -> Degrees:
    """Read ``n_chunks=``: one number for both directions, or a pair of numbers.

    Raises:
        ValueError: a number is below 1, or there are not two of them.  TypeError: it is neither.

    Example:
        >>> as_degrees("FMoE", 2), as_degrees("FMoE", (2, 3))
        (Degrees(forward=2, backward=2), Degrees(forward=2, backward=3))
    """
    advice = 'Use 1 for no overlap, a pair (forward, backward), or "auto".'
    if not isinstance(n_chunks, (tuple, list)):
        _checks.check_int(op, "n_chunks", n_chunks, 1, advice)
        return Degrees(n_chunks, n_chunks)
    if len(n_chunks) != 2:
        raise ValueError(
            f"{op}: n_chunks must be one int or a pair (forward, backward), got {n_chunks!r}. {advice}"
        )
    for number in n_chunks:
        _checks.check_int(op, "n_chunks", number, 1, advice)
    return Degrees(*n_chunks)


def one_degree(op: str, degrees: Degrees) -> int:
    """The number of chunks where both directions must have the same."""
    if not degrees.are_equal:
        raise NotImplementedError(
            f"{op}: n_chunks must be one number for both directions where the experts are modules or an activation of "
            f'your own, where hooks see rows and with a hierarchy of the form "leader", got {degrees}. Pass an int.'
        )
    return degrees.forward


def cut_points(degrees: Iterable[int]) -> list[Fraction]:
    """Where chunks begin and end, as parts of the whole, for several degrees at once.

    Between two of them are cells: every chunk of every one of the degrees is a range of these.

    Example:
        >>> [str(point) for point in cut_points([2, 3])]
        ['0', '1/3', '1/2', '2/3', '1']
    """
    return sorted({Fraction(i, degree) for degree in degrees for i in range(degree + 1)})


def cut_fractions(degrees: Iterable[int]) -> list[tuple[int, int]]:
    """``cut_points`` as numerators and denominators: numbers, which compilers know."""
    return [(point.numerator, point.denominator) for point in cut_points(degrees)]


def at(point: Fraction, total: int) -> int:
    """A point of a whole of so many rows, rounded down: an int, or symbolic as the total is."""
    return total * point.numerator // point.denominator
