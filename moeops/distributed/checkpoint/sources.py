"""Where a checkpoint is read from: a folder that many ranks wrote, or one merged file."""

from __future__ import annotations

import contextlib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from moeops.comm.agreement import everywhere
from moeops.comm.wires import explained
from moeops.distributed.checkpoint import files, layouts
from moeops.distributed.checkpoint.contents import check_merged, check_values
from moeops.distributed.checkpoint.ranks import everyone, is_distributed, place
from moeops.distributed.checkpoint.state import ModelState, Piece

VALUES = "values"  # the key of all that is no tensor


class Source(Protocol):
    """A checkpoint that is there, as ``load_checkpoint`` reads it.

    Attributes:
        path: where it is.
        tensors: shape and type of each tensor, by key.
        layers: what the checkpoint says of each layer of experts, see ``ExpertLayer.record``.
        groups: names of the parameters in each of the optimizer's groups; ``None`` without an optimizer.
    """

    path: Path
    tensors: dict[str, tuple[tuple[int, ...], str]]
    layers: list[dict[str, Any]]
    groups: list[list[str]] | None

    def check(self, op: str, rank: int, size: int) -> None:
        """Find damage in this rank's share of the files."""

    def fit(self, op: str, state: ModelState) -> None:
        """Take the layout of the model's experts, if the source can; sets the attributes."""

    def read(self, op: str, wanted: dict[str, list[Piece]]) -> dict[str, Any]:
        """Fill tensors; return the values that are none."""

    def extra(self, op: str) -> Any:
        """Read what was saved as ``extra`` in this process alone, and find damage there."""


@contextlib.contextmanager
def explain_dcp(op: str, path: Path) -> Iterator[None]:
    """Turn the errors of torch.distributed.checkpoint, which every rank gets, into ours."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as err:
        rank, (cause, _) = min(err.failures.items())
        if not isinstance(cause, Exception):
            raise cause from err  # an interrupt
        raise RuntimeError(
            f"{op}: torch.distributed.checkpoint must succeed in {path}, got an error on rank {rank} of {place()[1]}: "
            f"{type(cause).__name__}: {cause}. Look at the disk, and at what the error names."
        ) from err
    except RuntimeError as err:
        group = everyone()
        if group is None:
            raise
        # What fails on a rank is a CheckpointException on all; this is a collective's, for want of a rank.
        raise explained(op, group.name, err) from err


class Folder:
    """A checkpoint of many files."""

    def __init__(self, op: str, path: Path) -> None:
        self.path = path
        self.index = files.read_index(op, path)
        self.layers: list[dict[str, Any]] = self.index["layers"]
        self.groups: list[list[str]] | None = self.index["groups"]
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {
            key: (tuple(entry["shape"]), entry["dtype"])
            for key, entry in self.index["tensors"].items()
        }

    def check(self, op: str, rank: int, size: int) -> None:
        """Compare this rank's share of the files with the index."""
        files.check_files(op, self.path, self.index, rank, size)

    def fit(self, op: str, state: ModelState) -> None:
        """A folder has one layout."""

    def read(self, op: str, wanted: dict[str, list[Piece]], alone: bool = False) -> dict[str, Any]:
        """Fill tensors; return the values that are none."""
        import torch.distributed.checkpoint as dcp

        from moeops.distributed.checkpoint.plans import LoadPieces, Reader

        state: dict[str, Any] = {**wanted, VALUES: None}
        with explain_dcp(op, self.path):
            dcp.load(
                state,
                storage_reader=Reader(str(self.path / self.index["folder"]), self.index),
                planner=LoadPieces(),
                no_dist=alone or not is_distributed(),
            )
        return check_values(op, self.path, state[VALUES], self.groups)

    def extra(self, op: str) -> Any:
        """Read ``extra`` from the one file that holds it."""
        file = self.index["objects"][VALUES]["file"]
        files.check_files(op, self.path, self.index, 0, 1, only=file)
        return self.read(op, {}, alone=True)["extra"]


class File:
    """A merged checkpoint."""

    def __init__(self, op: str, path: Path) -> None:
        self.path = path
        self.groups: list[list[str]] | None = None
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self.layers: list[dict[str, Any]] = []

    def check(self, op: str, rank: int, size: int) -> None:
        """Compare the file with the checksums that torch.save put into it; on one rank, since there is one file."""
        if rank != 0:
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                bad = archive.testzip()
        except Exception as err:  # zipfile has a dozen for what it meets in a damaged archive
            raise ValueError(
                f"{op}: {self.path} is damaged or no checkpoint: the file must be an archive of torch.save, got: "
                f"{err}. Load another one."
            ) from err
        if bad is not None:
            raise ValueError(
                f"{op}: {self.path} is damaged: the content of {bad} must fit its checksum, got another one. "
                "Load another checkpoint."
            )

    def extra(self, op: str) -> Any:
        """Read ``extra``; the tensors are only mapped."""
        self.check(op, 0, 1)
        return self._contents(op)["extra"]

    def _contents(self, op: str) -> dict[str, Any]:
        try:
            merged = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except (
            Exception
        ) as err:  # torch has as many, and refuses by one of them whatever would run code
            raise ValueError(
                f"{op}: path must be a file of merge_checkpoint, got {self.path}, which torch.load refuses with "
                f"weights_only=True: {err} Load another checkpoint."
            ) from err
        if not isinstance(merged, dict) or (merged.get("format"), merged.get("version")) != (
            files.FORMAT,
            files.VERSION,
        ):
            raise ValueError(
                f"{op}: path must be a file of merge_checkpoint, version {files.VERSION}, got {self.path}. Load other "
                "files with torch.load."
            )
        check_merged(op, self.path, merged)
        return merged

    def fit(self, op: str, state: ModelState) -> None:
        """Open the file and name its tensors as the model does."""
        merged = self._contents(op)
        self.parts: layouts.Parts = {f"model/{name}": [t] for name, t in merged["model"].items()}
        groups, optimizer = None, merged["optimizer"]
        if optimizer is not None:
            groups = optimizer["param_groups"]
            for name, entries in optimizer["state"].items():
                for key, tensor in entries.items():
                    self.parts[f"optimizer/{name}/{key}"] = [tensor]
        fused = {layer.prefix: layer.names is not None for layer in state.layers}
        for layer in merged["layers"]:
            is_fused = layer["names"] is not None
            if fused.get(layer["prefix"], is_fused) != is_fused:
                change = layouts.to_experts if is_fused else layouts.to_fused
                layer = change(op, self.parts, groups, layer)
            self.layers.append(layer)
        for key, parts in self.parts.items():
            dtype = str(parts[0].dtype).removeprefix("torch.")
            self.tensors[key] = (layouts.shape_of(parts), dtype)
        self.groups = None if groups is None else [group["params"] for group in groups]
        self.values = {"objects": merged["objects"], "groups": groups, "extra": merged["extra"]}

    def read(self, op: str, wanted: dict[str, list[Piece]]) -> dict[str, Any]:
        """Fill tensors; return the values that are none."""

        def copy() -> None:
            for key, pieces in wanted.items():
                for piece in pieces:
                    layouts.copy_rows(self.parts[key], piece)

        everywhere(op, everyone(), copy)
        return self.values


def open_source(op: str, path: Path) -> Source | None:
    """Rank 0 looks what there is, and the others read no index of another save."""
    if place()[0] != 0:
        return None
    return File(op, path) if path.is_file() else Folder(op, path)
