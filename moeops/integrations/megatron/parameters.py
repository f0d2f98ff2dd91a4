"""Expert weights as Megatron-Core starts, marks and saves them.

E experts, E_local on this rank, P ranks that hold one expert together, D width, H hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn

Weights = dict[str, nn.Parameter]


class Stock(NamedTuple):
    """Where ``SequentialMLP`` has a weight, and which dimension of an expert's is cut in ``P``."""

    name: str
    dim: int


STOCK = {
    "w_up": Stock("linear_fc1.weight", 0),
    "b_up": Stock("linear_fc1.bias", 0),
    "w_down": Stock("linear_fc2.weight", 1),
    "b_down": Stock("linear_fc2.bias", 0),  # never cut, as P is 1 where there are biases
}


@dataclass(frozen=True)
class ExpertPlace:
    """Which experts this rank holds, and which shard of them.

    Attributes:
        num_local: ``E_local``.
        ep_rank: place among the ranks that hold different experts.
        ep_size: how many these are, ``E / E_local``.
        shard: place among the ranks that hold the same experts together.
        num_shards: ``P``.
        replica: place among the ranks that hold the same.
        reduced_as_dense: the ranks that hold the same experts are those that hold the same dense weights.
        gated: ``w_up`` and ``b_up`` are gate rows, then up rows.
    """

    num_local: int
    ep_rank: int
    ep_size: int
    shard: int
    num_shards: int
    replica: int
    reduced_as_dense: bool
    gated: bool

    @property
    def own(self) -> range:
        """The experts of this rank among all ``E``."""
        return range(self.ep_rank * self.num_local, (self.ep_rank + 1) * self.num_local)

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.num_local * self.ep_size

    def halves(self, name: str) -> int:
        """How many matrices lie in one of these weights, one after the other."""
        return 2 if self.gated and name in ("w_up", "b_up") else 1


def get_groups(pg_collection: Any = None) -> Any:
    """Megatron's groups of a MoE layer: the given ``ProcessGroupCollection``, or that of ``parallel_state``."""
    return get_default_pg_collection() if pg_collection is None else pg_collection


def find_place(op: str, num_local: int, config: Any, pg_collection: Any) -> ExpertPlace:
    """Read the groups of Megatron's ``parallel_state``, or of a ``ProcessGroupCollection``.

    Raises:
        ValueError: the experts have biases and are cut in shards.
    """
    groups = get_groups(pg_collection)
    num_shards = groups.expt_tp.size()
    if num_shards > 1 and config.add_bias_linear:
        raise ValueError(
            f"{op}: add_bias_linear must be False where expert_tensor_parallel_size is above 1, got True and "
            f"{num_shards}. Leave the biases out, or set expert_tensor_parallel_size=1."
        )
    return ExpertPlace(
        num_local=num_local,
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
        shard=groups.expt_tp.rank(),
        num_shards=num_shards,
        replica=groups.expt_dp.rank(),
        reduced_as_dense=groups.ep.size() == 1 and num_shards == groups.tp.size(),
        gated=config.gated_linear_unit,
    )


@torch.no_grad()
def start(weights: Weights, config: Any, place: ExpertPlace) -> None:
    """Draw weights as Megatron's linear layers do, expert by expert, and set biases to zero.

    On the CPU every rank draws all ``E`` experts and keeps its own, so that they differ between ranks and do not
    depend on how many ranks there are. On CUDA Megatron's generator of experts differs between ranks.
    """
    if not config.perform_initialization:
        return
    methods = {"w_up": config.init_method, "w_down": config.output_layer_init_method}
    for bias in weights.keys() - methods.keys():
        weights[bias].zero_()
    on_cpu = config.use_cpu_initialization
    for expert in range(place.num_experts) if on_cpu else place.own:
        for name, method in methods.items():
            dim, stride = STOCK[name].dim, place.halves(name)
            own = weights[name][expert - place.own.start] if expert in place.own else None
            if not on_cpu:
                _initialize_affine_weight_gpu(own, method, dim, stride=stride, is_expert=True)
                continue
            part = torch.empty_like(weights[name][0]) if own is None else own
            whole = list(part.shape)
            whole[dim] *= place.num_shards
            _initialize_affine_weight_cpu(
                part,
                *whole,
                part.shape[dim],
                dim,
                method,
                stride=stride,
                params_dtype=config.params_dtype,
                rank=place.shard,
                world_size=place.num_shards,
            )


def mark(weights: Weights, place: ExpertPlace) -> None:
    """Tell Megatron's data parallelism and gradient norm which ranks hold the same weights."""
    for name, weight in weights.items():
        weight.allreduce = place.reduced_as_dense  # type: ignore[attr-defined]  # Megatron's
        set_tensor_model_parallel_attributes(weight, True, 1 + STOCK[name].dim, place.halves(name))


