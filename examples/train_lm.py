"""Train a byte-level GPT with Mixture-of-Experts MLPs under torch.compile, on text that is already on this machine.

    python examples/train_lm.py                  about three minutes on two CPU cores, for two models: one with experts,
                                                 and a dense one of equal active FLOPs
    python examples/train_lm.py --no-compare     without the dense one
    python examples/train_lm.py --text my_folder --gate switch --experts 16
    python examples/train_lm.py --layers 4 --experts 4,8,16,16 --top-k 1 --shared-expert residual      PR-MoE
    torchrun --nproc-per-node=2 examples/train_lm.py --expert-parallel      each rank holds half of the experts
    torchrun --nproc-per-node=4 examples/train_lm.py --expert-parallel --expert-tensor-parallel 2  half of each of them
    torchrun --nproc-per-node=2 examples/train_lm.py --expert-parallel --wire int8   a byte per number between ranks

Writes a checkpoint, metrics.json and train_lm.png into --out. Ctrl-C saves; --resume goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lm.errors import UsageError
from lm.gates import GATES, default_top_k, help_text

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
NEEDED = ("torch", "moeops", "tqdm", "matplotlib", "numpy")
CAPACITY = 2.0
QUICK = {
    "experts": 4,
    "d_model": 32,
    "d_hidden": 32,
    "layers": 2,
    "heads": 2,
    "context": 32,
    "batch": 8,
    "steps": 40,
    "eval_every": 20,
    "eval_batches": 4,
    "sample_bytes": 40,
}


class Parser(argparse.ArgumentParser):
    """Answers a bad option with one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(message)


def make_parser() -> Parser:
    """All options."""
    parser = Parser(
        prog="train_lm.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Values in brackets are defaults.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--gate", choices=tuple(GATES), default="qwen3", help=f"[%(default)s] {help_text()}"
    )
    model.add_argument(
        "--experts",
        type=expert_counts,
        default=16,
        help="experts per layer, or a number for each layer, such as 4,8,16,16, PR-MoE's pyramid [%(default)s]",
    )
    model.add_argument(
        "--shared-expert",
        choices=("sum", "sigmoid", "residual"),
        help="one more expert, for all tokens: DeepSeek's, Qwen2-MoE's or PR-MoE's form [none]",
    )
    model.add_argument(
        "--top-k", type=positive_int, help="experts per token [1 for switch and base, else 2]"
    )
    model.add_argument("--d-model", type=positive_int, default=64, help="model width [%(default)s]")
    model.add_argument(
        "--d-hidden", type=positive_int, default=64, help="width of one expert [%(default)s]"
    )
    model.add_argument("--layers", type=positive_int, default=2, help="[%(default)s]")
    model.add_argument(
        "--heads", type=positive_int, default=4, help="attention heads [%(default)s]"
    )
    model.add_argument(
        "--context", type=positive_int, default=128, help="bytes the model sees [%(default)s]"
    )
    dense = model.add_mutually_exclusive_group()
    dense.add_argument("--dense", action="store_true", help="train the dense baseline instead")
    dense.add_argument("--no-compare", action="store_true", help="train no baseline")

    data = parser.add_argument_group("data")
    data.add_argument("--text", type=Path, help="file or folder [Python's own standard library]")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch", type=positive_int, default=16, help="sequences per step [%(default)s]"
    )
    training.add_argument("--steps", type=positive_int, default=1600, help="[%(default)s]")
    training.add_argument(
        "--lr", type=positive_float, default=1e-2, help="peak learning rate [%(default)s]"
    )
    training.add_argument(
        "--weight-decay", type=factor, default=0.1, help="of matrices [%(default)s]"
    )
    training.add_argument(
        "--aux-loss-weight", type=factor, default=0.01, help="of the gate's loss [%(default)s]"
    )
    training.add_argument(
        "--seed", type=int, default=0, help="of weights and data order [%(default)s]"
    )
    training.add_argument(
        "--eval-every",
        type=positive_int,
        default=200,
        help="steps between validations [%(default)s]",
    )
    training.add_argument(
        "--eval-batches", type=positive_int, default=16, help="of a validation [%(default)s]"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--eager", action="store_true", help="without torch.compile")
    run.add_argument(
        "--expert-parallel",
        action="store_true",
        help="under torchrun: divide the experts among the ranks, instead of copying them",
    )
    run.add_argument(
        "--expert-tensor-parallel",
        type=positive_int,
        default=1,
        metavar="P",
        help="with --expert-parallel: divide each expert's hidden units among P of the ranks [%(default)s]",
    )
    run.add_argument(
        "--dispatch",
        choices=("exact", "gather", "static"),
        default="exact",
        help="gather: all tokens to all ranks; static: a fixed number of rows per expert, what does not fit is dropped "
        "[exact]",
    )
    run.add_argument(
        "--capacity",
        type=positive_float,
        help="of --dispatch static: a factor on the mean load of an expert [2]",
    )
    run.add_argument(
        "--wire",
        choices=("int8", "float8"),
        help="with --expert-parallel: encode rows and their gradients on the wires, and train without as well, in the "
        "place of the dense baseline",
    )
    run.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="[bfloat16 on CUDA, else float32]"
    )
    run.add_argument("--device", help="[cuda where there is one, else cpu]")
    run.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="folder [%(default)s]")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run.add_argument(
        "--no-checkpoint",
        action="store_true",
        help="write none: that of a billion parameters takes longer than many steps",
    )
    run.add_argument(
        "--sample-bytes", type=positive_int, default=300, help="to generate [%(default)s]"
    )
    run.add_argument("--quick", action="store_true", help="a tiny model and few steps: seconds")
    return parser


