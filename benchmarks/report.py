"""Fixed-width tables of measured rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.bench_gates import GateTimes
from benchmarks.runner import Row
from benchmarks.shapes import Shape
from benchmarks.timing import Spread

MIB = 1 << 20


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """First column left, the others right, two spaces between."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([render(header), "  ".join("-" * w for w in widths), *map(render, lines)])


def _with_failures(header: Sequence[str], rows: Sequence[Row], cells) -> str:
    """Rows that are not ok have their error below the table."""
    lines = []
    for row in rows:
        if row.status == "ok":
            lines.append([row.label, *cells(row)])
        else:
            lines.append([row.label, row.status.upper(), *[""] * (len(header) - 2)])
    text = table(header, lines)
    notes = [
        f"  {row.status.upper()} {row.label}: {row.error}" for row in rows if row.status != "ok"
    ]
    return "\n".join([text, *notes])


def _ms(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median / 1e3:.3f}"


def _us(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.1f}"


def _range(spread: Spread | None, scale: float = 1.0) -> str:
    return "-" if spread is None else f"{spread.p10 * scale:.4g}..{spread.p90 * scale:.4g}"


def _tflops(flops: int, spread: Spread | None) -> str:
    if spread is None:
        return "-"
    speed = flops / spread.median / 1e6
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"


def _gbps(num_bytes: int, spread: Spread | None) -> str:
    return "-" if spread is None or not num_bytes else f"{num_bytes / spread.median / 1e3:.0f}"


def _mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:.0f}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _share(limit: Spread | None, spread: Spread | None) -> str:
    if limit is None or spread is None:
        return "-"
    return f"{100 * limit.median / spread.median:.0f}"


def block_table(shape: Shape, rows: Sequence[Row]) -> str:
    """Milliseconds, TFLOP/s and share of the dense limit; MB are 2^20 bytes."""
    limit = next((row for row in rows if row.key == "dense" and row.status == "ok"), None)
    header = (
        "expert block", "infer ms", "fwd ms", "fwd+bwd ms", "p10..p90",
        "infer TF/s", "fwd TF/s", "f+b TF/s", "infer %", "fwd %", "f+b %",
        "act MB", "peak MB", "syncs",
    )  # fmt: skip

    def cells(row: Row) -> list[str]:
        is_limit = row.key in ("dense", "bmm")
        return [
            _ms(row.infer),
            _ms(row.forward),
            _ms(row.total),
            _range(row.total, 1e-3),
            _tflops(shape.flops_forward, row.infer),
            _tflops(shape.flops_forward, row.forward),
            _tflops(shape.flops_total, row.total),
            _share(limit and limit.infer, row.infer),
            _share(limit and limit.forward, row.forward),
            _share(limit and limit.total, row.total),
            "-" if is_limit else _mib(row.activation_bytes),
            "-" if is_limit else _mib(row.peak_bytes),
            _count(row.host_syncs),
        ]

    return _with_failures(header, rows, cells)


def stage_table(group: str, rows: Sequence[Row]) -> str:
    """Microseconds, and GB/s over the bytes that an ideal kernel moves."""
    header = (group, "us", "p10..p90", "GB/s", "bwd us", "p10..p90", "GB/s", "syncs")

    def cells(row: Row) -> list[str]:
        return [
            _us(row.forward),
            _range(row.forward),
            _gbps(row.bytes_forward, row.forward),
            _us(row.backward),
            _range(row.backward),
            _gbps(row.bytes_backward, row.backward),
            _count(row.host_syncs),
        ]

    return _with_failures(header, rows, cells)


def gate_table(gates: Sequence[GateTimes]) -> str:
    """Microseconds of routing; without the router's product, over ``topk_route`` alone at the same K."""
    header = (
        "gate", "K", "fwd us", "bwd us", "x topk_route", "compiled fwd us", "bwd us", "x topk_route", "syncs",
    )  # fmt: skip

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        [
            gate.name, str(gate.top_k), number(gate.forward), number(gate.backward), number(gate.ratio, 2),
            number(gate.compiled_forward), number(gate.compiled_backward), number(gate.compiled_ratio, 2),
            _count(gate.host_syncs),
        ]
        for gate in gates
    ]  # fmt: skip
    notes = [f"  {gate.error}" for gate in gates if gate.error]
    return "\n".join([table(header, lines), *notes])


def lane_table(
    shape: Shape, rows: Sequence[Row], recorded: Mapping[str, tuple[float, float]]
) -> str:
    """Device times, wall times from idle to idle, and how many times faster than what was recorded elsewhere."""
    header = [
        "whole layer", "infer ms", "fwd ms", "fwd+bwd ms", "f+b TF/s",
        "wall fwd", "wall f+b", "p10..p90", "act MB", "syncs",
    ]  # fmt: skip
    names = list(recorded)
    header += [f"x {'fused' if 'fused' in name else 'FastMoE'} fwd / f+b" for name in names]

    def cells(row: Row) -> list[str]:
        values = [
            _ms(row.infer),
            _ms(row.forward),
            _ms(row.total),
            _tflops(shape.flops_total, row.total),
            _ms(row.wall_forward),
            _ms(row.wall_total),
            _range(row.wall_total, 1e-3),
            "-" if row.key == "dense" else _mib(row.activation_bytes),
            _count(row.host_syncs),
        ]
        return values + [_ratio(row, recorded[name]) if row.ours else "-" for name in names]

    text = _with_failures(header, rows, cells)
    notes = [
        f"  {name}: {fwd} ms forward, {total} ms forward + backward; recorded elsewhere, not in this run"
        for name, (fwd, total) in recorded.items()
    ]
    return "\n".join([text, *notes])


def ratios(row: Row, recorded: tuple[float, float]) -> tuple[float, float] | None:
    """Recorded milliseconds over this run's wall times, forward and forward + backward."""
    if row.wall_forward is None or row.wall_total is None:
        return None
    return (
        1e3 * recorded[0] / row.wall_forward.median,
        1e3 * recorded[1] / row.wall_total.median,
    )


def _ratio(row: Row, recorded: tuple[float, float]) -> str:
    both = ratios(row, recorded)
    return "-" if both is None else f"{both[0]:.1f} / {both[1]:.1f}"
