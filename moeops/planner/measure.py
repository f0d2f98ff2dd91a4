"""Times of one rank's own work: experts, router, rows in memory, copies to the host.

T tokens, K experts per token, N = T * K pairs, E experts, D model width, H hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moeops
from moeops.cost.laws import permute_bytes
from moeops.gates.naive import NaiveGate
from moeops.layers.experts import FusedExperts
from moeops.planner.clock import Clock

Record = dict[str, Any]
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        experts: D, H, E, activation, and rows per expert to try.
        router: T, D, E, K.
        memory: T, D, K.
        exchange: bytes in the buffer that a rank sends.
        overlap: D, H, E, rows of all experts, bytes of the exchange beside them.
        samples: that count, of each.
        flush_bytes: written before each sample.
    """

    experts: tuple[tuple[int, int, int, str, tuple[int, ...]], ...]
    router: tuple[tuple[int, int, int, int], ...]
    memory: tuple[tuple[int, int, int], ...]
    exchange: tuple[int, ...]
    overlap: tuple[tuple[int, int, int, int, int], ...]
    samples: int
    flush_bytes: int


# Neither the widths nor the numbers of experts of the models that the plan is checked with: laws must carry that far.
GPU_SIZES = Sizes(
    experts=(
        (1024, 4096, 8, "gelu", (64, 512, 4096)),
        (2048, 1024, 16, "swiglu", (16, 64, 256, 2048)),
        (2048, 1024, 64, "swiglu", (32, 128, 512, 1536)),
        (4096, 2048, 8, "swiglu", (32, 128, 512, 2048)),
        (4096, 8192, 4, "swiglu", (64, 256, 1024, 4096)),
    ),
    router=(
        (1024, 2048, 64, 4),
        (4096, 1024, 256, 8),
        (8192, 4096, 16, 2),
        (16384, 2048, 64, 8),
        (16384, 4096, 128, 8),
        (32768, 1024, 32, 4),
    ),
    memory=((256, 2048, 2), (4096, 2048, 2), (4096, 4096, 4), (16384, 2048, 4), (32768, 2048, 8)),
    exchange=tuple(MIB // 16 << power for power in range(0, 13, 2)),  # 64 KiB to 256 MiB
    overlap=((4096, 2048, 8, 4096, 128 * MIB), (4096, 8192, 4, 4096, 256 * MIB)),
    samples=9,
    flush_bytes=512 * MIB,
)
CPU_SIZES = Sizes(
    experts=(
        (256, 512, 4, "gelu", (8, 64, 256)),
        (256, 128, 16, "swiglu", (4, 16, 64)),
        (128, 128, 32, "swiglu", (4, 16, 64)),
        (512, 256, 8, "swiglu", (4, 32, 128)),
    ),
    router=((256, 256, 16, 2), (512, 512, 64, 4), (2048, 128, 32, 2), (2048, 256, 128, 8)),
    memory=((256, 128, 2), (1024, 256, 2), (2048, 256, 4), (4096, 512, 4)),
    exchange=tuple(MIB // 64 << power for power in range(0, 11, 2)),  # 16 KiB to 16 MiB
    overlap=((256, 512, 4, 512, 4 * MIB),),
    samples=9,
    flush_bytes=64 * MIB,
)
QUICK_SIZES = Sizes(
    experts=(
        (128, 256, 4, "gelu", (4, 64, 256)),
        (64, 64, 16, "swiglu", (2, 16, 64)),
        (256, 128, 2, "swiglu", (8, 64, 256)),
    ),
    router=((128, 64, 8, 2), (512, 128, 16, 2), (1024, 64, 64, 4), (2048, 128, 32, 4)),
    memory=((64, 64, 2), (512, 128, 2), (2048, 128, 4)),
    exchange=tuple(MIB // 64 << power for power in range(0, 9, 2)),  # 16 KiB to 4 MiB
    overlap=((128, 256, 4, 512, MIB),),
    samples=5,
    flush_bytes=16 * MIB,
)


def measure_experts(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> list[Record]:
    """Expert blocks on rows that came from two ranks, as the exact dispatcher runs them."""
    records: list[Record] = []
    for d_model, d_hidden, num_experts, activation, all_rows in sizes.experts:
        experts = build_experts(clock, d_model, d_hidden, num_experts, activation, dtype)
        for rows_per_expert in all_rows:
            rows = rows_per_expert * num_experts
            block = ExpertRun(clock, experts, rows, dtype)
            facts = {
                "dtype": _name(dtype),
                "rows": rows,
                "d_model": d_model,
                "d_hidden": d_hidden,
                "num_experts": num_experts,
                "num_projections": 3 if activation == "swiglu" else 2,
            }
            records += _both_ways(clock, block.forward, block.leaves, facts)
        del experts, block
        _release(clock)
    return records


def build_experts(
    clock: Clock, d_model: int, d_hidden: int, num_experts: int, activation: str, dtype: torch.dtype
) -> FusedExperts:
    """Experts with random weights."""
    return FusedExperts(
        num_experts, d_model, d_hidden, activation, bias=False, dtype=dtype, device=clock.device
    )


class ExpertRun:
    """Rows received, by source and there by expert, and their way through the experts."""

    def __init__(self, clock: Clock, experts: FusedExperts, rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(experts.num_expert, (rows,), generator=generator)
        ids = torch.cat([part.sort().values for part in ids.tensor_split(2)])
        self._counts = torch.stack(
            [part.bincount(minlength=experts.num_expert) for part in ids.tensor_split(2)]
        ).to(clock.device)
        self._experts = experts
        self._num_rows = rows
        self.rows = torch.randn(rows, experts.d_model, device=clock.device).to(dtype)
        self.rows.requires_grad_()
        self.leaves = (self.rows, *experts.parameters())

    def forward(self) -> Tensor:
        """Find the rows' order, and run the block."""
        num_experts, device = self._experts.num_expert, self.rows.device
        numbers = torch.arange(num_experts, dtype=torch.int32, device=device).repeat(2)
        ids = torch.repeat_interleave(numbers, self._counts.flatten(), output_size=self._num_rows)
        plan = moeops.sort_tokens(ids.unsqueeze(1), num_experts)
        weights = torch.ones(self._num_rows, 1, device=device)
        return self._experts(self.rows, weights, plan)


def measure_router(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> list[Record]:
    """A linear gate with softmax and top-k, and the sort of what it chose."""
    records: list[Record] = []
    for num_tokens, d_model, num_experts, top_k in sizes.router:
        gate = NaiveGate(d_model, num_experts, 1, top_k).to(clock.device, dtype)
        x = torch.randn(num_tokens, d_model, device=clock.device).to(dtype).requires_grad_()

        def forward(gate=gate, x=x, num_experts=num_experts) -> Tensor:
            ids, weights = gate(x)
            moeops.sort_tokens(ids, num_experts)
            return weights

        facts = {
            "dtype": _name(dtype),
            "num_tokens": num_tokens,
            "d_model": d_model,
            "num_experts": num_experts,
            "top_k": top_k,
        }
        records += _both_ways(clock, forward, (x, *gate.parameters()), facts)
    return records


def measure_memory(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> list[Record]:
    """Tokens into rows of experts, and rows back into tokens."""
    records: list[Record] = []
    for num_tokens, d_model, top_k in sizes.memory:
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.rand(num_tokens, 2 * top_k, generator=generator).argsort(1)[:, :top_k]
        plan = moeops.sort_tokens(ids.to(clock.device), 2 * top_k)
        x = torch.randn(num_tokens, d_model, device=clock.device).to(dtype)
        rows = moeops.permute_tokens(x, plan)
        weights = torch.rand(num_tokens, top_k, device=clock.device)
        row_bytes = d_model * x.element_size()
        num_bytes = permute_bytes(num_tokens, num_tokens * top_k, row_bytes)
        calls = {
            "permute_tokens": partial(moeops.permute_tokens, x, plan),
            "unpermute_tokens": partial(moeops.unpermute_tokens, rows, plan, weights),
        }
        records += [
            {"op": name, "num_bytes": num_bytes, "seconds": clock.seconds(call)}
            for name, call in calls.items()
        ]
    return records


def measure_host_copy(clock: Clock) -> list[Record]:
    """Seconds of the host for a small copy from the device, the wait for it included."""
    small = torch.zeros(16, dtype=torch.int64, device=clock.device)

    def copy() -> list[float]:
        begin = time.perf_counter()
        small.cpu()
        return [time.perf_counter() - begin]

    return [{"seconds": clock.host_samples(copy)[0]}]


def _both_ways(
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


@contextmanager
def one_thread_per_rank(size: int) -> Iterator[None]:
    """Ranks on one CPU must not fight for its cores."""
    before = torch.get_num_threads()
    if size > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _release(clock: Clock) -> None:
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