def shard_for_checkpoint(
    weights: Weights,
    prefix: str,
    key_prefix: str,
    place: ExpertPlace,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Describe weights to ``megatron.core.dist_checkpointing`` as those of ``SequentialMLP``, one tensor per expert.

    Args:
        weights: ``[E_local, ...]`` by moeops' names.
        prefix: of the names in the state dict.
        key_prefix: of the keys in the checkpoint.
        place: what of all experts ``weights`` are.
        sharded_offsets: of the layers of a pipeline.
        metadata: with ``singleton_local_shards`` each expert has keys of its own.

    Returns:
        By name, what Megatron's ``sharded_state_dict`` holds.
    """
    single = bool((metadata or {}).get("singleton_local_shards", False))
    state: dict[str, Any] = {}
    for name, weight in weights.items():
        layout = functools.partial(_cut, name, place, sharded_offsets, single)
        state[prefix + name] = ShardedTensorFactory(
            key_prefix + STOCK[name].name,
            weight,
            layout,
            functools.partial(_join, place.halves(name)),
            (0, 0, place.replica),
        )
    # Megatron's own linear layers save an empty object for each expert, and look for it.
    for expert in place.own:
        for linear in ("linear_fc1", "linear_fc2"):
            key, offsets = _of_expert(
                key_prefix + linear + "._extra_state",
                linear,
                expert,
                place,
                sharded_offsets,
                single,
            )
            state[f"{prefix}{expert}.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                None, key, offsets, (0, place.shard, place.replica)
            )
    return state


def _of_expert(
    key: str,
    end: str,
    expert: int,
    place: ExpertPlace,
    offsets: tuple[tuple[int, int, int], ...],
    single: bool,
) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """Key and offsets of one expert: its number is in the key, or a place in one more dimension."""
    if single:
        start = key.rindex(end)
        return f"{key[:start]}{expert}.{key[start:]}", offsets
    return key, (*offsets, (len(offsets), expert, place.num_experts))


@torch.no_grad()
def _cut(
    name: str,
    place: ExpertPlace,
    offsets: tuple[tuple[int, int, int], ...],
    single: bool,
    key: str,
    weight: Tensor,
    replica_id: Any,
    flattened_range: slice | None,
) -> list[ShardedTensor]:
    """What of a checkpoint's tensors a weight ``[E_local, ...]`` is: expert by expert, gate before up."""
    assert flattened_range is None, "Megatron-Core 0.16 flattens no weights with a factory"
    stock, halves = STOCK[name], place.halves(name)
    shards = []
    for expert, own in zip(place.own, weight, strict=True):
        own_key, own_offsets = _of_expert(key, stock.name, expert, place, offsets, single)
        prepended = len(own_offsets)
        for half, part in enumerate(own.chunk(halves, stock.dim)):
            start, total = half * place.num_shards + place.shard, halves * place.num_shards
            part_key = own_key
            if single and halves > 1:
                start, total, part_key = place.shard, place.num_shards, f"{own_key}_{'wv'[half]}"
            shards.append(
                ShardedTensor.from_rank_offsets(
                    part_key,
                    part.contiguous(),
                    *own_offsets,
                    (prepended + stock.dim, start, total),
                    replica_id=replica_id,
                    prepend_axis_num=prepended,
                )
            )
    return shards


@torch.no_grad()
def _join(halves: int, shards: list[Tensor]) -> Tensor:
    """The inverse of ``_cut``."""
    experts = (shards[first : first + halves] for first in range(0, len(shards), halves))
    return torch.stack([torch.cat(parts) for parts in experts])


def take_stock_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict`` of a module with expert weights: take those of Megatron's own experts.

    ``SequentialMLP`` and ``TEGroupedMLP`` have a tensor for each expert; ``GroupedMLP`` has transposed ones.
    """
    weights = dict(module.named_parameters(recurse=False))
    num_local = next(iter(weights.values())).shape[0]
    for key in [key for key in state if key.startswith(prefix) and key.endswith("_extra_state")]:
        del state[key]
    for name, places in _stock_names(prefix, num_local):
        if name in weights and all(place in state for place in places):
            state[prefix + name] = torch.stack([state.pop(place) for place in places])
    for name, old in (("w_up", "weight1"), ("w_down", "weight2")):
        if (found := state.pop(prefix + old, None)) is not None:
            # Both are [E_local, in, out] in memory, whatever their two dimensions are.
            experts = found.reshape(num_local, weights[name].shape[2], -1)
            state[prefix + name] = experts.transpose(1, 2)


def _stock_names(prefix: str, num_local: int) -> Iterator[tuple[str, list[str]]]:
    for name, stock in STOCK.items():
        yield name, [f"{prefix}local_experts.{e}.{stock.name}" for e in range(num_local)]
        yield name, [f"{prefix}{stock.name}{e}" for e in range(num_local)]
