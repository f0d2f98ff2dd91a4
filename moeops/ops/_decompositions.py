"""Every op that a forward calls, written in ATen ops: slow, without a loop over values, right wherever ATen is.

They serve what a compiled kernel cannot: forward-mode and higher derivatives, ``torch.func``'s transforms, and formats
that know ATen only, such as ONNX. Arguments are those of the bare op. T tokens, K experts per token, R rows, E experts,
D model width, H hidden width, C capacity. Experts are unrolled: an op on rows multiplies all of them with every expert.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks
from moeops.ops.activations import GATED
from moeops.reference import ops as reference
from moeops.types import Glu, TokenPlan


def exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is at work; nobody can be in it who has not imported it."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _order(values: Tensor, *, descending: bool = False) -> Tensor:
    """Indices that sort the last dimension, equal values in their order.

    ONNX has one sort, ``TopK``, which keeps that order by its definition; torch's exporter knows it by the name of the
    sort that promises nothing.
    """
    if exporting_to_onnx():
        return torch.sort(values, dim=-1, descending=descending).indices
    return torch.sort(values, dim=-1, descending=descending, stable=True).indices


def _choose(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    num_groups: int,
    top_groups: int,
    group_score: str = "top2",
) -> Tensor:
    """Ids ``[T, K]`` of the best experts of the best groups."""
    z = logits.detach().to(_checks.accumulate_dtype(logits.dtype))
    choice = z  # as good as the scores, without the ties that rounding makes
    if bias is not None or num_groups > 1:
        choice = torch.softmax(z, dim=-1) if score == "softmax" else torch.sigmoid(z)
    if bias is not None:
        choice = choice + bias.to(choice.dtype)
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, choice.shape[1] // num_groups))
        members = grouped
        if group_score == "top2":
            members = torch.topk(grouped, min(2, grouped.shape[2])).values
        groups = _order(members.sum(-1), descending=True)[:, :top_groups]
        out = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, groups, False)
        choice = grouped.masked_fill(out[:, :, None], float("-inf")).flatten(1)
    return _order(choice, descending=True)[:, :top_k]


def _topk_route(
    logits,
    top_k,
    bias=None,
    *,
    score="softmax",
    renormalize=True,
    scale=1.0,
    num_groups=1,
    top_groups=1,
):
    ids = _choose(logits, bias, top_k, score, num_groups, top_groups)
    options = {"score": score, "renormalize": renormalize, "scale": scale}
    return reference.chosen_weights(logits, ids, **options), ids


def _chosen_weights(logits, topk_ids, **options):
    return reference.chosen_weights(logits, topk_ids, **options)


def _count_tokens(topk_ids, num_experts):
    return reference.count_tokens(topk_ids, num_experts)


def _score_sums(logits, *, score="softmax"):
    return reference.score_sums(logits, score=score)


def _balance(sums: Tensor, counts: Tensor, num_tokens: Any) -> Tensor:
    """``E * sum_e f_e * P_e``, 0 without a token."""
    pairs = (num_tokens * counts.sum()).clamp_min(1)
    return counts.shape[0] * (counts * sums).sum() / pairs


def _topk_route_balance(
    logits,
    top_k,
    bias=None,
    uniform=None,
    temperature=None,
    *,
    score="softmax",
    renormalize=True,
    scale=1.0,
    num_groups=1,
    top_groups=1,
    group_score="top2",
    top_p=1.0,
    min_score=0.0,
    num_counted=None,
):
    num_experts = logits.shape[1]
    if temperature is not None:
        logits = logits.to(_checks.accumulate_dtype(logits.dtype)) / temperature
    ids = _choose(logits, bias, top_k, score, num_groups, top_groups, group_score)
    if uniform is not None:
        ids = _sample_last(logits.detach(), ids, uniform)
    if top_p < 1 or min_score > 0:
        own = reference.chosen_weights(logits.detach(), ids, score=score, renormalize=False)
        ends = own < min_score
        if top_p < 1:
            ends = ends | (own.cumsum(1) - own >= top_p)
        first = torch.arange(top_k, device=ids.device) == 0  # is never left out
        ids = torch.where((ends & ~first).cumsum(1) > 0, -1, ids)
    counts = reference.count_tokens(
        ids[:, : top_k if num_counted is None else num_counted], num_experts
    )
    sums = reference.score_sums(logits, score=score)
    weights = reference.chosen_weights(
        logits, ids, score=score, renormalize=renormalize, scale=scale
    )
    return weights, sums, _balance(sums, counts, logits.shape[0]), ids, counts


def _sample_last(logits: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Draw the last choice from what the softmax leaves to the others, by the inverse of its distribution."""
    num_experts = logits.shape[1]
    left = torch.softmax(logits.to(torch.float64), dim=-1).scatter(1, ids[:, :-1], 0.0)
    mass = left.cumsum(1)
    above = mass > uniform.to(torch.float64)[:, None] * mass[:, -1:]  # [T, E]
    experts = torch.arange(num_experts, device=ids.device)
    drawn = torch.where(above, experts, num_experts).amin(1)
    last = torch.where(left > 0, experts, -1).amax(1)
    return torch.cat((ids[:, :-1], torch.where(drawn < num_experts, drawn, last)[:, None]), 1)


