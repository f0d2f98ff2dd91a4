"""Train the same small model with every gate of moeops at equal cost, and write a table and a picture.

    python examples/compare_gates.py                               all gates, some minutes on a CPU core
    python examples/compare_gates.py --gates naive,switch,gshard --steps 1000 --seeds 3

Same data, steps, seeds, attention and embedding for all; experts of equal total size and equal active size per token:
where a gate knows one expert per token only, experts are fewer and wider. Writes compare_gates.md, compare_gates.csv
and compare_gates.png into --out. A gate that is finished is not trained again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm.errors import UsageError
from lm.gates import GATES
from train_lm import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Parser,
    check_installed,
    positive_float,
    positive_int,
)

DENSE = "dense"


def make_parser() -> Parser:
    """All options."""
    parser = Parser(
        prog="compare_gates.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"Gates: {', '.join(GATES)}. Values in brackets are defaults.",
    )
    parser.add_argument(
        "--gates", default=",".join(GATES), help=f"comma list; {DENSE} is always there [all]"
    )
    parser.add_argument("--steps", type=positive_int, default=600, help="[%(default)s]")
    parser.add_argument("--seeds", type=positive_int, default=1, help="runs per gate [%(default)s]")
    parser.add_argument("--experts", type=positive_int, default=8, help="[%(default)s]")
    parser.add_argument(
        "--top-k", type=positive_int, default=2, help="experts per token [%(default)s]"
    )
    parser.add_argument("--d-model", type=positive_int, default=64, help="[%(default)s]")
    parser.add_argument(
        "--d-hidden", type=positive_int, default=64, help="width of one expert [%(default)s]"
    )
    parser.add_argument("--layers", type=positive_int, default=2, help="[%(default)s]")
    parser.add_argument("--heads", type=positive_int, default=4, help="[%(default)s]")
    parser.add_argument("--context", type=positive_int, default=64, help="[%(default)s]")
    parser.add_argument("--batch", type=positive_int, default=16, help="[%(default)s]")
    parser.add_argument("--lr", type=positive_float, default=3e-3, help="[%(default)s]")
    parser.add_argument(
        "--eval-batches", type=positive_int, default=32, help="held-out batches [%(default)s]"
    )
    parser.add_argument("--text", type=Path, help="file or folder [Python's standard library]")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--device", help="[cuda where there is one, else cpu]")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare_gates"), help="folder [%(default)s]"
    )
    return parser


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse, and refuse what does not fit."""
    options = make_parser().parse_args(arguments)
    names = [name.strip() for name in options.gates.split(",") if name.strip()]
    unknown = [name for name in names if name not in GATES and name != DENSE]
    if unknown or not names:
        raise UsageError(
            f"--gates must be a comma list of {', '.join(GATES)}, got {options.gates!r}. Check {unknown}."
        )
    options.gates = [DENSE, *(name for name in GATES if name in names)]
    if options.top_k > options.experts:
        raise UsageError(
            f"--top-k must be at most --experts = {options.experts}, got {options.top_k}. Lower it."
        )
    for name in options.gates[1:]:
        only = GATES[name].top_k
        if only is not None and (options.experts * only) % options.top_k:
            raise UsageError(
                f"--experts times {only} must be a multiple of --top-k = {options.top_k} for the {name} gate, got "
                f"{options.experts}. Leave the gate out or change them."
            )
    if options.d_model % (2 * options.heads):
        raise UsageError(
            f"--d-model must be a multiple of 2 * --heads = {2 * options.heads}, got {options.d_model}. "
            "Change one of them."
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        check_installed()
        try:
            from lm.compare import compare
        except ImportError as err:  # an unbuilt or broken moeops says what to do
            raise UsageError(str(err)) from err
        return compare(options, sys.argv[1:] if arguments is None else arguments)
    except UsageError as err:
        print(f"compare_gates.py: {err}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("compare_gates.py: stopped at once; what is finished stands.", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
