"""A job measures its own layers and links: the cost model of ``n_chunks="auto"`` without a profile.

W ranks, E_local experts on a rank, D model width, H hidden width of a rank's share of an expert.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moeops._extension import loaded_libraries
from moeops.comm.agreement import everywhere
from moeops.comm.groups import RankGroup, describe_group, process_group
from moeops.comm.hierarchical import Hierarchy
from moeops.cost.laws import ITEM_BYTES
from moeops.cost.model import CostModel
from moeops.profiling.clock import Clock, Ranks
from moeops.profiling.fit import fit_model
from moeops.profiling.links import all_reduces, all_to_alls, gathers, overlap
from moeops.profiling.machine import describe_machine
from moeops.profiling.work import (
    ExpertRun,
    Record,
    Weights,
    both_ways,
    measure_memory,
    random_weights,
    slowest,
)

BUDGET_SECONDS = 15.0
SAMPLES, WARM_UP = 5, 2
FLUSH_BYTES = 64 << 20
ROWS_PER_EXPERT = (2, 8, 32, 128, 512, 2048, 8192)
ROW_BYTES = 2 << 30  # of all rows and what is made of them, above which a size is left out
EXCHANGE_BYTES = (64 << 10, 1 << 20, 8 << 20, 64 << 20)
# Sizes that are measured in any case: laws need a slope, and that of links shows with the third.
_LEAST = {"experts": 2, "links": 3}
_SHARES = {"experts": 0.5, "links": 0.4}  # of the budget

_known: dict[str, CostModel] = {}


@dataclasses.dataclass(frozen=True)
class JobLayer:
    """What is measured.

    Attributes:
        d_model: ``D``.
        d_hidden: ``H``.
        num_projections: 3 for swiglu, 2 otherwise.
        num_expert: ``E_local``.
        dtype: name of a float type.
    """

    d_model: int
    d_hidden: int
    num_projections: int
    num_expert: int
    dtype: str


class _GroupRanks(Ranks):
    """The ranks of a group, which tell each other what they need by this group alone."""

    def __init__(self, op: str, group: RankGroup, device: torch.device) -> None:
        super().__init__(device, group.rank, group.size)
        self._op = op
        self._ranks = group
        self.group = process_group(group.name)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return everywhere(self._op, self._ranks, lambda: value, self.device)

    def barrier(self) -> None:
        """Wait for the other ranks' hosts."""
        self.gather(None)

    def meet(self, token: torch.Tensor) -> None:
        """Let the devices wait for each other."""
        dist.all_reduce(token, group=self.group)


def job_model(
    op: str,
    layer: JobLayer,
    group: RankGroup,
    device: torch.device,
    *,
    hierarchy: Hierarchy | None = None,
    refresh: bool = False,
    seconds: float = BUDGET_SECONDS,
) -> CostModel:
    """Return the costs of a layer's experts and of its ranks' links, as measured here, by this job or by one before.

    The first layer of a size measures: experts of its sizes on more and more rows, forward and backward; exchanges,
    all-gathers, reduce-scatters and all-reduces of the group; both at once; rows in memory. What rank 0 has then is
    what all ranks have. It is kept in a file beside Inductor's cache, whose name depends on the layer's sizes, the
    machine, where the ranks are, torch, the kernels and NCCL's settings; later jobs read it.

    Laws of links are those of this group, within a node or between nodes: its model is for groups of its size. With a
    hierarchy there is a law of exchanges inside of its nodes and one of those between them.

    Args:
        op: for error messages.
        layer: what is measured.
        group: the ranks that share the experts, all of which call it; more than one.
        device: where the layer is.
        hierarchy: how the ranks are arranged as nodes, where rows pass both kinds of links.
        refresh: measure again, and replace the file.
        seconds: what measuring may take; larger sizes are left out when there is no time for them.

    Returns:
        The same model on every rank.

    Raises:
        ValueError: there is nothing to measure on (a meta device, torch's "fake" backend), on every rank alike; the
        file is damaged, on every rank.  RuntimeError: a rank did not take part within the group's time-out.
    Host sync: many. Cost: ``seconds``, give or take a measurement; a few milliseconds for what is known.
    """
    _check_real(op, group, device)
    ranks = _GroupRanks(op, group, device)
    path = _path(ranks, layer, hierarchy)
    memo = f"{group.name} {path}"
    if memo in _known and not refresh:
        return _known[memo]

    def read() -> CostModel | None:
        if ranks.rank != 0 or refresh or not path.exists():
            return None
        return CostModel.load(path)

    model = everywhere(op, group, read, device)[0]
    if model is None:
        measured = _measure(ranks, layer, hierarchy, seconds)

        def write() -> CostModel | None:
            if ranks.rank != 0:
                return None
            measured.save(path)
            return measured

        model = everywhere(op, group, write, device)[0]
    assert model is not None
    _known[memo] = model
    return model


def _check_real(op: str, group: RankGroup, device: torch.device) -> None:
    backend = dist.get_backend(process_group(group.name))
    if device.type not in ("cpu", "cuda") or backend == "fake" or group.size == 1:
        raise ValueError(
            f"{op}: a job that measures itself must have several ranks with CPUs or GPUs, got device "
            f"{device.type!r} and backend {backend!r} in {describe_group(group)}. Pass a cost model: "
            "CostModel.load(FILE), with a file of python -m moeops profile."
        )


