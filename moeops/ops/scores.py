"""How much each expert is wanted. T tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.ops import _checks
from moeops.ops._checks import fake_check
from moeops.ops.routing import SCORES


@torch.library.register_fake("moeops::score_sums")
def _score_sums_fake(logits, score):
    fake_check(logits.dim() == 2, "score_sums: logits must have 2 dimensions. Reshape them first.")
    return logits.new_empty((logits.shape[1],), dtype=_checks.accumulate_dtype(logits.dtype))


@torch.library.register_fake("moeops::score_sums_backward")
def _score_sums_backward_fake(grad_sums, logits, score):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _score_sums_setup(ctx, inputs, output):
    logits, ctx.score = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits)


def _score_sums_grad(ctx, grad_sums):
    if grad_sums is None:
        return None, None
    (logits,) = ctx.saved_tensors
    return torch.ops.moeops.score_sums_backward(grad_sums, logits, ctx.score), None


torch.library.register_autograd(
    "moeops::score_sums", _score_sums_grad, setup_context=_score_sums_setup
)
_checks.refuse_second_gradient("score_sums_backward")


def score_sums(logits: Tensor, score: str = "softmax") -> Tensor:
    """Sum over the tokens each expert's share of the token's scores, without writing the shares.

    ``sums_e = sum_t s_te / sum_j s_tj`` with ``s = softmax(logits)``, whose shares are itself, or
    ``s = sigmoid(logits)``; divided by ``T`` this is the mean router probability of every balance loss. Sigmoids
    that all round to 0 still have shares.

    Args:
        logits: router logits, ``[T, E]``, any float type; computed in float32 (float64 for float64). On CUDA ``E`` is
            at most 2048.
        score: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``[E]`` float32 (float64 for float64 logits); 0 for no tokens, NaN if a logit is NaN or plus infinity.

    Raises:
        ValueError: a shape or ``score`` does not fit.  TypeError: ``logits`` is not float.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.  Cost: reads the logits once.
    Source: the ``P_e`` of the Switch Transformer, arXiv:2101.03961, equation 6; of sigmoids: DeepSeek-V3,
    arXiv:2412.19437, equation 20.

    Example:
        >>> score_sums(torch.zeros(4, 2)).tolist()
        [2.0, 2.0]
    """
    if not torch.compiler.is_compiling():
        op = "score_sums"
        _checks.check_tensor(op, "logits", logits, 2)
        _checks.check_float(op, "logits", logits)
        if score not in SCORES:
            raise ValueError(
                f"{op}: score must be one of {SCORES}, got {score!r}. Pick one of them."
            )
    return torch.ops.moeops.score_sums(logits, score)
