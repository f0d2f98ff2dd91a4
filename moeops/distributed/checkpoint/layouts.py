"""One tensor for all experts of a layer, or one for each: the two layouts of a merged checkpoint. E experts.

Tensors are lists of parts along dimension 0, so that nothing is copied before somebody wants the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeops.distributed.checkpoint.state import Piece
from moeops.layers._fastmoe_keys import FASTMOE_NAMES

_LIST_NAMES = {name: fused for fused, name in FASTMOE_NAMES.items()}  # the way back

Parts = dict[str, list[Tensor]]


def split_name(key: str) -> tuple[str, str, str]:
    """``("model/", name, "")`` or ``("optimizer/", name, "/state")``."""
    head, _, name = key.partition("/")
    if head == "model":
        return "model/", name, ""
    name, _, state = name.rpartition("/")
    return "optimizer/", name, f"/{state}"


def shape_of(parts: list[Tensor]) -> tuple[int, ...]:
    """Shape of the whole."""
    if len(parts) == 1:
        return tuple(parts[0].shape)
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def copy_rows(parts: list[Tensor], piece: Piece) -> None:
    """Fill one rank's part of a tensor."""
    start = 0
    for part in parts:
        if part.dim() == 0:
            piece.local.copy_(part)
            return
        first = max(start, piece.offset[0])
        last = min(start + part.shape[0], piece.offset[0] + piece.local.shape[0])
        if first < last:
            source = part[first - start : last - start]
            for dim in range(1, part.dim()):
                source = source.narrow(dim, piece.offset[dim], piece.local.shape[dim])
            piece.local[first - piece.offset[0] : last - piece.offset[0]].copy_(source)
        start += part.shape[0]


def can_fuse(parts: Parts, layer: dict[str, Any]) -> bool:
    """Whether the experts of a layer have FastMoE's names and shapes."""
    start = f"model/{layer['prefix']}"
    found = [key for key in parts if key.startswith(start)]
    return bool(found) and all(
        key[len(start) :].partition(".")[2] in _LIST_NAMES and parts[key][0].shape[:1] == (1,)
        for key in found
    )


def to_experts(
    op: str, parts: Parts, groups: list[dict[str, Any]] | None, layer: dict[str, Any]
) -> dict[str, Any]:
    """Give each expert of a layer tensors of its own, in place; return the layer's new record."""
    prefix, num_experts = layer["prefix"], layer["num_experts"]

    def new_names(name: str) -> list[str]:
        rest = name[len(prefix) :]
        if not name.startswith(prefix) or rest not in layer["names"]:
            return []
        rest = FASTMOE_NAMES.get(rest, rest)
        return [f"{prefix}{index}.{rest}" for index in range(num_experts)]

    for key in list(parts):
        head, name, tail = split_name(key)
        names = new_names(name)
        if not names:
            continue
        (whole,) = parts.pop(key)
        by_expert = whole.dim() > 0 and whole.shape[0] == num_experts
        if not by_expert and whole.numel() != 1:
            raise NotImplementedError(
                f"{op}: optimizer state must be a number or have the {num_experts} experts in dimension 0 to be split "
                f"by expert, got {key} {list(whole.shape)}. Use the fused layout."
            )
        for index, new in enumerate(names):
            parts[f"{head}{new}{tail}"] = [whole[index : index + 1] if by_expert else whole]
    for group in groups or ():
        group["params"] = [new for name in group["params"] for new in new_names(name) or [name]]
    return {**layer, "names": None}


def to_fused(
    op: str, parts: Parts, groups: list[dict[str, Any]] | None, layer: dict[str, Any]
) -> dict[str, Any]:
    """Put the tensors of a layer's experts together, in place; return the layer's new record."""
    prefix, num_experts = layer["prefix"], layer["num_experts"]

    def new_name(name: str) -> tuple[str, int] | None:
        if not name.startswith(prefix):
            return None
        index, _, rest = name[len(prefix) :].partition(".")
        return (prefix + _LIST_NAMES.get(rest, rest), int(index)) if index.isdigit() else None

    # Collect, by the fused name, the parts of every expert.
    found: dict[str, dict[int, list[Tensor]]] = {}
    for key in list(parts):
        head, name, tail = split_name(key)
        new = new_name(name)
        if new is not None:
            found.setdefault(f"{head}{new[0]}{tail}", {})[new[1]] = parts.pop(key)
    for key, by_expert in found.items():
        if len(by_expert) != num_experts or max(by_expert) >= num_experts:
            raise ValueError(
                f"{op}: every one of {num_experts} experts must have {key} to be fused, got experts "
                f"{sorted(by_expert)}. Load it into a layer with a list of experts."
            )
        # In the order of experts, as they lie in the fused tensor; a number, such as a step count, is kept once.
        rows = [part for index in range(num_experts) for part in by_expert[index]]
        if rows[0].dim() == 0:
            if any(not torch.equal(row, rows[0]) for row in rows):
                raise ValueError(
                    f"{op}: experts must have the same {key} to be fused, got "
                    f"{[row.item() for row in rows]}. Load it into a layer with a list of experts."
                )
            rows = rows[:1]
        parts[key] = rows
    # The optimizer's groups name a fused tensor once, and in one group only.
    for number, group in enumerate(groups or ()):
        names = [new[0] if (new := new_name(name)) else name for name in group["params"]]
        group["params"] = list(dict.fromkeys(names))
        for other in (groups or ())[:number]:
            both = set(group["params"]) & set(other["params"])
            if both:
                raise ValueError(
                    f"{op}: experts of a layer must be in one parameter group to be fused, got {min(both)} in two. "
                    "Load it into a layer with a list of experts."
                )
    start = f"model/{prefix}"
    return {**layer, "names": [key[len(start) :] for key in found if key.startswith(start)]}
