"""FastMoE's state dicts, one per rank, to a whole one and back. E experts, E_local on a rank, W ranks.

A program that has run with FastMoE has a file for each rank; its adapter for Megatron-LM writes all of rank 0, and the
experts only of the others. ``merge_ranks`` makes one state dict of them, for layers that hold all experts, which
``load_state_dict`` takes. From there ``moeops.distributed.save_checkpoint`` writes a checkpoint that any number of
ranks loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeops.layers._fastmoe_keys import FASTMOE_NAMES

LAYOUTS = ("each", "one")

State = dict[str, Tensor]

# experts.3.<rest>, one for each; experts.htoh4.weight, one for all: where the experts are, which, what of them.
_ONE_OF_MANY = re.compile(r"((?:.*\.)?experts\.)(\d+)\.(.+)")
_FUSED_NAMES = (*FASTMOE_NAMES, *FASTMOE_NAMES.values())
_ALL_AT_ONCE = re.compile(r"((?:.*\.)?experts\.)(" + "|".join(map(re.escape, _FUSED_NAMES)) + r")")


def merge_ranks(states: Sequence[Mapping[str, Tensor]]) -> State:
    """Make one state dict of those of all ranks that share the experts.

    Args:
        states: one for each rank, in their order, in either of FastMoE's layouts, or with moeops' names of fused
            experts. All but the first may lack everything but experts.

    Returns:
        The state dict of a model whose layers have all ``E`` experts, in the layout of ``states``.

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
    of_experts = [{name for name in state if _is_expert(name)} for state in states]
    for rank, names in enumerate(of_experts):
        if names != of_experts[0]:
            raise ValueError(
                f"{op}: all ranks must have experts of the same names, got {sorted(names ^ of_experts[0])[:4]} on one "
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
                        f"{op}: {name} must be equal on all ranks, got another value on rank {rank} than on rank 0. "
                        "Pass the files of one step."
                    )
            merged[name] = value
        elif _ALL_AT_ONCE.fullmatch(name):
            merged[name] = torch.cat([state[name] for state in states])
        else:
            place, index, rest = _ONE_OF_MANY.fullmatch(name).groups()  # type: ignore[union-attr]
            for rank, state in enumerate(states):
                merged[f"{place}{rank * counts[place] + int(index)}.{rest}"] = state[name]
    return merged


def split_ranks(state: Mapping[str, Tensor], world_size: int, layout: str = "each") -> list[State]:
    """Make state dicts that FastMoE loads, one for each rank, of that of a model with all experts.

    Args:
        state: of layers that hold all ``E`` experts: fused ones of moeops, or a list.
        world_size: ``W``.
        layout: of fused experts: "each" has ``experts.0.htoh4.weight [1, H, D]`` and so on, as FastMoE from version 1.0
            on; "one" has ``experts.htoh4.weight [E_local, H, D]``, as version 0.2.

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
    counts: dict[str, int] = {}
    for name, value in state.items():
        if match := _ALL_AT_ONCE.fullmatch(name):
            counts[match[1]] = value.shape[0]
        elif match := _ONE_OF_MANY.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    for place, count in counts.items():
        if count % world_size:
            raise ValueError(
                f"{op}: world_size must be a divisor of the {count} experts of {place.rstrip('.')}, got {world_size}. "
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
            for own in states:
                own[name] = value
    return states


def _is_expert(name: str) -> bool:
    return bool(_ALL_AT_ONCE.fullmatch(name) or _ONE_OF_MANY.fullmatch(name))
