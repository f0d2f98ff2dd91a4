"""Which gradients are summed behind which dispatch of a backward: bytes per slice. Seconds and bytes.

A backward passes the layers with experts from the last to the first. Behind each one's last dispatch the links that
carry gradients have nothing to do until its combine, for a time that is its window: gradients that are known by then
can be summed there for nothing. What finds no window is summed after all others, or makes a slice longer than that.

Source: Pan et al. 2025, arXiv:2501.10714, section 5, whose second step is a search by differential evolution. Here it
is exact up to the size of a unit. Only the standard library is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moeops.cost.laws import BytesLaw

UNITS = 128  # that all bytes are divided into
# Exposed seconds of a slice count a little more than those of the rest, beside which there may be other work.
_PREFER_REST = 1 + 1e-6


class SlicePlan(NamedTuple):
    """What is summed where.

    Attributes:
        num_bytes: of each slice, in the order of the backward, and of the rest behind them, which is last.
        exposed_seconds: by which slices and rest are longer than their windows.
    """

    num_bytes: tuple[float, ...]
    exposed_seconds: float


def bytes_within(law: BytesLaw, seconds: float) -> float:
    """How many bytes can be summed in so many seconds: the inverse of the law; 0 where a call takes longer."""
    if seconds < law.call_seconds:
        return 0.0
    if law.seconds_per_byte == 0:
        return math.inf
    return (seconds - law.call_seconds) / law.seconds_per_byte


def plan_slices(
    known_bytes: Sequence[float], windows: Sequence[float], law: BytesLaw, *, units: int = UNITS
) -> SlicePlan:
    """Divide gradients among the windows of a backward, so that the least time is exposed.

    Args:
        known_bytes: of gradients that become known before each window and after the one before, and after the last
            window: one more than there are windows without the last, so as many as windows plus 1.
        windows: seconds for which each layer's links are idle, in the order of the backward, and seconds of other work
            that is left after the last of them: as many as ``known_bytes``.
        law: seconds of an all-reduce by the bytes of its tensors.
        units: that all bytes are divided into; slices are whole numbers of them but for what is left.

    Returns:
        The plan with the least exposed time; of equal ones the one that exposes the rest, and fills windows early.

    Raises:
        ValueError: there are not as many windows as known_bytes, or none.

    Example:
        >>> plan_slices([10.0, 0.0], [6.0, 100.0], BytesLaw(1.0, 1.0), units=10)
        SlicePlan(num_bytes=(5.0, 5.0), exposed_seconds=0.0)
    """
    if not windows or len(windows) != len(known_bytes):
        raise ValueError(
            f"plan_slices: windows must be as many as known_bytes, at least 1, got {len(windows)} and "
            f"{len(known_bytes)}. The last of both is what comes after all layers."
        )
    total = float(sum(known_bytes))
    if total == 0:
        return SlicePlan((0.0,) * len(windows), 0.0)
    unit = total / units
    # Whole units that are known before each window; all that there are before the last one.
    known = [int(sum(known_bytes[: place + 1]) / unit + 1e-9) for place in range(len(windows))]
    known[-1] = units
    costs = [[_PREFER_REST * s for s in _exposed(w, unit, units, law)] for w in windows[:-1]]
    costs.append(_exposed(windows[-1], unit, units, law))
    # best[done]: the least seconds with so many units summed, and what the last window's slice was.
    best = [0.0] + [math.inf] * units
    chosen: list[list[int]] = []
    for place, cost in enumerate(costs):
        last = place == len(costs) - 1
        following = [math.inf] * (units + 1)
        slices = [0] * (units + 1)
        for done in range(known[place] + 1):
            if last and done < units:
                continue
            # The smallest slice first: of equal plans, the one whose earlier slices are larger.
            for size in range(done + 1):
                seconds = best[done - size] + cost[size]
                if seconds < following[done] - 1e-15:
                    following[done], slices[done] = seconds, size
        best = following
        chosen.append(slices)
    sizes = []
    done = units
    for slices in reversed(chosen):
        sizes.append(slices[done] * unit)
        done -= slices[done]
    sizes.reverse()
    pairs = zip(sizes, windows, strict=True)
    exposed = sum(max(0.0, law.seconds(size) - window) for size, window in pairs if size)
    return SlicePlan(tuple(sizes), exposed)


def _exposed(window: float, unit: float, units: int, law: BytesLaw) -> list[float]:
    """Seconds by which an all-reduce of so many units is longer than its window."""
    longer = [max(0.0, law.seconds(size * unit) - window) for size in range(1, units + 1)]
    return [0.0, *longer]
