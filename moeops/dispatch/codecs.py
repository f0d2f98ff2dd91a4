"""Rows that are encoded on the wires: hooks around an exchange, and their transpose in the backward. R rows of width D.

A codec is a pair of functions on rows. Rows leave a rank as what the first makes of them, and what arrives goes through
the second. In the backward gradients go the other way, and are encoded and decoded by the same pair: the gradient of
decoding is encoding. Autograd takes both ends for linear and the difference for noise, as quantised training does.

What travels are bytes. Autograd differentiates floats only, so these are the bits of float32 numbers, which exchanges
move and nobody adds up. Some of them are those of NaN, which ``torch.autograd.detect_anomaly`` reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks
from moeops.dispatch.hooks import StageHook

_CONTAINER = torch.float32
_WORD = 4  # bytes of it


class RowCodec(NamedTuple):
    """A pair of functions that tracers can follow; each row depends on itself alone.

    Attributes:
        encode: rows ``[R, D]``, float32, to ``[R, B]`` uint8.
        decode: ``[R, B]`` uint8 and ``D`` to rows ``[R, D]``, float32.
        num_bytes: ``B`` for a width ``D``.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, int], Tensor]
    num_bytes: Callable[[int], int]


_codecs: dict[str, RowCodec] = {}


def register_codec(name: str, codec: RowCodec) -> None:
    """Give a codec a name, the same on every rank, before a layer uses it.

    Raises:
        ValueError: the name is taken by another codec.
    """
    if _codecs.setdefault(name, codec) != codec:
        raise ValueError(
            f"register_codec: name must be a new one, got {name!r}, which is registered. Choose another."
        )


def codec_hooks(
    name: str, d_model: int, *, d_out: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, StageHook]:
    """Hooks that encode rows where they leave a rank and decode them where they arrive, on both ways.

    Args:
        name: "int8" or "float8" (e4m3), each with a float32 scale per row, or of ``register_codec``.
        d_model: width of rows.
        d_out: width of the experts' answers, where it is another one.
        dtype: of rows as experts take and make them; under autocast the autocast type.

    Returns:
        Arguments of ``FMoE.set_stage_hooks``. ``Exact`` and ``Static`` take them; ``Gather`` adds gradients up on their
        way, and refuses them.

    Raises:
        ValueError: the name is unknown.  TypeError: ``dtype`` is no float type; in the layer, the input is no tensor of
        a float type.
    Gradients: rows, encoded on their way too.  Host sync: none.  Deterministic: yes.

    Example:
        >>> sorted(codec_hooks("int8", 64))
        ['after_combine', 'after_dispatch', 'before_combine', 'before_dispatch']
    """
    if name not in _codecs:
        raise ValueError(
            f"codec_hooks: name must be one of {tuple(_codecs)}, got {name!r}. Use one of these, or register_codec."
        )
    if dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(
            f"codec_hooks: dtype must be one of {_checks.FLOAT_DTYPES}, got {dtype}. Pass that of the layer's input."
        )
    encode = _Encode(name)
    return {
        "before_dispatch": encode,
        "after_dispatch": _Decode(name, d_model, dtype),
        "before_combine": encode,
        "after_combine": _Decode(name, d_model if d_out is None else d_out, dtype),
    }


class _Encode:
    """A hook behind which rows are bits, which dispatchers may move and not add up."""

    makes_bits = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, rows: Tensor) -> Tensor:
        if (
            not isinstance(rows, Tensor)
            or rows.dim() != 2
            or rows.dtype not in _checks.FLOAT_DTYPES
        ):
            raise TypeError(
                f"codec_hooks: rows must be one tensor [R, D] of a float type, got {_checks.describe(rows)}. Leave the "
                "codec out for other inputs."
            )
        return torch.ops.moeops.encode_rows(rows, self.name)


class _Decode:
    def __init__(self, name: str, width: int, dtype: torch.dtype) -> None:
        self.name = name
        self.width = width
        self.dtype = dtype

    def __call__(self, bits: Tensor) -> Tensor:
        return torch.ops.moeops.decode_rows(bits, self.name, self.width, self.dtype)


def _pack(rows: Tensor, name: str) -> Tensor:
    """Rows ``[R, D]`` as bits ``[R, ceil(B / 4)]`` of float32 numbers."""
    codec = _codecs[name]
    coded = codec.encode(rows.float())
    num_bytes = codec.num_bytes(rows.shape[1])
    coded = F.pad(coded, (0, -num_bytes % _WORD))
    return coded.contiguous().view(_CONTAINER)


def _unpack(bits: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    codec = _codecs[name]
    coded = bits.contiguous().view(torch.uint8)[:, : codec.num_bytes(width)]
    return codec.decode(coded, width).to(dtype)


class _EncodeRows(torch.autograd.Function):
    """Encode; in the backward, decode what decoding's gradient has sent."""

    @staticmethod
    def forward(ctx, rows, name):
        ctx.name, ctx.width, ctx.dtype = name, rows.shape[1], rows.dtype
        return _pack(rows, name)

    @staticmethod
    def backward(ctx, bits):
        return _unpack(bits, ctx.name, ctx.width, ctx.dtype), None


class _DecodeRows(torch.autograd.Function):
    """Decode; in the backward, encode the gradient, so that its bits go back."""

    @staticmethod
    def forward(ctx, bits, name, width, dtype):
        ctx.name = name
        return _unpack(bits, name, width, dtype)

    @staticmethod
    def backward(ctx, grad):
        return _pack(grad, ctx.name), None, None, None


_library = torch.library.Library("moeops", "FRAGMENT")
_library.define("encode_rows(Tensor rows, str codec) -> Tensor")
_library.define("decode_rows(Tensor bits, str codec, SymInt width, ScalarType dtype) -> Tensor")
# Composite: graphs hold what the codec does, which Inductor fuses.
_library.impl("encode_rows", lambda *args: _EncodeRows.apply(*args), "CompositeImplicitAutograd")
_library.impl("decode_rows", lambda *args: _DecodeRows.apply(*args), "CompositeImplicitAutograd")


def _scaled(stored: torch.dtype, largest: float) -> RowCodec:
    """A byte for each number, and a scale for each row that brings its largest number to the type's largest."""
    whole = not stored.is_floating_point

    def encode(rows: Tensor) -> Tensor:
        scales = rows.abs().amax(1) / largest  # [R]
        # A row of zeros, or of numbers that have no inverse, is sent as zeros.
        inverse = torch.where(scales > torch.finfo(scales.dtype).tiny, 1 / scales, 0.0)
        coded = rows * inverse[:, None]
        coded = coded.round() if whole else coded
        coded = coded.clamp(-largest, largest).to(stored).view(torch.uint8)
        return torch.cat((coded, scales.view(torch.uint8).view(rows.shape[0], _WORD)), 1)

    def decode(coded: Tensor, width: int) -> Tensor:
        scales = coded[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return coded[:, :width].contiguous().view(stored).float() * scales

    return RowCodec(encode, decode, lambda width: width + _WORD)


register_codec("int8", _scaled(torch.int8, 127.0))
register_codec("float8", _scaled(torch.float8_e4m3fn, 448.0))
