"""Checkpoints of models with experts on many ranks, for any number of ranks. E experts, W ranks.

Tensors are written and read by torch.distributed.checkpoint, every rank its own; which experts are on which rank is
not part of a checkpoint. The index is JSON, with sizes and SHA-256 digests of all files, and replacing it is the last
and indivisible step of saving.

What is trusted: nothing that a file says is run. torch's own ``.metadata`` is a pickle and is not read; tensors, the
optimizer's options and ``extra`` are read with ``weights_only=True``, and only from files that the index lists. The
digests find damage, not forgery: whoever can write the folder can write an index that fits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeops.comm.agreement import everywhere
from moeops.distributed.checkpoint import files, layouts
from moeops.distributed.checkpoint.ranks import (
    check_fit,
    check_plain,
    everyone,
    is_distributed,
    join_param_groups,
    keep_and_tell,
    must_agree,
    place,
)
from moeops.distributed.checkpoint.sources import (
    VALUES,
    Folder,
    Source,
    explain_dcp,
    open_source,
)
from moeops.distributed.checkpoint.state import LocalState, ModelState, Piece

__all__ = ["load_checkpoint", "merge_checkpoint", "read_extra", "save_checkpoint"]

LAYOUTS = ("fused", "per_expert")


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Any = None,
) -> None:
    """Save a model and its optimizer, from all ranks of the job into one folder.

    Every rank calls it. Experts of ``moeops.FMoE`` layers get the numbers that they have among all experts, and the
    shards of an expert are put together; what ranks have copies of is written once. A checkpoint that is in the folder
    is replaced in one step, when the new one is complete and on the disk; until then it is the one that loads,
    whatever happens to the job.

    Args:
        path: a folder that all ranks share, made if it is not there. One job at a time saves there.
        model: on many ranks, as it is trained: with DDP, FSDP2, ``DistributedGroupedDataParallel`` or torch.compile
            around it or not.
        optimizer: trains parameters of the model; any that works by ``state_dict``.
        extra: anything of plain Python (numbers, text, lists, dicts) and tensors. Rank 0's is saved.

    Raises:
        ValueError: ranks disagree on a shape or an option.  TypeError: ``extra`` is more than plain Python.
        NotImplementedError: a tensor of an expert module has not the experts in dimension 0; or experts in shards are
        no ``FusedExperts``.
        RuntimeError: saving failed on another rank, or in torch.distributed.checkpoint.
    Host sync: copies everything to the host. Memory: no copy on the device.
    """
    op = "save_checkpoint"
    folder = Path(path)
    mine, told = keep_and_tell(op, lambda: _describe_saved(op, model, optimizer))
    objects, groups = _agree(op, told)
    rank, size = place()
    state: dict[str, Any] = dict(mine.pieces)

    def begin() -> str | None:
        if rank != 0:
            return None
        state[VALUES] = {"objects": objects, "groups": groups, "extra": extra}
        check_plain(op, state[VALUES])
        return files.new_data_folder(op, folder)

    try:
        name = everywhere(op, everyone(), begin)[0]
        assert name is not None
        data = folder / name
        entries = _write(op, data, state)
        digests = everywhere(op, everyone(), lambda: _digests_of_rank(data, rank))
        contents = {
            "format": files.FORMAT,
            "version": files.VERSION,
            "torch": str(torch.__version__),
            "ranks": size,
            "folder": name,
            "files": {file: digest for theirs in digests for file, digest in theirs.items()},
            "layers": told[0].layers,
            "groups": None if groups is None else [group["params"] for group in groups],
            **entries,
        }
        # The last step, which makes this checkpoint the one that loads.
        everywhere(
            op, everyone(), lambda: files.write_index(folder, contents) if rank == 0 else None
        )
    finally:
        if rank == 0:
            files.remove_other_data(folder)


class _Told(NamedTuple):
    """What a rank tells the others of what it saves; see ``LocalState``."""

    shapes: dict[str, Any]
    objects: dict[str, Any]
    groups: list[dict[str, Any]] | None
    equal: dict[str, float]
    layers: list[dict[str, Any]]


def _describe_saved(
    op: str, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[LocalState, _Told]:
    """What this rank saves, and what the others must know of it."""
    found = ModelState(op, model)
    mine = found.save(optimizer)
    layers = [layer.record() for layer in found.layers]
    return mine, _Told(_shapes_of(mine.pieces), mine.objects, mine.groups, mine.equal, layers)


def _shapes_of(pieces: dict[str, list[Piece]]) -> dict[str, Any]:
    """Shape and type of each whole tensor."""
    return {key: (parts[0].shape, parts[0].dtype) for key, parts in pieces.items()}


def _agree(op: str, told: list[_Told]) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Compare what the ranks save; return all values that are no tensors, and the optimizer's groups."""
    shapes: dict[str, Any] = {}
    equal: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for rank, theirs in enumerate(told):
        must_agree(op, rank, shapes, theirs.shapes)
        must_agree(op, rank, equal, theirs.equal)
        must_agree(op, rank, layers, {"layers of experts": theirs.layers})
        objects = {**theirs.objects, **objects}  # the first rank's counts
    return objects, join_param_groups(op, [theirs.groups for theirs in told])


