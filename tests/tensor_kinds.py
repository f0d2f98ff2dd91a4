"""Weights that are tensors of another kind, as quantisation makes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Wrapped(Tensor):
    """A tensor that keeps its values as integers and a scale, and that no op takes."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(*(func(t) for t in (args[0].values, args[0].scale)))
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class Quantised(Wrapped):
    def dequantize(self):
        return self.values.to(self.scale.dtype) * self.scale


def wrap(module, name, kind):
    weight = getattr(module, name).detach()
    scale = weight.abs().amax(-1, keepdim=True) / 127
    wrapped = kind((weight / scale).round().to(torch.int8), scale)
    setattr(module, name, nn.Parameter(wrapped, requires_grad=False))
    return wrapped
