"""Functions that a layer calls between its stages: FSMoE's six hooks. T tokens, R rows, W ranks."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch

from moeops import _checks, _nests

StageHook = Callable[[Any], Any]

STAGES = (
    "before_moe_start",
    "before_dispatch",
    "after_dispatch",
    "before_combine",
    "after_combine",
    "before_moe_end",
)
_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageHooks:
    """What to call between the stages of a layer; FSMoE's names. ``FMoE.set_stage_hooks`` makes it.

    A hook is called with a nest of tensors, and what it returns takes the nest's place, unless it is ``None``. Autograd
    and compilers go through it as through any other code. It may change widths, types and the structure of the nest,
    but not the number of entries in dimension 0, and each entry must depend on itself alone: ranks and dispatchers have
    rows in different orders, padding among them. The hooks must be the same on all ranks.

    Attributes:
        before_moe_start: on the layer's input, ``[T, ...]``, before the gate.
        before_dispatch: on rows before they leave this rank.
        after_dispatch: on rows that arrived, before the experts; what it returns is what experts take.
        before_combine: on the answers to them, before they go back.
        after_combine: on the answers that came back, before those of a token are summed.
        before_moe_end: on the layer's output, ``[T, ...]``.

    Source: Pan et al. 2025, arXiv:2501.10714, section 3.
    """

    before_moe_start: StageHook | None = None
    before_dispatch: StageHook | None = None
    after_dispatch: StageHook | None = None
    before_combine: StageHook | None = None
    after_combine: StageHook | None = None
    before_moe_end: StageHook | None = None
    _functions_in_c: str = dataclasses.field(init=False, repr=False)
    # Dynamo of torch 2.11 takes a function in C for a method where it is an attribute.
    _in_order: tuple[StageHook | None, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in STAGES:
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise TypeError(
                    f"StageHooks: {name} must be a function of a nest of tensors or None, got "
                    f"{_checks.describe(hook)}. Pass a function, or a module."
                )
        hooks = [getattr(self, name) for name in STAGES]
        marks = [repr(hook) if isinstance(hook, _IN_C) else "" for hook in hooks]
        object.__setattr__(self, "_functions_in_c", "|".join(marks))
        object.__setattr__(self, "_in_order", tuple(hooks))

    @property
    def on_rows(self) -> tuple[str, ...]:
        """Names of those that are there and are called within the dispatcher."""
        return tuple(name for name in STAGES[1:-1] if getattr(self, name) is not None)

    def call(self, name: str, nest: Any) -> Any:
        """Return what a hook makes of a nest; the nest where there is no hook.

        Raises:
            ValueError: outside of compiled code, where the number of entries in dimension 0 is another one.
            TypeError: outside of compiled code, where a leaf is no tensor.
        """
        hook = self._in_order[STAGES.index(name)]
        if hook is None:
            return nest
        # Read for the guard: torch 2.13 has none on functions in C, such as torch.Tensor.float, and would keep the old.
        assert self._functions_in_c
        num_rows = _nests.leaves(nest)[0].shape[0]
        out = hook(nest)
        if out is None:
            return nest
        if not torch.compiler.is_compiling():
            _check_rows(name, _nests.leaves(out), num_rows)
        return out


def _check_rows(name: str, leaves: list[Any], num_rows: int) -> None:
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                f"{name}: a hook must return tensors, or None, got {_checks.describe(leaf)}. Return the nest with "
                "other tensors in it."
            )
        if leaf.dim() == 0 or leaf.shape[0] != num_rows:
            raise ValueError(
                f"{name}: a hook must return tensors with {num_rows} entries in dimension 0, as it was given, got "
                f"{_checks.describe(leaf)}. Change what is in rows, not their number."
            )
    if not leaves:
        raise ValueError(f"{name}: a hook must return at least one tensor, or None, got none.")
