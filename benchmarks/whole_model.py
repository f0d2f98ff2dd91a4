"""A transformers model whose experts run in moeops: ``python -m benchmarks.whole_model``.

A Qwen3-MoE, gpt-oss or DeepSeek-V3 of full width with few layers and random weights, in bfloat16: a training step
(forward, backward, AdamW) and a decode step of a few tokens without cache, compiled and eager, with moeops' experts,
with transformers' own grouped_mm, and with its loop over experts. The losses of the first step must agree.
batched_mm, which copies the weights of every token's experts, is for decoding and is timed there alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine

MODELS = ("qwen3_moe", "gpt_oss", "deepseek_v3")
IMPLEMENTATIONS = ("moeops", "grouped_mm", "batched_mm", "eager")
LOSS_TOLERANCE = 2e-2  # of the loss near ln(vocabulary), between implementations in bfloat16


@dataclass(frozen=True)
class Row:
    """One implementation; times are medians in milliseconds, memory is 2^20 bytes, NaN is what was not measured."""

    experts: str
    compiled: bool
    train_ms: float
    train_tokens_per_s: float
    decode_ms: float
    peak_mb: float


def as_json(row: Row) -> dict[str, object]:
    """The row with null for what was not measured."""
    return {name: None if value != value else value for name, value in asdict(row).items()}


def make_config(args: argparse.Namespace):
    """The configuration of one of MODELS: experts, width and layers as asked for, attention of 64 columns a head."""
    import transformers

    common = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.width,
        "num_experts_per_tok": args.top_k,
        "num_hidden_layers": args.layers,
        "num_attention_heads": max(1, args.width // 64),
        "num_key_value_heads": max(1, args.width // 512),
        "output_router_logits": False,
        "use_cache": False,
    }
    if args.model == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **common,
            moe_intermediate_size=args.hidden,
            num_experts=args.experts,
            head_dim=64,
            norm_topk_prob=True,
        )
    if args.model == "gpt_oss":
        return transformers.GptOssConfig(
            **common, intermediate_size=args.hidden, num_local_experts=args.experts, head_dim=64
        )
    return transformers.DeepseekV3Config(
        **{**common, "num_key_value_heads": common["num_attention_heads"]},
        moe_intermediate_size=args.hidden,
        n_routed_experts=args.experts,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=max(1, args.width // 4),
        kv_lora_rank=max(1, args.width // 8),
    )


def build(experts: str, args: argparse.Namespace) -> torch.nn.Module:
    """The same weights for every implementation."""
    from transformers import AutoModelForCausalLM

    import moeops.integrations.transformers  # noqa: F401  (registers "moeops")

    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(
            make_config(args), experts_implementation=experts, dtype=torch.bfloat16
        )
    return model


def measure(experts: str, compiled: bool, args: argparse.Namespace) -> tuple[Row, float]:
    """Times of one implementation, and the loss of the first step, before any update."""
    torch._dynamo.reset()
    model = build(experts, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator(args.device).manual_seed(1)
    ids = torch.randint(
        args.vocabulary, (args.batch, args.length), device=args.device, generator=generator
    )
    run = torch.compile(model) if compiled else model

    def step() -> Tensor:
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    first_loss = train_ms = peak = math.nan
    if experts != "batched_mm":
        first_loss = float(step())
        train_ms = median_ms(step, args.repeats)
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() / 2**20
    tokens = ids[:1, : args.decode_tokens].T.contiguous()  # a batch of single tokens

    def decode() -> Tensor:
        with torch.no_grad():
            return run(input_ids=tokens).logits

    decode_ms = median_ms(decode, 4 * args.repeats)
    tokens_per_s = ids.numel() / train_ms * 1e3
    return Row(experts, compiled, train_ms, tokens_per_s, decode_ms, peak), first_loss


def median_ms(function: Callable[[], Tensor], repeats: int) -> float:
    """Wall time of whole steps, host included, after three warm-ups."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Defaults are Qwen3-30B-A3B's widths."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_model", description=__doc__)
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--model", choices=MODELS, default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.device = "cuda"
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where implementations disagree."""
    args = parse(argv)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model}, {args.layers} layers"
    )
    print(f"{args.batch} x {args.length} tokens a step, {args.decode_tokens} a decode step")
    rows, losses = [], {}
    for experts in args.implementations.split(","):
        for compiled in (True, False) if experts != "eager" else (False,):
            gc.collect()  # the model before
            torch.cuda.empty_cache()
            row, losses[experts, compiled] = measure(experts, compiled, args)
            rows.append(row)
            print(
                f"{experts:12s} {'compiled' if compiled else 'eager':9s} train {row.train_ms:8.1f} ms "
                f"{row.train_tokens_per_s:9.0f} tokens/s  decode {row.decode_ms:6.2f} ms  "
                f"peak {row.peak_mb:7.0f} MB  loss {losses[experts, compiled]:.4f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "machine": machine.describe(torch.device(args.device)),
                    "rows": [as_json(r) for r in rows],
                },
                indent=2,
            )
        )
    known = [loss for loss in losses.values() if not math.isnan(loss)]
    spread = max(known, default=0) - min(known, default=0)
    if spread > LOSS_TOLERANCE:
        print(f"losses differ by {spread:.4f}, more than {LOSS_TOLERANCE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
