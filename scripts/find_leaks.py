"""Call every op many times and compare what is allocated before and after, to the byte.

Started by ``sanitize_cpu.py``, in whose process AddressSanitizer counts the bytes that are allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from samples import OP_CASES, SAMPLES, op_cases

CALLS = 30
ROUNDS = 3
LEAST = 24  # bytes of a leak in every call, a text has 32; Python keeps some of its own, ever less
NAMES = ("strided", "few_rows")


def allocated() -> int:
    """Bytes that this process has from malloc and new."""
    gc.collect()
    count = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
    count.restype = ctypes.c_size_t
    return count()


def use(case) -> None:
    """An op, and the error that most ops have for tensors of one dimension more."""
    case.run()
    wrong = [a[..., None] if isinstance(a, torch.Tensor) else a for a in case.positional]
    with contextlib.suppress(RuntimeError, ValueError, TypeError):
        case.overload(*wrong, **case.keywords)


def growth(case) -> list[int]:
    """Bytes that stay allocated after each round of calls, behind two in which caches fill."""
    seen = []
    for _ in range(ROUNDS + 3):
        for _ in range(CALLS):
            use(case)
        seen.append(allocated())
    return [after - before for before, after in pairwise(seen[2:])]


def main() -> int:
    """Exit code 1 where an op keeps memory in every round."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # gradients are ops of their own
    gc.freeze()  # what the imports made stays, and would be looked through each time
    samples = [sample for sample in SAMPLES if sample.name in NAMES]
    for _ in range(
        3
    ):  # torch and Python keep some of the first hundreds of calls, whatever these call
        growth(op_cases(next(iter(OP_CASES)), samples[0], torch.float32)[0])
    leaks, cases = [], 0
    for op in OP_CASES:
        for sample in samples:
            for case in op_cases(op, sample, torch.float32):
                cases += 1
                grown = growth(case)
                if min(grown) >= LEAST * CALLS:
                    leaks.append(f"{op} ({sample}): {grown} bytes in rounds of {CALLS} calls")
    print("\n".join(leaks) or f"find_leaks: {cases} cases of {len(OP_CASES)} ops keep no memory")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
