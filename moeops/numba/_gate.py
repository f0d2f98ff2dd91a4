"""A gate for layers around a routing op. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

import copy
import copyreg
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked
from moeops.gates.base import BaseGate, check_top_k, with_mask_argument
from moeops.gates.functional import RouterLinear, router_logits
from moeops.numba._row_op import RowOp

InputFunction = Callable[[BaseGate, Tensor], Tensor]
LossFunction = Callable[..., Tensor]
RoutingFunction = Callable[..., Any]


class _Recipe(NamedTuple):
    """What ``as_gate`` was given."""

    op: RowOp
    inputs: Mapping[str, InputFunction]
    loss: LossFunction | None
    routing: RoutingFunction | None
    setup: Callable[[BaseGate], None] | None
    numbers: Mapping[str, int | float | bool | None]


class _MadeClass(type):
    """Class of the classes that ``as_gate`` makes, which pickle finds by the variable that holds them."""


def _reduce_class(cls: _MadeClass) -> str | tuple[Any, ...]:
    """Say to pickle where a class is: under its own name, or in another variable of its module or of the rule's."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is cls:
        return cls.__qualname__
    places = (cls.__module__, cls.recipe.op.__module__)  # type: ignore[attr-defined]  # of RuleGate
    for module in places:
        for name, value in vars(sys.modules[module]).items():
            if value is cls:
                return _load_class, (module, name)
    raise TypeError(
        f"as_gate: the class {cls.__name__} must be a variable of the module {places[0]} to be pickled, got none there "
        "that holds it. Assign what as_gate returns to a variable outside of functions."
    )


def _load_class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


copyreg.pickle(_MadeClass, _reduce_class)


class RuleGate(BaseGate, metaclass=_MadeClass):
    """Base of the gates that ``as_gate`` makes: a linear router in float32, then the op."""

    recipe: _Recipe

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        **numbers: int | float | bool,
    ) -> None:
        super().__init__(num_expert, world_size)
        name = type(self).__name__
        _checks.check_int(name, "d_model", d_model, 1, "Pass the width of x.")
        check_top_k(name, top_k, self.tot_expert)
        known = self.recipe.numbers
        self.options = {**known, **numbers}
        if None in self.options.values() or self.options.keys() != known.keys():
            raise TypeError(
                f"{name}: the numbers {list(known)} must be given or have defaults, got {numbers}. Pass them by name."
            )
        self.d_model = d_model
        self.top_k = top_k
        self.gate = RouterLinear(d_model, self.tot_expert, bias=gate_bias)
        if self.recipe.setup is not None:
            self.recipe.setup(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give what ``setup`` adds its first values again; the router resets itself."""
        if self.recipe.setup is None:
            return
        # The same sizes and options, none of the tensors: setup fills it on the CPU.
        fresh = copy.copy(self)
        fresh._parameters, fresh._buffers, fresh._modules = {}, {}, dict(self._modules)
        with torch.device("cpu"):
            self.recipe.setup(fresh)
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(fresh, kind).items():
                if value is not None:
                    getattr(self, name).copy_(value)

    def forward(self, inp: Tensor, mask: Tensor | None = None) -> Any:
        """Choose experts: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        op, inputs, loss, routing, _, _ = self.recipe
        logits = router_logits(inp, self.gate)  # [T, E]
        given = {"logits": logits, "top_k": self.top_k, **self.options}
        given.update({name: function(self, logits) for name, function in inputs.items()})
        weights, ids = op(*[given[item.name] for item in op.signature.inputs])
        ids = drop_masked(ids, mask)
        own = None if loss is None else loss(self, logits, ids, weights, mask=mask)
        self.set_loss(own, logits, ids, mask)
        if routing is None:
            return ids, weights
        return routing(self, logits, ids, weights, mask=mask)

    def extra_repr(self) -> str:
        """Sizes and numbers of the gate."""
        numbers = "".join(f", {key}={value}" for key, value in self.options.items())
        return (
            f"op={self.recipe.op.name}, num_expert={self.num_expert}, world_size={self.world_size}, "
            f"top_k={self.top_k}{numbers}"
        )


def as_gate(
    op: RowOp,
    name: str | None = None,
    *,
    inputs: Mapping[str, InputFunction] | None = None,
    loss: LossFunction | None = None,
    routing: RoutingFunction | None = None,
    setup: Callable[[BaseGate], None] | None = None,
    **options: int | float | bool,
) -> type[BaseGate]:
    """Make a gate class for ``FMoE`` from a routing op: a linear router in float32, then the op.

    The class is called as ``gate(d_model, num_expert, world_size, top_k)``, with ``gate_bias=`` and with the op's
    numbers by name. It compiles and exports like any other gate, and a module that holds one can be pickled where the
    class is in a variable, of any name, of the module that calls ``as_gate`` or that has the rule.

    Args:
        op: made with ``moeops.numba.route``.
        name: name of the class; the rule's in CamelCase with "Gate" behind it by default.
        inputs: the op's further tensors, each by a function ``(gate, logits) -> tensor``.
        loss: auxiliary loss, a function ``(gate, logits, topk_ids, topk_weights) -> scalar``, set in each forward.
        routing: what the gate returns, a function ``(gate, logits, topk_ids, topk_weights)``; ``(topk_ids,
            topk_weights)`` by default.
            Both functions may have an argument ``mask``, which gets the layer's mask ``[T]`` or ``None``; the ids of
            masked tokens are -1.
        setup: called with the new gate at the end of its constructor, to add buffers or parameters, and by
            ``reset_parameters`` with a bare copy of the gate, from which their first values are taken.
        options: values of the op's numbers that replace the signature's defaults.

    Returns:
        A subclass of ``BaseGate``.

    Raises:
        TypeError: ``op`` was not made with ``route``.  ValueError: an input or number is missing or unknown.

    Example:
        >>> from moeops.numba.gates import naive_topk
        >>> Gate = as_gate(naive_topk)
        >>> Gate(8, 4, 1, top_k=2)(torch.randn(5, 8))[0].shape
        torch.Size([5, 2])
    """
    if not isinstance(op, RowOp) or op.signature.inputs[0].name != "logits":
        raise TypeError(
            f"as_gate: op must be made with moeops.numba.route, got {op!r}. Write a BaseGate that calls it instead."
        )
    given = dict(inputs or {})
    tensors = [t.name for t in op.signature.tensors if t.name != "logits"]
    numbers = {s.name: s for s in op.signature.scalars if s.name != "top_k"}
    if sorted(given) != sorted(tensors):
        raise ValueError(
            f"as_gate: inputs must have a function for each of {tensors} of {op.name}, got {sorted(given)}."
        )
    unknown = [key for key in options if key not in numbers]
    if unknown:
        raise ValueError(
            f"as_gate: options must be numbers of {op.name}, {list(numbers)}, got {unknown}. Remove them."
        )
    defaults = {key: options.get(key, number.default) for key, number in numbers.items()}
    camel = "".join(part.title() for part in op.rule.function.__name__.split("_"))
    members = {
        "recipe": _Recipe(
            op,
            given,
            None if loss is None else with_mask_argument(loss),
            None if routing is None else with_mask_argument(routing),
            setup,
            defaults,
        ),
        "__doc__": op.rule.function.__doc__,
        "__module__": sys._getframe(1).f_globals.get("__name__", op.__module__),
    }
    made: Any = _MadeClass(name or f"{camel}Gate", (RuleGate,), members)
    return made
