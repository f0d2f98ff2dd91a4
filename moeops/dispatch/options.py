"""How a layer dispatches, written down: the records that ``dispatch=`` takes. E_local experts on a rank, W ranks.

``Exact`` and ``Static`` have the same exchange between ranks, which can be cut into chunks, take stages over nodes and
be spread over replicas. Names, for ``dispatch="exact"``, are in ``DISPATCHES``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from moeops import _checks
from moeops.comm.agreement import everywhere
from moeops.comm.groups import RankGroup, process_group
from moeops.comm.hierarchical import Hierarchy, check_hierarchy
from moeops.cost.model import CostModel
from moeops.cost.schedule import LayerSizes, schedule_of
from moeops.dispatch.base import ChunkedOptions, Dispatcher, DispatchOptions, ExpertRanks
from moeops.dispatch.degrees import Degrees
from moeops.dispatch.exact import ExactDispatcher
from moeops.dispatch.gather import Gather
from moeops.dispatch.local import LocalDispatcher
from moeops.dispatch.region import can_be_a_region, nodes_of_region
from moeops.dispatch.replicas import Placement, ReplicaDispatcher, place_replicas
from moeops.dispatch.shadowing import ShadowDispatcher, ShadowPolicy
from moeops.dispatch.shards import ShardedDispatcher
from moeops.dispatch.static import StaticDispatcher, check_row_capacity
from moeops.profiling.job import JobLayer, job_model
from moeops.profiling.machine import check_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeOptions(ChunkedOptions):
    """What ``Exact`` and ``Static`` have in common.

    Attributes:
        n_chunks: see ``ChunkedOptions``. Both directions have as many with ``replicas``, and with a hierarchy of the
            form "leader".
        hierarchy: how the ranks of ``moe_group`` are arranged as nodes, from ``moeops.distributed.build_hierarchy``;
            ``None`` for the flat exchange.
        replicas: dict of expert, from 0 to ``E``, to ranks of ``moe_group`` that hold it beside its owner; its tokens
            stay on a rank that holds it, and all others are spread over these. Experts must have the same structure,
            and no buffers.
    """

    hierarchy: Hierarchy | None = None
    replicas: Mapping[int, int | Iterable[int]] | None = None

    def check(self, ranks: ExpertRanks) -> None:
        """Raise ValueError or TypeError for a wrong option, NotImplementedError for two that exclude each other."""
        super().check(ranks)
        check_hierarchy(ranks.op, self.hierarchy, ranks.group)
        if self._placement(ranks) is not None:
            _refuse_shards("replicas", ranks)
        leader = None if can_be_a_region(self.hierarchy) else self.hierarchy
        self._check_one_degree('a hierarchy of the form "leader"', leader, ranks)
        self._check_one_degree("replicas", self._placement(ranks), ranks)

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        """Make the dispatcher."""
        placement = self._placement(ranks)
        if placement is None or ranks.group is None:
            return self._build_plain(ranks, ranks.num_expert)
        return ReplicaDispatcher(
            self._build_plain(ranks, placement.num_slots), placement, ranks.group
        )

    def settings(self, ranks: ExpertRanks) -> dict[str, Any]:
        """The fields; of a hierarchy its sizes and form, since its groups differ between ranks."""
        hierarchy = self.hierarchy
        return {
            **super().settings(ranks),
            "hierarchy": None if hierarchy is None else (hierarchy.node_size, hierarchy.form),
            "replicas": self._placement(ranks),
        }

    def node_size(self) -> int:
        """Ranks of a node with a hierarchy, 0 without."""
        nodes = nodes_of_region(self.hierarchy)
        return 0 if nodes is None else nodes.node_size

    def _sizes(
        self, kind: str, ranks: ExpertRanks, num_tokens: int | None, capacity: int = 0
    ) -> LayerSizes | None:
        """The layer as a cost model knows it; none knows the form "leader"."""
        if not can_be_a_region(self.hierarchy):
            return None
        return super()._sizes(kind, ranks, num_tokens, capacity)

    def _check_one_degree(self, option: str, value: Any, ranks: ExpertRanks) -> None:
        """With another option, both directions have as many chunks, and no model chooses them."""
        is_one = self.auto_chunks(ranks.op) is None and self.degrees(ranks.op).are_equal
        if value is not None and not is_one:
            raise NotImplementedError(
                f"{ranks.op}: n_chunks must be one number for both directions with {option}, got {self.n_chunks!r}. "
                f"Pass an int, or leave out {option}."
            )

    def _placement(self, ranks: ExpertRanks) -> Placement | None:
        return place_replicas(ranks.op, self.replicas, ranks.num_expert, ranks.group)

    def _build_plain(self, ranks: ExpertRanks, num_slots: int) -> Dispatcher:
        """The dispatcher for so many experts and replicas on each rank."""
        raise NotImplementedError(
            f"{type(self).__name__}: _build_plain must be written by the subclass, got none. Write it."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(ExchangeOptions):
    """Send every row, however many there are: dropless, with one copy of some counts to the host per forward.

    Attributes:
        n_chunks, hierarchy, replicas: see ``ExchangeOptions``.
        shadowing: a ``ShadowPolicy``, or a function of ``world_size`` that returns one: where it pays, the weights of
            much chosen experts go to all ranks instead of their tokens to them. Experts as for ``replicas``, and not
            with it. For ``FMoETransformerMLP`` also a ``CostModel``, of which the layer makes a policy.

    Example:
        >>> Exact(n_chunks=2)
        Exact(n_chunks=2, hierarchy=None, replicas=None, shadowing=None)
    """

    shadowing: ShadowPolicy | CostModel | Callable[..., ShadowPolicy] | None = None

    def check(self, ranks: ExpertRanks) -> None:
        """Raise TypeError where ``shadowing`` is no policy; see ``ExchangeOptions``."""
        super().check(ranks)
        policy = self._policy(ranks)
        if policy is None:
            return
        if not isinstance(policy, ShadowPolicy):
            raise TypeError(
                f"{ranks.op}: shadowing must be a ShadowPolicy or None, got {_checks.describe(policy)}. Pass "
                "moeops.distributed.ShadowPolicy(...), or ShadowPolicy.from_cost_model(...)."
            )
        if self._placement(ranks) is not None:
            raise NotImplementedError(
                f"{ranks.op}: replicas must be None with shadowing, got both. Choose one of them."
            )
        _refuse_shards("shadowing", ranks)
        self._check_one_degree("shadowing", policy, ranks)

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        """Make the dispatcher; with one rank nothing is sent, and it is the local one."""
        policy, plain = self._policy(ranks), super().build(ranks)
        if policy is None or not isinstance(plain, ExactDispatcher):
            return plain
        return ShadowDispatcher(plain, policy)

    def settings(self, ranks: ExpertRanks) -> dict[str, Any]:
        """The fields, and the policy that a function or a cost model came to."""
        return {**super().settings(ranks), "shadowing": self._policy(ranks)}

    def for_mlps(
        self, d_model: int, d_hidden: int, num_projections: int, dtype: torch.dtype
    ) -> Exact:
        """Let a cost model price these experts."""
        filled = super().for_mlps(d_model, d_hidden, num_projections, dtype)
        assert isinstance(filled, Exact)
        if not isinstance(self.shadowing, CostModel):
            return filled
        policy = functools.partial(
            ShadowPolicy.from_cost_model,
            self.shadowing,
            d_model,
            d_hidden,
            num_projections=num_projections,
            dtype=dtype,
        )
        return dataclasses.replace(filled, shadowing=policy)

    def kept(self) -> Exact:
        """The record without ``shadowing``, which may be a function."""
        return dataclasses.replace(self, shadowing=None)

    def layer_sizes(self, ranks: ExpertRanks, num_tokens: int | None) -> LayerSizes | None:
        """Sizes of the layer for a cost model."""
        return self._sizes("exact", ranks, num_tokens)

    def _policy(self, ranks: ExpertRanks) -> Any:
        """The policy, or what a user passed in its place."""
        if callable(self.shadowing):
            return self.shadowing(world_size=1 if ranks.group is None else ranks.group.size)
        return self.shadowing

    def _build_plain(self, ranks: ExpertRanks, num_slots: int) -> Dispatcher:
        if ranks.group is None or ranks.group.size == 1:
            return LocalDispatcher(num_slots)
        return ExactDispatcher(
            num_slots, ranks.group, n_chunks=self.degrees(ranks.op), hierarchy=self.hierarchy
        )


@dataclasses.dataclass(frozen=True)
class Static(ExchangeOptions):
    """Send buffers of fixed size: nothing is copied to the host, and rows that do not fit are dropped.

    Attributes:
        capacity: an int, rows per expert and sending rank; or a float, a factor on ``T * K / E``. It also holds on one
            rank, which drops what many drop.
        n_chunks, hierarchy, replicas: see ``ExchangeOptions``.

    Example:
        >>> Static(1.5, n_chunks=2)
        Static(n_chunks=2, hierarchy=None, replicas=None, capacity=1.5)
    """

    capacity: int | float = 1.25

    def check(self, ranks: ExpertRanks) -> None:
        """Raise ValueError or TypeError for a wrong capacity; see ``ExchangeOptions``."""
        super().check(ranks)
        check_row_capacity(ranks.op, self.capacity)

    def layer_sizes(self, ranks: ExpertRanks, num_tokens: int | None) -> LayerSizes | None:
        """Sizes of the layer for a cost model; an int capacity says how many tokens are balanced."""
        capacity = self.capacity
        size = 1 if ranks.group is None else ranks.group.size
        num_experts, top_k = ranks.num_expert * size, max(1, ranks.top_k * ranks.num_shards)
        if isinstance(capacity, int):
            num_tokens = num_tokens or math.ceil(capacity * num_experts / top_k)
        elif num_tokens is not None:
            capacity = math.ceil(capacity * num_tokens * top_k / num_experts)
        return self._sizes("static", ranks, num_tokens, int(capacity))

    def _build_plain(self, ranks: ExpertRanks, num_slots: int) -> Dispatcher:
        capacity = self.capacity
        if isinstance(capacity, float):
            capacity *= num_slots / ranks.num_expert  # a share of the experts, not of the slots
        return StaticDispatcher(
            num_slots,
            ranks.group,
            capacity,
            n_chunks=self.degrees(ranks.op),
            hierarchy=self.hierarchy,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(DispatchOptions):
    """Choose a dispatcher when the layer is built: ``Gather`` where it sends little more, else ``Exact``.

    Gathering sends a token to all ``W - 1`` other ranks, ``Exact`` to those that have one of its ``K`` experts, nearly
    all with ``W <= K``; and gathering copies nothing to the host. But it needs the same number of tokens on every rank
    in every forward, which nobody can see when the layer is built: say that it is so, by ``equal_tokens``, or give a
    bound, by ``max_tokens``. Else the choice is ``Exact``, which is right for any number of tokens.

    Attributes:
        equal_tokens: in every forward, every rank has as many tokens as every other.
        max_tokens: as of ``Gather``.

    Example:
        >>> from moeops.comm import RankGroup
        >>> ranks = ExpertRanks("FMoE", 64, RankGroup("0", 2, 0), top_k=8)
        >>> Auto().choose(ranks)[0]
        Exact(n_chunks=1, hierarchy=None, replicas=None, shadowing=None)
        >>> Auto(equal_tokens=True).choose(ranks)[0]
        Gather(n_chunks=1, rows=None, max_tokens=None, transport='nccl')
    """

    equal_tokens: bool = False
    max_tokens: int | None = None

    def check(self, ranks: ExpertRanks) -> None:
        """Raise TypeError or ValueError for a wrong option."""
        if not isinstance(self.equal_tokens, bool):
            raise TypeError(
                f"{ranks.op}: equal_tokens must be True or False, got {_checks.describe(self.equal_tokens)}. Pass True "
                "where all ranks have the same number of tokens."
            )
        Gather(max_tokens=self.max_tokens).check(ranks)

    def choose(self, ranks: ExpertRanks) -> tuple[DispatchOptions, str]:
        """The record, and why: from ``W``, ``K`` and the options, which all ranks have alike."""
        size = 1 if ranks.group is None else ranks.group.size
        if size == 1:
            return Exact(mlps=self.mlps), "one rank"
        slots = ranks.top_k * ranks.num_shards
        if size > slots:
            return Exact(mlps=self.mlps), f"{size} ranks are more than {slots} experts per token"
        if not self.equal_tokens and self.max_tokens is None:
            return Exact(
                mlps=self.mlps
            ), "ranks may have different numbers of tokens: see equal_tokens"
        why = f"{size} ranks, {slots} experts per token"
        return Gather(max_tokens=self.max_tokens, mlps=self.mlps), why


DISPATCHES: dict[str, type[DispatchOptions]] = {
    "auto": Auto,
    "exact": Exact,
    "gather": Gather,
    "static": Static,
}


def as_options(op: str, dispatch: Any) -> DispatchOptions:
    """Read a layer's ``dispatch=``: a record, or the name of one with its default options.

    Raises:
        ValueError: there is no such name.  TypeError: it is neither.
    """
    if isinstance(dispatch, str) and dispatch in DISPATCHES:
        return DISPATCHES[dispatch]()
    if isinstance(dispatch, DispatchOptions):
        return dispatch
    message = (
        f"{op}: dispatch must be one of {tuple(DISPATCHES)} or a record such as moeops.dispatch.Static(capacity=1.25), "
        f"got {dispatch!r}. Pick one of them."
    )
    if isinstance(dispatch, str):
        raise ValueError(message)
    raise TypeError(message)


def build_dispatcher(options: DispatchOptions, ranks: ExpertRanks) -> Dispatcher:
    """Check a record, and make the dispatcher of a layer's ranks; every rank builds the same.

    Raises:
        ValueError: an option does not fit.  TypeError: one has the wrong type.  NotImplementedError: two of them
        exclude each other.
    """
    options.check(ranks)
    options, _ = options.choose(ranks)
    dispatcher = options.build(ranks)
    if ranks.num_shards > 1:
        assert ranks.group is not None
        expert_ranks = ranks.group.size // ranks.num_shards
        dispatcher = ShardedDispatcher(dispatcher, ranks.num_expert, expert_ranks, ranks.num_shards)
    dispatcher.built_from = options.kept(), ranks
    return dispatcher


def connect(dispatcher: Dispatcher) -> None:
    """Let the ranks of a dispatcher do together what its options need; all ranks call it.

    Raises:
        ValueError: the ranks or their devices do not fit, on all ranks.  RuntimeError: a rank has failed.
    """
    assert dispatcher.built_from is not None
    options, ranks = dispatcher.built_from
    options.connect(ranks)


def choose_degrees(dispatcher: Dispatcher, device: Any) -> None:
    """Let a cost model choose the chunks of a dispatcher that is to have them chosen; all ranks call it.

    Args:
        dispatcher: what ``build_dispatcher`` returned on every rank of the group.
        device: where the layer is; torch's default if ``None``.

    Raises:
        ValueError: the model lacks a law that it needs, or is of another machine; nothing can be measured.
        RuntimeError: a rank has failed.
    """
    assert dispatcher.built_from is not None
    options, ranks = dispatcher.built_from
    auto, group = options.auto_chunks(ranks.op), ranks.group
    if auto is None or group is None or group.size == 1:
        return
    sizes = options.layer_sizes(ranks, auto.num_tokens)
    assert sizes is not None
    model = auto.cost_model
    if model is None:
        layer = JobLayer(
            sizes.mlps.d_model,
            sizes.mlps.d_hidden,
            sizes.mlps.num_projections,
            sizes.num_expert,
            sizes.mlps.dtype,
        )
        nodes = nodes_of_region(getattr(options, "hierarchy", None))
        model = job_model(ranks.op, layer, group, _place(group, device), hierarchy=nodes)

    priced = functools.partial(schedule_of, sizes, model)

    def choose() -> tuple[int, int]:
        check_machine(ranks.op, model, _place(group, device))
        dispatcher.schedule = priced()
        best = dispatcher.schedule.best()
        return best.forward, best.backward

    dispatcher.set_degrees(Degrees(*everywhere(ranks.op, group, choose, device)[0]))


def _place(group: RankGroup, device: Any) -> torch.device:
    """Where to measure: at the layer's device, or where the group's backend works, to which the layer will go."""
    place = torch.get_default_device() if device is None else torch.device(device)
    types = [torch.device(kind).type for kind in process_group(group.name)._device_types]
    if place.type in types or place.type == "meta" or "cuda" not in types:
        return place
    return torch.device("cuda", torch.cuda.current_device())


def _refuse_shards(option: str, ranks: ExpertRanks) -> None:
    if ranks.num_shards > 1:
        raise NotImplementedError(
            f"{ranks.op}: {option} must be None where a rank has no use for another rank's shard, got it with "
            f"expert_tensor_parallel_size={ranks.num_shards}. Choose one of them."
        )
