"""The truth for every op, in plain PyTorch: slow, readable, right in float64, differentiable by autograd.

Names and arguments of the public functions, but for ``topk_route``, whose ``group_score`` serves ``topk_route_balance``
too. T tokens, K experts per token, N = T * K pairs, R rows, E experts, D model width, H hidden width of one expert, C
capacity in rows. Loops and host copies are welcome here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops.types import BalancedRoute, Glu, NoisyRoute, Route, TokenPlan


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
) -> Route:
    """Scores, biased choice of the best groups and experts, unbiased weights of the chosen."""
    T, E = logits.shape
    z = logits.to(_accumulate_dtype(logits.dtype))
    scores = torch.softmax(z, dim=-1) if score == "softmax" else torch.sigmoid(z)  # [T, E]
    choice = scores.detach()
    if bias is not None:
        choice = choice + bias.to(choice.dtype)
    elif num_groups == 1:
        choice = z.detach()  # monotone in the scores, without the ties that rounding makes
    if num_groups > 1:
        grouped = choice.view(T, num_groups, E // num_groups)
        best_members = (
            grouped if group_score == "sum" else grouped.topk(min(2, E // num_groups)).values
        )
        worth = best_members.sum(-1)  # [T, G]
        best = torch.sort(worth, dim=-1, descending=True, stable=True).indices[:, :top_groups]
        keep = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
        choice = grouped.masked_fill(~keep[:, :, None], float("-inf")).view(T, E)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return Route(weights * scale, ids)


def chosen_weights(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Scores of the chosen experts, 0 for dropped pairs."""
    z = logits.to(_accumulate_dtype(logits.dtype))
    scores = torch.softmax(z, dim=-1) if score == "softmax" else torch.sigmoid(z)  # [T, E]
    weights = scores.gather(1, topk_ids.to(torch.int64).clamp_min(0))
    weights = weights.masked_fill(topk_ids < 0, 0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights * scale


def topk_route_balance(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    top_p: float = 1.0,
    min_score: float = 0.0,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    num_counted: int | None = None,
) -> BalancedRoute:
    """The choice first, then what it is worth, then the sums: each by the op that does nothing else."""
    T, E = logits.shape
    if temperature is not None:
        logits = logits.to(_accumulate_dtype(logits.dtype)) / temperature
    scores, ids = topk_route(
        logits,
        top_k,
        score=score,
        renormalize=False,
        bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )
    if uniform is not None:
        probs = torch.softmax(logits.detach().to(torch.float64), dim=-1)
        for t in range(T):
            left = probs[t].clone()
            left[ids[t, : top_k - 1]] = 0
            mass = left.cumsum(0)
            above = (mass > float(uniform[t]) * mass[-1]).nonzero()
            ids[t, top_k - 1] = above[0, 0] if len(above) else left.nonzero()[-1, 0]
        scores = chosen_weights(logits, ids, score=score, renormalize=False)
    for t in range(T):
        reached = 0.0
        for k in range(top_k):
            own = float(scores[t, k].detach())
            if k > 0 and ((top_p < 1 and reached >= top_p) or own < min_score):
                ids[t, k:] = -1
                break
            reached += own
    counted = ids[:, : top_k if num_counted is None else num_counted]
    counts = count_tokens(counted, E)
    sums = score_sums(logits, score=score)
    loss = _balance(sums, counts, T)
    weights = chosen_weights(logits, ids, score=score, renormalize=renormalize, scale=scale)
    return BalancedRoute(weights, sums, loss, ids, counts)


def _balance(sums: Tensor, counts: Tensor, num_tokens: int) -> Tensor:
    return counts.numel() * (counts * sums).sum() / max(1, num_tokens * int(counts.sum()))


def prototype_route(logits: Tensor, num_prototypes: int) -> BalancedRoute:
    """Each group is a router of its own."""
    T, E = logits.shape
    size = E // num_prototypes
    groups = [
        topk_route(logits[:, first : first + size], 1, renormalize=False)
        for first in range(0, E, size)
    ]
    weights = torch.cat([group[0] for group in groups], 1)
    ids = torch.cat([group[1] + k * size for k, group in enumerate(groups)], 1)
    sums = torch.cat([score_sums(logits[:, first : first + size]) for first in range(0, E, size)])
    counts = count_tokens(ids, E)
    return BalancedRoute(weights, sums, _balance(sums, counts, T), ids, counts)


def relu_route(logits: Tensor) -> BalancedRoute:
    """Slot e is expert e where its logit is positive."""
    T, E = logits.shape
    weights = torch.relu(logits.to(_accumulate_dtype(logits.dtype)))
    ids = torch.where(weights > 0, torch.arange(E, device=logits.device), -1)
    sums, counts = weights.sum(0), count_tokens(ids, E)
    return BalancedRoute(weights, sums, _balance(sums, counts, T), ids, counts)


def noisy_topk_route(
    clean: Tensor, spread: Tensor, noise: Tensor, top_k: int, *, min_noise: float = 0.01
) -> NoisyRoute:
    """The paper's equations, token by token and expert by expert."""
    T, E = clean.shape
    acc = _accumulate_dtype(clean.dtype)
    clean, spread, noise = clean.to(acc), spread.to(acc), noise.to(acc)
    sigma = torch.log1p(torch.exp(spread)) + min_noise
    noisy = clean + noise * sigma
    ids = torch.sort(noisy.detach(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(noisy.gather(1, ids), dim=-1)
    importance = torch.zeros(T, E, dtype=acc, device=clean.device).scatter(1, ids, weights).sum(0)
    load = list((noisy.sum(0) * 0).split(1))
    for t in range(T):
        for e in range(E):
            stays = torch.ones((), dtype=acc, device=clean.device)
            if top_k < E:
                others = torch.cat((noisy[t, :e], noisy[t, e + 1 :]))
                mark = torch.sort(others, descending=True).values[top_k - 1]
                distance = (clean[t, e] - mark) / sigma[t, e]
                stays = 0.5 * torch.erfc(-distance / 2**0.5)
            load[e] = load[e] + stays
    loads = torch.cat(load)

    def variation(values: Tensor) -> Tensor:
        mean = values.mean()
        return (values - mean).square().mean() / (mean.square() + 1e-30)

    return NoisyRoute(weights, importance, loads, variation(importance) + variation(loads), ids)


def alignment_sum(logits: Tensor, topk_ids: Tensor, experts_per_group: int) -> Tensor:
    """Token by token: what probabilities outside the group exceed the last choice's by."""
    probs = torch.softmax(logits.to(_accumulate_dtype(logits.dtype)), dim=-1)
    total = probs.sum() * 0
    for p, ids in zip(probs, topk_ids.tolist(), strict=True):
        if ids[0] < 0 or ids[-1] < 0:
            continue
        for e, own in enumerate(p):
            if e // experts_per_group != ids[0] // experts_per_group:
                total = total + torch.relu(own - p[ids[-1]])
    return total


def score_sums(logits: Tensor, *, score: str = "softmax") -> Tensor:
    """Each token's scores divided by their sum, summed over the tokens."""
    z = logits.to(_accumulate_dtype(logits.dtype))
    # sigmoid(z) / sum of sigmoid is the softmax of log sigmoid, which cannot divide by zero.
    return torch.softmax(z if score == "softmax" else F.logsigmoid(z), dim=-1).sum(0)


def sort_tokens(
    topk_ids: Tensor,
    num_experts: int,
    num_rows: int | None = None,
    *,
    drop_out_of_range: bool = False,
) -> TokenPlan:
    """Stable sort of pairs by expert, dropped pairs last or, with fewer rows than pairs, without a row."""
    flat = topk_ids.reshape(-1).to(torch.int64)
    dropped = flat < 0
    if drop_out_of_range:
        dropped = dropped | (flat >= num_experts)
    flat = torch.where(dropped, num_experts, flat)
    row_to_pair = torch.sort(flat, stable=True).indices
    pair_to_row = torch.empty_like(row_to_pair)
    pair_to_row[row_to_pair] = torch.arange(flat.numel(), device=flat.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    offsets = F.pad(counts[:num_experts].cumsum(0), (1, 0))
    if num_rows is not None:
        live = int(offsets[-1])
        if live > num_rows:
            raise RuntimeError(
                f"sort_tokens: num_rows must hold all pairs, got {num_rows} for {live}. Pass an upper bound."
            )
        owned = live if num_rows < flat.numel() else flat.numel()
        row_to_pair = F.pad(row_to_pair[:owned], (0, num_rows - owned))
        pair_to_row = torch.where(pair_to_row < owned, pair_to_row, num_rows)
    return TokenPlan(
        row_to_pair.to(torch.int32),
        pair_to_row.to(torch.int32).view(topk_ids.shape),
        offsets.to(torch.int32),
    )


def count_tokens(topk_ids: Tensor, num_experts: int) -> Tensor:
    """How many pairs each expert has, by comparison."""
    experts = torch.arange(num_experts, device=topk_ids.device)
    return (topk_ids.reshape(-1, 1) == experts).sum(0, dtype=torch.int32)


def limit_capacity(
    topk_ids: Tensor,
    num_experts: int,
    capacity: int,
    *,
    priority: Tensor | None = None,
    by_choice: bool = False,
) -> Tensor:
    """Keep the first, or the highest-priority, ``capacity`` pairs of each expert; -1 for the rest."""
    flat = topk_ids.reshape(-1)
    out = flat.clone()
    order = torch.arange(flat.numel(), device=flat.device)
    if by_choice:
        order = order.view(topk_ids.shape).t().reshape(-1)
    if priority is not None:
        order = torch.sort(priority.reshape(-1), descending=True, stable=True).indices
    for e in range(num_experts):
        pairs = order[flat[order] == e]
        out[pairs[capacity:]] = -1
    return out.view(topk_ids.shape)


def permute_tokens(x: Tensor, plan: TokenPlan) -> Tensor:
    """``rows[r] = x[row_to_pair[r] // K]``, zero for rows that hold no pair that counts."""
    row_to_pair, pair_to_row, expert_offsets = plan
    K = max(1, pair_to_row.shape[1])
    live = int(expert_offsets[-1])
    rows = x[row_to_pair[:live].long() // K]
    return F.pad(rows, (0, 0, 0, row_to_pair.numel() - live))


def unpermute_tokens(rows: Tensor, plan: TokenPlan, topk_weights: Tensor | None = None) -> Tensor:
    """``y[t] = sum_k topk_weights[t, k] * rows[pair_to_row[t, k]]`` over the pairs that were not dropped."""
    _, pair_to_row, expert_offsets = plan
    acc = _accumulate_dtype(rows.dtype)
    live = pair_to_row < expert_offsets[-1]  # [T, K]
    last = rows.shape[0]  # a zero row for pairs without one
    picked = F.pad(rows, (0, 0, 0, 1))[torch.where(live, pair_to_row, last).long()].to(
        acc
    )  # [T, K, D]
    if topk_weights is not None:
        picked = picked * torch.where(live, topk_weights.to(acc), 0)[:, :, None]
    return picked.sum(1).to(rows.dtype)


def pad_rows(rows: Tensor, expert_offsets: Tensor, capacity: int) -> Tensor:
    """``padded[e, c] = rows[expert_offsets[e] + c]``, zero past the expert's last row."""
    offsets = expert_offsets.tolist()
    parts = []
    for begin, end in pairwise(offsets):
        part = rows[begin : min(end, begin + capacity)]
        parts.append(F.pad(part, (0, 0, 0, capacity - part.shape[0])))
    return torch.stack(parts)


def unpad_rows(padded: Tensor, expert_offsets: Tensor, num_rows: int) -> Tensor:
    """``rows[expert_offsets[e] + c] = padded[e, c]``; rows past the capacity or the last offset are zero."""
    capacity = padded.shape[1]
    offsets = expert_offsets.tolist()
    parts = []
    for e, (begin, end) in enumerate(pairwise(offsets)):
        part = padded[e, : min(end - begin, capacity)]
        parts.append(F.pad(part, (0, 0, 0, end - begin - part.shape[0])))
    parts.append(padded.new_zeros(num_rows - offsets[-1], padded.shape[2]))
    return torch.cat(parts)


def grouped_linear(
    rows: Tensor, weight: Tensor, expert_offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """``out[r] = weight[e] @ rows[r] + bias[e]`` for the expert that owns row ``r``; zero past the last offset."""
    acc = _accumulate_dtype(rows.dtype)
    offsets = expert_offsets.tolist()
    parts = []
    for e, (begin, end) in enumerate(pairwise(offsets)):
        part = rows[begin:end].to(acc) @ weight[e].to(acc).t()
        parts.append(part if bias is None else part + bias[e].to(acc))
    parts.append(torch.zeros(rows.shape[0] - offsets[-1], weight.shape[1]).to(rows.device, acc))
    return torch.cat(parts).to(rows.dtype)


def grouped_linear_weight_grad(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """``out[e] = grad[rows of e].T @ rows[rows of e]``."""
    acc = _accumulate_dtype(rows.dtype)
    offsets = expert_offsets.tolist()
    parts = [
        grad[begin:end].to(acc).t() @ rows[begin:end].to(acc) for begin, end in pairwise(offsets)
    ]
    return torch.stack(parts).to(rows.dtype)


def grouped_sum(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """``out[e] = sum of the rows of expert e``."""
    acc = _accumulate_dtype(rows.dtype)
    offsets = expert_offsets.tolist()
    parts = [rows[begin:end].to(acc).sum(0) for begin, end in pairwise(offsets)]
    return torch.stack(parts).to(rows.dtype)


def activate(pre_activation: Tensor, activation: str | Glu) -> Tensor:
    """``[R, 2H] -> [R, H]`` for gated units (rows hold gate, then up, or both in turns), else elementwise."""
    if isinstance(activation, Glu):
        return _gated_unit(pre_activation, activation)
    if activation == "swiglu":
        gate, up = pre_activation.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "geglu_tanh":
        gate, up = pre_activation.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
    if activation == "gelu":
        return F.gelu(pre_activation)
    if activation == "relu":
        return F.relu(pre_activation)
    if activation == "silu":
        return F.silu(pre_activation)
    if activation == "relu_squared":
        return F.relu(pre_activation).square()
    raise ValueError(
        f"moe_mlp: activation must be one of those of moeops.moe_mlp, got {activation!r}. Pick one."
    )


def _gated_unit(pre_activation: Tensor, unit: Glu) -> Tensor:
    if unit.interleaved:
        gate, up = pre_activation.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        gate, up = pre_activation.chunk(2, dim=-1)
    if unit.limit is not None:
        gate = torch.clamp(gate, max=unit.limit)
        up = torch.clamp(up, min=-unit.limit, max=unit.limit)
    up = up + unit.offset
    if unit.gate == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    return gate * torch.sigmoid(unit.alpha * gate) * up


def moe_mlp(
    x: Tensor,
    plan: TokenPlan,
    topk_weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Glu = "swiglu",
) -> Tensor:
    """The expert block: permute, up projection, activation, down projection, weighted sum."""
    rows = permute_tokens(x, plan)
    hidden = activate(grouped_linear(rows, w_up, plan.expert_offsets, bias=b_up), activation)
    out = grouped_linear(hidden, w_down, plan.expert_offsets, bias=b_down)
    return unpermute_tokens(out, plan, topk_weights)
