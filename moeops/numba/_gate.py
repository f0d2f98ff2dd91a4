"""A gate for layers around a routing op. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from moeops import _checks
from moeops.gates.base import BaseGate, check_top_k
from moeops.gates.functional import router_logits
from moeops.numba._row_op import RowOp
from moeops.numba._signature import TensorArg

InputFunction = Callable[[BaseGate, Tensor], Tensor]
LossFunction = Callable[[BaseGate, Tensor, Tensor, Tensor], Tensor]
RoutingFunction = Callable[[BaseGate, Tensor, Tensor, Tensor], Any]


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
    numbers by name. It compiles and exports like any other gate.

    Args:
        op: made with ``moeops.numba.route``.
        name: name of the class; the rule's in CamelCase with "Gate" behind it by default.
        inputs: the op's further tensors, each by a function ``(gate, logits) -> tensor``.
        loss: auxiliary loss, a function ``(gate, logits, topk_ids, topk_weights) -> scalar``, set in each forward.
        routing: what the gate returns, a function ``(gate, logits, topk_ids, topk_weights)``; ``(topk_ids,
            topk_weights)`` by default.
        setup: called with the new gate at the end of its constructor, to add buffers or parameters.
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
    rule_name = "".join(part.title() for part in op.rule.function.__name__.split("_"))
    gate_name: str = name or f"{rule_name}Gate"

    class RuleGate(BaseGate):
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
            _checks.check_int(gate_name, "d_model", d_model, 1, "Pass the width of x.")
            check_top_k(gate_name, top_k, self.tot_expert)
            values = {**defaults, **numbers}
            missing = [key for key, value in values.items() if value is None]
            unknown = [key for key in numbers if key not in defaults]
            if missing or unknown:
                raise TypeError(
                    f"{gate_name}: the numbers {list(defaults)} must be given or have defaults, got {numbers}. "
                    "Pass them by name."
                )
            self.d_model = d_model
            self.top_k = top_k
            self.options = values
            self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)
            if setup is not None:
                setup(self)

        def forward(self, inp: Tensor) -> Any:
            """Choose experts: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
            logits = router_logits(inp, self.gate)  # [T, E]
            arguments: list[Any] = []
            for item in op.signature.inputs:
                if item.name == "logits":
                    arguments.append(logits)
                elif item.name == "top_k":
                    arguments.append(self.top_k)
                elif isinstance(item, TensorArg):
                    arguments.append(given[item.name](self, logits))
                else:
                    arguments.append(self.options[item.name])
            weights, ids = op(*arguments)
            if loss is not None:
                self.set_loss(loss(self, logits, ids, weights))
            return (ids, weights) if routing is None else routing(self, logits, ids, weights)

        def extra_repr(self) -> str:
            """Sizes and numbers of the gate."""
            numbers = "".join(f", {key}={value}" for key, value in self.options.items())
            return (
                f"op={op.name}, num_expert={self.num_expert}, world_size={self.world_size}, "
                f"top_k={self.top_k}{numbers}"
            )

    RuleGate.__name__ = RuleGate.__qualname__ = gate_name
    RuleGate.__module__ = op.__module__
    RuleGate.__doc__ = op.rule.function.__doc__
    return RuleGate
