"""Auxiliary losses of routers, as functions. T tokens, E experts, K experts per token.

All are 0 for no tokens, and none copies to the host. ``moeops.auxiliary_loss`` collects the losses that gates set.

``mask`` names tokens that are not there, such as padding: ``[T]`` integers or bool, and a token with a value other than
0 counts for nothing; its numbers must be finite. What is left is the loss of the other tokens alone.
"""

from moeops.losses.balance import (
    balance_loss,
    balance_of_route,
    balance_of_sums,
    chosen_experts,
    gshard_loss,
    mask_route,
    masked_score_sums,
    score_balance_loss,
    score_shares,
    sequence_loss,
    sum_tokens,
    switch_loss,
)
from moeops.losses.load import alignment_loss, cv_squared, importance, noisy_load
from moeops.losses.logits import router_entropy, z_loss

__all__ = [
    "alignment_loss",
    "balance_loss",
    "balance_of_route",
    "balance_of_sums",
    "chosen_experts",
    "cv_squared",
    "gshard_loss",
    "importance",
    "mask_route",
    "masked_score_sums",
    "noisy_load",
    "router_entropy",
    "score_balance_loss",
    "score_shares",
    "sequence_loss",
    "sum_tokens",
    "switch_loss",
    "z_loss",
]
