"""FastMoE's layer around moeops'. T tokens, K experts per token, E_local experts on a rank, W ranks, R rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moeops.integrations.fmoe._settings import use_compat
from moeops.integrations.fmoe.fastermoe import dispatch_from_environment
from moeops.integrations.fmoe.functions import MOEGather, MOEScatter, prepare_forward
from moeops.integrations.fmoe.gates import NaiveGate
from moeops.integrations.fmoe.linear import FMoELinear, MOELinear
from moeops.layers import _layer_checks, moe
from moeops.layers._build import accepts_count

__all__ = [
    "FMoE",
    "FMoELinear",
    "MOELinear",
    "mark_module_parallel_comm",
]

ExpertFn = Callable[[Any, Tensor], Any]

# Positional order of FMoE. Version 0.2 had no slice_group and no moe_group: its fifth argument is top_k, an int.
_NAMES = (
    "num_expert",
    "d_model",
    "world_size",
    "mp_group",
    "slice_group",
    "moe_group",
    "top_k",
    "gate",
    "expert",
    "gate_hook",
    "mask",
    "mask_dict",
    "gate_bias",
)
_NAMES_0_2 = tuple(name for name in _NAMES[:-1] if name not in ("slice_group", "moe_group"))


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    """Tag a module's parameters with the group that reduces their gradients, as attribute ``dp_comm``."""
    for parameter in module.parameters():
        parameter.dp_comm = comm  # type: ignore[attr-defined]  # FastMoE's tag


def _fmoe_general_global_forward(
    inp: Any, gate: Tensor, expert_fn: ExpertFn, num_expert: int, world_size: int, **kwargs: Any
) -> Any:
    """Send tokens to chosen experts, run these, and bring the outputs back, one row per pair.

    Args:
        inp: nest of tokens, ``[T, ...]``.
        gate: chosen experts, ``[T, K]``, or ``[T]`` for one each; -1 for a dropped one.
        expert_fn: called with the rows of this rank's experts and their counts, int64 ``[E_local]`` on the CPU.
        num_expert: ``E_local``.
        world_size: ``W``; the group is that of ``ensure_comm``.
        **kwargs: not used, as in FastMoE's naive schedule.

    Returns:
        Nest of ``[T * K, ...]``, token by token, zeros for dropped pairs.
    """
    top_k = gate.shape[1] if gate.dim() == 2 else 1
    pos, local, received, counts, num_rows = prepare_forward(gate, num_expert, world_size)
    token = torch.div(pos, top_k, rounding_mode="floor")

    def scatter(leaf: Tensor) -> Tensor:
        return MOEScatter.apply(leaf, token, local, received, num_rows, world_size)

    def gather(leaf: Tensor) -> Tensor:
        return MOEGather.apply(leaf, pos, local, received, gate.numel(), world_size)

    return _pytree.tree_map(gather, expert_fn(_pytree.tree_map(scatter, inp), counts))


