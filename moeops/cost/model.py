"""What the parts of an expert-parallel layer cost on a machine. W ranks, L per node, D model width, H hidden width.

Every law is a sum of non-negative coefficients times sizes, fitted to measurements by ``python -m moeops profile``;
times are seconds, sizes bytes. ``python -m moeops plan`` and expert shadowing read them. Only the standard library is
imported here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeops.cost.laws import (
    ITEM_BYTES,
    BytesLaw,
    Direction,
    ExpertLaw,
    HostCost,
    HostLaw,
    LinkLaw,
    RouterLaw,
    dtype_name,
    expert_features,
    router_features,
)

FORMAT = "moeops cost model"
VERSION = 2
MODES = ("eager", "compiled")


@dataclass(frozen=True)
class CostModel:
    """Costs of one machine: measured by ``python -m moeops profile``, or given by hand.

    A part that was neither measured nor given is ``None`` or missing, and asking for it is an error that says how to
    get it: no number is ever made up.

    Attributes:
        device: "cpu" or "cuda".
        experts: by dtype name, ``Direction`` of ``ExpertLaw``.
        router: by dtype name, ``Direction`` of ``RouterLaw``.
        memory: rows copied on the device.
        host_copy_seconds: a small copy from the device, and the wait for it.
        inside_node: all-to-all among ranks of a node.
        between_nodes: all-to-all among ranks of different nodes; bytes per second are those of one rank's share of
            its node's network.
        all_gather: inside a node; bytes are those that leave a rank for the ``W - 1`` others.
        reduce_scatter: the same.
        all_reduce: inside a node; bytes are those that leave a rank, ``2 (W - 1) / W`` of the tensor.
        host: by mode ("eager", "compiled"), then by dispatcher ("local", "exact", "gather", "static").
        overlap_loss: what is lost where an exchange and experts run at once: of the shorter one's time, the share by
            which both together take longer than the longer one. 0 is perfect overlap, 1 is none.
        machine: what was measured on, for the reader.
        measurements: every raw measurement, so that laws can be fitted again without the machine.
    """

    device: str = "cpu"
    experts: Mapping[str, Direction] = field(default_factory=dict)
    router: Mapping[str, Direction] = field(default_factory=dict)
    memory: BytesLaw | None = None
    host_copy_seconds: float | None = None
    inside_node: LinkLaw | None = None
    between_nodes: LinkLaw | None = None
    all_gather: LinkLaw | None = None
    reduce_scatter: LinkLaw | None = None
    all_reduce: LinkLaw | None = None
    host: Mapping[str, Mapping[str, HostCost]] = field(default_factory=dict)
    overlap_loss: float | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    measurements: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_rates(
        cls,
        *,
        products_per_second: float,
        link_bytes_per_second: float,
        memory_bytes_per_second: float | None = None,
        message_seconds: float = 0.0,
        dtypes: tuple[str, ...] = ("bfloat16",),
    ) -> CostModel:
        """Build a model from rates alone, as FasterMoE's policy has them.

        Args:
            products_per_second: multiply-adds of expert matmuls, half of the FLOP/s; the backward has two per one.
            link_bytes_per_second: of one rank in one direction, inside a node.
            memory_bytes_per_second: read and written; ``None`` neglects copies of rows.
            message_seconds: per message to another rank.
            dtypes: names of the types that these rates are for.

        Returns:
            A model that knows experts and the exchange inside a node.
        """
        per_byte = 0.0 if memory_bytes_per_second is None else 1 / memory_bytes_per_second
        laws = Direction(
            ExpertLaw(0.0, 0.0, 1 / products_per_second, per_byte),
            ExpertLaw(0.0, 0.0, 2 / products_per_second, 2 * per_byte),
        )
        return cls(
            experts={dtype_name(dtype): laws for dtype in dtypes},
            memory=BytesLaw(0.0, per_byte),
            inside_node=LinkLaw(0.0, message_seconds, 1 / link_bytes_per_second),
        )

    def all_to_all_seconds(
        self, num_bytes: float, world_size: int, node_size: int | None = None
    ) -> float:
        """Predict one exchange among ``world_size`` ranks, all with as much to send.

        Links inside a node and the network work at the same time, so the slower of both counts.

        Args:
            num_bytes: in the buffer that the busiest rank sends, its own part included; every rank's part is equal.
            world_size: ``W``.
            node_size: ``L``, ranks per node; ``None`` means that all are in one.

        Returns:
            Seconds; 0 for one rank.

        Raises:
            ValueError: a size is negative or does not fit, or the links that are needed are not known.
        """
        local, nodes = self._nodes(num_bytes, world_size, node_size)
        share = num_bytes / world_size
        parts = []
        if local > 1:
            parts.append(self.link("inside_node").seconds(share * (local - 1), local - 1))
        if nodes > 1:
            others = world_size - local
            parts.append(self.link("between_nodes").seconds(share * others, others))
        return max(parts, default=0.0)

    def gather_seconds(
        self, num_bytes: float, world_size: int, node_size: int | None = None
    ) -> tuple[float, float]:
        """Predict an all-gather of every rank's bytes, and a reduce-scatter back.

        Between nodes, and where they were not measured, both cost what an all-to-all with as many bytes does.

        Args:
            num_bytes: of one rank.
            world_size: ``W``.
            node_size: ``L``, ranks per node; ``None`` means that all are in one.

        Returns:
            Seconds of either; 0 for one rank.
        """
        local, nodes = self._nodes(num_bytes, world_size, node_size)
        exchange = None
        seconds = []
        for law in (self.all_gather, self.reduce_scatter):
            if law is not None and nodes == 1:
                seconds.append(law.seconds(num_bytes * (local - 1), local - 1))
                continue
            if exchange is None:
                exchange = self.all_to_all_seconds(num_bytes * world_size, world_size, node_size)
            seconds.append(exchange)
        return seconds[0], seconds[1]

    def all_reduce_law(self, world_size: int, node_size: int | None = None) -> BytesLaw:
        """Seconds of an all-reduce among ``world_size`` ranks by the bytes of its tensors.

        A rank sends ``2 (W - 1) / W`` of its tensors in ``2 (W - 1)`` messages. Between nodes, and where it was not
        measured, that costs what an all-to-all with as many bytes and messages on these links does.

        Args:
            world_size: ``W``.
            node_size: ``L``, ranks per node; ``None`` means that all are in one.

        Raises:
            ValueError: a size does not fit, or the links that are needed are not known.
        """
        _, nodes = self._nodes(0.0, world_size, node_size)
        if world_size == 1:
            return BytesLaw(0.0, 0.0)
        if nodes > 1:
            law = self.link("between_nodes")
        else:
            law = self.link("inside_node") if self.all_reduce is None else self.all_reduce
        others = world_size - 1
        return BytesLaw(
            law.seconds(0.0, 2 * others), 2 * others / world_size * law.seconds_per_byte
        )

    def hierarchical_seconds(
        self, num_bytes: float, world_size: int, node_size: int, form: str = "2d"
    ) -> float:
        """Predict an exchange in stages, as ``hierarchical_all_to_all`` makes it; arguments as for the flat one.

        The stages wait for each other, and rows are sorted in memory once between two of them. "2d": inside the node,
        then between equal local ranks. "leader": to local rank 0, between these, and back out.
        """
        local, nodes = self._nodes(num_bytes, world_size, node_size)
        if local == 1 or nodes == 1:
            return self.all_to_all_seconds(num_bytes, world_size, node_size)
        inside, between = self.link("inside_node"), self.link("between_nodes")
        if form == "2d":
            stages = inside.seconds(num_bytes * (local - 1) / local, local - 1)
            stages += between.seconds(num_bytes * (nodes - 1) / nodes, nodes - 1)
            return stages + self.memory_seconds(2 * num_bytes)
        if form != "leader":
            raise ValueError(f"CostModel: form must be '2d' or 'leader', got {form!r}.")
        every = local * num_bytes
        # The leader takes what the others send, and hands out as much.
        stages = 2 * inside.seconds((local - 1) * num_bytes, local - 1)
        stages += between.seconds(every * (nodes - 1) / nodes, nodes - 1)
        return stages + 2 * self.memory_seconds(2 * every)

    def _nodes(self, num_bytes: float, world_size: int, node_size: int | None) -> tuple[int, int]:
        """Ranks of a node, and nodes."""
        if world_size < 1 or num_bytes < 0:
            raise ValueError(
                "CostModel: world_size must be at least 1 and num_bytes at least 0, got "
                f"{world_size} and {num_bytes}. Pass bytes per rank."
            )
        local = world_size if node_size is None else min(node_size, world_size)
        if local < 1 or world_size % local:
            raise ValueError(
                f"CostModel: world_size must be a multiple of node_size, got {world_size} and {node_size}. Pass ranks "
                "per node."
            )
        return local, world_size // local

    def expert_seconds(
        self,
        rows: float,
        d_model: int,
        d_hidden: int,
        num_projections: int,
        dtype: Any,
        backward: bool = False,
        *,
        num_experts: int = 1,
    ) -> float:
        """Predict the expert block of one rank: matrix products, activation, and rows into expert order and back.

        Args:
            rows: of all these experts together.
            d_model: ``D``.
            d_hidden: ``H`` of one expert.
            num_projections: 3 for swiglu, 2 otherwise.
            dtype: type of rows and weights, or its name.
            backward: the backward alone, instead of the forward.
            num_experts: on this rank, in one call.

        Returns:
            Seconds; those of a call without rows where ``rows`` is 0.

        Raises:
            ValueError: a size is negative, or the type is not in the profile.
        """
        if rows < 0 or min(d_model, d_hidden, num_projections, num_experts) < 1:
            raise ValueError(
                "CostModel: rows must be at least 0 and sizes at least 1, got "
                f"{(rows, d_model, d_hidden, num_projections, num_experts)}. Pass the sizes of the experts."
            )
        name = dtype_name(dtype)
        law = self._direction("experts", name, backward)
        item = ITEM_BYTES[name]
        return law.seconds(
            expert_features(rows, d_model, d_hidden, num_projections, item, num_experts)
        )

    def router_seconds(
        self,
        num_tokens: float,
        d_model: int,
        num_experts: int,
        dtype: Any,
        backward: bool = False,
    ) -> float:
        """Predict a linear gate with softmax and top-k, and the sort by expert: forward, or backward alone."""
        name = dtype_name(dtype)
        law = self._direction("router", name, backward)
        return law.seconds(router_features(num_tokens, d_model, num_experts, ITEM_BYTES[name]))

    def _direction(self, part: str, name: str, backward: bool) -> Any:
        laws = getattr(self, part)
        if name not in laws:
            raise ValueError(
                f"CostModel: {part} must be profiled for {name}, got a profile with {sorted(laws) or 'none'}. Run "
                f"python -m moeops profile --dtype {name}."
            )
        return laws[name].backward if backward else laws[name].forward

    def memory_seconds(self, num_bytes: float) -> float:
        """Predict a pass over rows in memory: bytes read and bytes written."""
        if self.memory is None:
            raise ValueError(
                "CostModel: memory must be profiled, got none. Run python -m moeops profile."
            )
        return self.memory.seconds(num_bytes)

    def link(self, name: str) -> LinkLaw:
        """The law of a link or a collective; an error says how to get one that is missing."""
        law = getattr(self, name)
        if law is not None:
            return law
        advice = {
            "inside_node": "Profile two or more ranks of a node: torchrun --nproc-per-node=2 -m moeops profile; or "
            "pass --inside-node GB_PER_SECOND,MICROSECONDS.",
            "between_nodes": "Profile ranks of two nodes or more, or pass what the network gives each rank in one "
            "direction and what a message costs: --between-nodes GB_PER_SECOND,MICROSECONDS.",
        }
        default = "Profile two or more ranks: torchrun --nproc-per-node=2 -m moeops profile."
        raise ValueError(
            f"CostModel: {name} must be measured or given, got neither. {advice.get(name, default)}"
        )

    def host_cost(self, mode: str, dispatcher: str) -> HostCost | None:
        """What the host needs for a layer, ``None`` where that was not measured."""
        return self.host.get(mode, {}).get(dispatcher)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a file that is there is replaced as a whole."""
        path = Path(path)
        record = {"format": FORMAT, "version": VERSION, **_as_json(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1, allow_nan=False)
                file.write("\n")
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is damaged, of another kind or of another version; it names the file and the entry.
            OSError: it cannot be read.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as err:  # of JSON, and of UTF-8
            raise ValueError(
                f"CostModel.load: {path} must be JSON, got a damaged file: {err}. Profile again."
            ) from err
        kind = record.get("format") if isinstance(record, dict) else None
        if kind != FORMAT:
            raise ValueError(
                f"CostModel.load: {path} must be a {FORMAT!r}, got a file of the kind {kind!r}. Write one with python "
                "-m moeops profile --out FILE."
            )
        if record.get("version") != VERSION:
            raise ValueError(
                f"CostModel.load: {path} must have version {VERSION}, got {record.get('version')!r}. Profile again "
                "with this moeops."
            )
        try:
            return _from_json(record)
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise ValueError(
                f"CostModel.load: {path} must hold every part of a cost model, got a damaged one: {err}. Profile again."
            ) from err


_LINKS = ("inside_node", "between_nodes", "all_gather", "reduce_scatter", "all_reduce")


def _as_json(model: CostModel) -> dict[str, Any]:
    """Plain values, a key per field."""
    return {f.name: _plain(getattr(model, f.name)) for f in dataclasses.fields(model)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _from_json(record: dict[str, Any]) -> CostModel:
    """The model of a checked kind and version."""
    names = {f.name for f in dataclasses.fields(CostModel)} | {"format", "version"}
    if record.keys() != names:
        raise ValueError(f"entries must be {sorted(names)}, got {sorted(record)}")
    links = {
        name: None if record[name] is None else _law(LinkLaw, record[name], name) for name in _LINKS
    }
    host = {
        mode: {
            dispatcher: HostCost(
                **{
                    part: _law(HostLaw, cost[part], f"host.{mode}.{dispatcher}.{part}")
                    for part in ("router", "first", "forward", "backward")
                }
            )
            for dispatcher, cost in costs.items()
        }
        for mode, costs in record["host"].items()
    }
    memory, copy, loss = record["memory"], record["host_copy_seconds"], record["overlap_loss"]
    if record["device"] not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {record['device']!r}")
    return CostModel(
        device=record["device"],
        experts=_directions(ExpertLaw, record["experts"], "experts"),
        router=_directions(RouterLaw, record["router"], "router"),
        memory=None if memory is None else _law(BytesLaw, memory, "memory"),
        host_copy_seconds=None if copy is None else _number(copy, "host_copy_seconds"),
        host=host,
        overlap_loss=None if loss is None else _number(loss, "overlap_loss"),
        machine=_mapping(record["machine"], "machine"),
        measurements=_mapping(record["measurements"], "measurements"),
        **links,
    )


def _directions(kind: type, entries: Any, name: str) -> dict[str, Direction]:
    return {
        dtype_name(dtype): Direction(
            **{
                way: _law(kind, laws[way], f"{name}.{dtype}.{way}")
                for way in ("forward", "backward")
            }
        )
        for dtype, laws in _mapping(entries, name).items()
    }


def _law(kind: type, entry: Any, name: str) -> Any:
    """A law from exactly its own numbers."""
    names = {f.name for f in dataclasses.fields(kind)}
    if _mapping(entry, name).keys() != names:
        raise ValueError(f"{name} must have {sorted(names)}, got {sorted(entry)}")
    return kind(**{key: _number(value, f"{name}.{key}") for key, value in entry.items()})


def _mapping(entry: Any, name: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must be an object, got {type(entry).__name__}")
    return entry


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)
