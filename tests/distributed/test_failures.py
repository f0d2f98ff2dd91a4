"""A rank that ends or hangs in the middle of an exchange: every other rank ends with an error, within the time-out."""

from __future__ import annotations

import os
import re
import signal
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from parallel_cases import batch, make
from torch.utils._python_dispatch import TorchDispatchMode

from moeops.dispatch import legs
from moeops.distributed import DistributedGroupedDataParallel, explain_failures
from processes import launch, start_rank

pytestmark = pytest.mark.distributed

TIMEOUT = 6  # seconds
COMPILED_TIMEOUT = 60  # seconds; ranks compile before they meet, and not all at the same speed
COMPILED = {"counts": {"dispatch": "exact"}, "backward": {"dispatch": "static", "capacity": 4}}
EAGER = {"tokens": {"dispatch": "gather", "rows": 3.0}}


class Case(NamedTuple):
    """How the last rank goes, where, and what the others do there."""

    how: str  # "killed" or "hangs"
    where: str  # "building", "counts", "rows", "tokens" or "backward"
    backend: str | None = None  # of torch.compile, None for eager mode
    observed: bool = False  # by a dispatch mode, for which torch's functional collectives run

    @property
    def ranks(self) -> int:
        return 2 if self.backend else 3

    @property
    def timeout(self) -> int:
        return COMPILED_TIMEOUT if self.backend else TIMEOUT


class Observer(TorchDispatchMode):
    """Sees every op, and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def vanish(case: Case, folder: str) -> None:
    """The last rank kills itself, or does nothing for longer than the others wait."""
    if case.how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 10 * TIMEOUT
    while time.monotonic() < deadline and len(list(Path(folder).glob("*.txt"))) < case.ranks - 1:
        time.sleep(0.1)
    os._exit(0)


def worker(rank: int, case: Case, folder: str) -> None:
    report = Path(folder) / f"rank{rank}.txt"
    last = rank == case.ranks - 1
    try:
        start_rank(rank, case.ranks, "gloo", folder, case.timeout)
        options = COMPILED[case.where] if case.backend else EAGER.get(case.where, {})
        run = make("mlp", 2, "cpu", world_size=case.ranks, **options)
        if case.backend:
            run = torch.compile(run, fullgraph=True, backend=case.backend)
        # A graph without a backward where none is needed: compiling it takes seconds.
        torch.set_grad_enabled(not case.backend or case.where == "backward")
        x = batch(4, "cpu").requires_grad_()
        y = run(x)
        if torch.is_grad_enabled():
            y.sum().backward()
        if last and case.where in ("building", "counts", "tokens"):
            vanish(case, folder)
        if last and case.where == "rows":  # after the counts are exchanged, before the rows are
            legs.Leg.send = lambda *args: vanish(case, folder)
        start = time.monotonic()
        if case.where == "building":
            make("mlp", 2, "cpu", world_size=case.ranks)
        with explain_failures(), Observer() if case.observed else nullcontext():
            y = run(x)
            if last and case.where == "backward":
                vanish(case, folder)
            start = time.monotonic()
            y.sum().backward()
    except RuntimeError as error:
        seconds = time.monotonic() - start
        report.write_text(f"{seconds} {error}")
        os._exit(0)
    except BaseException:
        report.write_text(f"999 {traceback.format_exc()}")
        os._exit(1)
    report.write_text("999 no error")
    os._exit(1)


def assert_all_others_fail(op: str, case: Case, folder: Path) -> None:
    codes = launch(worker, (case, str(folder)), case.ranks, 240)
    assert codes[-1] == (-signal.SIGKILL if case.how == "killed" else 0)
    for rank in range(case.ranks - 1):
        assert codes[rank] == 0, (folder / f"rank{rank}.txt").read_text()
        seconds, message = (folder / f"rank{rank}.txt").read_text().split(" ", 1)
        assert float(seconds) < TIMEOUT + 4
        place = f"every rank of group '0' (rank {rank} of {case.ranks}) must take part within"
        # And then the backend's own words, not explained twice.
        start = f"{op}: {place} the time-out of {case.timeout} s, got: ["
        assert message.startswith(start), message


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("killed", "building"),
        ("killed", "counts"),
        ("killed", "rows"),
        ("killed", "tokens"),
        ("killed", "backward"),
        ("hangs", "rows"),
    ],
)
def test_every_other_rank_ends_with_an_error(how, where, tmp_path):
    ops = {"building": "FMoETransformerMLP", "counts": "exchange_counts"}
    ops["tokens"] = "all_gather_rows"
    op = ops.get(where, "all_to_all_rows")
    assert_all_others_fail(op, Case(how, where), tmp_path)


def test_functional_collectives_end_with_an_error(tmp_path):
    assert_all_others_fail("all_to_all_rows", Case("killed", "backward", observed=True), tmp_path)


@pytest.mark.parametrize(("where", "backend"), [("counts", "inductor"), ("backward", "aot_eager")])
def test_compiled_code_ends_with_an_error(where, backend, tmp_path):
    op = "all_to_all_single in compiled code"
    assert_all_others_fail(op, Case("killed", where, backend), tmp_path)


def test_other_errors_stay_as_they_are():
    @explain_failures()
    def fail():
        raise RuntimeError("buf1 = torch.ops._c10d_functional.wait_tensor.default(buf0)")

    with pytest.raises(RuntimeError, match=r"^buf1 = ") as caught:
        fail()
    assert caught.value.__cause__ is None


NCCL_OPS = {  # where the last rank goes, and what the others then wait for; None: any op
    "counts": "exchange_counts",
    "tokens": "all_gather_rows",
    "static": "all_to_all_rows",
    "backward": "all_to_all_rows",
    "gradients": None,
    "peer": "peer_all_gather",
    "compiled": "all_to_all_single in compiled code",
}


def nccl_worker(rank: int, size: int, where: str, blocking: bool, folder: str) -> None:
    """The last rank kills itself; what the others raise goes to files, what torch logs to others."""
    log = os.open(f"{folder}/stderr{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = str(int(blocking))
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"  # torch's flight recorder takes its time
    report = Path(folder) / f"rank{rank}.txt"
    try:
        timeout = COMPILED_TIMEOUT if where == "compiled" else TIMEOUT
        ranks = start_rank(rank, size, "nccl", folder, timeout)
        options = EAGER["tokens"] if where in ("tokens", "peer") else {}
        if where == "peer":
            options = {**options, "transport": "peer"}
        if where in ("static", "compiled"):
            options = COMPILED["backward"]
        layer = make("mlp", 2, ranks.device, world_size=size, **options)
        model = DistributedGroupedDataParallel(layer)
        run = torch.compile(layer, fullgraph=True) if where == "compiled" else layer
        x = batch(4, ranks.device).requires_grad_()
        run(x).sum().backward()
        model.allreduce_gradients()
        torch.cuda.synchronize()

        def vanish(point: str) -> None:
            if rank == size - 1 and where == point:
                os.kill(os.getpid(), signal.SIGKILL)

        vanish(where if where not in ("backward", "gradients", "peer") else "")
        with explain_failures():
            y = run(x)
            torch.cuda.synchronize()
            vanish(where if where in ("backward", "peer") else "")
            y.sum().backward()
            torch.cuda.synchronize()
            vanish("gradients")
            model.allreduce_gradients()
            torch.cuda.synchronize()
    except RuntimeError as error:
        report.write_text(str(error))
        os._exit(0)
    except BaseException:
        report.write_text(traceback.format_exc())
        os._exit(1)
    report.write_text("no error")
    os._exit(1)


def vanish_with_nccl(
    size: int, where: str, blocking: bool, folder: Path
) -> tuple[list[int], dict[str, str]]:
    """Exit codes of all ranks, and what they wrote."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"{size} CUDA devices are needed, {torch.cuda.device_count()} are there")
    # The start of CUDA and the time-out; the watchdog then gives all ranks a minute to write what they know.
    codes = launch(nccl_worker, (size, where, blocking, str(folder)), size, 150)
    texts = {path.name: path.read_text(errors="replace") for path in folder.glob("*.txt")}
    assert codes[-1] == -signal.SIGKILL, texts
    return codes[:-1], texts


