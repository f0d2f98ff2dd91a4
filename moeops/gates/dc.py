"""GShard's gate with one capacity for all ranks. T tokens, K = 2 experts per token, E experts, D width, W ranks."""

from __future__ import annotations

from typing import Any

from moeops.gates._fastmoe_names import accept_fastmoe_names
from moeops.gates.functional import Count, expert_capacity
from moeops.gates.gshard import GShardGate


class DCGate(GShardGate):
    """GShard's gate with distributed capacity: an expert counts the tokens of all ranks, not of each one alone.

    All as in ``GShardGate``, but an expert takes ``ceil(factor * 2 * (tokens of all ranks) / E)`` pairs wherever they
    come from: an expert that is popular on one rank only overflows later. First choices come before second ones,
    earlier ranks before later ones, then by position: W ranks drop what one rank with all the tokens would. The
    pairs that overflow get id -1 and add nothing to the output.

    Every forward with a capacity gathers ``2 * E + 1`` counts over ``group``, on the device: all its ranks must call
    the gate. With ``world_size=1`` nothing is sent, and this is ``GShardGate``.

    Departures from FastMoE's gate of the same name: those of ``GShardGate``, and the capacity is the factor times the
    mean load. FastMoE's is ``ceil(factor * T)`` with the tokens of the expert's own rank, ``E_local / 2`` times as
    much; ``compat=True`` does so too, with the mean over the ranks for ``T``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ``W``, ranks that hold different experts.
        top_k: must be 2; also as ``topk``, FastMoE's name.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        random_routing: drop second choices at random: ``True`` in training, ``False`` never, ``"always"``.
        gate_bias: give the router a bias.
        drop_policy: ``"choice"`` or ``"position"``; see ``apply_capacity``.
        balance: set the loss; ``"global"``: ``c_e`` over all ranks too; ``False`` for no loss.
        compat: FastMoE's numbers.
        group: the ``W`` ranks that hold the experts, a process group; a layer may set it later.

    Raises:
        ValueError: an argument does not fit, or ``group`` is missing with ``world_size > 1``.
    Source: GShard, arXiv:2006.16668; distributed capacity: FastMoE, arXiv:2103.13262.

    Example:
        >>> topk_ids, topk_weights = DCGate(8, 4, 1)(torch.randn(5, 8))
        >>> topk_ids.shape
        torch.Size([5, 2])
    """

    global_capacity = True
    group_use = "its capacity"

    @accept_fastmoe_names
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        capacity: tuple[float, float] | float | None = (1.2, 2.4),
        random_routing: bool | str = True,
        gate_bias: bool = True,
        *,
        drop_policy: str = "choice",
        balance: bool | str = True,
        compat: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            num_expert,
            world_size,
            top_k,
            capacity,
            random_routing,
            gate_bias,
            drop_policy=drop_policy,
            balance=balance,
            compat=compat,
            group=group,
        )

    def _rows(self, factor: float, num_tokens: Count) -> Count:
        """Pairs per expert."""
        if self.compat:
            return expert_capacity(factor, num_tokens, 1, self.world_size)
        return super()._rows(factor, num_tokens)
