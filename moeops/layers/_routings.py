"""What the records that gates return have in common for a layer. T tokens, K experts per token, E experts, S slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moeops import _nests
from moeops._masks import drop_masked
from moeops._token_groups import join_token_groups, split_token_groups
from moeops.types import Routing, SlotRouting


def as_routing(op: str, gate: object, output: Any) -> Routing | SlotRouting:
    """Read what a gate returned: a record, or a pair that means ``Routing`` with its defaults.

    Of a pair FastMoE's older shapes are taken too: weights ``[T, 1, K]``, and ids ``[T * K]`` beside them.
    """
    if isinstance(output, (Routing, SlotRouting)):
        return output
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        got = (
            f"{len(output)} values" if isinstance(output, (tuple, list)) else type(output).__name__
        )
        raise TypeError(
            f"{op}: {type(gate).__name__} must return (topk_ids, topk_weights), a moeops.Routing or a "
            f"moeops.SlotRouting, got {got}. Return (topk_ids [T, K], topk_weights [T, K])."
        )
    topk_ids, topk_weights = output
    if isinstance(topk_weights, Tensor) and topk_weights.dim() == 3 and topk_weights.shape[1] == 1:
        topk_weights = topk_weights.squeeze(1)
        if isinstance(topk_ids, Tensor) and topk_ids.dim() == 1:
            if topk_ids.shape[0] != topk_weights.numel():
                raise ValueError(
                    f"{op}: {type(gate).__name__} must return as many flat topk_ids as the topk_weights "
                    f"{list(output[1].shape)} have entries, got {list(topk_ids.shape)}. Return one id per weight."
                )
            topk_ids = topk_ids.reshape(topk_weights.shape)
    return Routing(topk_ids, topk_weights)


def pad_left_out(leaf: Any, num_rows: int, expert_offsets: Tensor) -> Any:
    """Add zeros for the rows of dropped pairs where experts did not return them: ``[R, ...]``.

    The number of kept pairs is copied to the host only where rows are missing. Another number is left to the checks;
    a graph asserts that it is not.
    """
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return leaf
    if statically_known_true(leaf.shape[0] == num_rows):
        return leaf
    kept = expert_offsets[-1].item()
    if torch.compiler.is_compiling():
        torch._check(leaf.shape[0] == kept)
        torch._check(kept <= num_rows)
    elif leaf.shape[0] != kept:
        return leaf
    missing = leaf.new_zeros((num_rows - leaf.shape[0], *leaf.shape[1:]))
    return torch.cat((leaf, missing))


def hide_tokens(inp: Any, mask: Tensor, *, finite: bool) -> Any:
    """Write zeros over masked tokens in every float leaf, so that nothing of them reaches the others.

    NaN times the zero gradient of a masked token is NaN in the router's gradient, and times a zero weight in a mix.

    Args:
        inp: a nest of tensors ``[T, ...]``.
        mask: ``[T]``.
        finite: hide those with finite numbers too, not only those with NaN or infinity.
    """

    def hide(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        masked = mask != 0  # [T]
        if not finite:
            rows = leaf if leaf.dim() > 1 else leaf.unsqueeze(1)
            masked = masked & ~rows.isfinite().flatten(1).all(1)
        return leaf.masked_fill(masked.view(-1, *(1,) * (leaf.dim() - 1)), 0)

    return _nests.map_leaves(hide, inp)


def without_masked(routing: Routing | SlotRouting, mask: Tensor) -> Routing | SlotRouting:
    """Take the tokens with a mask other than 0 out: the experts see nothing of them, and they get nothing."""
    if isinstance(routing, Routing):
        return routing._replace(topk_ids=drop_masked(routing.topk_ids, mask))
    dispatch, combine, tokens_per_group = routing
    masked = (mask != 0)[:, None]  # [T, 1]
    every = split_token_groups(dispatch, tokens_per_group)  # [G, L, E * S]
    kept = split_token_groups(dispatch.masked_fill(masked, 0), tokens_per_group)
    # The other tokens take over, so that a slot's weights keep their sum: what a softmax over them alone gives.
    kept_sum = kept.sum(1, keepdim=True)
    factor = every.sum(1, keepdim=True) / torch.where(kept_sum == 0, 1, kept_sum)
    dispatch = join_token_groups(kept * factor, tokens_per_group, mask.shape[0])
    return SlotRouting(dispatch, combine.masked_fill(masked, 0), tokens_per_group)


def output_weights(routing: Routing | SlotRouting) -> Tensor:
    """Sum the factors that a masked token's expert outputs would get, were none of its pairs dropped: ``[T]``."""
    if isinstance(routing, SlotRouting):
        return routing.combine_weights.sum(1)
    weights = routing.topk_weights
    return (torch.ones_like(weights) if routing.scale_inputs else weights).sum(1)


def fill_masked(out: Any, mask: Tensor, mask_dict: dict[int, Any] | None, weights: Tensor) -> Any:
    """Write ``mask_dict``'s values times ``weights [T]`` over the masked tokens of every leaf."""

    def fill(y: Tensor) -> Tensor:
        column = (-1, *(1,) * (y.dim() - 1))
        for key, value in (mask_dict or {}).items():
            if isinstance(value, Tensor):
                value = value.to(y.device)
            filled = (weights.reshape(column) * value).to(y.dtype)
            y = torch.where((mask == key).reshape(column), filled, y)
        return y

    return _nests.map_leaves(fill, out)
