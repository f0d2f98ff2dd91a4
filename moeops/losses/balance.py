"""Losses that are least where every expert gets the same share of the tokens. T tokens, E experts, K per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked, hide_masked, num_unmasked
from moeops.comm.collectives import all_reduce_sum
from moeops.losses._common import TINY, check_ids, check_logits
from moeops.ops.scores import score_sums
from moeops.ops.sorting import count_tokens
from moeops.types import BalancedRoute


def balance_loss(
    router_probs: Tensor, topk_ids: Tensor, *, group: Any = None, mask: Tensor | None = None
) -> Tensor:
    """Compute the load-balancing loss of GShard and Switch: ``E * sum_e f_e * P_e``, 1 at perfect balance.

    ``f_e`` is the share of the ``T * K`` entries of ``topk_ids`` that name expert ``e`` (a constant for autograd),
    ``P_e`` the mean probability that the router gives to it. GShard counts first choices only: pass one column.

    With ``group`` ``f_e`` counts the entries of all its ranks, and ``P_e`` stays this rank's. The loss is linear in
    ``P_e`` and shares ``f_e``, so the mean of the ranks' losses, whose gradient data parallelism takes anyway, is the
    loss of all tokens at once (for equal ``T``): an expert may serve one rank's domain alone, as long as it is not
    overloaded over all.

    Args:
        router_probs: ``[T, E]`` float, each row sums to 1.
        topk_ids: ``[T, K]`` int32 or int64, before any token is dropped.
        group: the ranks to count over, a process group or ``moeops.distributed.RankGroup``; all of them must call
            this. ``None`` for this rank alone.
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar of the type of ``router_probs``; 0 for no tokens.

    Gradients: ``router_probs``.  Host sync: none.  Deterministic: yes.  With ``group``: one all-reduce of ``E + 1``
    counts.
    Source: GShard, arXiv:2006.16668, algorithm 1; Switch Transformer, arXiv:2101.03961, equation 4; over a group:
    arXiv:2501.11873.

    Example:
        >>> balance_loss(torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    prob_sums = sum_tokens(router_probs, mask)  # [E]
    loss = balance_of_sums(prob_sums, topk_ids, group=group, mask=mask)
    return loss.to(router_probs.dtype)


def score_balance_loss(
    logits: Tensor,
    topk_ids: Tensor,
    score: str = "softmax",
    *,
    group: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``balance_loss`` of each token's scores divided by their sum, which are never written without a mask."""
    sums = masked_score_sums(logits, mask, score=score)
    return balance_of_sums(sums, topk_ids, group=group, mask=mask)


def balance_of_sums(
    prob_sums: Tensor, topk_ids: Tensor, *, group: Any = None, mask: Tensor | None = None
) -> Tensor:
    """``balance_loss`` from the sums of the probabilities over the tokens, ``[E]`` float32 or float64."""
    topk_ids = drop_masked(topk_ids, mask)
    num_tokens, num_experts = num_unmasked(topk_ids, mask, prob_sums.dtype), prob_sums.shape[0]
    counts = count_tokens(topk_ids, num_experts)  # [E]
    if group is None:
        pairs = num_tokens * topk_ids.shape[1]
        return (counts * prob_sums).sum() / (num_tokens * pairs * (1 / num_experts) + TINY)
    counts, all_pairs = _sum_counts(counts, topk_ids, group, mask)
    means = (counts * prob_sums).sum() / (num_tokens * (1 / num_experts) + TINY)
    return means / (all_pairs.to(means.dtype) + TINY)


def balance_of_route(
    route: BalancedRoute, *, group: Any = None, mask: Tensor | None = None
) -> Tensor:
    """``balance_loss`` of what a route counted; with ``group`` over its ranks. Takes the mask that the route took."""
    if group is None:
        return route.balance_loss
    counts = all_reduce_sum(route.tokens_per_expert.to(torch.int64), group)  # [E]
    num_tokens = num_unmasked(route.topk_ids, mask, route.score_sums.dtype)
    return _balance_of_counts(counts, route.score_sums, num_tokens)


def _balance_of_counts(counts: Tensor, sums: Tensor, num_tokens: Any) -> Tensor:
    """``E * sum_e f_e * P_e`` with the shares of the counted pairs, however many each token has."""
    means = (counts * sums).sum() / (num_tokens * (1 / counts.shape[0]) + TINY)
    return means / (counts.sum().to(torch.float64).to(means.dtype) + TINY)


def mask_route(
    route: BalancedRoute,
    shares: Callable[[], Tensor],
    mask: Tensor | None,
    num_counted: int | None = None,
) -> BalancedRoute:
    """Take masked tokens out of a route: ids, sums, counts and loss are those of the other tokens alone.

    Args:
        route: of all tokens.
        shares: makes what the route summed up, ``[T, E]`` with gradients. The op that made the route never wrote it.
        mask: ``[T]``; ``None`` leaves the route as it is.
        num_counted: choices of a token that are counted, from the first one on; ``None`` for all.
    """
    if mask is None:
        return route
    topk_ids = drop_masked(route.topk_ids, mask)
    counts = count_tokens(topk_ids[:, :num_counted], route.score_sums.shape[0])
    sums = sum_tokens(shares(), mask)
    loss = _balance_of_counts(counts, sums, num_unmasked(topk_ids, mask, sums.dtype))
    return BalancedRoute(route.topk_weights, sums, loss, topk_ids, counts)


def sum_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum ``[T, E]`` over the tokens that are there, half types in float32."""
    return hide_masked(values, mask).sum(0, dtype=_checks.accumulate_dtype(values.dtype))


def masked_score_sums(logits: Tensor, mask: Tensor | None, *, score: str = "softmax") -> Tensor:
    """``score_sums`` over the tokens that are there."""
    if mask is None:
        return score_sums(logits, score=score)
    return sum_tokens(score_shares(logits, score), mask)


def score_shares(logits: Tensor, score: str = "softmax") -> Tensor:
    """Scores of all experts, each row divided by its sum: ``[T, E]``, half types in float32."""
    logits = logits.to(_checks.accumulate_dtype(logits.dtype))
    if score == "softmax":
        return torch.softmax(logits, dim=-1)
    # sigmoid(z) / sum sigmoid is the softmax of log sigmoid(z), which cannot divide by zero. With m = max(-z, 0) held
    # constant, no exponent below is positive. (logaddexp with a constant cannot be compiled for CUDA with an unbacked
    # token count on torch 2.11.)
    m = torch.relu(-logits).detach()  # [T, E]
    return torch.softmax(-m - torch.log(torch.exp(-m) + torch.exp(-logits - m)), dim=-1)


def _sum_counts(
    counts: Tensor, topk_ids: Tensor, group: Any, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum the pairs of each expert, and of all, over the ranks."""
    pairs = torch.ones_like(topk_ids, dtype=torch.int64)
    pairs = (pairs if mask is None else pairs * (mask == 0)[:, None]).sum()
    sums = all_reduce_sum(torch.cat((counts.to(torch.int64), pairs[None])), group)  # [E + 1]
    return sums[:-1], sums[-1].to(torch.float64)  # exact, where float32 ends at 2 ** 24


def switch_loss(
    logits: Tensor, topk_ids: Tensor, *, group: Any = None, mask: Tensor | None = None
) -> Tensor:
    """Compute the Switch Transformer's loss from logits: ``balance_loss(softmax(logits), topk_ids)``.

    Every choice counts alike, so that it serves any ``K``; the loss that Mixtral and Qwen3 train with is ``K`` times
    this one.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).
        topk_ids: ``[T, K]`` integers, before any token is dropped.
        group: ranks to count over, see ``balance_loss``.
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar, 1 at perfect balance.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.
    Source: Switch Transformer, arXiv:2101.03961, equation 4.

    Example:
        >>> float(switch_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]])))
        1.0
    """
    if not torch.compiler.is_compiling():
        check_logits("switch_loss", logits)
        check_ids("switch_loss", topk_ids, logits.shape[0])
    return score_balance_loss(logits, topk_ids, group=group, mask=mask)


def gshard_loss(
    logits: Tensor, topk_ids: Tensor, *, group: Any = None, mask: Tensor | None = None
) -> Tensor:
    """Compute GShard's loss from logits: ``balance_loss`` of the first choices, column 0 of ``topk_ids``.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).
        topk_ids: ``[T, K]`` integers, best first, before any token is dropped.
        group: ranks to count over, see ``balance_loss``.
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar, 1 at perfect balance.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.
    Source: GShard, arXiv:2006.16668, algorithm 1.

    Example:
        >>> float(gshard_loss(torch.zeros(2, 2), torch.tensor([[0, 1], [1, 0]])))
        1.0
    """
    if not torch.compiler.is_compiling():
        check_logits("gshard_loss", logits)
        check_ids("gshard_loss", topk_ids, logits.shape[0])
    return score_balance_loss(logits, topk_ids[:, :1], group=group, mask=mask)


def sequence_loss(
    router_probs: Tensor, topk_ids: Tensor, sequence_length: int, *, mask: Tensor | None = None
) -> Tensor:
    """Compute the sequence-wise balance loss: the mean over the sequences of ``balance_loss`` of each alone.

    ``S`` tokens in a row are a sequence; a last one with fewer than ``S`` is averaged over those it has, and so is one
    with masked tokens. A sequence of masked tokens alone is none.

    Args:
        router_probs: ``[T, E]`` float, each row sums to 1.
        topk_ids: ``[T, K]`` integers, no expert twice in a row; -1 counts for no expert.
        sequence_length: ``S``, at least 1.
        mask: ``[T]``, tokens to leave out; they keep their places in the sequences.

    Returns:
        A scalar of the type of ``router_probs``, 1 at perfect balance; 0 for no tokens.

    Raises:
        ValueError: a shape or a number does not fit.  TypeError: a type does not fit.
    Gradients: ``router_probs``.  Host sync: none.  Deterministic: yes.
    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.

    Example:
        >>> probs = torch.eye(2).repeat(2, 1)
        >>> sequence_loss(probs, probs.argmax(-1, keepdim=True), 2), sequence_loss(probs, torch.zeros(4, 1).long(), 4)
        (tensor(1.), tensor(1.))
    """
    if not torch.compiler.is_compiling():
        op = "sequence_loss"
        _checks.check_tensor(op, "router_probs", router_probs, 2)
        _checks.check_float(op, "router_probs", router_probs)
        check_ids(op, topk_ids, router_probs.shape[0])
        _checks.check_int(
            op, "sequence_length", sequence_length, 1, "Pass the tokens per sequence."
        )
    num_tokens, num_experts = router_probs.shape
    num_sequences = (num_tokens + sequence_length - 1) // sequence_length
    missing = num_sequences * sequence_length - num_tokens
    sums = [
        F.pad(t, (0, 0, 0, missing)).view(num_sequences, sequence_length, num_experts).sum(1)
        for t in (
            chosen_experts(drop_masked(topk_ids, mask), num_experts).to(router_probs.dtype),
            hide_masked(router_probs, mask),
        )
    ]  # [sequences, E] each
    if mask is None:
        first = torch.arange(num_sequences, device=router_probs.device) * sequence_length
        tokens = (num_tokens - first).clamp(max=sequence_length)  # [sequences]
        counted: Any = num_sequences
    else:
        tokens = F.pad((mask == 0).to(torch.int64), (0, missing))
        tokens = tokens.view(num_sequences, sequence_length).sum(1)
        counted = (tokens > 0).sum().to(router_probs.dtype)
        tokens = tokens.clamp_min(1)
    products = (sums[0] * sums[1]).sum(1) / tokens.to(router_probs.dtype).square()
    return num_experts / topk_ids.shape[1] * products.sum() / (counted + TINY)


def chosen_experts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Mark the chosen experts of each token: ids ``[T, K]`` in ``[-1, E)`` to ``[T, E]`` bool."""
    # A column of its own takes the dropped pairs.
    ids = torch.where(topk_ids < 0, num_experts, topk_ids).to(torch.int64)
    marks = torch.zeros(
        topk_ids.shape[0], num_experts + 1, dtype=torch.bool, device=topk_ids.device
    )
    return marks.scatter(1, ids, True)[:, :num_experts]
