"""What all dispatchers share: the contract, and tokens as rows. T tokens, K experts per token, R rows, E experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moeops import _checks
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.types import Routing, SlotRouting, TokenPlan

# experts(rows, expert_offsets, rows_per_expert): the last are the offsets' differences where the host knows them.
Experts = Callable[[Any, Tensor, list[int] | None], Any]
Block = Callable[[Any, Tensor, TokenPlan], Any]


class Dispatcher:
    """Base of all dispatchers: how tokens get to the experts that a gate chose, and their outputs back.

    A dispatcher knows nothing of gates and experts. It reads a ``Routing`` (never with ``scale_inputs``: a layer has
    applied that before) or a ``SlotRouting``, and hands rows in expert order to the experts on this rank. Inputs and
    outputs are nests of tensors, tokens or rows in dimension 0 of every leaf.

    Subclasses write ``dispatch`` and ``combine``; one with a schedule of its own (chunks in flight, say) overrides
    ``run``, which a layer calls. One without rows for slots raises NotImplementedError for a ``SlotRouting``.
    """

    def dispatch(self, routing: Routing | SlotRouting, inp: Any) -> tuple[Any, Tensor, Any]:
        """Bring tokens to experts.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.

        Returns:
            Nest of rows ``[R, ...]`` in expert order; expert_offsets ``[E_local + 1]`` int32, rows past the last
            offset are padding; and the record that ``combine`` needs.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: dispatch must be written by the subclass."
        )

    def combine(self, out: Any, record: Any) -> Any:
        """Bring the experts' outputs, a nest of ``[R, ...]``, back: nest of ``[T, ...]``, weighted and summed."""
        raise NotImplementedError(
            f"{type(self).__name__}: combine must be written by the subclass."
        )

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
    ) -> Any:
        """Dispatch, run the experts, combine.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.
            experts: called with the rows, ``expert_offsets`` and, if the host knows them, the rows per expert;
                returns a nest of ``[R, ...]``.
            block: the same experts as one call ``block(x, topk_weights, plan)`` that moves the tokens itself, for
                dispatchers that leave them on this rank.

        Returns:
            Nest of ``[T, ...]``.
        """
        rows, expert_offsets, record = self.dispatch(routing, inp)
        return self.combine(experts(rows, expert_offsets, None), record)


def permute_leaf(leaf: Tensor, plan: TokenPlan) -> Tensor:
    """Copy a leaf ``[T, ...]`` into expert order ``[R, ...]``."""
    if leaf.dtype in _checks.FLOAT_DTYPES:
        return permute_tokens(as_rows(leaf), plan).reshape(-1, *leaf.shape[1:])
    # Ids, positions, flags: nothing to differentiate, and no kernel needed.
    return leaf.index_select(0, plan.row_to_pair // plan.pair_to_row.shape[1])


def combine_leaf(leaf: Tensor, plan: TokenPlan, topk_weights: Tensor | None) -> Tensor:
    """Sum an output leaf ``[R, ...]`` over each token's pairs: ``[T, ...]``."""
    y = unpermute_tokens(as_rows(leaf), plan, topk_weights)
    return y.reshape(y.shape[0], *leaf.shape[1:])


def as_rows(leaf: Tensor) -> Tensor:
    """``[T, ...]`` as ``[T, row]``; spelt out because ``reshape(T, -1)`` is undefined for zero tokens."""
    if leaf.dim() == 2:
        return leaf
    size = 1
    for length in leaf.shape[1:]:
        size *= length
    return leaf.reshape(leaf.shape[0], size)
