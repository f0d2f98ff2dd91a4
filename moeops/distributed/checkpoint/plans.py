"""Hand parts of tensors to torch.distributed.checkpoint, and take them back. Import it where it is used."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moeops.distributed.checkpoint.state import Piece


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    """Where a part is in the whole."""
    return ChunkStorageMetadata(torch.Size(piece.offset), piece.local.shape)


def _is_nothing(piece: Piece) -> bool:
    """Whether another rank holds all of a tensor that is not empty."""
    return piece.local.numel() == 0 and 0 not in piece.shape


def _find(pieces: list[Piece], index: MetadataIndex) -> Piece:
    """The part at a place."""
    (piece,) = (piece for piece in pieces if torch.Size(piece.offset) == index.offset)
    return piece


class SavePieces(DefaultSavePlanner):
    """Write lists of parts of tensors, and plain values; of equal parts one is written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """List what this rank has."""
        items = []
        for key, value in self.state_dict.items():
            if not isinstance(value, list):
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
                continue
            for piece in value:
                if _is_nothing(piece):
                    continue
                data = TensorWriteData(
                    chunk=_chunk(piece),
                    properties=TensorProperties.create_from_tensor(piece.local),
                    size=torch.Size(piece.shape),
                )
                index = MetadataIndex(key, piece.offset)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """What is to be written."""
        value = self.state_dict[write_item.index.fqn]
        if isinstance(value, list):
            return _find(value, write_item.index).local
        data = io.BytesIO()
        torch.save(value, data)
        return data


class Writer(FileSystemWriter):
    """torch's writer, which also says where everything went."""

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write torch's own index, and keep what ours needs."""
        super().finish(metadata, results)
        places: dict[str, dict[tuple[int, ...], Any]] = {}
        for result in (r for results_of_rank in results for r in results_of_rank):
            offset = tuple(result.index.offset or ())
            info = result.storage_data
            places.setdefault(result.index.fqn, {})[offset] = {
                "file": info.relative_path,
                "start": info.offset,
                "length": info.length,
            }
        self.entries: dict[str, Any] = {"tensors": {}, "objects": {}}
        for key, value in metadata.state_dict_metadata.items():
            if isinstance(value, BytesStorageMetadata):
                self.entries["objects"][key] = places[key][()]
                continue
            self.entries["tensors"][key] = {
                "dtype": str(value.properties.dtype).removeprefix("torch."),
                "shape": list(value.size),
                "chunks": [
                    {
                        "offset": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                        **places[key][tuple(chunk.offsets)],
                    }
                    for chunk in value.chunks
                ],
            }


class Reader(FileSystemReader):
    """torch's reader with the index of moeops in place of torch's pickle; tensors are read with ``weights_only``."""

    def __init__(self, folder: str, index: dict[str, Any]) -> None:
        super().__init__(folder)
        self.index = index

    def _place(self, entry: dict[str, Any]) -> _StorageInfo:
        return _StorageInfo(entry["file"], entry["start"], entry["length"])

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Translate the index."""
        metadata: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for key, entry in self.index["tensors"].items():
            metadata[key] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, entry["dtype"])),
                torch.Size(entry["shape"]),
                [
                    ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["shape"]))
                    for c in entry["chunks"]
                ],
            )
            for chunk in entry["chunks"]:
                places[MetadataIndex(key, chunk["offset"])] = self._place(chunk)
        for key, entry in self.index["objects"].items():
            metadata[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = self._place(entry)
        return Metadata(metadata, storage_data=places)


class LoadPieces(LoadPlanner):
    """Read lists of parts of tensors into place, and the values whose entries are none."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Keep what is wanted and what there is."""
        assert metadata is not None
        self.state_dict = state_dict
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """List what this rank reads, from however many parts it was saved in."""
        items = []
        for key, value in self.state_dict.items():
            if isinstance(value, list):
                chunks = [_chunk(piece) for piece in value if not _is_nothing(piece)]
                saved = self.metadata.state_dict_metadata[key]
                assert isinstance(saved, TensorStorageMetadata)
                items += create_read_items_for_chunk_list(key, saved, chunks)
                continue
            zero = torch.Size((0,))
            index = MetadataIndex(key)
            items.append(ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero))
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value: tensors and plain Python, no code."""
        loaded = torch.load(value, map_location="cpu", weights_only=True)
        self.state_dict[read_item.dest_index.fqn] = loaded

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the elements of a read go."""
        target = _find(self.state_dict[read_item.dest_index.fqn], read_item.dest_index).local
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the tensor was read into place."""
