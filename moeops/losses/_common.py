"""What losses share: checks, and a divisor that is never 0."""

from __future__ import annotations

from torch import Tensor

from moeops import _checks

# Makes 0 / 0 tokens 0 and changes no other quotient. A maximum would do the same in eager mode, but a compiler that
# takes a symbolic token count to be at least 2 simplifies it away, and then meets 0.
TINY = 1e-30


def check_logits(op: str, logits: Tensor) -> None:
    """Logits are ``[T, E]`` floats."""
    _checks.check_tensor(op, "logits", logits, 2)
    _checks.check_float(op, "logits", logits)


def check_ids(op: str, topk_ids: Tensor, num_tokens: int) -> None:
    """Ids are integers, a row for each token."""
    _checks.check_ids(op, "topk_ids", topk_ids)
    _checks.check_size(op, "topk_ids", topk_ids, 0, num_tokens, "one row per token")