def _prototype_route(logits, num_prototypes):
    num_experts = logits.shape[1]
    size = num_experts // num_prototypes
    groups = [logits[:, first : first + size] for first in range(0, num_experts, size)]
    routes = [_topk_route(group, 1, renormalize=False) for group in groups]
    weights = torch.cat([route[0] for route in routes], 1)
    ids = torch.cat([route[1] + k * size for k, route in enumerate(routes)], 1)
    sums = torch.cat([reference.score_sums(group) for group in groups])
    counts = reference.count_tokens(ids, num_experts)
    return weights, sums, _balance(sums, counts, logits.shape[0]), ids, counts


def _relu_route(logits):
    weights = torch.relu(logits.to(_checks.accumulate_dtype(logits.dtype)))
    ids = torch.where(weights > 0, torch.arange(logits.shape[1], device=logits.device), -1)
    sums, counts = weights.sum(0), reference.count_tokens(ids, logits.shape[1])
    return weights, sums, _balance(sums, counts, logits.shape[0]), ids, counts


def _noisy_topk_route(clean, spread, noise, top_k, *, min_noise=0.01):
    num_experts = clean.shape[1]
    acc = _checks.accumulate_dtype(clean.dtype)
    clean, spread, noise = clean.to(acc), spread.to(acc), noise.to(acc)
    sigma = F.softplus(spread) + min_noise
    noisy = clean + noise * sigma
    order = _order(noisy.detach(), descending=True)
    ids = order[:, :top_k]
    weights = torch.softmax(noisy.gather(1, ids), dim=-1)
    importance = torch.zeros_like(noisy).scatter(1, ids, weights).sum(0)
    if top_k < num_experts:
        runner_up = order[:, top_k]
        # An expert stays while it beats the best one outside, or gets in when it beats the last one inside.
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, ids, True)
        outside, inside = noisy.gather(1, order[:, top_k, None]), noisy.gather(1, ids[:, -1:])
        mark = torch.where(chosen, outside, inside)
        load = (0.5 * torch.erfc((mark - clean) / sigma * 0.5**0.5)).sum(0)
    else:
        runner_up = torch.full_like(order[:, 0], -1)
        load = torch.ones_like(noisy).sum(0)

    def variation(values: Tensor) -> Tensor:
        mean = values.mean()
        return (values - mean).square().mean() / (mean.square() + 1e-30)

    return weights, importance, load, variation(importance) + variation(load), ids, runner_up