def _digests_of_rank(data: Path, rank: int) -> dict[str, Any]:
    """Sizes and digests of the files that a rank has written."""
    written = [*data.glob(f"__{rank}_*"), *([data / ".metadata"] if rank == 0 else [])]
    return {file.name: files.digest_of(file) for file in written}


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Load what ``save_checkpoint`` or ``merge_checkpoint`` wrote, on any number of ranks.

    Every rank calls it, with a model that has the same experts in total as the one that was saved, in any number of
    shards; each rank reads its own.
    Every file's size and digest is checked before anything is changed. Names, shapes and types must be those of the
    checkpoint. An optimizer's state and options are replaced; it may be new. A merged file may have the experts
    in another layout than the model.

    Args:
        path: the folder, or a merged file; all ranks read it.
        model: takes the values.
        optimizer: takes its state, in the same parameter groups; ``None`` to leave that in the checkpoint.

    Returns:
        ``extra`` as it was saved, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no checkpoint.  ValueError: a file is damaged, and is named; or the checkpoint
        does not fit the model.  RuntimeError: loading failed on another rank.
    """
    op = "load_checkpoint"
    source = everywhere(op, everyone(), lambda: open_source(op, Path(path)))[0]
    assert source is not None
    rank, size = place()
    everywhere(op, everyone(), lambda: source.check(op, rank, size))
    wanted, told = keep_and_tell(op, lambda: _describe_wanted(op, source, model, optimizer))
    check_fit(op, str(path), source.tensors, source.layers, told, optimizer is not None)
    values = source.read(op, wanted.pieces)
    everywhere(op, everyone(), lambda: _hand_over(op, source.path, wanted, optimizer, values))
    return values["extra"]


class _Wanted(NamedTuple):
    """What a rank reads.

    Attributes:
        state: its model.
        pieces: parts of tensors, by key.
        room: tensors of the optimizer's state that these parts are in, by key.
        groups: the checkpoint's parameter groups for each of the optimizer's, ``None`` for one without parameters.
    """

    state: ModelState
    pieces: dict[str, list[Piece]]
    room: dict[str, Tensor]
    groups: list[int | None]


def _describe_wanted(
    op: str, source: Source, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[_Wanted, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """What this rank reads, and what of it is compared with the checkpoint: shapes, and layers of experts."""
    state = ModelState(op, model)
    source.fit(op, state)
    wanted = _Wanted(state, state.model_pieces(), {}, [])
    if optimizer is not None:
        if source.groups is None:
            raise ValueError(
                f"{op}: optimizer must be None for a checkpoint without one, got {type(optimizer).__name__}. "
                f"Start with a new optimizer, {source.path} has no state."
            )
        wanted.groups.extend(_match_groups(op, state, optimizer, source))
        for key, (parts, tensor) in state.wanted_state(optimizer, source.tensors).items():
            wanted.pieces[key] = parts
            wanted.room[key] = tensor
    layers = [{**layer.record(), "ranks": layer.size} for layer in state.layers]
    return wanted, (_shapes_of(wanted.pieces), layers)


def _hand_over(
    op: str,
    path: Path,
    wanted: _Wanted,
    optimizer: torch.optim.Optimizer | None,
    values: dict[str, Any],
) -> None:
    """Give model and optimizer what was read: the model's tensors are filled, its hooks and extra states are left."""
    state, objects = wanted.state, values["objects"]
    loaded: dict[str, Any] = dict(state.tensors)
    for raw in state.extra_states:
        key = f"model/{state.name(raw)}"
        if key not in objects:
            raise ValueError(
                f"{op}: the model must have the extra states of {path}, got {key}, which the checkpoint has not. Build "
                "the same model."
            )
        loaded[raw] = objects[key]
    state.model.load_state_dict(loaded)
    if optimizer is not None:
        options = [{} if number is None else values["groups"][number] for number in wanted.groups]
        try:
            _load_optimizer(state, optimizer, wanted.room, objects, options)
        except (
            Exception
        ) as err:  # whatever an optimizer says that misses a state, or meets another's
            raise ValueError(
                f"{op}: optimizer must take the state in {path}, got {type(err).__name__}: {err}. Pass an optimizer of "
                "the kind that was saved."
            ) from err


def read_extra(path: str | os.PathLike[str]) -> Any:
    """Read what ``save_checkpoint`` saved as ``extra``, without a model: to build one by it, or to look at the step.

    Every rank calls it; rank 0 reads, and all get its answer.

    Args:
        path: the folder, or a merged file.

    Returns:
        ``extra`` as it was saved, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no checkpoint.  ValueError: a file is missing, or the one that holds ``extra`` is
        damaged, and is named.  RuntimeError: reading failed on rank 0.
    """
    op = "read_extra"

    def read() -> Any:
        source = open_source(op, Path(path))
        return None if source is None else source.extra(op)

    return everywhere(op, everyone(), read)[0]