def positive_int(text: str) -> int:
    """Option type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def expert_counts(text: str) -> int | tuple[int, ...]:
    """Option type."""
    counts = tuple(positive_int(part) for part in text.split(","))
    return counts[0] if len(counts) == 1 else counts


def factor(text: str) -> float:
    """Option type."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, got {value}")
    return value


def positive_float(text: str) -> float:
    """Option type."""
    value = factor(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be above 0, got 0")
    return value


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse, fill in what depends on other options, and refuse what does not fit."""
    parser = make_parser()
    if "--quick" in arguments:  # other defaults; what is given still wins
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    pyramid = not isinstance(options.experts, int)
    if pyramid and len(options.experts) != options.layers:
        raise UsageError(
            f"--experts must be one number, or one for each of the --layers = {options.layers}, got "
            f"{len(options.experts)} of them. Change one of them."
        )
    fewest = min(options.experts) if pyramid else options.experts
    if options.top_k is None:
        options.top_k = default_top_k(options.gate, fewest)
    if options.top_k > fewest:
        raise UsageError(
            f"--top-k must be at most {'the least of --experts' if pyramid else '--experts'} = {fewest}, got "
            f"{options.top_k}. Lower it."
        )
    if options.shared_expert is not None and options.dense:
        raise UsageError(
            f"--shared-expert must be left out with --dense, got {options.shared_expert}. Leave one of them out."
        )
    wanted = GATES[options.gate].top_k
    if wanted is not None and options.top_k != wanted:
        raise UsageError(
            f"--top-k must be {wanted} for the {options.gate} gate, got {options.top_k}. Leave it out."
        )
    # The loss of a gate that sees later tokens is comparable with nothing.
    is_comparable = GATES[options.gate].causal != "no"
    options.compare = is_comparable and not (options.dense or options.no_compare or options.wire)
    if options.wire is not None and (options.dense or not options.expert_parallel):
        raise UsageError(
            f"--wire must come with --expert-parallel and without --dense, got {options.wire}. Nothing else is sent."
        )
    if options.wire is not None and options.dispatch == "gather":
        raise UsageError(
            f"--wire must come with --dispatch exact or static, got {options.wire} and gather, which adds rows up on "
            "their way."
        )
    if options.dispatch == "static":
        options.capacity = CAPACITY if options.capacity is None else options.capacity
    elif options.capacity is not None:
        raise UsageError(
            f"--capacity must come with --dispatch static, got {options.capacity}. Exact dispatch drops nothing."
        )
    if options.expert_tensor_parallel > 1 and not options.expert_parallel:
        raise UsageError(
            f"--expert-tensor-parallel must come with --expert-parallel, got {options.expert_tensor_parallel} alone. "
            "Give both."
        )
    if options.no_checkpoint and options.resume:
        raise UsageError(
            "--resume must come without --no-checkpoint, got both. Leave one of them out."
        )
    if options.d_model % (2 * options.heads):
        raise UsageError(
            f"--d-model must be a multiple of 2 * --heads = {2 * options.heads}, got {options.d_model}. "
            "Change one of them."
        )
    return options


def check_installed() -> None:
    """Refuse to start without a package, in one clear line."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} must be installed. Run: pip install 'moeops[examples]', or use `make train`."
        )


def load_run() -> Callable[[argparse.Namespace], int]:
    """Import the rest: late, so that --help is quick."""
    check_installed()
    try:
        from lm.run import run
    except ImportError as err:  # an unbuilt or broken moeops says what to do
        raise UsageError(str(err)) from err
    return run


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        return load_run()(options)
    except UsageError as err:
        print(f"train_lm.py: {err}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("train_lm.py: stopped at once; the last checkpoint stands.", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
