"""The maths that gates share. T tokens, E experts, K experts per token, D model width, C capacity in rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import _checks
from moeops._masks import drop_masked, hide_masked, num_unmasked
from moeops._tracing import exporting
from moeops.comm.collectives import all_gather_counts
from moeops.comm.groups import rank_group
from moeops.losses import balance_of_route, mask_route, score_shares
from moeops.ops.balance import topk_route_balance
from moeops.ops.routing import topk_route
from moeops.ops.sorting import limit_capacity, sort_tokens

MILLION = 1_000_000  # factors count in millionths: integers trace with symbolic sizes, and 1.2 means 6 / 5
POLICIES = ("position", "choice", "priority", "batch", "random")
GROUP_POLICIES = ("position", "choice")

Count = TypeVar("Count", int, Tensor)


class RouterLinear(nn.Linear):
    """The linear layer of a router: ``nn.Linear`` that computes in float32, whatever the types and autocast.

    Parameters, their names and their start are those of ``nn.Linear``, and so is all that torch and others do to one:
    hooks, parametrisations, pruning, offloading, FSDP units and low-rank adapters around it.

    Args:
        in_features: ``D``.
        out_features: ``E``.
        bias: add one.
        device: of the parameters, torch's default if ``None``.
        dtype: of the parameters, torch's default if ``None``.
        keep_float32: leave the parameters in float32 when the module is cast to a half type.

    Example:
        >>> router = RouterLinear(4, 2).bfloat16()
        >>> router.weight.dtype, router(torch.ones(3, 4, dtype=torch.bfloat16)).dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        keep_float32: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.keep_float32 = keep_float32

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input W^T + b``: ``[..., D]`` of any float type to ``[..., E]`` float32 (float64 for float64)."""
        return exact_linear(input, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterLinear:
        def keep(old: Tensor) -> Tensor:
            new = fn(old)
            if new.dtype not in (torch.bfloat16, torch.float16):
                return new
            # The values of before: a trip through a half type would round them.
            return (new if old.is_meta else old).to(new.device, torch.float32)

        return super()._apply(keep if self.keep_float32 else fn, recurse)


def router_logits(x: Tensor, router: nn.Module, *, jitter: float = 0.0) -> Tensor:
    """Call a router, and return its logits in float32.

    A ``RouterLinear`` computes in float32, whatever the types of the model and of autocast. Any other module (a plain
    ``nn.Linear``, a quantised one, an adapter around either) gets the tokens as they are and computes as it does
    elsewhere in the model: a bfloat16 ``nn.Linear``, or one under autocast, has bfloat16 logits, which are cast. An
    adapter around a ``RouterLinear`` adds what it computes to logits in float32.

    Args:
        x: tokens, ``[T, D]``, any float type.
        router: called as ``router(x)``; returns ``[T, E]``.
        jitter: half-width of a factor on every entry of ``x``, drawn from ``U(1 - jitter, 1 + jitter)`` and multiplied
            in float32; only a ``RouterLinear`` sees the product unrounded.

    Returns:
        Logits ``[T, E]``, float32 (float64 for float64 ``x``).

    Raises:
        ValueError: ``x`` is not ``[T, D]``, or the router's output not ``[T, E]``.  TypeError: one is not float.
    Gradients: ``x`` and the router's parameters.  Host sync: none.

    Example:
        >>> router_logits(torch.ones(3, 4, dtype=torch.bfloat16), RouterLinear(4, 2)).dtype
        torch.float32
    """
    op = "router_logits"
    if not torch.compiler.is_compiling():
        _checks.check_tensor(op, "x", x, 2)
        _checks.check_float(op, "x", x)
        width = getattr(router, "in_features", None)
        if isinstance(width, int):
            _checks.check_size(op, "x", x, 1, width, "the router's inputs")
    dtype = _checks.accumulate_dtype(x.dtype)
    if jitter:
        exact = x.to(dtype)
        exact = exact * uniform_like(exact, 1 - jitter, 1 + jitter)
        x = exact if isinstance(router, RouterLinear) else exact.to(x.dtype)
    logits = router(x)
    if not torch.compiler.is_compiling():
        _checks.check_tensor(op, "the router's output", logits, 2)
        _checks.check_float(op, "the router's output", logits)
        _checks.check_size(op, "the router's output", logits, 0, x.shape[0], "the tokens")
    return logits.to(dtype)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in float32 (float64 for float64 ``x``), whatever the types and autocast."""
    dtype = _checks.accumulate_dtype(x.dtype)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    device = x.device.type
    # Entered only where it changes something: an autocast region is one more thing for an exported graph to carry.
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(dtype), weight, bias)
    return F.linear(x.to(dtype), weight, bias)


