"""Times of one rank's router and of copies to the host, and which sizes of everything are measured.

T tokens, K experts per token, N = T * K pairs, E experts, D model width, H hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import moeops
from moeops.gates.naive import NaiveGate
from moeops.profiling.clock import Clock
from moeops.profiling.work import Record, both_ways

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
            "dtype": str(dtype).removeprefix("torch."),
            "num_tokens": num_tokens,
            "d_model": d_model,
            "num_experts": num_experts,
            "top_k": top_k,
        }
        records += both_ways(clock, forward, (x, *gate.parameters()), facts)
    return records


def measure_host_copy(clock: Clock) -> list[Record]:
    """Seconds of the host for a small copy from the device, the wait for it included."""
    small = torch.zeros(16, dtype=torch.int64, device=clock.device)

    def copy() -> list[float]:
        begin = time.perf_counter()
        small.cpu()
        return [time.perf_counter() - begin]

    return [{"seconds": clock.host_samples(copy)[0]}]


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
