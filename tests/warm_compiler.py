"""Imported once by the process that ranks are forks of: each of them finds torch's compiler loaded, and used.

The first compilation of a process imports thousands of modules and fills tables, which takes a processor 5 seconds.
Nothing here may start threads, autograd's among them, which do not survive a fork.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import torch
import torch._inductor.config


def count_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


def compile_once() -> None:
    """Compile a line for the CPU; not in builds for CUDA, where the compiler would ask for a GPU before the fork."""
    if torch.version.cuda is not None:
        return
    with suppress(ImportError):
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # a thread, as soon as the compiler shows its progress
    torch._inductor.config.compile_threads = 1  # of ranks too
    torch.set_num_threads(1)
    before = count_threads()  # NumPy's OpenBLAS has some, and starts them anew in a fork
    with torch.no_grad():
        torch.compile(lambda x: (x.sin() @ x).relu().sum(0), fullgraph=True)(torch.ones(4, 4))
    torch._dynamo.reset()
    started = count_threads() - before
    assert started <= 0, f"the compiler has started {started} threads, which a fork would not have"


compile_once()
gc.collect()
gc.freeze()  # or every rank's garbage collections would walk through all of it, and copy its memory
