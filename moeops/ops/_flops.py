"""What torch's FLOP counter counts for ops with products. R rows, D inputs, H outputs or hidden width, E experts.

Two operations for a multiplication and its addition, as torch counts ``mm``; biases, activations and sums over experts
are not counted, as torch does not count theirs. The counter asks for shapes, so rows are those of the plan, ``R``: a
dropped pair counts where it has a row, although kernels skip it. A gate that says how many rows it fills (``num_rows``)
is counted by these.

The formulas register themselves when somebody imports the counter: where Triton is installed, importing it here would
nearly double the time of ``import moeops``.
"""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def _grouped_linear_flops(rows: Any, weight: Any, *_args: Any, **_options: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def _weight_grad_flops(grad: Any, rows: Any, *_args: Any, **_options: Any) -> int:
    return 2 * rows[0] * grad[1] * rows[1]


def _block_flops(num_rows: int, w_up: Any, w_down: Any) -> tuple[int, int]:
    """One product with ``w_up`` for each row, and one with ``w_down``."""
    return 2 * num_rows * w_up[1] * w_up[2], 2 * num_rows * w_down[1] * w_down[2]


def _moe_mlp_flops(
    x: Any,
    topk_weights: Any,
    w_up: Any,
    w_down: Any,
    b_up: Any,
    b_down: Any,
    row_to_pair: Any,
    *_plan: Any,
    **_options: Any,
) -> int:
    return sum(_block_flops(row_to_pair[0], w_up, w_down))


def _moe_mlp_backward_flops(
    grad_y: Any,
    x: Any,
    topk_weights: Any,
    w_up: Any,
    w_down: Any,
    b_up: Any,
    b_down: Any,
    pre_activation: Any,
    row_to_pair: Any,
    *_plan: Any,
    need_x: bool = True,
    need_topk_weights: bool = True,
    need_w_up: bool = True,
    need_w_down: bool = True,
    **_options: Any,
) -> int:
    up, down = _block_flops(row_to_pair[0], w_up, w_down)
    # The gradient of the hidden rows serves all but w_down's; nothing of the forward is multiplied again.
    need_hidden = need_x or need_topk_weights or need_w_up
    return up * (need_x + need_w_up) + down * (need_hidden + need_w_down)


_FORMULAS = {
    "grouped_linear": _grouped_linear_flops,
    "grouped_linear_weight_grad": _weight_grad_flops,
    "moe_mlp": _moe_mlp_flops,
    "moe_mlp_backward": _moe_mlp_backward_flops,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.moeops, name))(formula)


class _CounterFinder(importlib.abc.MetaPathFinder):
    """Finds the counter's module as the other finders do, and registers the formulas when the module has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _COUNTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                return self._registering(spec)
        return None

    def _registering(self, spec: ModuleSpec) -> ModuleSpec:
        loader = spec.loader
        assert loader is not None
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)
            sys.meta_path.remove(self)

        loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _CounterFinder())
