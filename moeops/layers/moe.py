"""Mixture of experts around any gate and any expert. T tokens, K experts per token, N = T * K pairs, E experts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moeops.gates.naive import NaiveGate
from moeops.layers import _layer_checks
from moeops.ops import _checks
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.ops.sorting import sort_tokens
from moeops.types import TokenPlan

GateHook = Callable[[Tensor, Tensor, None], Any]


class FMoE(nn.Module):
    """Send each token to a few of several experts and sum their outputs, weighted by a gate.

    FastMoE's layer of the same name, with its argument names and order. An expert may be any module, the experts may
    differ, and inputs and outputs may be nests (dict, list, tuple) of tensors with the tokens in dimension 0.

    Departures from FastMoE:

    - ``gate`` may also be a factory function or a ready module; an expert may also be a ready module.
    - Experts are called with one argument, their rows (FastMoE 1.x adds the row count).
    - An expert without tokens is called with zero rows, so its parameters get zero gradients instead of none and
      every rank of a data-parallel job reduces the same set. Experts must accept zero rows.
    - A mask without ``mask_dict`` is not ignored: the tokens it names come out as zeros.
    - For nested inputs the gate sees the first leaf, unless it has a true attribute ``nested_input``; FastMoE hands
      every gate the whole nest.
    - Expert parallelism is not in this version: ``world_size > 1`` and process groups are refused.

    Args:
        num_expert: experts ``E``; with a list of experts, its length counts instead.
        d_model: width ``D`` that gate and experts are built for.
        world_size: must be 1.
        mp_group: must be ``None``; FastMoE's old name of ``slice_group``.
        slice_group: must be ``None``.
        moe_group: must be ``None``.
        top_k: experts per token ``K`` that the gate is built for.
        gate: class or function called as ``gate(d_model, num_expert, world_size, top_k)``, with ``gate_bias=`` if it
            takes that, or a ready module. See ``moeops.gates.BaseGate`` for what it returns.
        expert: class or function called with ``d_model`` to build each expert; or a list with one class, function or
            ready module per expert; or ``None`` in a subclass that sets ``self.experts`` to one module, which is then
            called as ``experts(rows, tokens_per_expert)`` with rows in expert order.
        gate_hook: called as ``gate_hook(topk_ids, topk_weights, None)`` after the gate; what it returns is ignored.
        mask: integers, one per token; see ``forward``. Kept as a buffer that is not saved.
        mask_dict: mask value to expert output of the tokens so masked: a number, or a tensor of one output row.
        gate_bias: handed to the gate if its constructor takes it.
        dtype: type of the parameters built here, torch's default if ``None``. Ready modules stay as they are.
        device: device of the parameters built here, torch's default if ``None``.

    Raises:
        ValueError: a size or an option does not fit.  TypeError: an argument has the wrong type.
        NotImplementedError: more than one rank is asked for.
    Host sync: one copy of ``E + 1`` integers per forward, to cut the rows into one slice per expert (under
    ``torch.compile`` on CUDA too); ``FMoETransformerMLP`` has none.

    Example:
        >>> layer = FMoE(4, 8, top_k=2, expert=lambda d_model: nn.Linear(d_model, 3))
        >>> layer(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """

    experts: nn.Module
    mask: Tensor | None

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group: Any = None,
        slice_group: Any = None,
        moe_group: Any = None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] | nn.Module = NaiveGate,
        expert: Callable[[int], nn.Module] | Sequence[Any] | nn.ModuleList | None = None,
        gate_hook: GateHook | None = None,
        mask: Tensor | None = None,
        mask_dict: dict[int, Any] | None = None,
        gate_bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        is_list = isinstance(expert, (list, tuple, nn.ModuleList))
        if is_list:
            num_expert = len(expert)  # type: ignore[arg-type]
        for name, size in (
            ("num_expert", num_expert),
            ("d_model", d_model),
            ("world_size", world_size),
        ):
            _checks.check_int(op, name, size, 1, "Sizes are at least 1.")
        _layer_checks.check_one_rank(op, world_size, mp_group, slice_group, moe_group)
        self.num_expert = num_expert
        self.d_model = d_model
        self.world_size = world_size
        place = torch.device(device) if device is not None else contextlib.nullcontext()
        with place:
            self.gate = _build_gate(op, gate, d_model, num_expert, world_size, top_k, gate_bias)
        if dtype is not None and self.gate is not gate:
            self.gate.to(dtype)
        self.top_k = getattr(self.gate, "top_k", top_k)
        self.experts_fused = expert is None
        if expert is not None:
            plans = list(expert) if is_list else [expert] * num_expert  # type: ignore[arg-type]
            with place:
                built = [_build_expert(op, plan, d_model, is_list) for plan in plans]
            if dtype is not None:
                for plan, module in zip(plans, built, strict=True):
                    if module is not plan:
                        module.to(dtype)
            self.experts = nn.ModuleList(built)
        self.gate_hook = gate_hook
        _layer_checks.check_mask(op, mask, None)
        self.register_buffer("mask", mask, persistent=False)
        self.mask_dict = _layer_checks.check_mask_dict(op, mask_dict)
        self.expert_dp_comm: str | None = None

    def reset_parameters(self) -> None:
        """Draw new parameters in the gate and in every expert that can."""
        for module in self.modules():
            if module is not self and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Tag parameters with the group that reduces their gradients, as attribute ``dp_comm``.

        The gate's parameters are tagged ``"gate"``. The tags are read by data-parallel wrappers that know them, not by
        torch's; they outlive ``deepcopy``, pickle and moves between devices.

        Args:
            expert_dp_comm: tag of the experts' parameters; ``"none"`` means that no group reduces them.
        """
        self.expert_dp_comm = expert_dp_comm
        for module, tag in ((self.experts, expert_dp_comm), (self.gate, "gate")):
            for parameter in module.parameters():
                parameter.dp_comm = tag  # type: ignore[attr-defined]

    def _restore_tags(self) -> None:
        """Tag parameters that torch made anew; a tag that is there may be the user's own and stays."""
        if self.expert_dp_comm is None:
            return
        for module, tag in ((self.experts, self.expert_dp_comm), (self.gate, "gate")):
            for parameter in module.parameters():
                if not hasattr(parameter, "dp_comm"):
                    parameter.dp_comm = tag  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        self._restore_tags()
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._restore_tags()

    def forward(self, moe_inp: Any, mask: Tensor | None = None) -> Any:
        """Run tokens through the gate and their experts.

        Args:
            moe_inp: tokens, ``[T, D]``, or a nest of tensors with ``T`` entries each in dimension 0. The gate sees the
                first leaf (a dict's first key), flattened to ``[T, D]``.
            mask: ``T`` integers in any shape; tokens with a value other than 0 skip the experts. Their expert output
                is ``mask_dict[value]``, zero for a value that is not there, and is then weighted by the gate like any
                other. Overrides the constructor's mask for this call.

        Returns:
            What the experts return, with ``T`` entries in dimension 0 of each leaf: the sum over a token's experts,
            weighted. A dropped pair adds nothing.

        Raises:
            ValueError: a shape does not fit.  TypeError: a leaf is not a tensor, the gate's input is not float, or the
            gate returns other types than it must.
        """
        op = type(self).__name__
        leaves, spec = _pytree.tree_flatten(moe_inp)
        if not torch.compiler.is_compiling():
            _layer_checks.check_leaves(op, leaves)
        gate_inp = leaves[0] if leaves[0].dim() == 2 else leaves[0].flatten(1)  # [T, D]
        if not torch.compiler.is_compiling():
            _checks.check_float(op, "x", gate_inp)
            _checks.check_size(op, "x", gate_inp, 1, self.d_model, "d_model")
        nested = getattr(self.gate, "nested_input", False)
        topk_ids, topk_weights = self.gate(moe_inp if nested else gate_inp)  # [T, K] each
        if not torch.compiler.is_compiling():
            _layer_checks.check_gate_output(op, self.gate, topk_ids, topk_weights, gate_inp)
        if self.gate_hook is not None:
            self.gate_hook(topk_ids, topk_weights, None)
        mask = self.mask if mask is None else mask
        if mask is not None:
            if not torch.compiler.is_compiling():
                _layer_checks.check_mask(op, mask, gate_inp)
            mask = mask.reshape(-1)  # [T]
            topk_ids = torch.where((mask != 0)[:, None], -1, topk_ids)
        plan = sort_tokens(topk_ids, self.num_expert)
        out = self._run_experts(leaves, spec, topk_weights, plan)
        if mask is None:
            return out
        fill = self._mask_filler(mask, topk_weights)
        return _pytree.tree_map(fill, out)

    def _run_experts(
        self, leaves: list[Tensor], spec: Any, topk_weights: Tensor, plan: TokenPlan
    ) -> Any:
        """Dispatch the leaves, run the experts, combine what they return."""
        op = type(self).__name__
        if not hasattr(self, "experts"):
            raise RuntimeError(
                f"{op}: expert must be given, or self.experts be set by a subclass, got neither. "
                "Pass a class, a function of d_model, or a list."
            )
        rows = [_permute_leaf(leaf, plan) for leaf in leaves]
        if self.experts_fused:
            counts = plan.expert_offsets.diff()
            out_leaves, out_spec = _pytree.tree_flatten(
                self.experts(_pytree.tree_unflatten(rows, spec), counts)
            )
        else:
            out_leaves, out_spec = self._loop_over_experts(rows, spec, plan)
        combined = [_combine_leaf(op, leaf, plan, topk_weights) for leaf in out_leaves]
        return _pytree.tree_unflatten(combined, out_spec)

    def _loop_over_experts(
        self, rows: list[Tensor], spec: Any, plan: TokenPlan
    ) -> tuple[list[Tensor], Any]:
        """Call every expert on its slice of the rows and join what they return."""
        op = type(self).__name__
        num_rows = plan.row_to_pair.shape[0]
        # One copy to the host, and not one for each of the entries.
        counts = plan.expert_offsets.diff().cpu().tolist()
        # Written as a difference, so that the sizes add up to num_rows for symbolic counts too.
        counts.append(num_rows - sum(counts))
        for count in counts:
            torch._check(count >= 0)
        slices = [leaf.split(counts) for leaf in rows]
        outputs: list[list[Tensor]] = []
        out_spec = None
        assert isinstance(self.experts, nn.ModuleList)
        for index, expert in enumerate(self.experts):
            part = _pytree.tree_unflatten([leaf[index] for leaf in slices], spec)
            leaves, this_spec = _pytree.tree_flatten(expert(part))
            if not torch.compiler.is_compiling():
                _layer_checks.check_expert_output(op, index, leaves, counts[index])
            if out_spec is None:
                out_spec = this_spec
            elif this_spec != out_spec:
                raise ValueError(
                    f"{op}: experts must all return the same structure, got {this_spec} from expert {index} and "
                    f"{out_spec} from expert 0. Make their outputs alike."
                )
            outputs.append(leaves)
        joined = []
        for parts in zip(*outputs, strict=True):
            if not torch.compiler.is_compiling():
                _layer_checks.check_same_row(op, parts)
            dropped = parts[0].new_zeros((counts[-1], *parts[0].shape[1:]))
            joined.append(torch.cat((*parts, dropped)))
        return joined, out_spec

    def _mask_filler(self, mask: Tensor, topk_weights: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function that writes ``mask_dict``'s values, weighted, over masked tokens."""
        total = topk_weights.sum(1)  # [T]

        def fill(y: Tensor) -> Tensor:
            column = (-1, *(1,) * (y.dim() - 1))
            for key, value in (self.mask_dict or {}).items():
                if isinstance(value, Tensor):
                    value = value.to(y.device)
                filled = (total.reshape(column) * value).to(y.dtype)
                y = torch.where((mask == key).reshape(column), filled, y)
            return y

        return fill

    def extra_repr(self) -> str:
        """Sizes of the layer."""
        return f"num_expert={self.num_expert}, d_model={self.d_model}, top_k={self.top_k}"


def _permute_leaf(leaf: Tensor, plan: TokenPlan) -> Tensor:
    """Copy a leaf ``[T, ...]`` into expert order ``[N, ...]``."""
    if leaf.dtype in _checks.FLOAT_DTYPES:
        flat = leaf if leaf.dim() == 2 else leaf.reshape(leaf.shape[0], _row_size(leaf))
        return permute_tokens(flat, plan).reshape(-1, *leaf.shape[1:])
    # Ids, positions, flags: nothing to differentiate, and no kernel needed.
    return leaf.index_select(0, plan.row_to_pair // plan.pair_to_row.shape[1])


def _combine_leaf(op: str, leaf: Tensor, plan: TokenPlan, topk_weights: Tensor) -> Tensor:
    """Sum an output leaf ``[N, ...]`` over each token's pairs: ``[T, ...]``."""
    if not torch.compiler.is_compiling():
        if not isinstance(leaf, Tensor) or leaf.dtype not in _checks.FLOAT_DTYPES or leaf.dim() < 1:
            raise TypeError(
                f"{op}: experts must return float tensors with their rows in dimension 0, got "
                f"{_checks.describe(leaf)}. Outputs of several experts are summed."
            )
        _checks.check_size(op, "experts' output", leaf, 0, plan.row_to_pair.shape[0], "its rows")
    flat = leaf if leaf.dim() == 2 else leaf.reshape(leaf.shape[0], _row_size(leaf))
    y = unpermute_tokens(flat, plan, topk_weights)
    return y.reshape(y.shape[0], *leaf.shape[1:])


def _row_size(leaf: Tensor) -> int:
    """Elements per row; spelt out because ``reshape(T, -1)`` is undefined for zero tokens."""
    size = 1
    for length in leaf.shape[1:]:
        size *= length
    return size


def _build_gate(
    op: str,
    gate: Any,
    d_model: int,
    num_expert: int,
    world_size: int,
    top_k: int,
    gate_bias: bool,
) -> nn.Module:
    """Call a gate's class or factory, or take a ready one."""
    if isinstance(gate, nn.Module):
        built = gate
    elif callable(gate):
        _checks.check_int(op, "top_k", top_k, 1, "Choose 1 <= top_k <= num_expert.")
        if top_k > num_expert * world_size:
            raise ValueError(
                f"{op}: top_k must be at most the {num_expert * world_size} experts, got {top_k}. Lower top_k."
            )
        options = {"gate_bias": gate_bias} if _takes_gate_bias(gate) else {}
        built = gate(d_model, num_expert, world_size, top_k, **options)
    else:
        built = gate
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"{op}: gate must be a gate class, a function that builds a gate, or an nn.Module, got "
            f"{_checks.describe(built)}. Subclass moeops.gates.BaseGate."
        )
    tot_expert = getattr(built, "tot_expert", num_expert * world_size)
    if tot_expert != num_expert * world_size:
        raise ValueError(
            f"{op}: gate must choose among the layer's {num_expert * world_size} experts, got one for {tot_expert}. "
            "Build it with the same num_expert."
        )
    return built


def _takes_gate_bias(gate: Callable[..., Any]) -> bool:
    """The constructor names ``gate_bias``, or hands its keywords on to a NaiveGate."""
    try:
        parameters = inspect.signature(gate).parameters
    except (TypeError, ValueError):  # no signature: a builtin
        return False
    if "gate_bias" in parameters:
        return True
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return open_ended and isinstance(gate, type) and issubclass(gate, NaiveGate)


def _build_expert(op: str, expert: Any, d_model: int, may_be_ready: bool) -> nn.Module:
    """Call an expert's class or factory, or take a ready one from a list."""
    if isinstance(expert, nn.Module):
        if may_be_ready:
            return expert
        raise TypeError(
            f"{op}: expert must be a class, a function of d_model or a list, got the ready module "
            f"{type(expert).__name__}. Pass a list with one module per expert."
        )
    built = expert(d_model) if callable(expert) else expert
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"{op}: expert must build an nn.Module, got {_checks.describe(built)}. "
            "Pass a class, or a function of d_model that returns a module."
        )
    return built
