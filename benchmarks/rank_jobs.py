"""What the benchmarks of several ranks have in common: arguments, and the layer that they build."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import moeops
from benchmarks import machine, shapes

CUDA_TOKENS = 8192  # per rank
CUDA_CONFIGS = ("qwen3_30b", "mixtral_8x7b")


def parser_of(name: str, description: str | None, num_ranks: int) -> argparse.ArgumentParser:
    """A parser with the arguments that every such benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"torchrun --nproc-per-node={num_ranks} -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--tokens", type=int, help=f"per rank; default: {CUDA_TOKENS}; cpu: the shape's"
    )
    parser.add_argument("--json", type=Path, help=f"default: runs/{name}_<device>.json")
    parser.add_argument("--commit", help="recorded where the checkout has no git")
    return parser


def parse(
    parser: argparse.ArgumentParser, name: str, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Arguments with the defaults of ``parser_of`` filled in for the device."""
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.json = args.json or machine.ROOT / "runs" / f"{name}_{args.device}.json"
    return args


def shapes_of(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    option: str,
    default: Sequence[str] = CUDA_CONFIGS,
) -> list[shapes.Shape]:
    """The shapes whose names an option has, between commas, with the tokens of a rank."""
    given = getattr(args, option)
    names = given.split(",") if given else default if args.device == "cuda" else ["tiny"]
    if unknown := sorted(set(names) - set(shapes.SHAPES)):
        parser.error(f"--{option}: unknown {unknown}, choose from {sorted(shapes.SHAPES)}")
    tokens = args.tokens or (CUDA_TOKENS if args.device == "cuda" else None)
    return [
        dataclasses.replace(shapes.SHAPES[n], num_tokens=tokens or shapes.SHAPES[n].num_tokens)
        for n in names
    ]


def build_layer(
    shape: shapes.Shape,
    num_expert: int,
    kind: type[moeops.FMoETransformerMLP] = moeops.FMoETransformerMLP,
    **options: Any,
) -> moeops.FMoETransformerMLP:
    """A layer of a shape, without biases."""
    sizes = (num_expert, shape.d_model, shape.d_hidden, shape.activation)
    return kind(*sizes, bias=False, top_k=shape.top_k, **options)
