"""What the parts of a checkpoint must look like before anything in them is used; anything else is refused by name.

A form is a class or a check of one value; ``(None, form)`` where there may be nothing; ``[form]``, a list of any
length; ``{name: form}``, a dict that has these names; or ``{str: form}``, one with any names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def count(value: Any) -> bool:
    """A whole number from 0 on, of 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def positive(value: Any) -> bool:
    """A whole number from 1 on, of 63 bits."""
    return count(value) and value > 0


def file_name(value: Any) -> bool:
    """The name of a file or folder, with no way out of the folder that it is in."""
    return isinstance(value, str) and re.fullmatch(r"\.?\w[\w.-]*", value) is not None


def dtype_name(value: Any) -> bool:
    """The name of one of torch's types."""
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def anything(value: Any) -> bool:
    """A value that the checkpoint only keeps."""
    return True


_PLACE = {"file": file_name, "start": count, "length": count}
_LAYERS = [{"prefix": str, "num_experts": positive, "names": (None, [str])}]
_GROUPS = (None, [{"params": [str], str: anything}])
_INDEX = {
    "folder": file_name,
    "files": {str: {"bytes": count, "sha256": str}},
    "layers": _LAYERS,
    "groups": (None, [[str]]),
    "objects": {"values": _PLACE, str: _PLACE},
    "tensors": {
        str: {
            "dtype": dtype_name,
            "shape": [count],
            "chunks": [{**_PLACE, "offset": [count], "shape": [count]}],
        }
    },
}
_VALUES = {"objects": {str: anything}, "groups": _GROUPS, "extra": anything}
_MERGED = {
    "layers": _LAYERS,
    "model": {str: Tensor},
    "optimizer": (None, {"state": {str: {str: Tensor}}, "param_groups": _GROUPS[1]}),
    "objects": {str: anything},
    "extra": anything,
}


def check_index(op: str, file: Path, index: dict[str, Any]) -> None:
    """Refuse an index whose entries have another form, or name what is not there."""

    def must(fits: bool, where: str, wanted: str, got: object) -> None:
        if not fits:
            raise _damaged(op, file, where, wanted, got)

    _check(op, file, "the index", _INDEX, index)
    entries = [(key, entry) for key, entry in index["objects"].items()]
    for key, tensor in index["tensors"].items():
        entries += [(key, chunk) for chunk in tensor["chunks"]]
        whole, elements = tensor["shape"], 0
        for chunk in tensor["chunks"]:
            offset, shape = chunk["offset"], chunk["shape"]
            inside = len(offset) == len(shape) == len(whole) and all(
                first + length <= size
                for first, length, size in zip(offset, shape, whole, strict=True)
            )
            must(inside, f"parts of {key}", f"inside of {whole}", f"{shape} at {offset}")
            elements += math.prod(shape)
            size = math.prod(shape) * getattr(torch, tensor["dtype"]).itemsize
            must(size <= chunk["length"], f"a part of {key}", f"{size} bytes long", chunk["length"])
        must(elements == math.prod(whole), f"parts of {key}", f"all of {whole}", elements)
    for key, entry in entries:
        name = entry["file"]
        must(name in index["files"], f"the file of {key}", "one of the checkpoint's", name)
        end, length = entry["start"] + entry["length"], index["files"][name]["bytes"]
        must(end <= length, f"the place of {key}", f"in the {length} bytes of {name}", end)
    must(
        all(file_name(name) for name in index["files"]),
        "files",
        "names of files",
        list(index["files"]),
    )
    shapes = {key: tuple(tensor["shape"]) for key, tensor in index["tensors"].items()}
    check_layers(op, file, index["layers"], shapes)


def check_layers(
    op: str, file: Path, layers: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Refuse layers of experts that are not those of the tensors; ``shapes`` has keys ``model/NAME``."""
    for layer in layers:
        for name in layer["names"] or ():
            key = f"model/{layer['prefix']}{name}"
            if shapes.get(key, ())[:1] != (layer["num_experts"],):
                wanted = f"of the {layer['num_experts']} experts of {layer['prefix']!r}"
                raise _damaged(op, file, key, wanted, list(shapes.get(key, ())))


def check_values(
    op: str, path: Path, values: Any, groups: list[list[str]] | None
) -> dict[str, Any]:
    """Refuse values of another form, or an optimizer's groups that are not those of the index."""
    _check(op, path, "what is no tensor", _VALUES, values)
    named = None if values["groups"] is None else [group["params"] for group in values["groups"]]
    if named != groups:
        raise _damaged(op, path, "the optimizer's groups", "those of the index", named)
    return values


def check_merged(op: str, file: Path, merged: dict[str, Any]) -> None:
    """Refuse a merged file of another form."""
    _check(op, file, "the merged file", _MERGED, merged)
    shapes = {f"model/{name}": tuple(tensor.shape) for name, tensor in merged["model"].items()}
    check_layers(op, file, merged["layers"], shapes)


def _check(op: str, file: Path, where: str, form: Any, value: Any) -> None:
    """Refuse a value that has not the form."""
    if isinstance(form, tuple):
        if value is None and None in form:
            return
        (form,) = (one for one in form if one is not None)
    if isinstance(form, list):
        if not isinstance(value, list):
            raise _damaged(op, file, where, "a list", value)
        for number, item in enumerate(value):
            _check(op, file, f"{where}, item {number}", form[0], item)
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            raise _damaged(op, file, where, "a dict", value)
        for name in form:
            if name is not str and name not in value:
                raise _damaged(op, file, where, f"a dict with {name!r}", sorted(map(str, value)))
        for name, item in value.items():
            if not isinstance(name, str):
                raise _damaged(op, file, where, "a dict with names", name)
            known = form.get(name, form.get(str, anything))
            _check(op, file, f"{name!r} of {where}", known, item)
    elif not (isinstance(value, form) if isinstance(form, type) else form(value)):
        wanted = form.__name__ if isinstance(form, type) else _words(form)
        raise _damaged(op, file, where, wanted, value)


def _words(form: Callable[[Any], bool]) -> str:
    """What a check asks for: its first line."""
    return (form.__doc__ or "").rstrip(".").lower()


def _damaged(op: str, file: Path, where: str, wanted: str, got: object) -> ValueError:
    text = repr(got)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return ValueError(
        f"{op}: {file} is damaged: {where} must be {wanted}, got {text}. Load another checkpoint."
    )
