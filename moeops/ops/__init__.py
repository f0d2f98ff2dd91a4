"""The ops of ``torch.ops.moeops``: one file per family, with fakes, gradients and public functions side by side."""

from moeops.ops.exchange import all_to_all_rows, exchange_counts
from moeops.ops.grouped_linear import grouped_linear
from moeops.ops.moe_mlp import moe_mlp
from moeops.ops.padding import pad_rows, unpad_rows
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.ops.routing import topk_route
from moeops.ops.scores import score_sums
from moeops.ops.sorting import count_tokens, limit_capacity, sort_tokens

__all__ = [
    "all_to_all_rows",
    "count_tokens",
    "exchange_counts",
    "grouped_linear",
    "limit_capacity",
    "moe_mlp",
    "pad_rows",
    "permute_tokens",
    "score_sums",
    "sort_tokens",
    "topk_route",
    "unpad_rows",
    "unpermute_tokens",
]
