"""By which dispatcher a layer sends tokens, and what it calls between the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moeops.dispatch.base import Dispatcher
from moeops.dispatch.hooks import STAGES, StageHook, StageHooks
from moeops.dispatch.scaled_inputs import scale_inputs, sum_copies
from moeops.dispatch.weights import SharingDispatcher
from moeops.layers._calls import CallsExperts
from moeops.types import Routing, SlotRouting


class Dispatches(CallsExperts):
    """The part of ``FMoE`` that hands a routing to a dispatcher.

    Attributes:
        dispatcher: the layer's own.
        dispatch_table: what the dispatcher wants on the device in every forward, a buffer.
        stage_hooks: what the layer calls between its stages.
    """

    dispatcher: Dispatcher
    dispatch_table: Tensor | None
    stage_hooks = StageHooks()
    world_size: int
    _switches: Mapping[int, Dispatcher]  # others, by the ranks over which tokens travel

    def set_stage_hooks(self, **hooks: StageHook | None) -> None:
        """Set what the layer calls between its stages from now on, in the place of all that was set before.

        Args:
            hooks: by FSMoE's names, ``before_moe_start``, ``before_dispatch``, ``after_dispatch``, ``before_combine``,
                ``after_combine``, ``before_moe_end``; see ``moeops.dispatch.StageHooks``. A module among them is not
                part of the layer: keep it in a model of yours, so that its parameters are trained and saved.

        Raises:
            TypeError: there is no hook of a name, or one is not callable.
            NotImplementedError: the layer's dispatcher has replicas or shadows, and a hook is for rows.

        Example:
            >>> layer = FMoE(4, 8, expert=lambda d_model: nn.Linear(d_model, 3))
            >>> layer.set_stage_hooks(before_dispatch=torch.Tensor.bfloat16, after_dispatch=torch.Tensor.float)
        """
        unknown = [name for name in hooks if name not in STAGES]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: a hook must be one of {STAGES}, got {unknown[0]!r}. Use one of these names."
            )
        stage_hooks = StageHooks(**hooks)
        every = (self.dispatcher, *self._switches.values())
        try:
            for dispatcher in every:
                dispatcher.set_stage_hooks(stage_hooks)
        except NotImplementedError:
            for dispatcher in every:  # all of them, or none
                dispatcher.set_stage_hooks(self.stage_hooks)
            raise
        self.stage_hooks = stage_hooks

    def _dispatcher_of(self, parallel: int | None) -> Dispatcher:
        """The dispatcher of a call."""
        if parallel is None or parallel == self.world_size:
            return self.dispatcher
        if parallel not in self._switches:
            raise ValueError(
                f"{type(self).__name__}: parallel must be one of {sorted((*self._switches, self.world_size))}, got "
                f"{parallel}. Name others in parallel_degrees= when the layer is built."
            )
        return self._switches[parallel]

    def _sharing_options(self) -> list[str]:
        """Arguments that let experts' weights travel."""
        every = (self.dispatcher, *self._switches.values())
        return [one.option for one in every if isinstance(one, SharingDispatcher)]

    def _mixture(
        self,
        dispatcher: Dispatcher,
        routing: Routing | SlotRouting,
        inp: Any,
        early: dict[str, Any],
    ) -> Any:
        """Run the experts on what the gate sends to them."""
        if not hasattr(self, "experts"):
            raise RuntimeError(
                f"{type(self).__name__}: expert must be given, or self.experts be set by a subclass, got neither. "
                "Pass a class, a function of d_model, or a list."
            )
        if dispatcher.takes_scaled_inputs:
            return dispatcher.run(routing, inp, self._run_experts, self._block(), **early)
        plain, copies = scale_inputs(routing, inp)
        out = dispatcher.run(plain, copies, self._run_experts, self._block(), **early)
        return sum_copies(routing, out)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        table = self.dispatch_table
        if table is not None and not table.is_meta:
            table.copy_(self.dispatcher.table())  # type: ignore[arg-type]  # to_empty leaves anything in it
        return out
