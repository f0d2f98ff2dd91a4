"""Losses of Shazeer et al.'s load and importance, and of groups of experts. T tokens, E experts, K per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked, hide_masked, num_unmasked
from moeops.losses._common import TINY, check_ids
from moeops.ops.routing import topk_route
from moeops.ops.sorting import count_tokens


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
        check_ids(op, topk_ids, clean_logits.shape[0])
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
        check_ids(op, topk_ids, topk_weights.shape[0])
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
        check_ids(op, topk_ids, router_probs.shape[0])
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
