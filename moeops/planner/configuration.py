"""One layer, the ranks it runs on, and what it is asked for.

T tokens per rank, K experts per token, E experts, D model width, H hidden width, W ranks that share the experts, P
shards of an expert, C capacity. A shard counts as an expert of width H / P that each token of the whole expert goes to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from moeops.comm import hierarchical
from moeops.cost.laws import ITEM_BYTES, distinct_parts
from moeops.cost.model import MODES
from moeops.dispatch.degrees import Degrees, as_degrees
from moeops.dispatch.gather import DEFAULT_ROWS
from moeops.ops.activations import ACTIVATIONS, is_gated

DISPATCHERS = ("exact", "gather", "static")
FORMS = ("flat", *hierarchical.FORMS)
OPTIMIZER_BYTES = {  # per parameter, as a function of the bytes of its type
    "none": lambda item: 0,
    "momentum": lambda item: item,
    "adamw": lambda item: 2 * item,
    "adamw-fp32": lambda item: 12,  # two moments and the parameter itself in float32
}


@dataclass(frozen=True)
class Configuration:
    """One layer, and the ranks it runs on. Raises ValueError where sizes do not fit each other.

    Attributes:
        world_size: ranks in all.
        node_size: ranks per node.
        expert_parallel: ``W``; the other ranks hold copies.
        num_experts: ``E``.
        top_k: ``K``.
        d_model: ``D``.
        d_hidden: ``H`` of a whole expert.
        num_tokens: ``T`` of a rank.
        dtype: name of the type of weights and rows.
        activation: of the experts.
        capacity_factor: of the static dispatcher, on ``T * K / E``.
        imbalance: rows of the busiest rank over the mean.
        num_layers: of this kind.
        tensor_parallel: ``P``.
        mode: "eager" or "compiled".
        optimizer: whose state is counted.
    """

    world_size: int
    num_experts: int
    top_k: int
    d_model: int
    d_hidden: int
    num_tokens: int
    dtype: str = "bfloat16"
    activation: str = "swiglu"
    node_size: int = 8
    expert_parallel: int | None = None
    capacity_factor: float = 1.25
    imbalance: float = 1.0
    num_layers: int = 1
    tensor_parallel: int = 1
    mode: str = "eager"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in (
            "world_size", "num_experts", "top_k", "d_model", "d_hidden", "num_tokens", "node_size",
            "num_layers", "tensor_parallel",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        choices = {
            "dtype": tuple(ITEM_BYTES),
            "activation": ACTIVATIONS,
            "mode": MODES,
            "optimizer": tuple(OPTIMIZER_BYTES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        ranks, shards = self.ranks, self.tensor_parallel
        self._check_multiple("world_size", self.world_size, "the ranks that share experts", ranks)
        if self.world_size > self.node_size:
            self._check_multiple(
                "world_size", self.world_size, "the ranks of a node", self.node_size
            )
        if ranks > self.node_size:
            self._check_multiple("expert_parallel", ranks, "the ranks of a node", self.node_size)
        self._check_multiple("the ranks that share experts", ranks, "tensor_parallel", shards)
        self._check_multiple("d_hidden", self.d_hidden, "tensor_parallel", shards)
        if self.num_experts % (ranks // shards):
            raise ValueError(
                f"num_experts must be a multiple of the {ranks // shards} ranks that hold different experts, got "
                f"{self.num_experts}. Let fewer ranks share the experts (--expert-parallel, a divisor of "
                f"{self.world_size}), or cut experts in shards (--expert-tensor-parallel)."
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most the {self.num_experts} experts, got {self.top_k}."
            )
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be above 0, got {self.capacity_factor}.")
        if not 1 <= self.imbalance <= ranks:
            raise ValueError(
                f"imbalance must be from 1 (even) to {ranks} (all rows on one rank), got {self.imbalance}."
            )

    def _check_multiple(self, name: str, value: int, of: str, factor: int) -> None:
        if factor < 1 or value % factor:
            raise ValueError(f"{name} must be a multiple of {of}, got {value} and {factor}.")

    @property
    def ranks(self) -> int:
        """W."""
        return self.world_size if self.expert_parallel is None else self.expert_parallel

    @property
    def local_ranks(self) -> int:
        """Ranks of a node among the W."""
        return min(self.node_size, self.ranks)

    @property
    def nodes(self) -> int:
        """Nodes that the W ranks are on."""
        return self.ranks // self.local_ranks

    @property
    def local_experts(self) -> int:
        """Experts, or shards, on a rank."""
        return self.num_experts * self.tensor_parallel // self.ranks

    @property
    def hidden(self) -> int:
        """H of what a rank holds of an expert."""
        return self.d_hidden // self.tensor_parallel

    @property
    def num_projections(self) -> int:
        """Matrices of an expert."""
        return 3 if is_gated(self.activation) else 2

    @property
    def num_pairs(self) -> int:
        """Rows that a rank sends."""
        return self.num_tokens * self.top_k * self.tensor_parallel

    @property
    def capacity(self) -> int:
        """C, as ``StaticDispatcher`` has it."""
        factor = Fraction(self.capacity_factor).limit_denominator(10000)
        return math.ceil(self.num_pairs * factor / (self.num_experts * self.tensor_parallel))

    def rows(self, dispatcher: str) -> float:
        """Rows of the busiest rank's experts, padding included."""
        if dispatcher == "static":
            return float(self.num_experts * self.tensor_parallel * self.capacity)
        return self.num_pairs * self.imbalance

    def reached(self, parts: int) -> float:
        """How many of so many equal parts of the ranks a token goes to, experts chosen at random."""
        expert_ranks = self.ranks // self.tensor_parallel
        apart = min(parts, expert_ranks)  # parts that hold different experts
        return parts / apart * distinct_parts(apart, self.num_experts, self.top_k)

    def sent_rows(self, dispatcher: str) -> float:
        """Rows that the busiest rank sends one way, those to itself included."""
        everything = float(self.num_tokens * self.ranks)
        if dispatcher == "exact":
            return min(everything, self.num_tokens * self.reached(self.ranks) * self.imbalance)
        return everything if dispatcher == "gather" else self.rows(dispatcher)

    def kept_rows(self, dispatcher: str) -> float:
        """Rows at the busiest rank's experts that memory is kept for."""
        if dispatcher != "gather":
            return self.rows(dispatcher)
        slots = self.top_k * self.tensor_parallel
        most = self.ranks * self.num_tokens * min(slots, self.local_experts)
        return float(min(most, self.num_pairs * (2 if self.ranks == 2 else DEFAULT_ROWS)))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.d_model * ITEM_BYTES[self.dtype]

    @property
    def choice_bytes(self) -> int:
        """Bytes of the ids and weights of one token."""
        return 8 * self.top_k * self.tensor_parallel

    @property
    def expert_parameters(self) -> int:
        """Elements of the expert weights on a rank, without biases."""
        return self.local_experts * self.num_projections * self.d_model * self.hidden


class Choice(NamedTuple):
    """What a layer is asked for: the kind of ``dispatch=``, its ``n_chunks``, its hierarchy's form or "flat"."""

    dispatcher: str
    n_chunks: int | tuple[int, int] = 1
    form: str = "flat"

    @property
    def degrees(self) -> Degrees:
        """Chunks of both directions."""
        return as_degrees("Choice", self.n_chunks)

    def __str__(self) -> str:
        """As a line of a table."""
        text = f"{self.dispatcher}, {chunks_text(self.n_chunks)}"
        return text + ("" if self.form == "flat" else f", {self.form}")


def chunks_text(n_chunks: int | tuple[int, int]) -> str:
    """As ``n_chunks=`` takes them: "1 chunk", "(4, 3) chunks"."""
    if n_chunks == 1:
        return "1 chunk"
    return f"{n_chunks if isinstance(n_chunks, int) else tuple(n_chunks)} chunks"
