"""``python -m moeops plan``: predict an expert-parallel layer on as many ranks as one likes, from a profile."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from moeops.cost.laws import ITEM_BYTES, LinkLaw
from moeops.cost.model import MODES, CostModel
from moeops.ops.activations import ACTIVATIONS
from moeops.planner.assumptions import assumptions
from moeops.planner.configuration import DISPATCHERS, OPTIMIZER_BYTES, Choice, Configuration
from moeops.planner.memory import Memory, layer_memory
from moeops.planner.predict import (
    Prediction,
    auto_choices,
    by_node_bytes,
    choices,
    predict,
    recommend,
    token_exchange_seconds,
)
from moeops.planner.report import plan_text
from moeops.planner.shapes import MODELS
from moeops.planner.switching import degree_records

HELP = "predict compute, exchange and memory of a layer on many ranks, from a profile"
EPILOG = """a named model, or sizes:

  python -m moeops plan --profile profile.json --world 64 --node-size 8 --between-nodes 45,20 --model qwen3_30b
  python -m moeops plan --profile profile.json --world 8 --num-experts 64 --top-k 6 --d-model 2048 --d-hidden 1408 \
    --tokens 8192

--between-nodes is what the network gives each rank in one direction, in 1e9 bytes per second, and what a message
costs, in microseconds.
"""
SIZES = {  # of a Shape, by option
    "num_experts": "num_experts",
    "top_k": "top_k",
    "d_model": "d_model",
    "d_hidden": "d_hidden",
    "tokens": "num_tokens",
    "activation": "activation",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--profile", type=Path, required=True, help="what python -m moeops profile wrote")
    add("--world", type=int, required=True, help="ranks in all")
    add("--node-size", type=int, default=8, help="ranks per node, default 8")
    add(
        "--expert-parallel",
        type=int,
        metavar="W",
        help="ranks that share the experts; default: all",
    )
    add("--expert-tensor-parallel", type=int, default=1, metavar="P", help="shards of an expert")
    add(
        "--model",
        choices=tuple(MODELS),
        help="sizes of a published model; options below replace some",
    )
    add("--num-experts", type=int, metavar="E")
    add("--top-k", type=int, metavar="K")
    add("--d-model", type=int, metavar="D")
    add("--d-hidden", type=int, metavar="H", help="of one expert")
    add("--tokens", type=int, metavar="T", help="per rank; default: the model's")
    add("--activation", choices=ACTIVATIONS, help="default: swiglu")
    add("--dtype", default="bfloat16", choices=tuple(ITEM_BYTES), help="default: bfloat16")
    add("--capacity-factor", type=float, default=1.25, metavar="F", help="of static, default 1.25")
    add("--imbalance", type=float, default=1.0, metavar="X",
        help="rows of the busiest rank over the mean, default 1")  # fmt: skip
    add("--layers", type=int, default=1, metavar="N", help="of this kind, default 1")
    add("--mode", choices=MODES, default="eager", help="whose host time is taken, default eager")
    add("--optimizer", choices=tuple(OPTIMIZER_BYTES), default="adamw",
        help="whose state is counted: in the weights' type, or float32 with a copy of the weights")  # fmt: skip
    help = "instead of what the profile has: bandwidth of a rank, and time of a message"
    for name in ("--inside-node", "--between-nodes"):
        add(name, metavar="GB/s,us", help=help)
    add("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 2 for arguments or a profile that do not fit."""
    try:
        model = CostModel.load(args.profile)
        if args.inside_node is not None:
            law = parse_link("--inside-node", args.inside_node)
            model = dataclasses.replace(model, inside_node=law)
        if args.between_nodes is not None:
            law = parse_link("--between-nodes", args.between_nodes)
            model = dataclasses.replace(model, between_nodes=law)
        plan = make_plan(model, configuration(args))
    except (OSError, ValueError) as err:
        print(f"moeops plan: {err}", file=sys.stderr)
        return 2
    print(json.dumps(plan, indent=1) if args.json else plan_text(plan))
    return 0


def configuration(args: argparse.Namespace) -> Configuration:
    """The layer that the arguments describe.

    Raises:
        ValueError: a size is missing or does not fit.
    """
    sizes: dict[str, Any] = {"activation": "swiglu"}
    if args.model is not None:
        shape = MODELS[args.model]
        sizes = {field: getattr(shape, field) for field in SIZES.values()}
    for option, field in SIZES.items():
        if getattr(args, option) is not None:
            sizes[field] = getattr(args, option)
    missing = [f"--{name.replace('_', '-')}" for name, field in SIZES.items() if field not in sizes]
    if missing:
        raise ValueError(
            f"plan: {', '.join(missing)} must be given where --model is not, got neither. Pass one of them."
        )
    return Configuration(
        world_size=args.world,
        node_size=args.node_size,
        expert_parallel=args.expert_parallel,
        tensor_parallel=args.expert_tensor_parallel,
        dtype=args.dtype,
        capacity_factor=args.capacity_factor,
        imbalance=args.imbalance,
        num_layers=args.layers,
        mode=args.mode,
        optimizer=args.optimizer,
        **sizes,
    )


