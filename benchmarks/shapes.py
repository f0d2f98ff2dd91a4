"""Named problem sizes. T tokens, D model width, H hidden width of one expert, E experts, K experts per token."""

from __future__ import annotations

from dataclasses import dataclass

from moeops.planner.shapes import MODELS, Shape


@dataclass(frozen=True)
class LaneShape(Shape):
    """A whole layer with its gate, in the sizes FastMoE's paper uses."""

    activation: str = "gelu"


# Published models, and decoding batches of qwen3_30b.
CUDA_SHAPES = (
    MODELS["qwen3_30b"],
    MODELS["qwen3_235b"],
    MODELS["mixtral_8x7b"],
    MODELS["finegrain"],
    MODELS["gptoss_20b"],
    Shape("small_512", 512, 2048, 768, 128, 8),
    Shape("decode_64", 64, 2048, 768, 128, 8),
    Shape("decode_8", 8, 2048, 768, 128, 8),
    Shape("decode_1", 1, 2048, 768, 128, 8),
)
CPU_SHAPES = (
    Shape("cpu_small", 1024, 256, 256, 16, 2),
    Shape("cpu_fine", 1024, 256, 128, 64, 8),
)
# FastMoE's figure 6: four experts on each of 1 or 2 ranks.
FASTMOE_SHAPES = tuple(
    Shape(f"fastmoe_{name}4x{ranks}", *sizes, 4 * ranks, 2, "gelu")
    for name, sizes in (("", (4096, 1024, 4096)), ("tiny_", (48, 32, 16)))
    for ranks in (1, 2)
)
TEST_SHAPES = (Shape("tiny", 48, 32, 16, 4, 2),)
SHAPES = {shape.name: shape for shape in CUDA_SHAPES + CPU_SHAPES + FASTMOE_SHAPES + TEST_SHAPES}

CUDA_LANES = (
    LaneShape("fastmoe_e8", 4096, 1024, 4096, 8, 2),
    LaneShape("fastmoe_e64", 4096, 1024, 4096, 64, 2),
)
CPU_LANES = (LaneShape("fastmoe_cpu", 512, 128, 512, 8, 2),)
TEST_LANES = (LaneShape("fastmoe_tiny", 48, 32, 16, 4, 2),)
LANES = {shape.name: shape for shape in CUDA_LANES + CPU_LANES + TEST_LANES}

# Routing alone, for which D only sets the router's product: small, so that the gates' own work shows.
CUDA_GATES = (Shape("gates_t32768", 32768, 16, 16, 128, 8),)
CPU_GATES = (Shape("gates_t8192", 8192, 16, 16, 128, 8),)
TEST_GATES = (Shape("gates_tiny", 96, 16, 16, 16, 4),)
GATES = {shape.name: shape for shape in CUDA_GATES + CPU_GATES + TEST_GATES}
