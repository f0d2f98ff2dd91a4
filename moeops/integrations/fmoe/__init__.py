"""Stand in for FastMoE: ``install()`` puts this package into ``sys.modules`` as ``fmoe``.

.. code-block:: python

    import moeops.integrations.fmoe
    moeops.integrations.fmoe.install()

    from fmoe import FMoETransformerMLP  # as before, moeops' kernels

Names, arguments and shapes are those of FastMoE 1.1, and those of 0.2 where one can tell which is meant. Where
FastMoE's numbers are wrong, moeops' own are the default, and ``install(compat=True)`` asks for FastMoE's;
``docs/fastmoe.md`` lists them. Importing this package starts neither CUDA nor a process group.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from typing import Any

from moeops.integrations.fmoe import _settings
from moeops.integrations.fmoe.distributed import DistributedGroupedDataParallel
from moeops.integrations.fmoe.layers import FMoE
from moeops.integrations.fmoe.linear import FMoELinear
from moeops.integrations.fmoe.transformer import FMoETransformerMLP

__all__ = [
    "DistributedGroupedDataParallel",
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "install",
]

# FastMoE's modules, and which one here has their names.
_MODULES = {
    "balance": "balance",
    "distributed": "distributed",
    "functions": "functions",
    "layers": "layers",
    "linear": "linear",
    "transformer": "transformer",
    "utils": "utils",
    "gates": "gates",
    **dict.fromkeys(
        (
            f"gates.{name}"
            for name in (
                "base_gate",
                "dc_gate",
                "faster_gate",
                "gshard_gate",
                "naive_gate",
                "noisy_gate",
                "swipe_gate",
                "switch_gate",
                "utils",
                "zero_gate",
            )
        ),
        "gates",
    ),
    "fastermoe": "fastermoe",
    "fastermoe.config": "fastermoe",
    "fastermoe.expert_utils": "fastermoe",
    "fastermoe.schedule": "fastermoe",
    "fastermoe.shadow_policy": "fastermoe",
    "megatron": "megatron",
    **dict.fromkeys(
        (
            f"megatron.{name}"
            for name in ("balance", "checkpoint", "distributed", "layers", "patch", "utils")
        ),
        "megatron",
    ),
}


class _NoExtension(MetaPathFinder):
    """Say at ``import fmoe_cuda`` what there is instead."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "fmoe_cuda":
            raise ModuleNotFoundError(
                "fmoe_cuda: FastMoE's extension has no stand-in, because its functions write into tensors and hold "
                "NCCL's handles. Use fmoe.functions (count_by_gate, MOEScatter, MOEGather), fmoe.linear.MOELinear and "
                "fmoe.gates.limit_by_capacity, or moeops' ops: count_tokens, sort_tokens, permute_tokens, "
                "grouped_linear, all_to_all_rows.",
                name="fmoe_cuda",
            )


def install(compat: bool = False) -> None:
    """Make ``import fmoe`` mean this package, in this process, from here on.

    Args:
        compat: give FastMoE's numbers where they differ from moeops' by design: the default of every ``compat=`` in
            here. What differs is listed in ``docs/fastmoe.md``.

    Raises:
        RuntimeError: FastMoE itself has been imported: its classes are in use already.

    Example:
        >>> install()
        >>> from fmoe import FMoETransformerMLP
        >>> FMoETransformerMLP(4, 8, 16)(torch.randn(5, 8)).shape
        torch.Size([5, 8])
    """
    here = sys.modules[__name__]
    for name in ("fmoe", "fmoe_cuda"):
        found = sys.modules.get(name)
        if found is not None and found is not here:
            raise RuntimeError(
                f"install: {name} must not be imported before, got {getattr(found, '__file__', found)}. Call "
                "moeops.integrations.fmoe.install() first, or remove FastMoE."
            )
    _settings.set_compat(compat)
    sys.modules["fmoe"] = here
    for name, own in _MODULES.items():
        module = importlib.import_module(f"{__name__}.{own}")
        sys.modules[f"fmoe.{name}"] = module
        parent, _, last = name.rpartition(".")
        if parent and last not in vars(sys.modules[f"fmoe.{parent}"]):
            setattr(sys.modules[f"fmoe.{parent}"], last, module)
    if not any(isinstance(finder, _NoExtension) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoExtension())
