"""Over how many ranks tokens of one call should travel: times for each r of ``forward(parallel=r)``. W ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from moeops.cost.laws import ITEM_BYTES
from moeops.cost.model import CostModel
from moeops.planner.configuration import Configuration
from moeops.planner.predict import choices, predict, recommend


def degree_records(model: CostModel, config: Configuration) -> list[dict[str, Any]]:
    """Predict the layer for every divisor of ``W`` that its ranks and nodes allow, ``W`` first.

    With ``r`` ranks per group of tokens, the weights of ``W / r`` ranks are gathered in the forward, begun before the
    gate, and their gradients scattered in the backward, at its end.

    Returns:
        Of each ``r`` the best choice of a dispatcher, ``seconds`` of forward and backward in all, and of them
        ``weights``, what the gathered weights add. Nothing for one rank, or for shards, which do not switch.
    """
    if config.ranks == 1 or config.tensor_parallel > 1:
        return []
    records = []
    for degree in range(config.ranks, 0, -1):
        if config.ranks % degree or (degree > config.node_size and degree % config.node_size):
            continue
        inner = dataclasses.replace(
            config, expert_parallel=degree, imbalance=min(config.imbalance, degree)
        )
        best, _ = recommend(inner, [predict(model, inner, choice) for choice in choices(inner)])
        weights = _weights_seconds(model, config, degree, best.forward.parts["router"])
        records.append(
            {
                "parallel": degree,
                **best.choice._asdict(),
                "weights": weights,
                "seconds": best.total + weights,
            }
        )
    return records


def best_degree(records: list[dict[str, Any]]) -> int:
    """The first within one percent of the fastest: more ranks need less memory."""
    fastest = min(record["seconds"] for record in records)
    return next(r["parallel"] for r in records if r["seconds"] <= 1.01 * fastest)


def _weights_seconds(model: CostModel, config: Configuration, degree: int, router: float) -> float:
    """Weights there, beyond what the gate hides, and gradients back."""
    copies = config.ranks // degree
    if copies == 1:
        return 0.0
    num_bytes = config.expert_parameters * ITEM_BYTES[config.dtype]
    # Ranks with one place in their groups; of these so many are in a node.
    near = max(1, config.local_ranks // degree)
    gather, scatter = model.gather_seconds(num_bytes, copies, near)
    return max(0.0, gather - router) + scatter