def expert_capacity(
    capacity_factor: float, num_tokens: Count, top_k: int, num_experts: int
) -> Count:
    """Compute the capacity in rows per expert: ``ceil(capacity_factor * T * K / E)``.

    In integers, on the factor rounded to millionths: it traces with a symbolic token count, and 1.2 means 6 / 5.

    Args:
        capacity_factor: 1.0 leaves room for exactly the average load.
        num_tokens: ``T``: an int, a symbolic int, or an int64 tensor.
        top_k: ``K``.
        num_experts: ``E``.

    Returns:
        ``C``, of the kind of ``num_tokens``.

    Example:
        >>> expert_capacity(1.25, 10, 2, 8)
        4
    """
    divisor = MILLION * num_experts
    rows = num_tokens * (round(capacity_factor * MILLION) * top_k)
    return (rows + divisor - 1) // divisor


def balanced_route(
    logits: Tensor,
    top_k: int,
    *,
    balance: bool = True,
    num_counted: int | None = None,
    group: Any = None,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Route and compute the balance loss, in one pass over the logits.

    Args:
        logits: ``[T, E]`` float.
        top_k: ``K``.
        balance: False for ``topk_route`` alone.
        num_counted: choices that the loss counts, from the first one on; ``None`` for all.
        group: the ranks whose choices count together, see ``moeops.losses.balance_loss``.
        mask: ``[T]``, tokens that are not there: their ids are -1, and the loss is that of the others. They keep their
            weights.
        **options: of ``topk_route``.

    Returns:
        topk_weights ``[T, K]``, topk_ids ``[T, K]`` and the loss ``E * sum_e f_e * P_e``; ``None`` instead of it
        without ``balance`` and in an exported program, which has no losses.

    Gradients: ``logits`` through weights and loss.  Host sync: none.  Deterministic: yes.

    Example:
        >>> weights, ids, loss = balanced_route(torch.eye(4), 1)
        >>> ids.view(-1).tolist(), round(float(loss), 5)
        ([0, 1, 2, 3], 1.0)
    """
    if not balance or exporting():
        topk_weights, topk_ids = topk_route(logits, top_k, **options)
        return topk_weights, drop_masked(topk_ids, mask), None
    route = topk_route_balance(logits, top_k, num_counted=num_counted, **options)
    score = options.get("score", "softmax")
    route = mask_route(route, lambda: score_shares(logits, score), mask, num_counted)
    loss = balance_of_route(route, group=group, mask=mask)
    return route.topk_weights, route.topk_ids, loss


def apply_capacity(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int | Callable[[Any], Any],
    *,
    policy: str = "position",
    group: Any = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Let every expert take ``capacity`` pairs and set the ids of the others to -1.

    ``policy`` says who comes first:

    - ``"position"``: tokens in order, the choices of a token in order.
    - ``"choice"``: first choices in token order, then second choices, as GShard and Tutel count.
    - ``"priority"``: larger weights, whatever choice they are; equal ones by position.
    - ``"batch"``: first choices before second ones, in each of them the tokens with the largest weight first: the
      batch-prioritised routing of V-MoE.
    - ``"random"``: nobody, the order is drawn anew; ``torch.manual_seed`` reproduces it.

    With ``group`` the experts take ``capacity`` pairs of all its ranks together. Earlier ranks come first, after
    what the policy says: the same pairs are kept as on one rank that holds the tokens of all.

    Args:
        topk_ids: chosen experts, ``[T, K]``, int32 or int64, values in ``[-1, E)``, best first.
        topk_weights: ``[T, K]``, any float type; read by ``"priority"`` and ``"batch"``.
        num_experts: ``E``.
        capacity: ``C`` in pairs per expert, an int or a symbolic int; or a function that computes it from the number
            of tokens, those of all ranks with ``group`` (``expert_capacity`` can). The number is an int64 tensor with
            ``group`` or ``mask``.
        policy: one of the above; with ``group`` ``"position"`` or ``"choice"``.
        group: the ranks that share the capacity: a process group or ``moeops.distributed.RankGroup``; all of them
            must call this. ``None`` for this rank alone.
        mask: ``[T]``, tokens that are not there: they take no place, get -1 and do not count in the number of tokens.

    Returns:
        The ids that fit, -1 elsewhere: ``[T, K]``, dtype of ``topk_ids``.

    Raises:
        ValueError: ``policy`` is unknown or needs one rank, or a number does not fit.  TypeError: a dtype is wrong.
    Gradients: none.  Host sync: none.  Deterministic: yes, but for ``"random"``.  With ``group``: one all-gather of
    ``E + 1`` counts (``"choice"``: ``K * E + 1``).
    Source: GShard, arXiv:2006.16668; V-MoE, arXiv:2106.05974, section 4.

    Example:
        >>> ids, weights = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]])
        >>> apply_capacity(ids, weights, 2, 1).tolist()
        [[0, 1], [-1, -1]]
        >>> apply_capacity(ids, weights, 2, 1, policy="choice").tolist()
        [[0, -1], [1, -1]]
    """
    if policy not in POLICIES:
        raise ValueError(
            f"apply_capacity: policy must be one of {POLICIES}, got {policy!r}. Pick one of them."
        )
    if group is not None:
        if policy not in GROUP_POLICIES:
            raise ValueError(
                f"apply_capacity: policy must be one of {GROUP_POLICIES} with a group, got {policy!r}. "
                "Ranks know each other's counts, not their weights."
            )
        positions, tokens = queue_positions(
            topk_ids, num_experts, policy=policy, group=group, mask=mask
        )
        limit = capacity(tokens) if callable(capacity) else capacity
        return torch.where(positions < limit, topk_ids, -1)
    if mask is not None:
        topk_ids = drop_masked(topk_ids, mask)
        if callable(capacity):
            limit = capacity(num_unmasked(topk_ids, mask))
            positions = _positions(topk_ids, topk_weights, num_experts, policy)
            return torch.where(positions < limit, topk_ids, -1)
    rows = capacity(topk_ids.shape[0]) if callable(capacity) else capacity
    if policy == "position":
        return limit_capacity(topk_ids, num_experts, rows)
    if policy == "choice":
        return limit_capacity(topk_ids, num_experts, rows, by_choice=True)
    weights = topk_weights.detach()
    if policy == "batch":
        order = torch.argsort(weights.amax(1), descending=True, stable=True)  # [T]
        order = order[:, None].expand_as(topk_ids)
        queue = topk_ids.gather(0, order)  # [T, K]
        kept = limit_capacity(queue, num_experts, rows, by_choice=True)
        return torch.zeros_like(topk_ids).scatter(0, order, kept)
    priority = torch.rand_like(weights) if policy == "random" else weights
    return limit_capacity(topk_ids, num_experts, rows, priority=priority)


def _positions(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, policy: str) -> Tensor:
    """Place ``[T, K]`` of each pair in its expert's queue, for a capacity that only the device knows.

    As ``limit_capacity`` orders them; the largest int64 for a dropped pair.
    """
    if policy in GROUP_POLICIES:
        return queue_positions(topk_ids, num_experts, policy=policy)[0]
    weights = topk_weights.detach()
    if policy == "batch":
        order = torch.argsort(weights.amax(1), descending=True, stable=True)  # [T]
        order = order[:, None].expand_as(topk_ids)
        places, _ = queue_positions(topk_ids.gather(0, order), num_experts, policy="choice")
        return torch.zeros_like(places).scatter(0, order, places)
    priority = torch.rand_like(weights) if policy == "random" else weights
    return priority_positions(topk_ids, priority, num_experts)


def priority_positions(topk_ids: Tensor, priority: Tensor, num_experts: int) -> Tensor:
    """Place ``[T, K]`` of each pair in its expert's queue, the highest priority first, equal ones by position."""
    order = torch.argsort(priority.reshape(-1), descending=True, stable=True)  # [T * K]
    queue = topk_ids.reshape(-1)[order].unsqueeze(1)  # [T * K, 1]
    places, _ = queue_positions(queue, num_experts)
    return torch.zeros_like(places[:, 0]).scatter(0, order, places[:, 0]).view_as(topk_ids)


def uniform_like(like: Tensor, low: float, high: float) -> Tensor:
    """Noise from ``U(low, high)`` in the shape and type of ``like``, drawn in one kernel."""
    if torch.compiler.is_compiling():
        # What a compiler fuses with what reads the noise; the method below it can only call, and copy around.
        return low + (high - low) * torch.rand_like(like)
    return torch.empty_like(like).uniform_(low, high)


def queue_positions(
    topk_ids: Tensor,
    num_experts: int,
    *,
    policy: str = "position",
    group: Any = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Number the pairs of each expert in the order of ``policy``, over all ranks of a group.

    Args:
        topk_ids: chosen experts, ``[T, K]``, int32 or int64, values in ``[-1, E)``.
        num_experts: ``E``.
        policy: ``"position"`` or ``"choice"``, see ``apply_capacity``.
        group: a process group or ``moeops.distributed.RankGroup``; ``None`` for this rank alone.
        mask: ``[T]``, tokens that are not there: their pairs are dropped, and they do not count.

    Returns:
        positions ``[T, K]`` int64, 0 for the first pair of an expert, the largest int64 for a dropped pair; and the
        tokens of all ranks together, a scalar int64 tensor.

    Host sync: none.  Deterministic: yes.  With ``group``: one all-gather of the counts.

    Example:
        >>> queue_positions(torch.tensor([[0, 1], [1, 0]]), 2, policy="choice")[0].tolist()
        [[0, 1], [0, 1]]
    """
    topk_ids = drop_masked(topk_ids, mask)
    places, queue_ids, counts, tokens, rank = local_queues(
        topk_ids, num_experts, policy, group, mask
    )
    per_choice = counts.sum(0)  # [choices, E]
    ahead = per_choice.cumsum(0) - per_choice + counts[:rank].sum(0)
    positions = places + ahead.view(-1)[queue_ids]
    positions = torch.where(topk_ids < 0, torch.iinfo(torch.int64).max, positions)
    return positions, tokens.sum()


def local_queues(
    topk_ids: Tensor, num_experts: int, policy: str, group: Any, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Sort this rank's pairs into queues, and learn how long those of all ranks are.

    A queue is an expert, or with ``policy="choice"`` a choice of an expert, numbered ``k * E + e``. The ids of masked
    tokens are -1.

    Returns:
        place of each pair in its queue on this rank ``[T, K]`` and the queue's number ``[T, K]``, both int64 and 0
        for dropped pairs; pairs of each queue ``[W, choices, E]`` and tokens ``[W]`` of every rank, int64; this rank.
    """
    top_k = topk_ids.shape[1]
    queue_ids, num_queues = topk_ids, num_experts
    if policy == "choice":
        column = torch.arange(top_k, device=topk_ids.device, dtype=topk_ids.dtype)
        queue_ids = torch.where(topk_ids < 0, -1, topk_ids + column * num_experts)
        num_queues = top_k * num_experts
    plan = sort_tokens(queue_ids, num_queues)
    offsets = plan.expert_offsets.to(torch.int64)
    live = queue_ids >= 0
    queue_ids = queue_ids.to(torch.int64).clamp_min(0)
    places = torch.where(live, plan.pair_to_row - offsets[queue_ids], 0)
    every = torch.ones_like(topk_ids[:, 0], dtype=torch.int64)
    tokens = hide_masked(every, mask).sum()
    sizes = torch.cat((offsets.diff(), tokens[None]))  # [queues + 1]
    rank = 0
    if group is None:
        sizes = sizes[None]
    else:
        group = rank_group(group)
        sizes = all_gather_counts(sizes, group)  # [W, queues + 1]
        rank = group.rank
    counts = sizes[:, :-1].reshape(sizes.shape[0], num_queues // num_experts, num_experts)
    return places, queue_ids, counts, sizes[:, -1], rank


def check_capacity_options(
    gate: str, drop_policy: object, global_capacity: object, allowed: tuple[str, ...] = POLICIES
) -> None:
    """The order of overflow is known, and one that several ranks can agree on if they must."""
    if drop_policy not in allowed:
        raise ValueError(
            f"{gate}: drop_policy must be one of {allowed}, got {drop_policy!r}. Pick one of them."
        )
    if global_capacity and drop_policy not in GROUP_POLICIES:
        raise ValueError(
            f"{gate}: drop_policy must be one of {GROUP_POLICIES} with global_capacity, got {drop_policy!r}. "
            "Ranks know each other's counts, not their weights."
        )


def check_scale(gate: str, scale: object) -> None:
    """``scale`` is a finite number above 0."""
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(
            f"{gate}: scale must be above 0 and finite, got {scale!r}. Use 1.0 for none."
        )


def check_balance(gate: str, balance: object) -> None:
    """``balance`` is False, True or ``"global"``."""
    if not isinstance(balance, bool) and balance != "global":
        raise ValueError(
            f"{gate}: balance must be False, True or 'global', got {balance!r}. Use True on one rank."
        )


def check_capacity(gate: str, capacity: object) -> tuple[float, float] | None:
    """Read a capacity argument: ``None``, one factor, or (training, evaluation)."""
    if capacity is None:
        return None
    pair = capacity if isinstance(capacity, (tuple, list)) else (capacity, capacity)
    if len(pair) != 2 or not all(isinstance(c, (int, float)) and 0 < c < 1e6 for c in pair):
        raise ValueError(
            f"{gate}: capacity must be None, a factor, or a pair (training, evaluation) of factors above 0, "
            f"got {capacity!r}. 1.0 leaves room for exactly the average load."
        )
    return float(pair[0]), float(pair[1])