def _path(ranks: _GroupRanks, layer: JobLayer, hierarchy: Hierarchy | None) -> Path:
    """Where the model of this layer is kept, the same name on every rank."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # a second to import

    places = ranks.gather((socket.gethostname(), describe_machine(ranks.device)))
    hosts = [host for host, _ in places]
    key = {
        "layer": dataclasses.asdict(layer),
        "node_size": None if hierarchy is None else hierarchy.node_size,
        "machines": [machine for _, machine in places],
        "hosts": [hosts.index(host) for host in hosts],
        "backend": dist.get_backend(ranks.group),
        "torch": torch.__version__,
        "kernels": [_digest(path) for path in loaded_libraries().values()],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")},
        "threads": torch.get_num_threads(),
    }
    # Rank 0's: environments may differ.
    name = ranks.gather(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20])[0]
    return Path(cache_dir()) / "moeops" / f"job-{name}.json"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _measure(
    ranks: _GroupRanks, layer: JobLayer, hierarchy: Hierarchy | None, seconds: float
) -> CostModel:
    clock = Clock(ranks, SAMPLES, WARM_UP, FLUSH_BYTES)
    dtype: torch.dtype = getattr(torch, layer.dtype)
    activation = "swiglu" if layer.num_projections == 3 else "gelu"
    weights = random_weights(
        clock, layer.d_model, layer.d_hidden, layer.num_expert, activation, dtype
    )
    measurements: dict[str, list[Record]] = {"experts": []}
    largest = _measure_experts(clock, weights, _SHARES["experts"] * seconds, measurements)
    _measure_links(clock, ranks, hierarchy, _SHARES["links"] * seconds, measurements)
    block = ExpertRun(clock, weights, largest)
    num_bytes = largest * layer.d_model * ITEM_BYTES[layer.dtype]
    measurements["overlap"] = slowest(clock, [overlap(clock, block, num_bytes, ranks.group)])
    tokens = ((256, layer.d_model, 2), (2048, layer.d_model, 2))
    measurements["memory"] = slowest(clock, measure_memory(clock, tokens, dtype))
    machine = {
        **describe_machine(ranks.device),
        "torch": torch.__version__,
        "ranks": ranks.size,
        "layer": dataclasses.asdict(layer),
    }
    return fit_model(measurements, ranks.device.type, machine)


def _measure_experts(
    clock: Clock, weights: Weights, seconds: float, measurements: dict[str, list[Record]]
) -> int:
    """Experts on more and more rows; the number before the last, which takes the time of a usual layer."""
    num_expert = weights.w_up.shape[0]
    measured: list[int] = []

    def measure(rows_per_expert: int) -> None:
        block = ExpertRun(clock, weights, rows_per_expert * num_expert)
        records = both_ways(clock, block.forward, block.leaves, block.facts)
        measurements["experts"] += slowest(clock, records)
        measured.append(block.facts["rows"])

    _, height, d_model = weights.w_up.shape
    row_bytes = num_expert * (2 * d_model + height) * weights.w_up.element_size()
    least = _LEAST["experts"]
    sizes = [*ROWS_PER_EXPERT[:least]]
    sizes += [n for n in ROWS_PER_EXPERT[least:] if n * row_bytes <= ROW_BYTES]
    _within(clock, seconds, sizes, least, measure)
    return measured[-2]


def _measure_links(
    clock: Clock,
    ranks: _GroupRanks,
    hierarchy: Hierarchy | None,
    seconds: float,
    measurements: dict[str, list[Record]],
) -> None:
    exchanges = {"inside_node": (ranks.group, ranks.size)}
    if hierarchy is not None:
        links = {"inside_node": hierarchy.inside, "between_nodes": hierarchy.across}
        exchanges = {name: (process_group(group.name), group.size) for name, group in links.items()}

    def measure(num_bytes: int) -> None:
        found = {
            **{name: all_to_alls(clock, [num_bytes], *among) for name, among in exchanges.items()},
            "all_reduce": all_reduces(clock, [num_bytes], ranks.group, ranks.size),
            **gathers(clock, [num_bytes], ranks.group, ranks.size),
        }
        for name, records in found.items():
            measurements.setdefault(name, []).extend(slowest(clock, records))

    _within(clock, seconds, EXCHANGE_BYTES, _LEAST["links"], measure)


def _within(
    clock: Clock, seconds: float, sizes: Iterable[int], least: int, measure: Callable[[int], None]
) -> None:
    """Measure growing sizes until there is no time for the next, on all ranks alike; some in any case."""
    begin = time.monotonic()
    last_size, last_seconds = 0, 0.0
    for place, size in enumerate(sizes):
        now = time.monotonic()
        if place >= least:
            # The last one's time, as much longer as the next is larger.
            wanted = max(clock.ranks.gather(now - begin + last_seconds * size / last_size))
            if wanted > seconds:
                return
        measure(size)
        last_seconds, last_size = time.monotonic() - now, size
