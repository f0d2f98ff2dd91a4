"""Laws of a cost model: sums of coefficients times sizes. Seconds and bytes; D model width, H hidden width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
)


def dtype_name(dtype: Any) -> str:
    """Name of a float type: "bfloat16" for ``torch.bfloat16`` and for "bfloat16"."""
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ValueError(
            f"CostModel: dtype must be one of {tuple(ITEM_BYTES)}, got {dtype!r}. Pass a float type."
        )
    return name


@dataclass(frozen=True)
class LinkLaw:
    """A collective on one kind of link: ``call + peers * peer + bytes * seconds_per_byte``.

    Attributes:
        call_seconds: per call, however many take part.
        peer_seconds: per other rank that a rank exchanges messages with.
        seconds_per_byte: per byte that leaves the busiest rank: the inverse of the bandwidth per rank and direction.
        residual: root mean square of the relative errors of the fit; 0 for numbers given by hand.
    """

    call_seconds: float
    peer_seconds: float
    seconds_per_byte: float
    residual: float = 0.0

    def seconds(self, num_bytes: float, num_peers: int) -> float:
        """Seconds for a rank that sends ``num_bytes`` to ``num_peers`` others; 0 where there is none."""
        if num_peers == 0:
            return 0.0
        return self.call_seconds + self.message_seconds(num_bytes, num_peers)

    def message_seconds(self, num_bytes: float, num_peers: int) -> float:
        """The same without what a call costs."""
        return num_peers * self.peer_seconds + num_bytes * self.seconds_per_byte


@dataclass(frozen=True)
class BytesLaw:
    """Rows moved in memory: ``call_seconds + bytes * seconds_per_byte``; bytes read and bytes written both count."""

    call_seconds: float
    seconds_per_byte: float
    residual: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        """Seconds to read and write ``num_bytes`` in all."""
        return self.call_seconds + num_bytes * self.seconds_per_byte


@dataclass(frozen=True)
class ExpertLaw:
    """The block of expert MLPs on one rank.

    ``call + weights * seconds_per_weight + rows * weights_of_one * seconds_per_product + bytes * seconds_per_byte``: an
    expert costs a floor, in which its weights are read (and its last tile is padded), and a part in proportion to its
    rows; bytes are those of the rows that pass through memory. The sum, not the maximum, of floor and slope: tiles are
    whole, so few rows cost more than their share before the floor is passed. Measured times follow the sum.
    """

    call_seconds: float
    seconds_per_weight: float
    seconds_per_product: float
    seconds_per_byte: float
    residual: float = 0.0

    def seconds(self, features: tuple[float, float, float]) -> float:
        """Seconds for ``expert_features``."""
        weights, products, num_bytes = features
        return (
            self.call_seconds
            + weights * self.seconds_per_weight
            + products * self.seconds_per_product
            + num_bytes * self.seconds_per_byte
        )


@dataclass(frozen=True)
class RouterLaw:
    """A gate and the sort by expert.

    ``call + T D E * seconds_per_product + T E * seconds_per_score + bytes of x * seconds_per_byte``.
    """

    call_seconds: float
    seconds_per_product: float
    seconds_per_score: float
    seconds_per_byte: float
    residual: float = 0.0

    def seconds(self, features: tuple[float, float, float]) -> float:
        """Seconds for ``router_features``."""
        products, scores, num_bytes = features
        return (
            self.call_seconds
            + products * self.seconds_per_product
            + scores * self.seconds_per_score
            + num_bytes * self.seconds_per_byte
        )


@dataclass(frozen=True)
class HostLaw:
    """What the host needs to queue a part of a layer: ``fixed_seconds + n_chunks * chunk_seconds``."""

    fixed_seconds: float
    chunk_seconds: float
    residual: float = 0.0

    def seconds(self, n_chunks: int) -> float:
        """Seconds for a layer with ``n_chunks``."""
        return self.fixed_seconds + n_chunks * self.chunk_seconds


@dataclass(frozen=True)
class HostCost:
    """Host time of one layer: its gate, from there to the first expert, from there to the end, and the backward."""

    router: HostLaw
    first: HostLaw
    forward: HostLaw
    backward: HostLaw


@dataclass(frozen=True)
class Direction:
    """A law for the forward and one for the backward alone."""

    forward: Any
    backward: Any


def expert_features(
    rows: float,
    d_model: int,
    d_hidden: int,
    num_projections: int,
    item_bytes: int,
    num_experts: int = 1,
) -> tuple[float, float, float]:
    """What ``ExpertLaw`` multiplies: elements of all weights, products of rows and weights, bytes of rows in memory.

    Rows pass through memory between the matrix products: ``D`` wide in and out, gathered and summed, and ``H`` wide
    before and after the activation, each written once and read once.
    """
    weights = num_projections * d_model * d_hidden
    widths = 2 * (2 * d_model + (num_projections - 1) * d_hidden + d_hidden)
    return float(num_experts * weights), float(rows * weights), float(rows * widths * item_bytes)


def router_features(
    num_tokens: float, d_model: int, num_experts: int, item_bytes: int
) -> tuple[float, float, float]:
    """What ``RouterLaw`` multiplies: products, scores, bytes of the tokens."""
    scores = float(num_tokens * num_experts)
    return scores * d_model, scores, float(num_tokens * d_model * item_bytes)


def permute_bytes(num_tokens: float, num_pairs: float, row_bytes: int) -> float:
    """Bytes that a gather of tokens or a weighted sum of rows must move: caches serve the copies of a token."""
    return (num_tokens + num_pairs) * row_bytes


def distinct_parts(num_parts: int, num_experts: int, top_k: int) -> float:
    """How many of equal parts of the experts have one of ``K`` that are chosen at random, all different."""
    none = 1.0
    for chosen in range(top_k):
        others = num_experts - num_experts / num_parts
        none *= max(0.0, others - chosen) / (num_experts - chosen)
    return num_parts * (1 - none)
