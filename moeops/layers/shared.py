"""An expert that sees every token, beside those that a gate chooses. T tokens, D model width, H hidden width."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moeops import _checks, _nests
from moeops.gates.functional import RouterLinear
from moeops.layers._build import placed
from moeops.layers._routings import hide_tokens
from moeops.layers.experts import Activation, fused_activation
from moeops.ops.activations import up_width
from moeops.reference.ops import activate
from moeops.types import Glu

SHARED_GATES = ("sigmoid", "softmax")


class SharedMLP(nn.Module):
    """An MLP for every token, of the form of the experts beside it.

    Args:
        d_model: ``D``.
        d_hidden: ``H``.
        activation: as of ``FusedExperts``. A module is copied, parameters and all.
        bias: give both projections a bias.
        dtype: type of the parameters, torch's default if ``None``.
        device: device of the parameters, torch's default if ``None``.

    Attributes:
        up: weight ``[2 H, D]`` (gate rows, then up rows) for gated units, else ``[H, D]``.
        down: weight ``[D, H]``.

    Example:
        >>> {name: list(p.shape) for name, p in SharedMLP(8, 16, bias=False).named_parameters()}
        {'up.weight': [32, 8], 'down.weight': [8, 16]}
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        activation: Activation = "swiglu",
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _checks.check_int("SharedMLP", "d_hidden", d_hidden, 1, "Pass shared_expert=None for none.")
        fused = fused_activation(activation)
        self.activation = copy.deepcopy(activation) if fused is None else fused
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.up = nn.Linear(d_model, up_width(d_hidden, fused), bias, **place)
        self.down = nn.Linear(d_hidden, d_model, bias, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        hidden = self.up(x)
        if isinstance(self.activation, (str, Glu)):
            return self.down(activate(hidden, self.activation))
        return self.down(self.activation(hidden))

    def extra_repr(self) -> str:
        """The activation, where it is no module of its own."""
        if isinstance(self.activation, nn.Module):
            return ""
        return f"activation={getattr(self.activation, '__name__', self.activation)!r}"


class SharedExpertGate(RouterLinear):
    """How much a token takes of the shared expert, and of the others; like a router, it computes in float32.

    Args:
        d_model: ``D``.
        form: "sigmoid", Qwen2-MoE's: a factor on the shared expert's output, and 1 for the others; no bias. "softmax",
            PR-MoE's: two factors that add up to 1, first that of the others.
        dtype: type of the parameters, torch's default if ``None``.
        device: device of the parameters, torch's default if ``None``.

    Source: PR-MoE: Rajbhandari et al. 2022, arXiv:2201.05596, section 4.1. Qwen2-MoE: Qwen Team 2024,
    arXiv:2407.10671.
    """

    def __init__(
        self,
        d_model: int,
        form: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        is_softmax = form == "softmax"
        super().__init__(d_model, 1 + is_softmax, is_softmax, device, dtype)
        self.form = form

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, 1]`` or ``[T, 2]`` factors, float32 (float64 for float64)."""
        logits = super().forward(input)
        return logits.sigmoid() if self.form == "sigmoid" else logits.softmax(1)

    def extra_repr(self) -> str:
        """Sizes and form."""
        return f"{super().extra_repr()}, form={self.form!r}"


def build_shared(
    op: str,
    shared_expert: Any,
    form: Any,
    d_model: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> tuple[nn.Module | None, SharedExpertGate | None]:
    """Make a layer's shared expert and its gate from what a user passed.

    Args:
        op: the layer's name, for error messages.
        shared_expert: a class or function called with ``d_model``, a ready module, or ``None``.
        form: of the gate, ``None`` for no gate.
        d_model: ``D``.
        dtype: of what is made here; a module that is ready stays as it is.
        device: likewise.

    Raises:
        ValueError: there is no such form, or nothing to weigh.  TypeError: ``shared_expert`` builds no module.
    """
    if form is not None and form not in SHARED_GATES:
        raise ValueError(
            f"{op}: shared_expert_gate must be None or one of {SHARED_GATES}, got {form!r}. Pick one of them."
        )
    if shared_expert is None:
        if form is not None:
            raise ValueError(
                f"{op}: shared_expert_gate must be None without a shared_expert, got {form!r}. Pass both, or none."
            )
        return None, None
    if isinstance(shared_expert, nn.Module):
        built: Any = shared_expert
    else:
        with placed(device):
            built = shared_expert(d_model) if callable(shared_expert) else shared_expert
        if not isinstance(built, nn.Module):
            raise TypeError(
                f"{op}: shared_expert must be a module, or a class or function of d_model that builds one, got "
                f"{_checks.describe(built)}. FMoETransformerMLP takes a hidden width too."
            )
        if dtype is not None:
            built.to(dtype)
    if form is None:
        return built, None
    return built, SharedExpertGate(d_model, form, dtype=dtype, device=device)


def shared_structure(module: nn.Module | None) -> Any:
    """What of a shared expert must be equal on all ranks."""
    if module is None:
        return None
    parameters = module.named_parameters()
    return repr(module), [(name, None if is_lazy(p) else tuple(p.shape)) for name, p in parameters]


class SharedPart:
    """A call of a layer's shared expert, to be made while tokens travel; then ``add_to`` the others' output.

    Args:
        op: the layer's name, for error messages.
        expert: the shared expert, called with ``inp``.
        gate: weighs it; ``None`` to add it as it is.
        inp: nest of ``[T, ...]``; the gate sees the first leaf, ``[T, D]`` where it is flattened.
        mask: ``[T]``: the shared expert sees zeros in the place of masked tokens.
    """

    def __init__(
        self,
        op: str,
        expert: nn.Module,
        gate: nn.Module | None,
        inp: Any,
        mask: Tensor | None,
    ) -> None:
        self.op = op
        self.expert = expert
        self.gate = gate
        self.inp = inp
        self.mask = mask
        self.out: Any = None
        self.factors: Tensor | None = None

    def __call__(self) -> None:
        """Run it."""
        inp = self.inp
        if self.mask is not None:
            inp = hide_tokens(inp, self.mask, finite=True)
        self.out = self.expert(inp)
        if self.gate is not None:
            first = _nests.leaves(inp)[0]
            self.factors = self.gate(first if first.dim() == 2 else first.flatten(1))

    def add_to(self, out: Any) -> Any:
        """Add the shared expert's output to the others', a nest of ``[T, ...]``; masked tokens have zeros."""
        leaves, spec = _nests.flatten(out)
        shared_leaves, shared_spec = _nests.flatten(self.out)
        if not torch.compiler.is_compiling():
            self._check(leaves, spec, shared_leaves, shared_spec)
        pairs = zip(leaves, shared_leaves, strict=True)
        return _nests.unflatten([self._add(y, shared) for y, shared in pairs], spec)

    def _add(self, y: Tensor, shared: Tensor) -> Tensor:
        column = (-1, *(1,) * (y.dim() - 1))
        shared = shared.to(y.dtype)
        if self.factors is not None:
            factors = [factor.to(y.dtype).view(column) for factor in self.factors.unbind(1)]
            shared = shared * factors[-1]
            if len(factors) == 2:
                y = y * factors[0]
        total = y + shared
        if self.mask is None:
            return total
        return total.masked_fill((self.mask != 0).view(column), 0)

    def _check(self, leaves: Any, spec: Any, shared_leaves: Any, shared_spec: Any) -> None:
        """The shared expert returned what can be added to the others' output."""
        if shared_spec != spec:
            raise ValueError(
                f"{self.op}: shared_expert must return the structure of the experts, {spec}, got {shared_spec}. Make "
                "their outputs alike."
            )
        for y, shared in zip(leaves, shared_leaves, strict=True):
            if not isinstance(shared, Tensor) or shared.dtype not in _checks.FLOAT_DTYPES:
                raise TypeError(
                    f"{self.op}: shared_expert must return float tensors, got {_checks.describe(shared)}. Its output "
                    "is added to that of the experts."
                )
            if shared.shape != y.shape:
                raise ValueError(
                    f"{self.op}: shared_expert must return the shape of the experts' output, {list(y.shape)}, got "
                    f"{_checks.describe(shared)}. Make their outputs alike."
                )
