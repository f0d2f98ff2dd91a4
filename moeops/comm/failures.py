"""Errors of compiled code that say which collective failed, in which group, after which time-out."""

from __future__ import annotations

import contextlib
import linecache
import re
from collections.abc import Iterator
from types import TracebackType

from moeops.comm.wires import explained

__all__ = ["explain_failures"]

# As generated code and FX graphs spell it: buf1 = torch.ops._c10d_functional.all_to_all_single.default(buf0, ..., '0')
_CALL = re.compile(
    r"(?:(?P<result>\w+) = )?torch\.ops\._c10d_functional\.(?P<op>\w+)\.default\((?P<first>\w+)(?P<rest>[^;]*)"
)
_NAME = re.compile(r"'([^']*)'\)")


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Let compiled code, forward and backward, fail as eager code does where a rank has ended or hangs.

    Generated code calls torch's collectives, whose errors are the backend's. This context manager or decorator turns
    them into errors that name the collective, the group and its time-out. It costs nothing where nothing fails, and
    leaves all other errors as they are. Put it around the call of what ``torch.compile`` returned and around
    ``backward()``, not inside of the compiled function. Code that Inductor wrote in C++ has no lines to read.

    With NCCL a rank that has gone is seen by torch's watchdog, which ends the process and says why, eager or compiled.

    Raises:
        RuntimeError: a collective of compiled code failed; the backend's error is its cause.

    Example:
        >>> with explain_failures():
        ...     torch.compile(torch.sin, backend="eager")(torch.zeros(1)).tolist()
        [0.0]
    """
    try:
        yield
    except RuntimeError as err:
        found = _failed_collective(err.__traceback__)
        if found is None:
            raise
        op, group_name = found
        raise explained(f"{op} in compiled code", group_name, err) from err


def _failed_collective(traceback: TracebackType | None) -> tuple[str, str] | None:
    """The collective of generated code that an error came from, and its group."""
    lines: list[str] = []
    call = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        source = linecache.getlines(code.co_filename, traceback.tb_frame.f_globals)
        source = source[: traceback.tb_lineno]
        if found := _CALL.search(source[-1] if source else ""):
            call, lines = found, source[:-1]
        traceback = traceback.tb_next
    if call is not None and call["op"] == "wait_tensor":
        call = _begun(lines, call["first"])
    group = _NAME.search(call["rest"]) if call is not None else None
    return (call["op"], group[1]) if call is not None and group is not None else None


def _begun(lines: list[str], waited: str) -> re.Match[str] | None:
    """The call that began what ``wait_tensor`` waits for: the last one with that result, or in that buffer."""
    for line in reversed(lines):
        call = _CALL.search(line)
        if call is None or call["op"] == "wait_tensor":
            continue
        if waited == (call["first"] if call["op"].endswith("_") else call["result"]):
            return call
    return None
