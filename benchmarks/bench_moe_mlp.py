"""The expert block: index work, permute, both projections, activation, weighted sum. Routing is given."""

from __future__ import annotations

from torch import Tensor

import moeops
from benchmarks import peers
from benchmarks.inputs import BlockProblem
from benchmarks.registry import Case, register

GROUP = "block"

register(GROUP, "dense", "dense matmul limit")(peers.dense_limit)
register(GROUP, "bmm", "equal-group bmm", default_on=("cuda",))(peers.equal_groups)
register(GROUP, "weights", "read of the chosen weights", default_on=())(peers.weights_read)


@register(GROUP, "moeops", "moeops.moe_mlp", ours=True)
def moeops_block(problem: BlockProblem) -> Case:
    """sort_tokens and moe_mlp."""
    p = problem

    def forward() -> Tensor:
        plan = moeops.sort_tokens(p.topk_ids, p.shape.num_experts)
        return moeops.moe_mlp(
            p.x, plan, p.topk_weights, p.w_up, p.w_down, activation=p.shape.activation
        )

    return peers.block_case(p, forward)


register(GROUP, "transformers-compiled", "transformers grouped_mm, compiled", default_on=("cuda",))(
    peers.transformers_grouped_mm_compiled
)
register(GROUP, "transformers", "transformers grouped_mm")(peers.transformers_grouped_mm)
register(GROUP, "torchtitan", "torchtitan style")(peers.torchtitan_style)
register(GROUP, "loop-unbound", "loop, unbound weights", default_on=("cpu",))(peers.unbound_loop)
register(GROUP, "loop", "naive loop")(peers.naive_loop)