def merge_checkpoint(
    path: str | os.PathLike[str], out_file: str | os.PathLike[str], layout: str = "fused"
) -> None:
    """Write a checkpoint of many ranks to one file, which ``torch.load`` reads with ``weights_only=True``.

    The file holds a dict: ``model`` is a state dict for a model on one rank, ``optimizer`` is ``None`` or a dict of
    ``state`` by parameter name and ``param_groups``, ``extra`` is what was saved. Call it in one process; everything
    is in host memory at once.

    Args:
        path: a folder that ``save_checkpoint`` wrote.
        out_file: the file, replaced in one step if it is there.
        layout: "fused" has one tensor for all experts, ``experts.w_up [E, ...]``; "per_expert" has one for each, by
            FastMoE's names: ``experts.{i}.htoh4.weight [1, H, D]``, ``htoh4.bias``, ``h4toh.weight``,
            ``h4toh.bias``. Other fused tensors keep their name behind the number; experts that are modules of other
            names stay as they are.

    Raises:
        FileNotFoundError: there is no checkpoint.  ValueError: a file is damaged, and is named; or no such layout.
    """
    op = "merge_checkpoint"
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {LAYOUTS}, got {layout!r}. Pick one.")
    source = Folder(op, Path(path))
    source.check(op, 0, 1)
    wanted = {}
    for key, (shape, dtype) in source.tensors.items():
        whole = torch.empty(shape, dtype=getattr(torch, dtype))
        wanted[key] = [Piece(whole, (0,) * len(shape), shape)]
    values = source.read(op, wanted, alone=True)
    parts: layouts.Parts = {key: [pieces[0].local] for key, pieces in wanted.items()}
    layers = []
    for layer in source.layers:
        if layout == "per_expert" and layer["names"] is not None:
            layer = layouts.to_experts(op, parts, values["groups"], layer)
        elif layout == "fused" and layer["names"] is None and layouts.can_fuse(parts, layer):
            layer = layouts.to_fused(op, parts, values["groups"], layer)
        layers.append(layer)
    merged: dict[str, Any] = {
        "format": files.FORMAT,
        "version": files.VERSION,
        "layout": layout,
        "layers": layers,
        "model": {},
        "optimizer": None,
        "objects": values["objects"],
        "extra": values["extra"],
    }
    if values["groups"] is not None:
        merged["optimizer"] = {"state": {}, "param_groups": values["groups"]}
    for key in sorted(parts):
        head, name, tail = layouts.split_name(key)
        # Parts that are views are copied: a view would take its whole base into the file.
        tensor = torch.cat(parts[key]) if len(parts[key]) > 1 else parts[key][0].clone()
        if head == "model/":
            merged["model"][name] = tensor
        else:
            merged["optimizer"]["state"].setdefault(name, {})[tail[1:]] = tensor
    out = Path(out_file)
    part = out.with_name(f"{out.name}.part")
    torch.save(merged, part)
    files.replace_file(part, out)


def _write(op: str, data: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write the data of all ranks; return where everything went, on rank 0."""
    import torch.distributed.checkpoint as dcp

    from moeops.distributed.checkpoint.plans import SavePieces, Writer

    writer = Writer(str(data))
    with explain_dcp(op, data):
        dcp.save(state, storage_writer=writer, planner=SavePieces(), no_dist=not is_distributed())
    return getattr(writer, "entries", {})


def _match_groups(
    op: str, state: ModelState, optimizer: torch.optim.Optimizer, source: Source
) -> list[int | None]:
    """Say which of a checkpoint's parameter groups each of the optimizer's is; ``None`` for one without parameters."""
    group_of = {name: number for number, group in enumerate(source.groups or ()) for name in group}
    parameters = iter(state.parameter_names(optimizer))
    matched: list[int | None] = []
    for number, group in enumerate(optimizer.param_groups):
        found = sorted({group_of.get(state.name(next(parameters)[0]), -1) for _ in group["params"]})
        if len(found) > 1 or -1 in found:
            raise ValueError(
                f"{op}: parameter group {number} must be one of the checkpoint's in {source.path}, got parameters of "
                f"{found} (-1: not trained there). Build the optimizer with the same groups."
            )
        matched.append(found[0] if found else None)
    return matched


def _load_optimizer(
    state: ModelState,
    optimizer: torch.optim.Optimizer,
    room: dict[str, Tensor],
    objects: dict[str, Any],
    options: list[dict[str, Any]],
) -> None:
    """Hand the loaded state to the optimizer, under its own numbers."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in (*objects.items(), *room.items()):
        head, name, tail = layouts.split_name(key)
        if head == "optimizer/":
            by_name.setdefault(name, {})[tail[1:]] = value
    packed = optimizer.state_dict()
    parameters = iter(state.parameter_names(optimizer))
    new_state, new_groups = {}, []
    for group, new in zip(packed["param_groups"], options, strict=True):
        new_groups.append({**group, **new, "params": group["params"]})
        for index in group["params"]:
            name = state.name(next(parameters)[0])
            if name in by_name:
                new_state[index] = by_name[name]
    optimizer.load_state_dict({"state": new_state, "param_groups": new_groups})
