"""Times of experts and of rows in memory on one rank.

T tokens, K experts per token, N = T * K pairs, E experts, D model width, H hidden width, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops.cost.laws import permute_bytes
from moeops.ops.activations import is_gated, up_width
from moeops.ops.moe_mlp import moe_mlp
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.ops.sorting import sort_tokens
from moeops.profiling.clock import Clock

Record = dict[str, Any]


class Weights(NamedTuple):
    """Experts of one rank, without biases.

    Attributes:
        w_up: ``[E, H, D]``, with 2 H rows for swiglu.
        w_down: ``[E, D, H]``.
        activation: as ``moe_mlp`` takes it.
    """

    w_up: Tensor
    w_down: Tensor
    activation: str


def random_weights(
    clock: Clock, d_model: int, d_hidden: int, num_experts: int, activation: str, dtype: torch.dtype
) -> Weights:
    """Experts with random weights."""
    height = up_width(d_hidden, activation)
    w_up, w_down = (
        torch.randn(shape, dtype=dtype, device=clock.device).div_(math.sqrt(shape[-1]))
        for shape in ((num_experts, height, d_model), (num_experts, d_model, d_hidden))
    )
    return Weights(w_up.requires_grad_(), w_down.requires_grad_(), activation)


class ExpertRun:
    """Rows received, by source and there by expert, and their way through the experts."""

    def __init__(self, clock: Clock, weights: Weights, rows: int) -> None:
        num_experts, d_model, d_hidden = weights.w_down.shape
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(num_experts, (rows,), generator=generator)
        ids = torch.cat([part.sort().values for part in ids.tensor_split(2)])
        self._counts = torch.stack(
            [part.bincount(minlength=num_experts) for part in ids.tensor_split(2)]
        ).to(clock.device)
        self._weights = weights
        dtype = weights.w_up.dtype
        self.rows = torch.randn(rows, d_model, device=clock.device).to(dtype).requires_grad_()
        self.leaves = (self.rows, weights.w_up, weights.w_down)
        self.facts: Record = {
            "dtype": _name(dtype),
            "rows": rows,
            "d_model": d_model,
            "d_hidden": d_hidden,
            "num_experts": num_experts,
            "num_projections": 3 if is_gated(weights.activation) else 2,
        }

    def forward(self) -> Tensor:
        """Find the rows' order, and run the block."""
        num_experts, device = self._weights.w_up.shape[0], self.rows.device
        numbers = torch.arange(num_experts, dtype=torch.int32, device=device).repeat(2)
        num_rows = self.rows.shape[0]
        ids = torch.repeat_interleave(numbers, self._counts.flatten(), output_size=num_rows)
        plan = sort_tokens(ids.unsqueeze(1), num_experts)
        ones = torch.ones(num_rows, 1, device=device)
        w_up, w_down, activation = self._weights
        return moe_mlp(self.rows, plan, ones, w_up, w_down, activation=activation)


def measure_experts(
    clock: Clock,
    shapes: Iterable[tuple[int, int, int, str, tuple[int, ...]]],
    dtype: torch.dtype,
) -> list[Record]:
    """Expert blocks on rows that came from two ranks, as the exact dispatcher runs them.

    Args:
        clock: what is timed with.
        shapes: D, H, E, activation, and rows per expert to try.
        dtype: of weights and rows.
    """
    records: list[Record] = []
    for d_model, d_hidden, num_experts, activation, all_rows in shapes:
        weights = random_weights(clock, d_model, d_hidden, num_experts, activation, dtype)
        for rows_per_expert in all_rows:
            block = ExpertRun(clock, weights, rows_per_expert * num_experts)
            records += both_ways(clock, block.forward, block.leaves, block.facts)
        del weights, block
        _release(clock)
    return records


def measure_memory(
    clock: Clock, shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype
) -> list[Record]:
    """Tokens into rows of experts, and rows back into tokens, of T, D and K."""
    records: list[Record] = []
    for num_tokens, d_model, top_k in shapes:
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.rand(num_tokens, 2 * top_k, generator=generator).argsort(1)[:, :top_k]
        plan = sort_tokens(ids.to(clock.device), 2 * top_k)
        x = torch.randn(num_tokens, d_model, device=clock.device).to(dtype)
        rows = permute_tokens(x, plan)
        weights = torch.rand(num_tokens, top_k, device=clock.device)
        row_bytes = d_model * x.element_size()
        num_bytes = permute_bytes(num_tokens, num_tokens * top_k, row_bytes)
        calls = {
            "permute_tokens": partial(permute_tokens, x, plan),
            "unpermute_tokens": partial(unpermute_tokens, rows, plan, weights),
        }
        records += [
            {"op": name, "num_bytes": num_bytes, "seconds": clock.seconds(call)}
            for name, call in calls.items()
        ]
    return records


def both_ways(
    clock: Clock, forward: Any, leaves: tuple[Tensor, ...], facts: Record
) -> list[Record]:
    """The forward with gradients, and the backward alone."""
    records = [{**facts, "way": "forward", "seconds": clock.seconds(forward)}]
    outputs: list[Tensor] = []
    grad = torch.randn_like(forward())

    def before() -> None:
        outputs[:] = [forward()]

    def backward() -> None:
        torch.autograd.grad(outputs.pop(), leaves, grad)

    seconds = clock.seconds(backward, before=before)
    return [*records, {**facts, "way": "backward", "seconds": seconds}]


def slowest(clock: Clock, rows: list[Record]) -> list[Record]:
    """Of every time the largest over the ranks; sizes are equal on all."""
    every = clock.ranks.gather(rows)
    return [
        {
            key: max(row[key] for row in same) if isinstance(value, float) else value
            for key, value in same[0].items()
        }
        for same in zip(*every, strict=True)
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _release(clock: Clock) -> None:
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
