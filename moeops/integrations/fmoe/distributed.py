"""FastMoE's data-parallel wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeops.distributed import grad_sync
from moeops.integrations.fmoe._settings import use_compat


class DistributedGroupedDataParallel(grad_sync.DistributedGroupedDataParallel):
    """``moeops.distributed.DistributedGroupedDataParallel`` with FastMoE's attributes.

    Args:
        module: what to train.
        auto_allreduce: reduce during the backward; FastMoE has no such thing.
        need_sync: start with equal parameters.
        compat: leave the gradients of experts as they are, the sum over the ranks' losses, as FastMoE does; ``None``
            for what ``install`` was told. Otherwise they are divided by the ranks that share the experts, like all
            other gradients are.
        **options: ``<tag>_group``, and options of ``moeops.distributed.DistributedGroupedDataParallel``.

    Attributes:
        comms: group by tag.

    Raises:
        TypeError: a group is given by position, as in FastMoE 0.2, whose order later versions changed.
    """

    def __init__(
        self,
        module: nn.Module,
        auto_allreduce: bool = False,
        need_sync: bool = True,
        *,
        compat: bool | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("auto_allreduce", auto_allreduce), ("need_sync", need_sync)):
            if not isinstance(value, (bool, int)):
                raise TypeError(
                    f"DistributedGroupedDataParallel: {name} must be a bool, got {value!r}. Pass groups by name: "
                    "dp_group=, moe_group=, gate_group=, world_group=."
                )
        if use_compat(compat):
            options.setdefault("scale_experts", False)
        super().__init__(module, bool(auto_allreduce), bool(need_sync), **options)

    @property
    def comms(self) -> dict[str, Any]:
        """Group by tag, for the tags that are reduced."""
        return dict(self._groups)
