"""The ops of ``torch.ops.moeops``: one file per family, with fakes, gradients and public functions side by side."""

from moeops.ops import _flops  # noqa: F401  (registers itself)
from moeops.ops.balance import prototype_route, relu_route, topk_route_balance
from moeops.ops.grouped_linear import grouped_linear
from moeops.ops.moe_mlp import moe_mlp
from moeops.ops.noisy import noisy_topk_route
from moeops.ops.padding import pad_rows, unpad_rows
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.ops.routing import chosen_weights, topk_route
from moeops.ops.scores import alignment_sum, score_sums
from moeops.ops.sorting import count_tokens, limit_capacity, sort_tokens

__all__ = [
    "alignment_sum",
    "chosen_weights",
    "count_tokens",
    "grouped_linear",
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