def _by_name(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of FMoE by name, in the order of version 1.1 or 0.2."""
    names = _NAMES_0_2 if len(args) > 4 and isinstance(args[4], int) else _NAMES
    if len(args) > len(names):
        raise TypeError(
            f"{op}: positional arguments must be {names}, got {len(args)}. Pass the others by name."
        )
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"{op}: {twice[0]} must be given once, got it by position and by name.")
    return {**given, **kwargs}


class FMoE(moe.FMoE):
    """``moeops.FMoE`` with FastMoE's conventions.

    - Positional arguments are those of version 1.1, or of 0.2 where the fifth is an int.
    - Every gate gets what the layer gets, nests included, unless it has an attribute ``nested_input``.
    - Experts whose ``forward`` takes two positional arguments are called with ``(rows, count)``, others with rows.
    - Fused experts (``expert=None``) are called with the rows of kept pairs and int64 counts on the CPU, through
      ``expert_fn(rows, counts)``, which a subclass may override, for a list of experts too. That costs a host copy.
    - ``FMOE_FASTER_SCHEDULE_ENABLE`` and ``FMOE_FASTER_SHADOW_ENABLE`` choose the dispatcher, unless one is given.

    Args:
        *args: positional arguments of FastMoE's layer.
        compat: FastMoE's numbers; ``None`` for what ``install`` was told. Gradients of gate and experts in a slice are
            those of this rank's slice, and a mask without ``mask_dict`` is ignored.
        **kwargs: arguments of FastMoE's layer, and of ``moeops.FMoE``.

    Raises:
        ValueError: a size or an option does not fit.  TypeError: an argument has the wrong type, or is given twice.
    """

    def __init__(self, *args: Any, compat: bool | None = None, **kwargs: Any) -> None:
        op = type(self).__name__
        options = _by_name(op, args, kwargs)
        self._compat = self.__dict__.get("_compat", use_compat(compat))
        if self._compat:
            options.setdefault("slice_gradients", "fastmoe")
        world_size = options.get("world_size", 1)
        if "dispatch" not in options and "device_mesh" not in options:
            options.update(dispatch_from_environment(world_size))
        options.setdefault("gate", NaiveGate)
        super().__init__(**options)
        if not hasattr(self.gate, "nested_input"):
            self.gate.nested_input = True  # type: ignore[assignment]  # read by FMoE

    @property
    def slice_size(self) -> int:
        """Ranks that hold the same tokens."""
        return 1 if self.slice_ranks is None else self.slice_ranks.size

    @property
    def slice_rank(self) -> int:
        """This rank's number among them."""
        return 0 if self.slice_ranks is None else self.slice_ranks.rank

    def _takes_count(self, expert: nn.Module) -> bool:
        return accepts_count(expert) if self.expert_call is None else "count" in self.expert_call

    def expert_fn(self, inp: Any, fwd_expert_count: Tensor) -> Any:
        """Run this rank's experts; a subclass may do it otherwise.

        Args:
            inp: nest of rows in expert order, ``[R, ...]``, without those of dropped pairs.
            fwd_expert_count: rows of each expert, int64 ``[E_local]`` on the CPU.

        Returns:
            Nest of ``[R, ...]``.
        """
        if self.experts_fused:
            return self.experts(inp, fwd_expert_count)
        counts = fwd_expert_count.tolist()
        device = _pytree.tree_leaves(inp)[0].device
        offsets = torch.nn.functional.pad(fwd_expert_count.cumsum(0), (1, 0)).to(device)
        return self._loop_over_experts(inp, offsets, counts)

    def expert_fn_single(self, inp: Any, fwd_expert_count: Tensor, idx: int) -> Any:
        """Run one of several experts on its rows; ``fwd_expert_count [1]`` is how many these are."""
        expert = self.experts[idx]  # type: ignore[index]  # a list
        return expert(inp, fwd_expert_count) if self._takes_count(expert) else expert(inp)

    def _overrides_expert_fn(self) -> bool:
        return type(self).expert_fn is not FMoE.expert_fn

    def _run_experts(
        self, rows: Any, expert_offsets: Tensor, rows_per_expert: list[int] | None
    ) -> Any:
        if not self.experts_fused and not self._overrides_expert_fn():
            return super()._run_experts(rows, expert_offsets, rows_per_expert)
        num_rows = _pytree.tree_leaves(rows)[0].shape[0]
        if rows_per_expert is None:
            counts = expert_offsets.diff().to("cpu", torch.int64)
            rows_per_expert = counts.tolist()
        else:
            counts = torch.tensor(rows_per_expert)
        for count in rows_per_expert:
            torch._check(count >= 0)
        kept = sum(rows_per_expert)
        torch._check(kept <= num_rows)
        inp = _pytree.tree_map(lambda leaf: leaf.narrow(0, 0, kept), rows)
        out = self.expert_fn(inp, counts)
        if not torch.compiler.is_compiling():
            _layer_checks.check_rows(type(self).__name__, _pytree.tree_leaves(out), kept)
            if kept == num_rows:
                return out

        def pad(leaf: Tensor) -> Tensor:
            return torch.cat((leaf, leaf.new_zeros((num_rows - kept, *leaf.shape[1:]))))

        return _pytree.tree_map(pad, out)

    def _mask_of(self, mask: Tensor | None) -> Tensor | None:
        return None if self._compat and self.mask_dict is None else super()._mask_of(mask)
