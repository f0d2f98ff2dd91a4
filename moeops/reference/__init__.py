"""The truth in plain PyTorch: slow, readable, right in float64.

``moeops.reference.NAME`` is the op ``NAME``; ``gates_prototypes`` has what the Numba gallery is compared with.
"""

from moeops.reference.ops import (
    activate,
    alignment_sum,
    chosen_weights,
    count_tokens,
    grouped_linear,
    grouped_linear_weight_grad,
    grouped_sum,
    limit_capacity,
    moe_mlp,
    noisy_topk_route,
    pad_rows,
    permute_tokens,
    prototype_route,
    relu_route,
    score_sums,
    sort_tokens,
    topk_route,
    topk_route_balance,
    unpad_rows,
    unpermute_tokens,
)

__all__ = [
    "activate",
    "alignment_sum",
    "chosen_weights",
    "count_tokens",
    "grouped_linear",
    "grouped_linear_weight_grad",
    "grouped_sum",
    "limit_capacity",
    "moe_mlp",
    "noisy_topk_route",
    "pad_rows",
    "permute_tokens",
    "prototype_route",
    "relu_route",
    "score_sums",
    "sort_tokens",
    "topk_route",
    "topk_route_balance",
    "unpad_rows",
    "unpermute_tokens",
]
