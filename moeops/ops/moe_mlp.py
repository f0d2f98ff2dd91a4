"""The expert block as one op. T tokens, K experts per token, R rows, E experts, D model width, H hidden width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._autocast import cast_for_autocast
from moeops.ops._library import LIBRARY, refuse_second_gradient
from moeops.ops._lora import check_lora
from moeops.ops.activations import activate, check_activation, op_options, up_width
from moeops.ops.grouped_linear import grouped_linear, is_transposed
from moeops.ops.permute import check_topk_weights, permute_tokens, unpermute_tokens
from moeops.types import Glu, LoraFactors, TokenPlan


@torch.library.register_fake("moeops::moe_mlp")
def _moe_mlp_fake(
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
    fake_check(
        x.shape[0] == pair_to_row.shape[0],
        "moe_mlp: x must have as many rows as the plan has tokens. Check the plan.",
    )
    fake_check(
        x.shape[1] == w_up.shape[2],
        "moe_mlp: w_up must have as many inputs as x has columns. Check w_up.shape[2].",
    )
    pre_activation = x.new_empty((row_to_pair.shape[0] if keep_pre else 0, w_up.shape[1]))
    return x.new_empty((x.shape[0], w_down.shape[1])), pre_activation


@torch.library.register_fake("moeops::moe_mlp_backward_data")
def _moe_mlp_backward_data_fake(
    grad_y,
    x,
    row_to_pair,
    pair_to_row,
    expert_offsets,
    topk_weights,
    w_up,
    w_down,
    b_up,
    b_down,
    pre_activation,
    *,
    activation="swiglu",
    alpha=1.0,
    limit=None,
    offset=0.0,
    interleaved=False,
    need_x=True,
    need_topk_weights=True,
    need_grad_pre=True,
    need_weighted_hidden=True,
):
    num_rows = row_to_pair.shape[0]
    return (
        x.new_empty(x.shape if need_x else 0),
        topk_weights.new_empty(topk_weights.shape) if need_topk_weights else x.new_empty(0),
        x.new_empty((num_rows, w_up.shape[1]) if need_grad_pre else 0),
        x.new_empty((num_rows, w_down.shape[2]) if need_weighted_hidden else 0),
    )


@torch.library.register_fake("moeops::moe_mlp_backward_weights")
def _moe_mlp_backward_weights_fake(
    grad_y,
    x,
    row_to_pair,
    pair_to_row,
    expert_offsets,
    topk_weights,
    grad_pre,
    weighted_hidden,
    *,
    need_w_up=True,
    need_w_down=True,
    need_b_up=True,
    need_b_down=True,
    transposed_up=False,
    transposed_down=False,
):
    num_experts = expert_offsets.shape[0] - 1
    out = grad_y.shape[1]

    def weight(needed, transposed, rows, columns):
        if not needed:
            return x.new_empty(0)
        if transposed:
            return x.new_empty((num_experts, columns, rows)).transpose(1, 2)
        return x.new_empty((num_experts, rows, columns))

    return (
        weight(need_w_up, transposed_up, grad_pre.shape[-1], x.shape[1]),
        weight(need_w_down, transposed_down, out, weighted_hidden.shape[-1]),
        x.new_empty((num_experts, grad_pre.shape[1]) if need_b_up else 0),
        x.new_empty((num_experts, out) if need_b_down else 0),
    )


class DataGrads(NamedTuple):
    """The gradients that tokens wait for, and what those of the weights are made of.

    Attributes:
        x: ``[T, D]``, empty where it was not asked for.
        topk_weights: ``[T, K]``, likewise.
        kept: the pre-activation's gradient ``[R, 2H or H]`` and the hidden rows times their routing weights ``[R, H]``,
            likewise; ``backward_weights`` takes them out.
    """

    x: Tensor
    topk_weights: Tensor
    kept: list[Tensor]


def backward_data(
    grad_y: Tensor,
    inputs: Sequence[Tensor | None],
    pre_activation: Tensor,
    activation: dict[str, Any],
    needs: Sequence[bool],
) -> DataGrads:
    """The first half of the backward.

    Args:
        grad_y: ``[T, D_out]``.
        inputs: what ``torch.ops.moeops.moe_mlp`` took, in order.
        pre_activation: what the op returned, ``[R, 2H or H]``.
        activation: the options of the op that say what it computes, by name.
        needs: for each of x, topk_weights, w_up, w_down, b_up and b_down, whether its gradient is wanted.

    Host sync: none.
    """
    x, topk_weights, w_up, w_down, b_up, _ = needs
    grad_x, grad_topk_weights, *kept = torch.ops.moeops.moe_mlp_backward_data(
        grad_y,
        *inputs,
        pre_activation,
        **activation,
        need_x=x,
        need_topk_weights=topk_weights,
        need_grad_pre=w_up or b_up,
        need_weighted_hidden=w_down,
    )
    return DataGrads(grad_x, grad_topk_weights, kept)


def backward_weights(
    grad_y: Tensor,
    x: Tensor,
    plan: Sequence[Tensor],
    topk_weights: Tensor,
    kept: list[Tensor],
    needs: Sequence[bool],
    transposed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of w_up, w_down, b_up and b_down, ``None`` where ``needs`` of these four wants none.

    Those of weights are in the layout of the weight: ``transposed`` says which of the two is stored ``[E, in, out]``.
    Empties ``kept``: ``w_down``'s gradient may take the memory of what ``w_up``'s was made of.
    """
    need_up, need_down, need_b_up, need_b_down = needs
    grads: list[Tensor | None] = [None] * 4

    def run(grad_pre, weighted_hidden, *needed):
        found = torch.ops.moeops.moe_mlp_backward_weights(
            grad_y,
            x,
            *plan,
            topk_weights,
            grad_pre,
            weighted_hidden,
            need_w_up=needed[0],
            need_w_down=needed[1],
            need_b_up=needed[2],
            need_b_down=needed[3],
            transposed_up=transposed[0],
            transposed_down=transposed[1],
        )
        for number, need in enumerate(needed):
            if need:
                grads[number] = found[number]

    # What no gradient needs may be anything: either tensor stands in for the other one.
    hidden, pre = kept.pop(), kept.pop()
    if need_up or need_b_up:
        run(pre, hidden, need_up, False, need_b_up, False)
    del pre
    if need_down or need_b_down:
        run(hidden, hidden, False, need_down, False, need_b_down)
    return grads


