"""LoRA on transformers' experts without a tensor of the size of their weights: PEFT's adapters, applied to rows.

.. code-block:: python

    import moeops.integrations.peft

    moeops.integrations.peft.enable()  # before or after the model is made

PEFT adds ``scaling * B @ A`` to the experts' weight in every forward. After ``enable()`` experts that run on moeops
(``experts_implementation="moeops"``) get the factors instead. Configurations, adapters, names and files stay PEFT's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import nn

from moeops.integrations.transformers.experts import LORA, NAME, up_name
from moeops.integrations.transformers.explain import is_experts
from moeops.types import LoraFactors

try:
    from peft.tuners.lora.layer import ParamWrapper
except ImportError as error:
    raise ImportError(
        "moeops.integrations.peft: peft must be installed with LoRA for parameters (0.20 or newer), got "
        f'{error}. Install it with pip install "moeops[peft]".'
    ) from error

__all__ = ["enable"]


def enable() -> None:
    """Give PEFT's LoRA factors to experts that run on moeops, instead of adding them to the weights.

    It concerns ``LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])`` on models with
    ``experts_implementation="moeops"``, made before or after. Other parameters and other experts stay as PEFT has
    them. Besides what PEFT offers, several adapters may be active without a weight-sized sum, and ``lora_dropout``
    works on experts: in training, elements of the rows are dropped that ``lora_A`` sees. Safe to call again.

    Raises:
        RuntimeError: this PEFT adds the factors in another way than those that moeops knows.
    """
    known = (
        hasattr(ParamWrapper, "_activate_lora")
        and "config" in signature(ParamWrapper.update_layer).parameters
    )
    if not known:
        raise RuntimeError(
            "moeops.integrations.peft: peft's ParamWrapper must have _activate_lora and update_layer(..., config), as "
            f"peft 0.20 to 0.21 have, got peft {version('peft')} without. Install one of these."
        )
    if getattr(ParamWrapper._activate_lora, "is_moeops", False):
        return
    stock_activate, stock_update = ParamWrapper._activate_lora, ParamWrapper.update_layer
    stock_init = ParamWrapper.__init__

    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        experts = self.get_base_layer()
        if not adapters:
            yield
        elif not takes_factors(experts, self.parameter_name):
            _refuse_dropout(self, adapters)
            with stock_activate(self, active_adapters):
                yield
        else:
            given = dict(getattr(experts, LORA, {}))
            setattr(experts, LORA, {**given, self.parameter_name: _factors(self, adapters)})
            try:
                yield
            finally:
                setattr(experts, LORA, given)

    @functools.wraps(stock_init)
    def __init__(
        self: Any, base_layer: nn.Module, adapter_name: str, *args: Any, config: Any, **kwargs: Any
    ) -> None:
        stock_init(self, base_layer, adapter_name, *args, config=_without_dropout(config), **kwargs)
        _set_dropout(self, adapter_name, config.lora_dropout)

    @functools.wraps(stock_update)
    def update_layer(self: Any, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        stock_update(self, adapter_name, *args, config=_without_dropout(config), **kwargs)
        _set_dropout(self, adapter_name, config.lora_dropout)

    _activate_lora.is_moeops = True  # type: ignore[attr-defined]  # a mark
    ParamWrapper._activate_lora = _activate_lora
    ParamWrapper.__init__ = __init__
    ParamWrapper.update_layer = update_layer


def takes_factors(module: Any, parameter_name: str) -> bool:
    """Whether a parameter is a weight of experts that run on moeops, which apply its factors to rows."""
    return (
        is_experts(module)
        and module.config._experts_implementation == NAME
        and parameter_name in (up_name(module), "down_proj")
    )


def _factors(wrapper: Any, adapters: list[str]) -> LoraFactors:
    """The factors of all active adapters as those of one, whose rank is the sum of theirs.

    PEFT stores ``lora_A`` as ``[E * r, D]``, experts slowest, and ``lora_B`` as ``[H, r * E]``, experts fastest.
    """
    num_experts = wrapper.num_experts
    parts = []
    for name in adapters:
        a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        dropout = wrapper.lora_dropout[name]
        parts.append(
            LoraFactors(
                a.reshape(num_experts, -1, a.shape[1]),
                b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1),
                wrapper.scaling[name],
                dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
            )
        )
    if len(parts) == 1:
        return parts[0]
    if any(part.dropout for part in parts):
        raise RuntimeError(
            "moeops.integrations.peft: lora_dropout must be 0 where several adapters are active on experts, got "
            f"{dict(zip(adapters, (part.dropout for part in parts), strict=True))}. Activate one, or call eval()."
        )
    return LoraFactors(
        torch.cat([part.a for part in parts], dim=1),
        torch.cat([part.b * part.scaling for part in parts], dim=2),
    )


def _without_dropout(config: Any) -> Any:
    """A configuration that ParamWrapper accepts: folded into a weight, factors could not drop elements of rows."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def _set_dropout(wrapper: Any, adapter_name: str, probability: float) -> None:
    if probability:
        wrapper.lora_dropout[adapter_name] = nn.Dropout(probability).train(wrapper.training)


def _refuse_dropout(wrapper: Any, adapters: list[str]) -> None:
    """PEFT's own way, which adds the factors to the weight, drops nothing."""
    for name in adapters:
        dropout = wrapper.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            raise RuntimeError(
                f"moeops.integrations.peft: lora_dropout of adapter {name!r} must be 0 for {wrapper.parameter_name}, "
                f"which does not run on moeops, got {dropout.p}. Use experts_implementation={NAME!r}, or 0."
            )
