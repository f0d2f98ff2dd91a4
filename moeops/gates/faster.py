"""Topology-aware gate. T tokens, K experts per token, E experts, D model width, W ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked, num_unmasked
from moeops.gates.functional import MILLION, apply_capacity, router_logits
from moeops.gates.naive import NaiveGate
from moeops.losses import gshard_loss
from moeops.ops.routing import topk_route


class FasterGate(NaiveGate):
    """Send few tokens over the slow network between nodes, as in FasterMoE.

    Experts live on ranks, ``gpus_per_node`` ranks in a row form a node. At most ``floor(outgoing_fraction * T)`` tokens
    may prefer an expert of another node. While fewer do, every token gets its ``top_k`` best experts, wherever they
    are. Otherwise those with the largest logits leave the node with their first choice, ties by position; every other
    choice of every token is made among the experts of this node. The weights are the softmax over the chosen logits.
    The loss is GShard's, of the unlimited choice: ``E * sum_e c_e * m_e``, 1 at perfect balance. Nothing is dropped,
    and nothing is exchanged: each rank looks at its own tokens.

    Departures from FastMoE's gate of the same name:

    - Plain arguments instead of environment variables; ``from_environment`` reads those.
    - No count is copied to the host: both cases are computed, and a mask on the device picks one.
    - Any ``top_k``; the choice that leaves the node comes first, as the best one; FastMoE has two and puts it last.
    - The loss is 1 at balance on any number of ranks; with ``compat=True`` it is divided by ``world_size ** 2``.
    - Shadowed experts (copies of other nodes' experts) are not known here.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, at most the experts of this node.
        gate_bias: give the router a bias.
        node_rank: number of this rank's node, ``rank // gpus_per_node``; needed with more than one node.
        gpus_per_node: ranks of a node; the last node may have fewer.
        outgoing_fraction: share of the tokens that may leave, from 0 to 1.
        compat: FastMoE's scale of the loss.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Raises:
        ValueError: a number does not fit, or ``node_rank`` is missing.  TypeError: a number is not an int.
    Source: FasterMoE, PPoPP 2022, doi:10.1145/3503221.3508418.

    Example:
        >>> gate = FasterGate(8, 2, 4, node_rank=0, gpus_per_node=2, outgoing_fraction=0.0)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> bool((topk_ids < 4).all())
        True
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        *,
        node_rank: int | None = None,
        gpus_per_node: int = 8,
        outgoing_fraction: float = 0.14,
        compat: bool = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        name = type(self).__name__
        _checks.check_int(name, "gpus_per_node", gpus_per_node, 1, "Pass the ranks of a node.")
        num_nodes = (world_size + gpus_per_node - 1) // gpus_per_node
        if node_rank is None:
            if num_nodes > 1:
                raise ValueError(
                    f"{name}: node_rank must be given with {num_nodes} nodes, got None. Pass rank // gpus_per_node, "
                    "or build the gate with gen_faster_gate."
                )
            node_rank = 0
        _checks.check_int(name, "node_rank", node_rank, 0, "Pass rank // gpus_per_node.")
        if node_rank >= num_nodes:
            raise ValueError(
                f"{name}: node_rank must be below the {num_nodes} nodes, got {node_rank}. Pass rank // gpus_per_node."
            )
        if not isinstance(outgoing_fraction, (int, float)) or not 0 <= outgoing_fraction <= 1:
            raise ValueError(
                f"{name}: outgoing_fraction must be in [0, 1], got {outgoing_fraction!r}. Use 0.14."
            )
        self.node_rank = node_rank
        self.gpus_per_node = gpus_per_node
        self.outgoing_fraction = float(outgoing_fraction)
        self.compat = bool(compat)
        self.first_expert = node_rank * gpus_per_node * num_expert
        self.last_expert = min(self.tot_expert, self.first_expert + gpus_per_node * num_expert)
        if top_k > self.last_expert - self.first_expert:
            raise ValueError(
                f"{name}: top_k must be at most the {self.last_expert - self.first_expert} experts of the node, got "
                f"{top_k}. Lower top_k."
            )

    @staticmethod
    def from_environment(rank: int, *, compat: bool = False) -> Callable[..., FasterGate]:
        """Make a layer's ``gate=`` argument with the options that FastMoE reads from the environment.

        ``FMOE_TOPO_GPUS_PER_NODE`` is ``gpus_per_node``, 8 where it is not set, and ``FMOE_TOPO_OUTGOING_FRACTION`` is
        ``outgoing_fraction``, 0.14 where it is not set. They are read when this is called.

        Args:
            rank: this process's rank among those that hold experts.
            compat: FastMoE's scale of the loss.

        Returns:
            ``build(d_model, num_expert, world_size, top_k=2, gate_bias=True)``, see ``gen_faster_gate``.

        Raises:
            ValueError: a variable is no number, or a number does not fit.  TypeError: ``rank`` is not an int.

        Example:
            >>> FasterGate.from_environment(11)(8, 4, 16).outgoing_fraction
            0.14
        """
        return gen_faster_gate(rank, **FasterGate.environment(), compat=compat)

    @staticmethod
    def environment() -> dict[str, Any]:
        """``gpus_per_node`` and ``outgoing_fraction`` as ``from_environment`` reads them."""
        return {
            "gpus_per_node": _from_environment("FMOE_TOPO_GPUS_PER_NODE", int, 8),
            "outgoing_fraction": _from_environment("FMOE_TOPO_OUTGOING_FRACTION", float, 0.14),
        }

    def forward(
        self, inp: Tensor, return_all_scores: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            return_all_scores: also return the router's logits.
            mask: ``[T]``, tokens that are not there; see ``BaseGate``.

        Returns:
            topk_ids ``[T, K]`` int64, topk_weights ``[T, K]`` float32 (float64 for float64), and on request the
            logits ``[T, E]``.
        """
        logits = router_logits(inp, self.gate)  # [T, E]
        topk_weights, topk_ids = topk_route(logits, self.top_k)
        loss = gshard_loss(logits, topk_ids, mask=mask)
        loss = loss / self.world_size**2 if self.compat else loss
        self.set_loss(loss, logits, drop_masked(topk_ids, mask), mask)
        if self.last_expert - self.first_expert < self.tot_expert:
            topk_ids = self._stay(logits.detach(), topk_ids, mask)
            topk_weights = torch.softmax(logits.gather(1, topk_ids), dim=-1)
        topk_ids = drop_masked(topk_ids, mask)
        if return_all_scores:
            return topk_ids, topk_weights, logits
        return topk_ids, topk_weights

    def _stay(self, logits: Tensor, topk_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Choose again in this node, but for the tokens that may leave."""
        first = topk_ids[:, :1]  # [T, 1]
        outside = (first < self.first_expert) | (first >= self.last_expert)
        if mask is not None:
            outside = outside & (mask == 0)[:, None]
        # In integers, so that it traces with a symbolic token count.
        millionths = round(self.outgoing_fraction * MILLION)
        quota = num_unmasked(logits, mask) * millionths // MILLION
        # One queue for the tokens that would leave; those with the largest logits get through.
        queue = torch.where(outside, 0, -1)
        leaves = apply_capacity(
            queue,
            logits.gather(1, first),
            1,
            lambda tokens: tokens * millionths // MILLION,
            policy="priority",
            mask=mask,
        )
        leaves = leaves == 0  # [T, 1]
        _, inside = topk_route(logits[:, self.first_expert : self.last_expert], self.top_k)
        inside = inside + self.first_expert
        limited = torch.where(leaves, torch.cat((first, inside[:, :-1]), dim=1), inside)
        return torch.where(outside.sum() < quota, topk_ids, limited)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, node_rank={self.node_rank}, gpus_per_node={self.gpus_per_node}, "
            f"outgoing_fraction={self.outgoing_fraction}, compat={self.compat}"
        )


def _from_environment(name: str, kind: type, default: Any) -> Any:
    """A number from an environment variable."""
    text = os.environ.get(name, str(default))
    try:
        return kind(text)
    except ValueError as err:
        raise ValueError(
            f"FasterGate.from_environment: {name} must be a number of type {kind.__name__}, got {text!r}. Set it "
            "right, or unset it."
        ) from err


def gen_faster_gate(
    rank: int, *, gpus_per_node: int = 8, outgoing_fraction: float = 0.14, compat: bool = False
) -> Callable[..., FasterGate]:
    """Make a layer's ``gate=`` argument: a function that builds the ``FasterGate`` of a rank.

    Args:
        rank: this process's rank among those that hold experts.
        gpus_per_node: ranks of a node.
        outgoing_fraction: share of the tokens that may leave the node.
        compat: FastMoE's scale of the loss.

    Returns:
        ``build(d_model, num_expert, world_size, top_k=2, gate_bias=True)``.

    Raises:
        ValueError: a number is too small.  TypeError: a number is not an int.

    Example:
        >>> gen_faster_gate(11)(8, 4, 16).node_rank
        1
    """
    _checks.check_int("gen_faster_gate", "rank", rank, 0, "Pass this process's rank.")
    _checks.check_int("gen_faster_gate", "gpus_per_node", gpus_per_node, 1, "Pass its ranks.")

    def build(
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
    ) -> FasterGate:
        return FasterGate(
            d_model,
            num_expert,
            world_size,
            top_k,
            gate_bias,
            node_rank=rank // gpus_per_node,
            gpus_per_node=gpus_per_node,
            outgoing_fraction=outgoing_fraction,
            compat=compat,
        )

    return build
