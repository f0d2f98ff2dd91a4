"""Which group reduces the gradients of a layer's parameters: FastMoE's tags, which survive what torch makes anew."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeops.comm.groups import RankGroup


class TagsParameters(nn.Module):
    """The part of ``FMoE`` that tags parameters.

    Attributes:
        moe_ranks: the ranks that hold the experts.
        slice_ranks: the ranks that hold the same tokens.
        expert_dp_comm: tag of the experts' parameters, ``None`` before ``mark_parallel_comm``.
    """

    experts: nn.Module
    gate: nn.Module
    shared_expert: nn.Module | None
    shared_expert_gate: nn.Module | None
    moe_ranks: RankGroup | None
    slice_ranks: RankGroup | None
    expert_dp_comm: str | None

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Tag parameters with the group that reduces their gradients, as attribute ``dp_comm``.

        The gate's parameters are tagged ``"gate"``. Those of a shared expert and its gate are tagged ``"dp"``, but
        ``"gate"`` in a layer with slices, where ranks with the same tokens give them different gradients. The tags are
        read by data-parallel wrappers that know them, not by torch's. The layer remembers them: a parameter that torch
        makes anew (by a move, ``deepcopy``, ``load_state_dict(assign=True)``, sharding, a parametrization) has the
        layer's tag still where ``moeops.layers.walk.parameter_tags`` is asked, as ``DistributedGroupedDataParallel``
        does. A tag that you set on a parameter yourself counts before the layer's, and is lost with the parameter.

        Args:
            expert_dp_comm: tag of the experts' parameters; ``"none"`` means that no group reduces them.
        """
        self.expert_dp_comm = expert_dp_comm
        for module, tag in self.comm_tags():
            for parameter in module.parameters():
                parameter.dp_comm = tag  # type: ignore[attr-defined]  # FastMoE's tag

    def comm_tags(self) -> tuple[tuple[nn.Module, str], ...]:
        """The experts, the gate and what is shared, each with its parameters' tag; nothing where there are no tags.

        Experts that are spread over ranks are nobody else's, so they are tagged ``"none"`` without
        ``mark_parallel_comm`` too.
        """
        tag = self.expert_dp_comm
        if tag is None:
            if self.moe_ranks is None:
                return ()
            tag = "none"
        dense = "dp" if self.slice_ranks is None else "gate"
        shared = [m for m in (self.shared_expert, self.shared_expert_gate) if m is not None]
        return (self.experts, tag), (self.gate, "gate"), *((module, dense) for module in shared)

    def _restore_tags(self) -> None:
        """Tag parameters that torch made anew; a tag that is there may be the user's own and stays."""
        if self.expert_dp_comm is None:
            return
        for module, tag in self.comm_tags():
            for parameter in module.parameters():
                if not hasattr(parameter, "dp_comm"):
                    parameter.dp_comm = tag  # type: ignore[attr-defined]  # FastMoE's tag

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        self._restore_tags()
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._restore_tags()


def restore_tags(layer: TagsParameters, _incompatible_keys: Any) -> None:
    """Tag what ``load_state_dict(assign=True)`` made."""
    layer._restore_tags()
