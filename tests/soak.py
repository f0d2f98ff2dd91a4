"""Thousands of compiled training steps with ever other token counts: ``python -m tests.soak``.

Memory, graphs, open files, threads and Python objects must stay where they are behind the first quarter, and the loss
must be that of an eager run. In float64 the eager run is one of its own, with as many steps; in other types, where
roundings soon lead two runs apart, it starts anew from the compiled run's state a few steps before each look.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moeops
from moeops.gates import DeepSeekV3Gate, SwitchGate

D, H, E = 32, 48, 8
MOST_TOKENS = 96
LOOKS = 20
PAGE = os.sysconf("SC_PAGE_SIZE")


class Tolerance(NamedTuple):
    """How far a loss may be from the eager one, relatively; how many steps before a look the eager run goes along."""

    loss: float
    steps: int | None  # None: all of them


TOLERANCES = {
    torch.float64: Tolerance(1e-6, None),
    torch.float32: Tolerance(1e-4, 5),
    torch.bfloat16: Tolerance(3e-2, 2),
}


class Look(NamedTuple):
    """What a process holds behind a step, and both losses of that step."""

    step: int
    seconds: float
    resident: int  # bytes
    on_device: int  # bytes
    graphs: int
    files: int
    threads: int
    objects: int
    loss: float
    eager: float

    @classmethod
    def now(cls, step: int, seconds: float, device: torch.device, losses: list[Tensor]) -> Look:
        """The values of this process."""
        gc.collect()
        on_gpu = device.type == "cuda"
        return cls(
            step,
            seconds,
            int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
            torch.cuda.memory_allocated(device) if on_gpu else 0,
            counters["stats"]["unique_graphs"],
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(gc.get_objects()),
            *(loss.item() for loss in losses),
        )

    def text(self) -> str:
        """One line."""
        return (
            f"step {self.step}, {self.seconds:.0f} s: {self.resident / 2**20:.1f} MiB resident, "
            f"{self.on_device / 2**20:.3f} MiB on the device, {self.graphs} graphs, {self.files} files, "
            f"{self.threads} threads, {self.objects} objects; loss {self.loss:.9f}, eager {self.eager:.9f}"
        )


# Growth that is none: per step behind the first quarter, or in all. A kept row of D float64 numbers has 256 bytes.
LEAST_GROWTH = {
    "resident": (1024.0, 8 * 2**20),
    "on_device": (8.0, 2**16),
    "graphs": (0.0, 0),
    "files": (0.0, 0),
    "threads": (0.0, 0),
    "objects": (0.05, 200),
}


def judge(looks: list[Look], tolerance: float) -> list[str]:
    """What grew, and losses that differ: one sentence each."""
    last = looks[-1]
    settled = [look for look in looks if look.step <= last.step / 4]
    problems = []
    for name, (per_step, in_all) in LEAST_GROWTH.items():
        before = max(getattr(look, name) for look in settled)
        growth = getattr(last, name) - before
        if growth > max(per_step * (last.step - settled[-1].step), in_all):
            problems.append(
                f"{name}: {before} until step {settled[-1].step}, {before + growth} at {last.step}"
            )
    problems += [
        f"loss: {look.loss!r} at step {look.step}, eager {look.eager!r}"
        for look in looks
        if not abs(look.loss - look.eager) <= tolerance * abs(look.eager)
    ]
    return problems


class Model(nn.Module):
    """Two layers, with a loss, a capacity, a bias that steps move and a shared expert; nothing draws random numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        self.first = moeops.FMoETransformerMLP(
            E, D, H, "swiglu", top_k=1, gate=partial(SwitchGate, switch_eps=0.0), **options
        )
        self.second = moeops.FMoETransformerMLP(
            E, D, H, "gelu", gate=DeepSeekV3Gate, shared_expert=H, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class Run:
    """A model, its optimizer, and a step that may be compiled."""

    def __init__(self, dtype: torch.dtype, device: torch.device, backend: str | None) -> None:
        torch.manual_seed(0)
        self.model = Model(dtype, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.loss_of: Callable[[Tensor, Tensor], Tensor] = self._loss_of
        if backend is not None:
            self.loss_of = torch.compile(
                self._loss_of, fullgraph=True, dynamic=True, backend=backend
            )

    def _loss_of(self, x: Tensor, wanted: Tensor) -> Tensor:
        error = (self.model(x) - wanted).square().sum() / (x.size(0) * D + 1)
        return error + 0.01 * moeops.auxiliary_loss(self.model)

    def step(self, x: Tensor, wanted: Tensor, progress: float) -> Tensor:
        """One step of training; its loss."""
        loss = self.loss_of(x, wanted)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        moeops.update_gates(self.model, progress)
        return loss.detach()

    def take_over(self, other: Run) -> None:
        """Go on from where ``other`` is."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(other.optimizer.state_dict())


def batches(steps: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Tokens and what they shall become, 0 to MOST_TOKENS of them; counts that have graphs of their own come first."""
    rng = Random(1)
    generator = torch.Generator(device).manual_seed(1)
    options = {"dtype": torch.float32, "device": device, "generator": generator}
    turn = torch.randn(D, D, **options) / D**0.5
    for step in range(steps):
        num_tokens = (5, 1, 0)[step] if step < 3 else rng.randint(0, MOST_TOKENS)
        x = torch.randn(num_tokens, D, **options)
        yield x.to(dtype), torch.tanh(2 * x @ turn).to(dtype)


def soak(
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "inductor",
    on_look: Callable[[Look], None] = lambda _look: None,
) -> list[Look]:
    """Train a compiled and an eager model side by side, and look LOOKS times."""
    compiled, eager = Run(dtype, device, backend), Run(dtype, device, None)
    counters.clear()
    every = steps // LOOKS
    along = TOLERANCES[dtype].steps or steps
    looks: list[Look] = []
    begin = time.monotonic()
    for step, (x, wanted) in enumerate(batches(steps, dtype, device), 1):
        until_look = -step % every
        if until_look == along - 1:
            eager.take_over(compiled)
        losses = [compiled.step(x, wanted, step / steps)]
        if until_look < along:
            losses.append(eager.step(x, wanted, step / steps))
        if until_look == 0:
            looks.append(Look.now(step, time.monotonic() - begin, device, losses))
            on_look(looks[-1])
    return looks


def main() -> int:
    """Exit code 1 where something grew or differs."""
    parser = argparse.ArgumentParser(
        "python -m tests.soak", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=10_000, help=f"a multiple of {LOOKS}")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCES]
    )
    args = parser.parse_args()
    if args.steps < LOOKS or args.steps % LOOKS:
        parser.error(f"--steps must be a multiple of {LOOKS}, got {args.steps}.")
    dtype = getattr(torch, args.dtype or "float64")
    torch.set_num_threads(1)  # for problems as small as these
    looks = soak(
        args.steps, args.device, dtype, on_look=lambda look: print(look.text(), flush=True)
    )
    problems = judge(looks, TOLERANCES[dtype].loss)
    print("\n".join(problems) or f"soak: {args.steps} steps, nothing grew and no loss differs")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
