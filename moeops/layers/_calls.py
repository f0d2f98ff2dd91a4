"""How a layer calls its experts: one after the other, or all as one module. R rows in expert order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeops import _nests
from moeops.dispatch.base import Block
from moeops.dispatch.weights import ExpertWeights, check_modules, module_weights
from moeops.layers import _layer_checks
from moeops.layers._build import takes_count
from moeops.layers._loop import loop_over_experts
from moeops.layers._routings import pad_left_out


class CallsExperts(nn.Module):
    """The part of ``FMoE`` that hands rows to experts; a layer with experts of another form overrides some of it.

    Attributes:
        experts: a list of modules, or one module for all experts.
        experts_fused: whether it is one.
        expert_call: see ``FMoE``.
    """

    experts: nn.Module
    experts_fused: bool
    expert_call: str | None
    _counted: tuple[bool, ...]  # for each of several experts

    def _block(self) -> Block | None:
        """The experts as one call on tokens, if there is one."""
        return None

    def _check_sharing(self, option: str) -> Any:
        """Refuse experts whose weights cannot travel; return what of them must be equal on all ranks."""
        op = type(self).__name__
        if not self.experts_fused:
            assert isinstance(self.experts, nn.ModuleList)
            return check_modules(op, option, list(self.experts))
        if type(self)._expert_weights is CallsExperts._expert_weights:
            raise NotImplementedError(
                f"{op}: {option} must be None without _expert_weights, got a subclass that sets self.experts and has "
                "none. Use FMoETransformerMLP, or a list of experts."
            )
        return None

    def _expert_weights(self) -> ExpertWeights:
        """The experts as tensors that can travel."""
        assert isinstance(self.experts, nn.ModuleList)
        return module_weights(list(self.experts), self._loop_over_experts)

    def _takes_count(self, expert: nn.Module) -> bool:
        """An expert is called with the number of its rows too; asked where the layer is built."""
        return takes_count(expert) if self.expert_call is None else "count" in self.expert_call

    def _run_experts(
        self, rows: Any, expert_offsets: Tensor, rows_per_expert: list[int] | None
    ) -> Any:
        """Call the experts on rows in expert order, a nest of ``[R, ...]``; what they return is one too."""
        op = type(self).__name__
        if self.experts_fused:
            out = self._fused_experts(rows, expert_offsets)
        else:
            out = self._loop_over_experts(rows, expert_offsets, rows_per_expert)
        if not torch.compiler.is_compiling():
            num_rows = _nests.leaves(rows)[0].shape[0]
            _layer_checks.check_rows(op, _nests.leaves(out), num_rows)
        return out

    def _fused_experts(self, rows: Any, expert_offsets: Tensor) -> Any:
        """Call the module of a subclass that holds all experts; rows of dropped pairs that it leaves out are zero."""
        num_rows = _nests.leaves(rows)[0].shape[0]
        out = self.experts(rows, expert_offsets.diff())
        return _nests.map_leaves(lambda leaf: pad_left_out(leaf, num_rows, expert_offsets), out)

    def _loop_over_experts(
        self,
        rows: Any,
        expert_offsets: Tensor,
        rows_per_expert: list[int] | None,
        experts: Sequence[Callable[..., Any]] | None = None,
    ) -> Any:
        """Call every expert, this layer's own if none are given, on its slice of the rows; join what they return."""
        op = type(self).__name__
        if torch.compiler.is_compiling():
            _layer_checks.warn_of_folded_rows(op, self.experts)  # type: ignore[arg-type]  # a list
        counted = self._counted
        if experts is None:
            assert isinstance(self.experts, nn.ModuleList)
            experts = list(self.experts)
        else:  # experts from elsewhere are like this rank's own
            counted = counted[:1] * len(experts)
        return loop_over_experts(op, experts, counted, rows, expert_offsets, rows_per_expert)