def parse_link(option: str, text: str) -> LinkLaw:
    """A link from "GB per second,microseconds per message"."""
    try:
        gigabytes, microseconds = (float(part) for part in text.split(","))
        if not (0 < gigabytes < float("inf") and 0 <= microseconds < float("inf")):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{option} must be GB_PER_SECOND,MICROSECONDS, got {text!r}. Pass a bandwidth above 0 and a latency, such "
            "as 45,20."
        ) from None
    return LinkLaw(0.0, 1e-6 * microseconds, 1e-9 / gigabytes)


def make_plan(model: CostModel, config: Configuration) -> dict[str, Any]:
    """Predict every choice, and choose.

    Returns:
        What ``--json`` prints: times in seconds, sizes in bytes, of one layer on its busiest rank unless they say
        otherwise.

    Raises:
        ValueError: the model lacks a part that this configuration needs.
    """
    predictions = [predict(model, config, choice) for choice in choices(config)]
    best, reason = recommend(config, predictions)
    return {
        "configuration": {
            **dataclasses.asdict(config),
            "expert_parallel": config.ranks,
            "local_experts": config.local_experts,
            "capacity": config.capacity,
            "rows_per_expert": config.rows("exact") / config.local_experts,
        },
        "recommended": {
            **best.choice._asdict(),
            "reason": reason,
            "seconds": best.total,
            "seconds_all_layers": config.num_layers * best.total,
        },
        "choices": [_choice_record(prediction) for prediction in predictions],
        "auto": [
            _choice_record(predict(model, config, choice)) for choice in auto_choices(model, config)
        ],
        "exchange": _exchanges(model, config),
        "memory": {
            dispatcher: _memory_record(config, layer_memory(config, Choice(dispatcher)))
            for dispatcher in DISPATCHERS
        },
        "parallel": degree_records(model, config),
        "gradients": _gradient_sync(model, config),
        "warnings": _warnings(model, config, best),
        "assumptions": assumptions(model, config),
    }


def _choice_record(prediction: Prediction) -> dict[str, Any]:
    return {
        **prediction.choice._asdict(),
        "forward": prediction.forward._asdict(),
        "backward": prediction.backward._asdict(),
        "seconds": prediction.total,
        "host_bound": prediction.host_bound,
    }


def _exchanges(model: CostModel, config: Configuration) -> list[dict[str, Any]]:
    """What one exchange of all tokens of an exact layer sends where, by form."""
    if config.ranks == 1:
        return []
    num_bytes = config.sent_rows("exact") * config.row_bytes
    local, ranks = config.local_ranks, config.ranks
    inside = num_bytes * (local - 1) / ranks
    between = num_bytes * (ranks - local) / ranks
    rows = [("flat", inside, between, local - 1, ranks - local)]
    if config.nodes > 1 and local > 1:
        nodes = config.nodes
        rows.append(("2d", *by_node_bytes(config, config.row_bytes), local - 1, nodes - 1))
        share = num_bytes * (nodes - 1) / nodes
        # Of the leader, the busiest rank.
        rows.append(
            ("leader", 2 * num_bytes * (local - 1), local * share, 2 * (local - 1), nodes - 1)
        )
    return [
        {
            "form": form,
            "bytes_inside_node": inside,
            "bytes_between_nodes": between,
            "messages_inside_node": near,
            "messages_between_nodes": far,
            "seconds": token_exchange_seconds(model, config, Choice("exact", form=form)),
        }
        for form, inside, between, near, far in rows
    ]


def _memory_record(config: Configuration, memory: Memory) -> dict[str, int]:
    kept = memory.weights + memory.gradients + memory.optimizer + memory.activations
    return {
        **memory._asdict(),
        # The buffers of one layer at a time: of the forward, or of the backward.
        "all_layers": config.num_layers * kept + max(memory.exchange, memory.workspace),
    }


def _gradient_sync(model: CostModel, config: Configuration) -> dict[str, Any] | None:
    """The sum of the experts' gradients over their copies, in a ring."""
    copies = config.world_size // config.ranks
    if copies == 1:
        return None
    num_bytes = config.expert_parameters * ITEM_BYTES[config.dtype]
    sent = 2 * num_bytes * (copies - 1) / copies
    name = "all_reduce" if config.world_size <= config.node_size else "between_nodes"
    law = getattr(model, name)
    seconds = None if law is None else law.seconds(sent, 2 * (copies - 1))
    return {"copies": copies, "bytes": num_bytes, "link": name, "seconds": seconds}


def _warnings(model: CostModel, config: Configuration, best: Prediction) -> list[str]:
    found = []
    law = model.experts[config.dtype].forward
    rows = config.rows(best.choice.dispatcher) / config.local_experts / best.choice.degrees.forward
    if 0 < rows * law.seconds_per_product < law.seconds_per_weight:
        needed = law.seconds_per_weight / law.seconds_per_product
        found.append(
            f"an expert gets {rows:.4g} rows at a time: below {needed:.0f} it takes longer to read its weights than to "
            "multiply. More tokens per rank, fewer ranks that share the experts, or fewer chunks use them better."
        )
    if config.capacity_factor < config.imbalance:
        found.append(
            f"static drops rows: a capacity factor of {config.capacity_factor:g} is below the imbalance of "
            f"{config.imbalance:g}."
        )
    if best.host_bound:
        found.append(
            "the device waits for the host in this choice: more tokens per rank, or --mode compiled, use it better."
        )
    return found
