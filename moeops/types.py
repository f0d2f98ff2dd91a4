"""Frozen records passed between calls."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = [
    "BalancedRoute",
    "Glu",
    "LoraFactors",
    "NoisyRoute",
    "Route",
    "Routing",
    "SlotRouting",
    "TokenPlan",
]


class TokenPlan(NamedTuple):
    """Where every token-expert pair goes: what ``combine`` needs from ``dispatch``.

    Pair ``t * K + k`` is choice ``k`` of token ``t``. Rows are in expert order, token order within an expert; the
    rows from ``expert_offsets[E]`` on hold no pair that counts. There are ``R = N`` rows unless ``sort_tokens`` was
    given fewer: with ``R = N`` the dropped pairs own those last rows, with fewer they own none.

    Attributes:
        row_to_pair: ``[R]`` int32, the pair held by each row.
        pair_to_row: ``[T, K]`` int32, the row of each pair, ``R`` or more for a dropped pair without one.
        expert_offsets: ``[E + 1]`` int32, expert ``e`` owns rows ``expert_offsets[e]`` to ``expert_offsets[e + 1]``.
    """

    row_to_pair: Tensor
    pair_to_row: Tensor
    expert_offsets: Tensor


class LoraFactors(NamedTuple):
    """A low-rank addition to each expert's matrix: ``weight[e] + scaling * b[e] @ a[e]``, which is never built.

    A plain tuple ``(a, b, scaling)`` does as well.

    Attributes:
        a: ``[E, r, D]``, any float type and strides; ``D`` inputs of the weight.
        b: ``[E, H, r]``, any float type and strides; ``H`` outputs of the weight.
        scaling: factor of the product.
        dropout: probability with which an element of a row is left out, 0 for none; what is kept is scaled up. The
            weight itself sees the whole row. Pass 0 outside training.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    dropout: float = 0.0


class Glu(NamedTuple):
    """A gated unit between the products of an expert: ``f(min(gate, limit)) * (clamp(up, -limit, limit) + offset)``.

    ``Glu()`` is "swiglu", ``Glu("gelu_tanh")`` is "geglu_tanh"; gpt-oss has
    ``Glu(alpha=1.702, limit=7.0, offset=1.0, interleaved=True)``.

    Attributes:
        gate: ``f``: "silu" for ``gate * sigmoid(alpha * gate)``, "gelu_tanh" for GELU in its tanh form.
        alpha: factor in the sigmoid, for "silu".
        limit: bound of ``gate`` from above and of ``up`` from both sides, above 0; ``None`` for none.
        offset: added to ``up``.
        interleaved: the rows of ``w_up``, and the values of ``b_up``, are gate and up in turns: gate 0, up 0, gate 1,
            up 1 ... Otherwise all rows of the gate come first.
    """

    gate: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0
    interleaved: bool = False


class Route(NamedTuple):
    """What ``topk_route`` returns.

    Attributes:
        topk_weights: ``[T, K]`` float.
        topk_ids: ``[T, K]`` int64, best first.
    """

    topk_weights: Tensor
    topk_ids: Tensor


class BalancedRoute(NamedTuple):
    """What ``topk_route_balance`` returns.

    Attributes:
        topk_weights: ``[T, K]`` float, 0 where the slot holds nothing.
        score_sums: ``[E]`` float, as ``moeops.score_sums``.
        balance_loss: ``[]`` float, 1 at perfect balance.
        topk_ids: ``[T, K]`` int64, -1 for a slot that holds nothing.
        tokens_per_expert: ``[E]`` int32, the counted pairs.
    """

    topk_weights: Tensor
    score_sums: Tensor
    balance_loss: Tensor
    topk_ids: Tensor
    tokens_per_expert: Tensor


class NoisyRoute(NamedTuple):
    """What ``noisy_topk_route`` returns.

    Attributes:
        topk_weights: ``[T, K]`` float.
        importance: ``[E]`` float, the sum of the weights of each expert.
        load: ``[E]`` float, a smooth estimate of the tokens of each expert.
        loss: ``[]`` float, the squared coefficients of variation of both, added.
        topk_ids: ``[T, K]`` int64.
    """

    topk_weights: Tensor
    importance: Tensor
    load: Tensor
    loss: Tensor
    topk_ids: Tensor


class Routing(NamedTuple):
    """What a gate returns when ids and weights alone do not say it all. A plain pair means the defaults.

    Attributes:
        topk_ids: ``[T, K]`` int64 or int32, chosen experts in ``[-1, E)``; -1 is a slot that holds nothing.
        topk_weights: ``[T, K]`` float, factor of each chosen expert; not read where the slot holds nothing.
        num_rows: upper bound of the slots that hold something, an int or a symbolic int, if it is below ``T * K``:
            the experts then work on that many rows. ``None`` means ``T * K``.
        scale_inputs: multiply the expert's input by the weight and not its output, as Llama-4 does.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    num_rows: int | None = None
    scale_inputs: bool = False


class SlotRouting(NamedTuple):
    """What a gate returns when experts work on mixtures of tokens (SoftMoE): the second dispatch contract.

    Expert ``e`` owns slots ``e * S`` to ``(e + 1) * S``; the input of slot ``s`` is
    ``sum_t dispatch_weights[t, s] * x[t]``, and token ``t`` gets ``sum_s combine_weights[t, s] * output[s]``.

    With ``tokens_per_group`` that many tokens in a row are a group (a sequence, say; the last one may be shorter), the
    sums stay within a group, and every group has ``E * S`` slots of its own.

    Attributes:
        dispatch_weights: ``[T, E * S]`` float.
        combine_weights: ``[T, E * S]`` float.
        tokens_per_group: a plain int; ``None`` for one group of all tokens.
    """

    dispatch_weights: Tensor
    combine_weights: Tensor
    tokens_per_group: int | None = None