def _alignment_sum(logits, topk_ids, experts_per_group):
    probs = torch.softmax(logits.to(_checks.accumulate_dtype(logits.dtype)), dim=-1)
    first, last = topk_ids[:, :1], topk_ids[:, -1:]
    groups = torch.arange(logits.shape[1], device=logits.device) // experts_per_group
    counts = (groups != first // experts_per_group) & (first >= 0) & (last >= 0)  # [T, E]
    excess = torch.relu(probs - probs.gather(1, last.clamp_min(0)))
    return torch.where(counts, excess, 0).sum()


def _sort_tokens(topk_ids, num_experts, num_rows=None, *, drop_out_of_range=False):
    flat = topk_ids.reshape(-1).to(torch.int64)
    dropped = flat < 0
    if drop_out_of_range:
        dropped = dropped | (flat >= num_experts)
    flat = torch.where(dropped, num_experts, flat)
    num_pairs = flat.shape[0]
    row_to_pair = _order(flat)
    pair_to_row = _order(row_to_pair)  # the inverse
    counts = reference.count_tokens(torch.where(dropped, -1, flat), num_experts)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    if num_rows is not None:
        row = torch.arange(num_rows, device=flat.device)
        owned = offsets[-1] if num_rows < num_pairs else num_pairs
        row_to_pair = torch.where(row < owned, F.pad(row_to_pair, (0, num_rows))[:num_rows], 0)
        pair_to_row = torch.where(pair_to_row < owned, pair_to_row, num_rows)
    return (
        row_to_pair.to(torch.int32),
        pair_to_row.to(torch.int32).reshape(topk_ids.shape),
        offsets.to(torch.int32),
    )


def _limit_capacity(topk_ids, num_experts, capacity, priority=None, *, by_choice=False):
    flat = topk_ids.reshape(-1).to(torch.int64)
    pairs = torch.arange(flat.shape[0], device=flat.device)
    order = pairs
    if by_choice:
        order = pairs.reshape(topk_ids.shape).t().reshape(-1)
    if priority is not None:
        order = _order(priority.detach().reshape(-1), descending=True)
    experts = torch.where(flat < 0, num_experts, flat)[order]
    order = order[_order(experts)]  # by expert, then by place in the queue
    counts = reference.count_tokens(flat, num_experts)
    starts = F.pad(counts.cumsum(0), (1, 0))  # [E + 1]; dropped pairs come after all
    place = torch.zeros_like(flat).scatter(0, order, pairs) - starts[flat.clamp_min(0)]
    return torch.where(place < capacity, topk_ids.reshape(-1), -1).reshape(topk_ids.shape)


def _owners(num_rows: Any, expert_offsets: Tensor) -> Tensor:
    """The expert of each row ``[R]``, ``E`` for rows past the last offset."""
    row = torch.arange(num_rows, device=expert_offsets.device)
    return (row[:, None] >= expert_offsets[1:]).sum(1)


def _gather_rows(rows: Tensor, index: Tensor, live: Tensor) -> Tensor:
    """Rows by index, zero where not ``live``."""
    with_zero = F.pad(rows, (0, 0, 0, 1))
    return with_zero[torch.where(live, index, rows.shape[0]).to(torch.int64)]


def _permute_tokens(x, row_to_pair, pair_to_row, expert_offsets):
    live = torch.arange(row_to_pair.shape[0], device=x.device) < expert_offsets[-1]
    return _gather_rows(x, row_to_pair // max(1, pair_to_row.shape[1]), live)


def _unpermute_tokens(rows, row_to_pair, pair_to_row, expert_offsets, topk_weights=None):
    plan = TokenPlan(row_to_pair, pair_to_row, expert_offsets)
    return reference.unpermute_tokens(rows, plan, topk_weights)


def _pad_rows(rows, expert_offsets, capacity):
    index = expert_offsets[:-1, None] + torch.arange(capacity, device=rows.device)  # [E, C]
    return _gather_rows(rows, index, index < expert_offsets[1:, None])


def _unpad_rows(padded, expert_offsets, num_rows):
    num_experts, capacity, width = padded.shape
    owner = _owners(num_rows, expert_offsets)
    place = torch.arange(num_rows, device=padded.device) - expert_offsets[owner]
    live = (owner < num_experts) & (place < capacity)
    flat = padded.reshape(num_experts * capacity, width)
    return _gather_rows(flat, owner * capacity + place, live)


def _grouped_linear(rows, weight, expert_offsets, bias=None):
    acc = _checks.accumulate_dtype(rows.dtype)
    owner = _owners(rows.shape[0], expert_offsets)[:, None]
    # What is in rows without an expert is nobody's, NaN included, which would pass through a product with zeros.
    wide = torch.where(owner < weight.shape[0], rows.to(acc), 0)
    out: Tensor | float = 0.0
    for expert in range(weight.shape[0]):
        own = F.linear(wide, weight[expert].to(acc), None if bias is None else bias[expert].to(acc))
        out = torch.where(owner == expert, own, out)
    assert isinstance(out, Tensor)  # there is an expert
    return out.to(rows.dtype)


def _grouped_linear_weight_grad(grad, rows, expert_offsets, *, transposed=False):
    acc = _checks.accumulate_dtype(rows.dtype)
    owner = _owners(rows.shape[0], expert_offsets)[:, None]
    sums = [
        torch.where(owner == expert, grad.to(acc), 0).t()
        @ torch.where(owner == expert, rows.to(acc), 0)
        for expert in range(expert_offsets.shape[0] - 1)
    ]
    return torch.stack(sums).to(rows.dtype)


def _grouped_sum(rows, expert_offsets):
    acc = _checks.accumulate_dtype(rows.dtype)
    owner = _owners(rows.shape[0], expert_offsets)[:, None]
    sums = [
        torch.where(owner == expert, rows.to(acc), 0).sum(0)
        for expert in range(expert_offsets.shape[0] - 1)
    ]
    return torch.stack(sums).to(rows.dtype)


def _moe_mlp(
    x,
    row_to_pair,
    pair_to_row,
    expert_offsets,
    topk_weights,
    w_up,
    w_down,
    b_up=None,
    b_down=None,
    *,
    activation="swiglu",
    alpha=1.0,
    limit=None,
    offset=0.0,
    interleaved=False,
    keep_pre=True,
):
    if activation in GATED:
        activation = Glu(GATED[activation].gate, alpha, limit, offset, interleaved)
    plan = (row_to_pair, pair_to_row, expert_offsets)
    acc = _checks.accumulate_dtype(x.dtype)
    rows = _permute_tokens(x.to(acc), *plan)
    pre = _grouped_linear(
        rows, w_up.to(acc), expert_offsets, None if b_up is None else b_up.to(acc)
    )
    out = _grouped_linear(
        reference.activate(pre, activation),
        w_down.to(acc),
        expert_offsets,
        None if b_down is None else b_down.to(acc),
    )
    y = _unpermute_tokens(out, *plan, topk_weights).to(x.dtype)
    return y, (pre if keep_pre else pre[:0]).detach().to(x.dtype)


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "alignment_sum": _alignment_sum,
    "chosen_weights": _chosen_weights,
    "count_tokens": _count_tokens,
    "grouped_linear": _grouped_linear,
    "grouped_linear_weight_grad": _grouped_linear_weight_grad,
    "grouped_sum": _grouped_sum,
    "limit_capacity": _limit_capacity,
    "moe_mlp": _moe_mlp,
    "noisy_topk_route": _noisy_topk_route,
    "pad_rows": _pad_rows,
    "permute_tokens": _permute_tokens,
    "prototype_route": _prototype_route,
    "relu_route": _relu_route,
    "score_sums": _score_sums,
    "sort_tokens": _sort_tokens,
    "topk_route": _topk_route,
    "topk_route_balance": _topk_route_balance,
    "unpad_rows": _unpad_rows,
    "unpermute_tokens": _unpermute_tokens,
}
