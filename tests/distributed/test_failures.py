"""A rank that ends or hangs in the middle of an exchange: every other rank ends with an error, within the time-out."""

from __future__ import annotations

import os
import signal
import time
import traceback
from pathlib import Path

import pytest
from parallel_cases import batch, make
from processes import launch, start_rank

from moeops.ops import exchange

pytestmark = pytest.mark.distributed

TIMEOUT = 6  # seconds
RANKS = 3


def vanish(how: str, folder: str) -> None:
    """The last rank kills itself, or does nothing for longer than the others wait."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 10 * TIMEOUT
    while time.monotonic() < deadline and len(list(Path(folder).glob("*.txt"))) < RANKS - 1:
        time.sleep(0.1)
    os._exit(0)


def worker(rank: int, how: str, where: str, folder: str) -> None:
    report = Path(folder) / f"rank{rank}.txt"
    try:
        start_rank(rank, RANKS, "gloo", folder, TIMEOUT)
        layer = make("mlp", 2, "cpu", world_size=RANKS)
        x = batch(4, "cpu").requires_grad_()
        layer(x).sum().backward()
        if rank == RANKS - 1:
            if where == "counts":
                vanish(how, folder)
            elif where == "rows":  # after the counts are exchanged, before the rows are
                exchange.Exchange.__init__ = lambda *args: vanish(how, folder)
        start = time.monotonic()
        y = layer(x)
        if where == "backward" and rank == RANKS - 1:
            vanish(how, folder)
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


@pytest.mark.parametrize(
    ("how", "where"),
    [("killed", "counts"), ("killed", "rows"), ("killed", "backward"), ("hangs", "rows")],
)
def test_every_other_rank_ends_with_an_error(how, where, tmp_path):
    codes = launch(worker, (how, where, str(tmp_path)), RANKS, 60)
    assert codes[-1] == (-signal.SIGKILL if how == "killed" else 0)
    op = "exchange_counts" if where == "counts" else "all_to_all_rows"
    for rank in range(RANKS - 1):
        assert codes[rank] == 0, (tmp_path / f"rank{rank}.txt").read_text()
        seconds, message = (tmp_path / f"rank{rank}.txt").read_text().split(" ", 1)
        assert float(seconds) < TIMEOUT + 4
        assert message.startswith(f"{op}: every rank of group '0' (rank {rank} of {RANKS}) must")
        assert f"time-out of {TIMEOUT} s" in message
