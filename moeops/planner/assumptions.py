"""What a plan rests on, in words."""

from __future__ import annotations

from moeops.cost.model import CostModel
from moeops.planner.configuration import Configuration
from moeops.planner.units import gbps, us


def assumptions(model: CostModel, config: Configuration) -> list[str]:
    """Sentences for the reader of a plan, with the numbers that were carried over."""
    machine = model.machine
    profiled = machine.get("ranks", 1)
    found = [
        f"profiled on {machine.get('gpu', model.device)}, {profiled} rank{'s' * (profiled != 1)}; every rank is such a "
        "machine, and all run the same layer at the same time.",
        f"the busiest rank gets {config.imbalance:g} times the mean; its experts get equal parts of that.",
        "the gate is a linear router with softmax and top-k; no attention, no dense layers and no data-parallel "
        "reduction is in the times.",
    ]
    return found + (_links(model, config) if config.ranks > 1 else [])


def _links(model: CostModel, config: Configuration) -> list[str]:
    found = []
    near, far = model.inside_node, model.between_nodes
    if near is not None and config.local_ranks > 1:
        text = (
            f"inside a node a rank sends {gbps(near.seconds_per_byte)} to any number of others, as through a switch "
            f"without contention; {us(near.peer_seconds)} per message, {us(near.call_seconds)} per call"
        )
        measured = model.machine.get("node_size", 1)
        if 1 < measured < config.local_ranks:
            text += f"; measured with {measured} ranks, carried over to {config.local_ranks}"
        found.append(text + ".")
    if far is not None and config.nodes > 1:
        found.append(
            f"between nodes a rank sends {gbps(far.seconds_per_byte)}, its own share of its node's network, at any "
            f"scale and without congestion; {us(far.peer_seconds)} per message, {us(far.call_seconds)} per call; "
            "links inside and between nodes work at the same time."
        )
    if model.overlap_loss is None:
        found.append("overlap is perfect: the profile has no measurement of what it costs.")
    else:
        found.append(
            f"where an exchange and experts run at once, {model.overlap_loss:.2f} of the shorter one's time is lost."
        )
    if model.host_cost(config.mode, "exact") is None:
        how = " --compiled" if config.mode == "compiled" else ""
        found.append(
            f"the host costs nothing: the profile has no {config.mode} layers between ranks (torchrun "
            f"--nproc-per-node=2 -m moeops profile{how})."
        )
    return found
