"""Auxiliary losses of routers, as functions. T tokens, E experts, K experts per token.

All are 0 for no tokens, and none copies to the host. ``moeops.auxiliary_loss`` collects the losses that gates set.

``mask`` names tokens that are not there, such as padding: ``[T]`` integers or bool, and a token with a value other than
0 counts for nothing; its numbers must be finite. What is left is the loss of the other tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked, hide_masked, num_unmasked
from moeops.comm.collectives import all_reduce_sum
from moeops.ops.routing import topk_route
from moeops.ops.scores import score_sums
from moeops.ops.sorting import count_tokens
from moeops.types import BalancedRoute

# Makes 0 / 0 tokens 0 and changes no other quotient. A maximum would do the same in eager mode, but a compiler that
# takes a symbolic token count to be at least 2 simplifies it away, and then meets 0.
TINY = 1e-30


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
        _check_logits("switch_loss", logits)
        _check_ids("switch_loss", topk_ids, logits.shape[0])
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
        _check_logits("gshard_loss", logits)
        _check_ids("gshard_loss", topk_ids, logits.shape[0])
    return score_balance_loss(logits, topk_ids[:, :1], group=group, mask=mask)


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the router z-loss ``mean_t logsumexp(logits_t) ** 2``, which keeps logits small.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar.

    Raises:
        ValueError: ``logits`` is not ``[T, E]``.  TypeError: ``logits`` is not float.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.
    Source: ST-MoE, arXiv:2202.08906, equation 5.

    Example:
        >>> float(z_loss(torch.zeros(3, 1)))
        0.0
    """
    if not torch.compiler.is_compiling():
        _check_logits("z_loss", logits)
    z = logits.to(_checks.accumulate_dtype(logits.dtype))
    # Not torch.logsumexp: it asks whether T * E is 0, which a compiler with an unbacked token count cannot answer.
    largest = z.detach().amax(-1, keepdim=True)  # [T, 1]
    logsumexp = (z - largest).exp().sum(-1).log() + largest[:, 0]  # [T]
    return hide_masked(logsumexp.square(), mask).sum() / (num_unmasked(z, mask, z.dtype) + TINY)


