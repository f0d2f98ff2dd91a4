"""Texts of the planner: laws, layers, memory, choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeops.cost.laws import Direction, HostCost
from moeops.cost.model import CostModel
from moeops.planner.configuration import chunks_text
from moeops.planner.switching import best_degree
from moeops.planner.units import gbps, us

MIB = 1 << 20


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as needed, the first ``left`` of them aligned left, the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def model_table(model: CostModel) -> str:
    """Every law of a cost model with the residual of its fit."""
    rows: list[tuple[str, str, str]] = []
    for dtype, laws in model.experts.items():
        for way, law in _ways(laws):
            text = (
                f"{2e-12 * _inverse(law.seconds_per_product):.4g} TFLOP/s, rows {gbps(law.seconds_per_byte)}, "
                f"{1e12 * law.seconds_per_weight:.3g} us per million weights, {us(law.call_seconds)} a call"
            )
            rows.append((f"experts {dtype} {way}", text, _percent(law.residual)))
    for dtype, laws in model.router.items():
        for way, law in _ways(laws):
            text = (
                f"{2e-12 * _inverse(law.seconds_per_product):.4g} TFLOP/s, scores "
                f"{1e12 * law.seconds_per_score:.3g} us per million, x {gbps(law.seconds_per_byte)}, "
                f"{us(law.call_seconds)} a call"
            )
            rows.append((f"router {dtype} {way}", text, _percent(law.residual)))
    if model.memory is not None:
        text = f"{gbps(model.memory.seconds_per_byte)}, {us(model.memory.call_seconds)} a call"
        rows.append(("memory", text, _percent(model.memory.residual)))
    for name in ("inside_node", "between_nodes", "all_gather", "reduce_scatter", "all_reduce"):
        law = getattr(model, name)
        if law is not None:
            text = (
                f"{gbps(law.seconds_per_byte)} per rank, {us(law.peer_seconds)} a message, "
                f"{us(law.call_seconds)} a call"
            )
            rows.append((name, text, _percent(law.residual)))
    if model.host_copy_seconds is not None:
        rows.append(("copy to the host", us(model.host_copy_seconds), ""))
    if model.overlap_loss is not None:
        rows.append(("overlap loss", f"{model.overlap_loss:.2f} of the shorter", ""))
    for mode, costs in model.host.items():
        for dispatcher, cost in costs.items():
            rows.append((f"host, {mode} {dispatcher}", *_host_text(cost)))
    return table(("law", "coefficients", "residual"), rows, left=2)


def _host_text(cost: HostCost) -> tuple[str, str]:
    parts = [
        f"{name} {us(law.fixed_seconds)} + {us(law.chunk_seconds)} n"
        for name, law in (
            ("first expert", cost.first),
            ("forward", cost.forward),
            ("backward", cost.backward),
        )
    ]
    worst = max(cost.first.residual, cost.forward.residual, cost.backward.residual)
    return ", ".join(parts), _percent(worst)


def _ways(laws: Direction):
    return ("forward", laws.forward), ("backward", laws.backward)


def _inverse(seconds: float) -> float:
    return 1 / seconds if seconds else float("inf")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plan_text(plan: dict[str, Any]) -> str:
    """A plan as ``make_plan`` returns it, in tables."""
    config, best = plan["configuration"], plan["recommended"]
    chosen = next(c for c in plan["choices"] if _key(c) == _key(best))
    lines = [
        f"E {config['num_experts']}, K {config['top_k']}, D {config['d_model']}, H {config['d_hidden']} "
        f"{config['activation']}, {config['dtype']}, {config['num_tokens']} tokens per rank",
        f"{config['world_size']} ranks, {config['node_size']} per node; {config['expert_parallel']} share the experts, "
        f"{config['local_experts']} on each"
        + (
            f" in shards of 1 / {config['tensor_parallel']}"
            if config["tensor_parallel"] > 1
            else ""
        )
        + f"; {config['rows_per_expert']:.4g} rows per expert",
        "",
        f"one layer, {_label(best)}, ms",
        _layer_table(chosen),
        "",
        "choices, ms" + ("" if config["mode"] == "eager" else f", {config['mode']}"),
        _choice_table(plan["choices"], best),
    ]
    if plan["auto"]:
        lines += ["", 'n_chunks="auto" of this profile, ms', _choice_table(plan["auto"], best)]
    if plan["exchange"]:
        lines += ["", "one exchange of all rows, busiest rank", _exchange_table(plan["exchange"])]
    if plan["parallel"]:
        lines += ["", "tokens of one call travel in r ranks, ms", _degree_table(plan["parallel"])]
    lines += ["", "memory per rank, MiB", _memory_table(plan["memory"], config), ""]
    sync = plan["gradients"]
    if sync is not None:
        seconds = (
            f"{1e3 * sync['seconds']:.3f} ms"
            if sync["seconds"] is not None
            else f"unknown, {sync['link']} is not in the profile"
        )
        lines.append(
            f"gradients of the experts: {sync['bytes'] / MIB:.0f} MiB over {sync['copies']} copies, {seconds} per "
            "layer, not in the times"
        )
    lines.append(f"RECOMMENDED {_label(best)}: {1e3 * best['seconds']:.3f} ms per layer")
    if config["num_layers"] > 1:
        lines[-1] += (
            f", {1e3 * best['seconds_all_layers']:.1f} ms for {config['num_layers']} layers"
        )
    lines += [f"  {best['reason']}"] if best["reason"] else []
    lines += [f"WARNING {text}" for text in plan["warnings"]]
    return "\n".join([*lines, "", "assumptions", *(f"  {text}" for text in plan["assumptions"])])


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["dispatcher"], record["n_chunks"], record["form"]


def _label(record: dict[str, Any]) -> str:
    return f"{record['dispatcher']}, {chunks_text(record['n_chunks'])}" + (
        "" if record["form"] == "flat" else f", {record['form']} exchange"
    )


def _layer_table(chosen: dict[str, Any]) -> str:
    """Parts of the layer in the order of the forward."""
    forward, backward = chosen["forward"], chosen["backward"]
    names = ("router", "dispatch", "exchange", "experts", "combine")
    rows = [(name, *(_ms(way["parts"][name]) for way in (forward, backward))) for name in names]
    overlap = [sum(way["parts"].values()) - way["device"] for way in (forward, backward)]
    rows.append(("overlap", *(_ms(-value) for value in overlap)))
    rows.append(
        ("wait for host", *(_ms(way["total"] - way["device"]) for way in (forward, backward)))
    )
    rows.append(("layer", *(_ms(way["total"]) for way in (forward, backward))))
    return table(("part", "forward", "backward"), rows)


def _choice_table(choices: Sequence[dict[str, Any]], best: dict[str, Any]) -> str:
    rows = [
        (
            _label(choice) + (" <-" if _key(choice) == _key(best) else ""),
            _ms(choice["forward"]["total"]),
            _ms(choice["backward"]["total"]),
            _ms(choice["seconds"]),
            _ms(choice["forward"]["hidden"] + choice["backward"]["hidden"]),
            "host" if choice["host_bound"] else "device",
        )
        for choice in choices
    ]
    return table(("choice", "forward", "backward", "both", "overlap", "bound by"), rows)


def _exchange_table(exchanges: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            row["form"],
            _ms(row["seconds"]),
            f"{row['bytes_inside_node'] / MIB:.1f}",
            f"{row['bytes_between_nodes'] / MIB:.1f}",
            str(row["messages_inside_node"]),
            str(row["messages_between_nodes"]),
        )
        for row in exchanges
    ]
    header = ("form", "ms", "MiB in node", "MiB between", "messages in node", "between")
    return table(header, rows)


def _degree_table(records: list[dict[str, Any]]) -> str:
    best = best_degree(records)
    rows = [
        (
            f"{record['parallel']}{' *' if record['parallel'] == best else ''}",
            _label(record),
            _ms(record["seconds"] - record["weights"]),
            _ms(record["weights"]),
            _ms(record["seconds"]),
        )
        for record in records
    ]
    return table(("parallel=", "dispatch", "layer", "weights", "all"), rows, left=2)


def _memory_table(memory: dict[str, dict[str, int]], config: dict[str, Any]) -> str:
    names = ("weights", "gradients", "optimizer", "activations", "exchange", "workspace")
    rows = [(name, *(f"{m[name] / MIB:.1f}" for m in memory.values())) for name in names]
    label = "this layer" if config["num_layers"] == 1 else f"{config['num_layers']} layers"
    rows.append((label, *(f"{m['all_layers'] / MIB:.1f}" for m in memory.values())))
    return table(("", *memory), rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds + 0.0:.3f}"
