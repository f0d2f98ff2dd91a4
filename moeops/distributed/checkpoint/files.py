"""Files of a checkpoint: an index in JSON that names, sizes and digests the others, written last and at once.

path/checkpoint.json         the index; replacing it is what makes a checkpoint the one that loads
path/data-3f0c.../*.distcp   tensors, written by torch.distributed.checkpoint
path/data-3f0c.../.metadata  its own index, for torch's tools; a pickle that moeops writes and never reads
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from moeops.distributed.checkpoint.contents import check_index

INDEX = "checkpoint.json"
FORMAT = "moeops.checkpoint"
VERSION = 1
_DATA = "data-"


def digest_of(file: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def new_data_folder(op: str, path: Path) -> str:
    """Make a folder for a checkpoint's data inside of ``path``; return its name."""
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"{op}: path must be a folder or not exist, got the file {path}. Pass another path."
        )
    path.mkdir(parents=True, exist_ok=True)
    name = _DATA + os.urandom(8).hex()
    (path / name).mkdir()
    return name


def write_index(path: Path, contents: dict[str, Any]) -> None:
    """Make a checkpoint whose data is written the one that loads, in one step that cannot be interrupted."""
    text = json.dumps(contents, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    _sync(path / contents["folder"])
    part = path / f"{INDEX}.part"
    write_whole(part, f'{{"sha256": "{digest}", "contents": {text}}}\n'.encode())
    os.replace(part, path / INDEX)
    _sync(path)
    _sync(path.parent)


def write_whole(file: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(part: Path, file: Path) -> None:
    """Put a file that is written in the place of another, in one step."""
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, file)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    if os.name != "posix":
        return  # Windows cannot open folders, and writes their entries through
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_index(op: str, path: Path) -> dict[str, Any]:
    """Read a checkpoint's index, and check it against its own digest."""
    file = path / INDEX
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{op}: path must hold a checkpoint, got {path} without {INDEX}. Nothing was saved there to the end."
        ) from None
    except OSError as err:
        raise ValueError(
            f"{op}: {file} must be a file that can be read, got {err.strerror}. Load another checkpoint."
        ) from err
    try:
        whole = json.loads(text)
        contents = whole["contents"]
        digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
        intact = digest == whole["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(
            f"{op}: {file} is damaged: the content must fit its digest, got another one. Load another checkpoint."
        )
    found = contents if isinstance(contents, dict) else {}
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise ValueError(
            f"{op}: path must hold a checkpoint of {FORMAT} version {VERSION}, got {found.get('format')!r} version "
            f"{found.get('version')!r} in {file}. Load it with the version of moeops that wrote it."
        )
    check_index(op, file, contents)
    return contents


def check_files(
    op: str, path: Path, index: dict[str, Any], first: int, step: int, only: str | None = None
) -> None:
    """Compare sizes of all files of a checkpoint, and digests of every ``step``-th or of one, with the index."""
    for number, (name, expected) in enumerate(sorted(index["files"].items())):
        file = path / index["folder"] / name
        try:
            size = file.stat().st_size
        except OSError as err:
            raise ValueError(
                f"{op}: {file} must be a file that can be read, got {err.strerror}. Load another checkpoint."
            ) from err
        if size != expected["bytes"]:
            raise ValueError(
                f"{op}: {file} is damaged: it must have {expected['bytes']} bytes, got {size}. Load another checkpoint."
            )
        chosen = number % step == first if only is None else name == only
        try:
            fits = not chosen or digest_of(file) == expected
        except OSError as err:
            raise ValueError(
                f"{op}: {file} must be a file that can be read, got {err.strerror}. Load another checkpoint."
            ) from err
        if not fits:
            raise ValueError(
                f"{op}: {file} is damaged: the content must fit its digest, got another one. Load another checkpoint."
            )


def remove_other_data(path: Path) -> None:
    """Remove data that the index does not name: of the checkpoint before, or of a save that was interrupted."""
    try:
        kept = read_index("", path)["folder"]
    except FileNotFoundError:
        kept = None
    except (ValueError, OSError):
        return  # which data it names is not known
    for folder in path.glob(f"{_DATA}*"):
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)