def _moe_mlp_setup(ctx, inputs, keyword_only_inputs, output):
    _, pre_activation = output
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)  # or pre_activation's gradient would be a buffer of zeros
    ctx.save_for_backward(*inputs, pre_activation)
    ctx.options = dict(keyword_only_inputs)
    ctx.keep_pre = ctx.options.pop("keep_pre")
    ctx.transposed = tuple(is_transposed(weight) for weight in inputs[5:7])


def _moe_mlp_grad(ctx, grad_y, _grad_pre_activation):
    if grad_y is None:
        return (None,) * 9
    if not ctx.keep_pre:
        raise RuntimeError(
            "moe_mlp: keep_pre must be True where a gradient is wanted, got False. Drop the argument."
        )
    # The dispatcher leaves biases at the end out where they are None.
    wanted = (*ctx.needs_input_grad, False, False)[:9]
    needs = (wanted[0], *wanted[4:])
    *inputs, pre_activation = ctx.saved_tensors
    grads = backward_data(grad_y, inputs, pre_activation, ctx.options, needs)
    x, *plan, topk_weights = inputs[:5]
    # The weights' gradients, which are large, can take the place of the pre-activation, unless the graph is retained.
    ctx.maybe_clear_saved_tensors()
    del pre_activation, inputs
    weights = backward_weights(grad_y, x, plan, topk_weights, grads.kept, needs[2:], ctx.transposed)
    grad_x, grad_topk_weights = (
        grad if need else None for grad, need in zip(grads[:2], needs[:2], strict=True)
    )
    return (grad_x, None, None, None, grad_topk_weights, *weights)


