"""What the ranks of a job say of a checkpoint, compared: every rank fails, or none does. W ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from moeops.comm.agreement import everywhere
from moeops.comm.groups import RankGroup, rank_group

K = TypeVar("K")
T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of a job's ranks."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized()


def everyone() -> RankGroup | None:
    """All ranks of the job, ``None`` for a process that is none."""
    return rank_group(torch.distributed.group.WORLD) if is_distributed() else None


def place() -> tuple[int, int]:
    """This rank, and how many there are."""
    group = everyone()
    return (0, 1) if group is None else (group.rank, group.size)


def keep_and_tell(op: str, work: Callable[[], tuple[K, T]]) -> tuple[K, list[T]]:
    """Make something to keep here and something to tell all, on every rank or on none; see ``everywhere``."""
    kept: list[K] = []

    def tell() -> T:
        mine, told = work()
        kept.append(mine)
        return told

    answers = everywhere(op, everyone(), tell)
    return kept[0], answers


def must_agree(op: str, rank: int, known: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Add what a rank says to what ranks before it said."""
    for key, value in theirs.items():
        if known.setdefault(key, value) != value:
            raise ValueError(
                f"{op}: {key} must be the same on every rank, got {known[key]} before and {value} on rank {rank} of "
                f"{place()[1]}. Build and train the model alike everywhere."
            )


def join_param_groups(op: str, answers: list[Any]) -> list[dict[str, Any]] | None:
    """Parameter groups with the names of all ranks; experts of a list are on one rank each."""
    if answers[0] is None and all(answer is None for answer in answers):
        return None
    if any(answer is None or len(answer) != len(answers[0] or ()) for answer in answers):
        counts = [None if answer is None else len(answer) for answer in answers]
        raise ValueError(
            f"{op}: optimizer must have the same parameter groups on every rank, got {counts} groups by rank. Build "
            "it alike everywhere."
        )
    joined = []
    for number, by_rank in enumerate(zip(*answers, strict=True)):
        options = [{k: v for k, v in group.items() if k != "params"} for group in by_rank]
        for rank, other in enumerate(options):
            if repr(other) != repr(options[0]):
                raise ValueError(
                    f"{op}: options of parameter group {number} must be the same on every rank, got {options[0]} on "
                    f"rank 0 and {other} on rank {rank} of {len(options)}. Set them alike everywhere."
                )
        names = dict.fromkeys(name for group in by_rank for name in group["params"])
        joined.append({**options[0], "params": list(names)})
    return joined


def check_plain(op: str, values: dict[str, Any]) -> None:
    """Refuse what could be saved and then not be loaded."""
    data = io.BytesIO()
    try:
        torch.save(values, data)
        data.seek(0)
        torch.load(data, map_location="cpu", weights_only=True)
    except Exception as err:
        raise TypeError(
            f"{op}: extra, extra states of modules and options of the optimizer must be plain Python and tensors, got "
            f"one that torch.load refuses with weights_only: {str(err).splitlines()[0]} Convert it before."
        ) from err


def _some(names: set[str]) -> str:
    """A few names of many."""
    shown = ", ".join(sorted(names)[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def check_fit(
    op: str,
    path: str,
    tensors: dict[str, tuple[tuple[int, ...], str]],
    layers: list[dict[str, Any]],
    answers: list[tuple[dict[str, Any], list[dict[str, Any]]]],
    with_optimizer: bool,
) -> None:
    """Compare what all ranks want with what there is; every rank comes to the same result."""
    saved = {layer["prefix"]: layer for layer in layers}
    for layer in answers[0][1]:
        there = saved.get(layer["prefix"])
        if there is not None and there["num_experts"] != layer["num_experts"]:
            have, size = there["num_experts"], layer["ranks"]
            advice = (
                f"Build the layer with num_expert={have // size} on each of {size} ranks."
                if have % size == 0
                else f"They cannot be shared equally by {size} ranks: choose a number of ranks that divides {have}."
            )
            raise ValueError(
                f"{op}: the model must have the experts of {path}, got {layer['num_experts']} experts of "
                f"{layer['prefix'].rstrip('.')} on {size} ranks and {have} in the checkpoint. {advice}"
            )
    wanted: dict[str, Any] = {}
    for rank, (shapes, _) in enumerate(answers):
        must_agree(op, rank, wanted, shapes)
    missing = {key for key in wanted if key not in tensors}
    unexpected = {
        key for key in tensors if key not in wanted and (with_optimizer or key.startswith("model/"))
    }
    for what, keys in (("missing from", missing), ("unexpected in", unexpected)):
        if keys:
            raise ValueError(
                f"{op}: the model must have the tensors of {path}, got {len(keys)} {what} the checkpoint: "
                f"{_some(keys)}. Build the same model; experts in another layout load from a file of merge_checkpoint."
            )
    for key, (shape, dtype) in wanted.items():
        there_shape, there_dtype = tensors[key]
        if (tuple(shape), dtype) != (there_shape, there_dtype):
            raise ValueError(
                f"{op}: {key} must have the shape and type of {path}, got {list(shape)} {dtype} in the model and "
                f"{list(there_shape)} {there_dtype} in the checkpoint. Build the same model; convert it after loading."
            )
