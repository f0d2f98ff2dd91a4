"""Experts' weights that are tensors of another kind, such as quantised ones or DTensors."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from moeops._imports import constant_when_traced

_warned: set[str] = set()


def plain_weight(layer: str, name: str, weight: Any) -> Any:
    """A weight as a tensor that kernels read: quantised ones are dequantised, other subclasses are refused."""
    kind = type(weight)
    # torch's mark of a tensor made of others; Dynamo answers this, and not is_traceable_wrapper_subclass.
    if not hasattr(kind, "__tensor_flatten__"):
        return weight
    if hasattr(weight, "device_mesh"):
        raise NotImplementedError(dtensor_error(layer, name, weight))
    if kind.dequantize is Tensor.dequantize:
        raise TypeError(
            f"{layer}: {name} must be a plain tensor or one with a method dequantize(), got {kind.__name__} "
            f"{list(weight.shape)}. Turn it into a plain tensor, or give the class that method."
        )
    _warn_once(layer, name, kind.__name__, weight.numel())
    return weight.dequantize()


def dtensor_error(layer: str, name: str, value: Any) -> str:
    """What is wrong with a DTensor, and what to do."""
    return (
        f"{layer}: {name} must be a plain tensor, got a DTensor {list(value.shape)} with {list(value.placements)}: a "
        "plan of sorted tokens belongs to one rank. Call .to_local() on tokens before the layer and "
        "DTensor.from_local() on its output, and keep the layer's parameters out of distribute_module; experts on "
        "several ranks are made by the layer's own device_mesh=, data parallelism by fully_shard or DDP."
    )


@constant_when_traced
def _warn_once(layer: str, name: str, kind: str, num_elements: int) -> None:
    """Warn once for each class: a compiler runs this when it traces, and keeps nothing of it in the graph."""
    if kind in _warned:
        return
    _warned.add(kind)
    warnings.warn(
        f"{layer}: {name} has the type {kind}, which no kernel reads: every forward dequantises all experts' weights, "
        f"{num_elements} elements here, and frees them after. That saves memory between forwards and no time.",
        stacklevel=2,
    )


def check_no_dtensor(layer: str, name: str, value: Tensor) -> None:
    """Tokens are a plain tensor."""
    if hasattr(value, "device_mesh"):
        raise NotImplementedError(dtensor_error(layer, name, value))