def router_entropy(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the mean entropy of ``softmax(logits)`` in nats: 0 for a certain router, ``log(E)`` for a uniform one.

    Add it to a loss for sharper choices, subtract it for softer ones, or log it.

    Args:
        logits: ``[T, E]``, any float type, finite, computed in float32 (float64 for float64).
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar.

    Raises:
        ValueError: ``logits`` is not ``[T, E]``.  TypeError: ``logits`` is not float.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.

    Example:
        >>> router_entropy(torch.zeros(3, 2))
        tensor(0.6931)
    """
    if not torch.compiler.is_compiling():
        _check_logits("router_entropy", logits)
    log_probs = torch.log_softmax(logits.to(_checks.accumulate_dtype(logits.dtype)), dim=-1)
    terms = hide_masked(log_probs.exp() * log_probs, mask)  # [T, E]
    return -terms.sum() / (num_unmasked(logits, mask, log_probs.dtype) + TINY)


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
        _check_ids(op, topk_ids, router_probs.shape[0])
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


def noisy_load(
    clean_logits: Tensor,
    noisy_logits: Tensor,
    noise: Tensor,
    topk_ids: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate smoothly how many tokens each expert gets from a noisy top-k gate.

    ``load_e = sum_t P(e stays among the best K when its own noise is drawn again)``, which is
    ``Phi((clean_e - h') / noise_e)`` with ``h'`` the K-th largest of the other experts' noisy logits. With ``K = E``
    it is the number of tokens, without a gradient.

    Args:
        clean_logits: ``[T, E]`` float.
        noisy_logits: ``[T, E]``, ``clean_logits`` plus the noise that was drawn.
        noise: ``[T, E]``, standard deviation of the noise, above 0.
        topk_ids: ``[T, K]`` integers, the K best of ``noisy_logits``, best first.
        mask: ``[T]``, tokens to leave out.

    Returns:
        ``[E]`` of the type of ``noisy_logits``; ``cv_squared`` of it is Shazeer's load loss.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: all logits and ``noise``.  Host sync: none.  Deterministic: yes.
    Source: Shazeer et al. 2017, arXiv:1701.06538, equations 8 to 10, appendix A.

    Example:
        >>> clean, ids = torch.zeros(1, 2), torch.tensor([[0]])
        >>> noisy_load(clean, clean, torch.ones(1, 2), ids)
        tensor([0.5000, 0.5000])
    """
    if not torch.compiler.is_compiling():
        op = "noisy_load"
        for name, value in (
            ("clean_logits", clean_logits),
            ("noisy_logits", noisy_logits),
            ("noise", noise),
        ):
            _checks.check_tensor(op, name, value, 2)
            _checks.check_float(op, name, value)
            for dim in (0, 1):
                _checks.check_size(op, name, value, dim, clean_logits.shape[dim], "as clean_logits")
        _check_ids(op, topk_ids, clean_logits.shape[0])
    num_experts = noisy_logits.shape[1]
    top_k = topk_ids.shape[1]
    if top_k == num_experts:
        return count_tokens(drop_masked(topk_ids, mask), num_experts).to(noisy_logits.dtype)
    # The K-th best among the others: for a chosen expert the first one left out, else the last one let in. Where
    # experts tie with the last one let in, both are equal.
    _, best = topk_route(noisy_logits.detach(), top_k + 1)
    last = noisy_logits.gather(1, best[:, top_k - 1 :])  # [T, 2]
    let_in, left_out = last.split(1, dim=1)  # [T, 1] each
    mark = torch.where(noisy_logits >= let_in, left_out, let_in)  # [T, E]
    # Phi(x) is erfc(-x / sqrt(2)) / 2.
    distance = torch.addcdiv(noise.new_zeros(()), mark - clean_logits, noise, value=math.sqrt(0.5))
    return 0.5 * hide_masked(torch.erfc(distance), mask).sum(0)


def importance(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Sum the weights that each expert got.

    Args:
        topk_weights: ``[T, K]`` float.
        topk_ids: ``[T, K]`` integers in ``[-1, E)``; -1 counts for no expert.
        num_experts: ``E``.

    Returns:
        ``[E]`` of the type of ``topk_weights``; ``cv_squared`` of it is Shazeer's importance loss.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: ``topk_weights``.  Host sync: none.  Deterministic: yes.
    Source: Shazeer et al. 2017, arXiv:1701.06538, equation 6.

    Example:
        >>> importance(torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]), 3)
        tensor([0.2500, 0.0000, 0.7500])
    """
    if not torch.compiler.is_compiling():
        op = "importance"
        _checks.check_tensor(op, "topk_weights", topk_weights, 2)
        _checks.check_float(op, "topk_weights", topk_weights)
        _check_ids(op, topk_ids, topk_weights.shape[0])
        _checks.check_size(op, "topk_ids", topk_ids, 1, topk_weights.shape[1], "as topk_weights")
        _checks.check_int(op, "num_experts", num_experts, 1, "Pass the number of experts.")
    # A column of its own takes the dropped pairs.
    ids = torch.where(topk_ids < 0, num_experts, topk_ids).to(torch.int64)
    per_token = topk_weights.new_zeros(topk_weights.shape[0], num_experts + 1)
    return per_token.scatter(1, ids, topk_weights)[:, :num_experts].sum(0)


def alignment_loss(
    router_probs: Tensor, topk_ids: Tensor, experts_per_group: int, *, mask: Tensor | None = None
) -> Tensor:
    """Compute the alignment loss of switch-and-mixture: how much better experts outside the chosen group are.

    The mean over the tokens of ``sum over the experts e outside the token's group of max(0, p_e - p_last)``, with
    ``p_last`` the probability of the last choice: 0 if the best ``K`` of all experts stand in one group.

    Args:
        router_probs: ``[T, E]`` float, each row sums to 1.
        topk_ids: ``[T, K]`` integers in ``[0, E)``, best first, all of a row in one group, before any token is dropped.
        experts_per_group: a plain int; expert ``e`` is in group ``e // experts_per_group``.
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar of the type of ``router_probs``; 0 for no tokens.

    Raises:
        ValueError: a shape or a number does not fit.  TypeError: a type does not fit.
    Gradients: ``router_probs``.  Host sync: none.  Deterministic: yes.
    Source: Switch and Mixture, arXiv:2110.07431; HetuMoE, arXiv:2203.14685, takes the sum over the tokens.

    Example:
        >>> alignment_loss(torch.tensor([[0.4, 0.1, 0.3, 0.2]]), torch.tensor([[0, 1]]), 2)
        tensor(0.3000)
    """
    if not torch.compiler.is_compiling():
        op = "alignment_loss"
        _checks.check_tensor(op, "router_probs", router_probs, 2)
        _checks.check_float(op, "router_probs", router_probs)
        _check_ids(op, topk_ids, router_probs.shape[0])
        _checks.check_int(
            op, "experts_per_group", experts_per_group, 1, "Pass the experts per group."
        )
    topk_ids = topk_ids.to(torch.int64)
    if mask is not None:
        topk_ids = topk_ids.clamp_min(0)  # those of masked tokens may be -1
    experts = torch.arange(router_probs.shape[1], device=topk_ids.device)
    outside = experts // experts_per_group != topk_ids[:, :1] // experts_per_group  # [T, E]
    # Inside, 0 exceeds no probability.
    excess = torch.where(outside, router_probs, 0) - router_probs.gather(1, topk_ids[:, -1:])
    num_tokens = num_unmasked(router_probs, mask, router_probs.dtype)
    return hide_masked(torch.relu(excess), mask).sum() / (num_tokens + TINY)


def cv_squared(values: Tensor) -> Tensor:
    """Compute the squared coefficient of variation ``var / mean ** 2``: 0 if all are equal, at most ``E - 1``.

    The variance is that of the whole population (divided by ``E``), as in the paper's own code; FastMoE divides by
    ``E - 1``.

    Args:
        values: ``[E]`` float, not negative.

    Returns:
        A scalar; 0 if all values are 0.

    Raises:
        ValueError: ``values`` is not ``[E]``.  TypeError: ``values`` is not float.
    Gradients: ``values``.  Host sync: none.  Deterministic: yes.
    Source: Shazeer et al. 2017, arXiv:1701.06538, equation 7.

    Example:
        >>> float(cv_squared(torch.tensor([2.0, 0.0])))
        1.0
    """
    if not torch.compiler.is_compiling():
        _checks.check_tensor("cv_squared", "values", values, 1)
        _checks.check_float("cv_squared", "values", values)
    mean = values.mean()
    return (values - mean).square().mean() / (mean.square() + TINY)


def _check_logits(op: str, logits: Tensor) -> None:
    _checks.check_tensor(op, "logits", logits, 2)
    _checks.check_float(op, "logits", logits)


def _check_ids(op: str, topk_ids: Tensor, num_tokens: int) -> None:
    _checks.check_ids(op, "topk_ids", topk_ids)
    _checks.check_size(op, "topk_ids", topk_ids, 0, num_tokens, "one row per token")


def _z(logits: Tensor, topk_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return z_loss(logits, mask=mask)


def _entropy(logits: Tensor, topk_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return router_entropy(logits, mask=mask)


# Losses that BaseGate.add_loss knows by name: functions of logits [T, E], topk_ids [T, K] and mask [T].
GATE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "z": _z,
    "entropy": _entropy,
    "switch": switch_loss,
    "gshard": gshard_loss,
}
