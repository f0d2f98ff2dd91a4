"""FastMoE's state dicts, one per rank, to a whole one and back. E experts, E_local on a rank, W ranks.

A program that has run with FastMoE has a file for each rank; its adapter for Megatron-LM writes all of rank 0, and the
experts only of the others, as dicts of dicts. ``merge_ranks`` makes one state dict of them, for layers that hold all
experts, which ``load_state_dict`` takes. From there ``moeops.distributed.save_checkpoint`` writes a checkpoint that any
number of ranks loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moeops.layers._fastmoe_keys import FASTMOE_NAMES

LAYOUTS = ("each", "one")

State = dict[str, Any]  # tensors, or dicts of them as Megatron-LM nests them

# experts.3.<rest>, one for each; experts.htoh4.weight, one for all: where the experts are, which, what of them.
_ONE_OF_MANY = re.compile(r"((?:.*[.\0])?experts\.)(\d+)\.(.+)")
_FUSED_NAMES = (*FASTMOE_NAMES, *FASTMOE_NAMES.values())
_ALL_AT_ONCE = re.compile(
    r"((?:.*[.\0])?experts\.)(" + "|".join(map(re.escape, _FUSED_NAMES)) + r")"
)


def merge_ranks(states: Sequence[Mapping[str, Any]]) -> State:
    """Make one state dict of those of all ranks that share the experts.

    Args:
        states: one for each rank, in their order, in either of FastMoE's layouts, or with moeops' names of fused
            experts. All but the first may lack everything but experts. Tensors may be in dicts inside of dicts.

    Returns:
        The state dict of a model whose layers have all ``E`` experts, in the layout and the dicts of ``states``.

    Raises:
        ValueError: there is none, ranks have other experts, or something else that is not equal on all ranks.

    Example:
        >>> states = [{"experts.0.htoh4.bias": torch.full((1, 2), float(rank))} for rank in range(2)]
        >>> {name: value.tolist() for name, value in merge_ranks(states).items()}
        {'experts.0.htoh4.bias': [[0.0, 0.0]], 'experts.1.htoh4.bias': [[1.0, 1.0]]}
    """
    op = "merge_ranks"
    if not states:
        raise ValueError(f"{op}: states must hold one dict for each rank, got none. Pass them.")
    states = [_flatten(state) for state in states]
    of_experts = [{name for name in state if _is_expert(name)} for state in states]
    for rank, names in enumerate(of_experts):
        if names != of_experts[0]:
            raise ValueError(
                f"{op}: all ranks must have experts of the same names, got {_shown(names ^ of_experts[0])} on one "
                f"of the ranks 0 and {rank} only. Pass the files of ranks that share the experts of one model."
            )
    counts: dict[str, int] = {}
    for name in of_experts[0]:
        if match := _ONE_OF_MANY.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    merged: State = {}
    for name, value in states[0].items():
        if not _is_expert(name):
            for rank, state in enumerate(states):
                if name in state and not torch.equal(state[name], value):
                    raise ValueError(
                        f"{op}: {_shown([name])[0]} must be equal on all ranks, got another value on rank {rank} than "
                        "on rank 0. Pass the files of one step."
                    )
            merged[name] = value
        elif _ALL_AT_ONCE.fullmatch(name):
            merged[name] = torch.cat([state[name] for state in states])
        else:
            found = _ONE_OF_MANY.fullmatch(name)
            assert found is not None
            place, index, rest = found.groups()
            for rank, state in enumerate(states):
                merged[f"{place}{rank * counts[place] + int(index)}.{rest}"] = state[name]
    return _unflatten(merged)


def split_ranks(
    state: Mapping[str, Any], world_size: int, layout: str = "each", *, experts_only: bool = False
) -> list[State]:
    """Make state dicts that FastMoE loads, one for each rank, of that of a model with all experts.

    Args:
        state: of layers that hold all ``E`` experts: fused ones of moeops, or a list; dicts of dicts as well.
        world_size: ``W``.
        layout: of fused experts: "each" has ``experts.0.htoh4.weight [1, H, D]`` and so on, as FastMoE from version 1.0
            on; "one" has ``experts.htoh4.weight [E_local, H, D]``, as version 0.2.
        experts_only: give all ranks but the first their experts only, as FastMoE's adapter for Megatron-LM does.

    Returns:
        ``W`` state dicts; their tensors share memory with ``state`` where they can.

    Raises:
        ValueError: the experts cannot be divided by ``world_size``, or ``layout`` is unknown.

    Example:
        >>> one, other = split_ranks({"experts.b_up": torch.tensor([[1.0], [2.0]])}, 2)
        >>> one, other
        ({'experts.0.htoh4.bias': tensor([[1.]])}, {'experts.0.htoh4.bias': tensor([[2.]])})
    """
    op = "split_ranks"
    if layout not in LAYOUTS:
        raise ValueError(
            f"{op}: layout must be one of {LAYOUTS}, got {layout!r}. Pick one of them."
        )
    state = _flatten(state)
    counts: dict[str, int] = {}
    for name, value in state.items():
        if match := _ALL_AT_ONCE.fullmatch(name):
            counts[match[1]] = value.shape[0]
        elif match := _ONE_OF_MANY.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    for place, count in counts.items():
        if count % world_size:
            raise ValueError(
                f"{op}: world_size must be a divisor of the {count} experts of {_shown([place.rstrip('.')])[0]}, got "
                f"{world_size}. "
                "Choose another number of ranks."
            )
    states: list[State] = [{} for _ in range(world_size)]
    for name, value in state.items():
        if match := _ALL_AT_ONCE.fullmatch(name):
            place, rest = match[1], FASTMOE_NAMES.get(match[2], match[2])
            for own, part in zip(states, value.chunk(world_size), strict=True):
                if layout == "one":
                    own[f"{place}{rest}"] = part
                else:
                    own |= {f"{place}{e}.{rest}": one for e, one in enumerate(part.split(1))}
        elif match := _ONE_OF_MANY.fullmatch(name):
            place, index, rest = match[1], int(match[2]), match[3]
            rank, own_index = divmod(index, counts[place] // world_size)
            states[rank][f"{place}{own_index}.{rest}"] = value
        else:
            for own in states[:1] if experts_only else states:
                own[name] = value
    return [_unflatten(own) for own in states]


def megatron_file(
    folder: str | Path, data_rank: int, tensor_rank: int = 0, pipeline_rank: int | None = None
) -> Path:
    """Say where FastMoE's adapter for Megatron-LM keeps a rank's checkpoint, whose key "model" is for ``merge_ranks``.

    Args:
        folder: of an iteration, such as ``checkpoints/iter_0001000``.
        data_rank: the rank's place among those that hold different experts, Megatron-LM's data-parallel ones.
        tensor_rank: its place in tensor parallelism, which has experts of its own.
        pipeline_rank: its stage, ``None`` without a pipeline.

    Example:
        >>> megatron_file("iter_0001000", 3).as_posix()
        'iter_0001000/mp_rank_00_dp_rank_0003/model_optim_rng.pt'
    """
    name = f"mp_rank_{tensor_rank:02d}"
    if pipeline_rank is not None:
        name += f"_{pipeline_rank:03d}"
    if data_rank:
        name += f"_dp_rank_{data_rank:04d}"
    return Path(folder, name, "model_optim_rng.pt")


_INTO = "\0"  # between the names of dicts inside of dicts, in which it cannot be


def _flatten(state: Mapping[str, Any]) -> State:
    flat: State = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}{_INTO}{rest}": inner for rest, inner in _flatten(value).items()}
        else:
            flat[name] = value
    return flat


def _unflatten(flat: State) -> State:
    state: State = {}
    for name, value in flat.items():
        *path, last = name.split(_INTO)
        place = state
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return state


def _shown(names: Any) -> list[str]:
    """A few names for an error message."""
    return [name.replace(_INTO, ".") for name in sorted(names)[:4]]


def _is_expert(name: str) -> bool:
    return bool(_ALL_AT_ONCE.fullmatch(name) or _ONE_OF_MANY.fullmatch(name))