@pytest.mark.cuda
@pytest.mark.parametrize("where", NCCL_OPS)
@pytest.mark.parametrize("size", [2, 4])
def test_nccl_that_waits_ends_with_an_error(size, where, tmp_path, cuda_device):
    """Where the host waits, this package names the op."""
    codes, texts = vanish_with_nccl(size, where, True, tmp_path)
    timeout = COMPILED_TIMEOUT if where == "compiled" else TIMEOUT
    op, any_op = NCCL_OPS[where], r"[\w .]+"
    for rank, code in enumerate(codes):
        assert code == 0, texts
        place = rf"every rank of group '\w+' \(rank {rank} of {size}\) must take part within"
        start = rf"{op or any_op}: {place} the time-out of {timeout} s, got: "
        assert re.match(start, texts[f"rank{rank}.txt"]), texts


@pytest.mark.cuda
@pytest.mark.parametrize("size", [2, 4])
def test_the_watchdog_of_nccl_ends_every_rank(size, tmp_path, cuda_device):
    """torch's watchdog ends the process, and names the collective."""
    codes, texts = vanish_with_nccl(size, "counts", False, tmp_path)
    for rank, code in enumerate(codes):
        assert code == -signal.SIGABRT, texts
        log = texts[f"stderr{rank}.txt"]
        assert "Watchdog caught collective operation timeout" in log
        assert f"Timeout(ms)={TIMEOUT * 1000}" in log
        assert "OpType=ALLTOALL" in log


@pytest.mark.cuda
@pytest.mark.parametrize("size", [2, 4])
def test_peers_that_meet_nobody_end(size, tmp_path, cuda_device):
    """The device gives up after the time-out, and takes the CUDA context with it."""
    codes, texts = vanish_with_nccl(size, "peer", False, tmp_path)
    for rank, code in enumerate(codes):
        assert code in (0, -signal.SIGABRT), texts
        if code == 0:
            assert "CUDA" in texts[f"rank{rank}.txt"], texts
