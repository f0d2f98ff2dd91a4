"""Named problem sizes. T tokens, D model width, H hidden width of one expert, E experts, K experts per token."""

from __future__ import annotations

from dataclasses import dataclass

from moeops.ops.activations import up_width
from moeops.types import Glu


@dataclass(frozen=True)
class Shape:
    """One expert block; FLOPs follow the usual convention, the matrix products of routed rows only."""

    name: str
    num_tokens: int
    d_model: int
    d_hidden: int
    num_experts: int
    top_k: int
    activation: str | Glu = "swiglu"

    @property
    def num_pairs(self) -> int:
        """N = T * K."""
        return self.num_tokens * self.top_k

    @property
    def up_width(self) -> int:
        """Rows of one expert's up projection: gate and up for gated units."""
        return up_width(self.d_hidden, self.activation)

    @property
    def flops_forward(self) -> int:
        """6 T K D H for gated units, 4 T K D H with one up matrix."""
        return 2 * self.num_pairs * self.d_model * (self.up_width + self.d_hidden)

    @property
    def flops_total(self) -> int:
        """Forward and backward: three times the forward."""
        return 3 * self.flops_forward

    def __str__(self) -> str:
        """Name and sizes on one line."""
        return (
            f"{self.name}: T={self.num_tokens} D={self.d_model} H={self.d_hidden} "
            f"E={self.num_experts} K={self.top_k} {self.activation}"
        )


# Expert blocks of published models; finegrain is a 30B-class model with many small experts.
MODELS = {
    shape.name: shape
    for shape in (
        Shape("qwen3_30b", 32768, 2048, 768, 128, 8),
        Shape("qwen3_235b", 16384, 4096, 1536, 128, 8),
        Shape("mixtral_8x7b", 8192, 4096, 14336, 8, 2),
        Shape("finegrain", 32768, 2048, 256, 256, 16),
        Shape("gptoss_20b", 16384, 2880, 2880, 32, 4),
        Shape("deepseek_v3", 8192, 7168, 2048, 256, 8),
    )
}