torch.library.register_autograd(
    "moeops::moe_mlp", _moe_mlp_grad, setup_context=_moe_mlp_setup, lib=LIBRARY
)
refuse_second_gradient("moe_mlp_backward_data")
refuse_second_gradient("moe_mlp_backward_weights")


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
    lora_up: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
    lora_down: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Run every token through its chosen experts and sum the results, weighted, in one op.

    ``y[t] = sum_k topk_weights[t, k] * (w_down[e] @ act(w_up[e] @ x[t] + b_up[e]) + b_down[e])`` with ``e`` the
    expert of pair (t, k); dropped pairs add nothing. For gated units ``w_up`` holds the gate rows, then the up rows, or
    both in turns, and ``act`` is ``f(gate) * up``: ``silu(gate) * up`` for swiglu, and with the options of a ``Glu``
    what ``Glu`` says.

    Args:
        x: tokens, ``[T, D]``, any float type.
        plan: what ``sort_tokens`` returned for these tokens.
        topk_weights: ``[T, K]`` float, cast to float32 (float64 for float64 ``x``).
        w_up: ``[E, 2H, D]`` for gated units, else ``[E, H, D]``; dtype of ``x``.
        w_down: ``[E, D_out, H]``, dtype of ``x``.
        b_up: ``[E, 2H or H]``, dtype of ``x``.
        b_down: ``[E, D_out]``, dtype of ``x``.
        activation: "swiglu", "geglu_tanh" (GELU in its tanh form), "gelu" (exact), "relu", "silu", "relu_squared"; or a
            ``Glu``, which is a gated unit with options.
        lora_up: a low-rank addition to ``w_up``, ``(a [E, r, D], b [E, 2H or H, r], scaling)`` or a ``LoraFactors``.
        lora_down: the same for ``w_down``. With either the block is composed of ``permute_tokens``,
            ``grouped_linear`` and ``unpermute_tokens``, and keeps what these keep.

    Returns:
        ``[T, D_out]``, dtype of ``x``.

    Raises:
        ValueError: a shape, device or ``activation`` does not fit.  TypeError: a dtype is wrong.
    Gradients: ``x``, ``topk_weights``, ``w_up``, ``w_down``, ``b_up``, ``b_down``, factors.  Host sync: none.
    Deterministic: yes, but for dropout.  Memory: keeps ``x`` and the pre-activation ``[R, 2H or H]`` for the backward,
    nothing else; where autograd does not record, not even those.
    Under ``torch.autocast`` the float arguments but ``topk_weights`` are cast to the autocast type.
    Source: recomputation scheme of SonicMoE, arXiv:2512.14080.

    Example:
        >>> plan = sort_tokens(torch.tensor([[0], [1]]), 2)
        >>> w_up, w_down = torch.ones(2, 1, 1), torch.tensor([[[2.0]], [[3.0]]])
        >>> moe_mlp(torch.ones(2, 1), plan, torch.ones(2, 1), w_up, w_down, activation="relu").tolist()
        [[2.0], [3.0]]
    """
    x, w_up, w_down, b_up, b_down = cast_for_autocast(x, w_up, w_down, b_up, b_down)
    if not torch.compiler.is_compiling():
        _check_moe_mlp(x, plan, topk_weights, w_up, w_down, b_up, b_down, activation)
        for name, lora, weight_name, weight in (
            ("lora_up", lora_up, "w_up", w_up),
            ("lora_down", lora_down, "w_down", w_down),
        ):
            if lora is not None:
                check_lora("moe_mlp", name, lora, weight_name, weight)
    if lora_up is not None or lora_down is not None:
        offsets = plan.expert_offsets
        rows = permute_tokens(x, plan)
        hidden = activate(grouped_linear(rows, w_up, offsets, bias=b_up, lora=lora_up), activation)
        rows = grouped_linear(hidden, w_down, offsets, bias=b_down, lora=lora_down)
        return unpermute_tokens(rows, plan, topk_weights)
    topk_weights = topk_weights.to(_checks.accumulate_dtype(x.dtype))
    block = (topk_weights, w_up, w_down, b_up, b_down)
    y, _ = torch.ops.moeops.moe_mlp(
        x, *plan, *block, **op_options(activation), keep_pre=_gradient_is_wanted((x, *block))
    )
    return y


def _gradient_is_wanted(tensors) -> bool:
    """Whether autograd records: without it the pre-activation need not be written to memory."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_moe_mlp(x, plan, topk_weights, w_up, w_down, b_up, b_down, activation):
    op = "moe_mlp"
    _checks.check_tensor(op, "x", x, 2)
    _checks.check_float(op, "x", x)
    _checks.check_plan(op, plan, "x", x)
    _checks.check_size(op, "x", x, 0, plan[1].shape[0], "the plan's tokens")
    check_topk_weights(op, topk_weights, plan, "x", x)
    check_activation(op, activation)
    num_experts = plan[2].shape[0] - 1
    for name, weight in (("w_up", w_up), ("w_down", w_down)):
        _checks.check_tensor(op, name, weight, 3)
        _checks.check_float(op, name, weight)
        _checks.check_like(op, name, weight, "x", x)
        _checks.check_size(op, name, weight, 0, num_experts, "one per expert")
    _checks.check_size(op, "w_up", w_up, 2, x.shape[1], "columns of x")
    wanted = up_width(w_down.shape[2], activation)
    _checks.check_size(op, "w_up", w_up, 1, wanted, f"{activation} with w_down's inputs")
    for name, bias, weight in (("b_up", b_up, w_up), ("b_down", b_down, w_down)):
        if bias is not None:
            _checks.check_tensor(op, name, bias, 2)
            _checks.check_like(op, name, bias, "x", x)
            _checks.check_size(op, name, bias, 0, num_experts, "one per expert")
            _checks.check_size(op, name, bias, 1, weight.shape[1], "outputs of its weight")
