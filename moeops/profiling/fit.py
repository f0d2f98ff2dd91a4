"""From measurements to laws: non-negative least squares of relative errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

import torch

from moeops.cost.laws import (
    ITEM_BYTES,
    BytesLaw,
    Direction,
    ExpertLaw,
    HostCost,
    HostLaw,
    LinkLaw,
    RouterLaw,
    expert_features,
    router_features,
)
from moeops.cost.model import CostModel

Rows = Sequence[Mapping[str, Any]]


def fit_nonnegative(
    features: Sequence[Sequence[float]], seconds: Sequence[float]
) -> tuple[list[float], float]:
    """Find coefficients, none below 0, with the least sum of squared relative errors.

    Args:
        features: a row per measurement; as many columns as coefficients, 4 at most.
        seconds: what was measured, above 0.

    Returns:
        The coefficients, and the root mean square of the relative errors.

    Raises:
        ValueError: there is no measurement, or one is not above 0.

    Example:
        >>> coefficients, residual = fit_nonnegative([[1, 0], [1, 2], [1, 4]], [3.0, 7.0, 11.0])
        >>> [round(value, 6) for value in coefficients], round(residual, 6)
        ([3.0, 2.0], 0.0)
    """
    if not seconds or min(seconds) <= 0:
        raise ValueError(
            f"fit_nonnegative: seconds must be above 0, and some, got {list(seconds)}."
        )
    times = torch.tensor(seconds, dtype=torch.float64)
    matrix = torch.tensor(features, dtype=torch.float64) / times[:, None]
    scale = matrix.abs().amax(0).clamp(min=torch.finfo(torch.float64).tiny)
    target = torch.ones(len(seconds), 1, dtype=torch.float64)
    columns = range(matrix.shape[1])
    best: tuple[float, list[float]] | None = None
    # The minimum under the bounds is an unbounded minimum of some columns: with four, trying all is exact and quick.
    for size in range(1, len(columns) + 1):
        for chosen in combinations(columns, size):
            part = matrix[:, chosen] / scale[list(chosen)]
            # gelsd copes with columns that depend on each other.
            solution = torch.linalg.lstsq(part, target, driver="gelsd").solution
            if float(solution.min()) < 0:
                continue
            error = float((part @ solution - target).square().mean().sqrt())
            # A column more must earn its place, or one that fits rounding would be kept.
            if best is None or error < best[0] * (1 - 1e-6):
                values = [0.0] * len(columns)
                for place, column in enumerate(chosen):
                    values[column] = float(solution[place, 0] / scale[column])
                best = error, values
    if best is None:
        raise ValueError("fit_nonnegative: features must be above 0 somewhere, got none that is.")
    return best[1], best[0]


def fit_model(
    measurements: Mapping[str, Any], device: str, machine: Mapping[str, Any]
) -> CostModel:
    """Build the laws of a machine from its raw measurements, those that are there.

    Args:
        measurements: lists of records by what was measured, as ``moeops.planner.measure`` writes them.
        device: "cpu" or "cuda".
        machine: what was measured on.

    Returns:
        The model, which holds the measurements too.
    """
    copies = measurements.get("host_copy", [])
    return CostModel(
        device=device,
        experts=_directions(measurements.get("experts", []), ExpertLaw, _expert_row),
        router=_directions(measurements.get("router", []), RouterLaw, _router_row),
        memory=_bytes_law(measurements.get("memory", [])),
        host_copy_seconds=median([row["seconds"] for row in copies]) if copies else None,
        inside_node=_link_law(measurements.get("inside_node", [])),
        between_nodes=_link_law(measurements.get("between_nodes", [])),
        all_gather=_link_law(measurements.get("all_gather", [])),
        reduce_scatter=_link_law(measurements.get("reduce_scatter", [])),
        all_reduce=_link_law(measurements.get("all_reduce", [])),
        host=_host_costs(measurements.get("host", [])),
        overlap_loss=_overlap_loss(measurements.get("overlap", [])),
        machine=machine,
        measurements=measurements,
    )


def _expert_row(row: Mapping[str, Any]) -> tuple[float, ...]:
    return expert_features(
        row["rows"],
        row["d_model"],
        row["d_hidden"],
        row["num_projections"],
        ITEM_BYTES[row["dtype"]],
        row["num_experts"],
    )


def _router_row(row: Mapping[str, Any]) -> tuple[float, ...]:
    return router_features(
        row["num_tokens"], row["d_model"], row["num_experts"], ITEM_BYTES[row["dtype"]]
    )


def _directions(
    rows: Rows, law: Callable[..., Any], features: Callable[[Mapping[str, Any]], tuple[float, ...]]
) -> dict[str, Direction]:
    """A law for each type and way."""
    found = {}
    for dtype in _in_order(row["dtype"] for row in rows):
        ways = {}
        for way in ("forward", "backward"):
            part = [row for row in rows if row["dtype"] == dtype and row["way"] == way]
            coefficients, residual = fit_nonnegative(
                [(1.0, *features(row)) for row in part], [row["seconds"] for row in part]
            )
            ways[way] = law(*coefficients, residual)
        found[dtype] = Direction(**ways)
    return found


def _bytes_law(rows: Rows) -> BytesLaw | None:
    if not rows:
        return None
    coefficients, residual = fit_nonnegative(
        [(1.0, row["num_bytes"]) for row in rows], [row["seconds"] for row in rows]
    )
    call, per_byte = coefficients
    return BytesLaw(call, per_byte, residual)


def _link_law(rows: Rows) -> LinkLaw | None:
    """Calls with different numbers of messages and of bytes: what a message costs shows if they do not go together."""
    if not rows:
        return None
    coefficients, residual = fit_nonnegative(
        [(1.0, row["num_messages"], row["num_bytes"]) for row in rows],
        [row["seconds"] for row in rows],
    )
    call, per_message, per_byte = coefficients
    return LinkLaw(call, per_message, per_byte, residual)


def _host_costs(rows: Rows) -> dict[str, dict[str, HostCost]]:
    """Laws in the number of chunks; what does not depend on it, or was measured for one number, has no slope."""
    costs: dict[str, dict[str, HostCost]] = {}
    for mode in _in_order(row["mode"] for row in rows):
        costs[mode] = {}
        of_mode = [row for row in rows if row["mode"] == mode]
        for dispatcher in _in_order(row["dispatcher"] for row in of_mode):
            part = [row for row in of_mode if row["dispatcher"] == dispatcher]
            costs[mode][dispatcher] = HostCost(
                router=_host_law(part, "router", slope=False),
                first=_host_law(part, "first"),
                forward=_host_law(part, "forward"),
                backward=_host_law(part, "backward"),
            )
    return costs


def _host_law(rows: Rows, name: str, *, slope: bool = True) -> HostLaw:
    slope = slope and len({row["n_chunks"] for row in rows}) > 1
    features = [(1.0, row["n_chunks"]) if slope else (1.0,) for row in rows]
    coefficients, residual = fit_nonnegative(features, [row[name] for row in rows])
    return HostLaw(coefficients[0], coefficients[1] if slope else 0.0, residual)


def _overlap_loss(rows: Rows) -> float | None:
    """Median over pairs of an exchange and experts, timed alone and at once."""
    if not rows:
        return None
    losses = []
    for row in rows:
        alone = row["exchange_seconds"], row["experts_seconds"]
        loss = (row["both_seconds"] - max(alone)) / min(alone)
        # Above 1 it would be worse than one after the other: a disturbed sample.
        losses.append(min(max(0.0, loss), 1.0))
    return median(losses)


def _in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
