"""LoRA on the experts of one transformers layer: ``python -m benchmarks.lora``.

Forward and backward of Qwen3-MoE's experts with PEFT adapters on both weights, which are frozen: on moeops, which gets
the factors (``moeops.integrations.peft``), and on transformers' grouped_mm, for which PEFT adds them to the weights.
Outputs and gradients must agree before anything is timed. Implementations take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

IMPLEMENTATIONS = ("moeops", "moeops-compiled", "grouped_mm")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # relative Frobenius error, against float32


class Layer(nn.Module):
    """Experts alone, in the place where PEFT looks for them."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        self.config = Qwen3MoeConfig(
            hidden_size=args.width, moe_intermediate_size=args.hidden, num_experts=args.experts
        )
        self.experts = Qwen3MoeExperts(self.config)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Tokens to tokens."""
        return self.experts(x, topk_ids, topk_weights)


def build(args: argparse.Namespace) -> nn.Module:
    """One layer with one adapter, whose B is not zero as PEFT's would be at the start."""
    import peft

    import moeops.integrations.peft

    moeops.integrations.peft.enable()
    torch.manual_seed(0)
    with torch.device(args.device):
        layer = Layer(args).to(args.dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        config = peft.LoraConfig(
            r=args.rank,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        model = peft.get_peft_model(layer, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.02)
    return model


def make_step(
    model: nn.Module, implementation: str, given: Sequence[Tensor], compiled: dict
) -> Callable[[], dict[str, Tensor]]:
    """A function that runs forward and backward and returns output and gradients."""
    x, topk_ids, topk_weights = given
    config = model.base_model.model.config
    name = implementation.removesuffix("-compiled")
    run: Callable = model
    if name != implementation:
        run = compiled.setdefault(implementation, torch.compile(model, fullgraph=True))
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grad = torch.ones_like(x) / x.shape[0]

    def step() -> dict[str, Tensor]:
        config._experts_implementation = name
        leaf = x.detach().requires_grad_()
        y = run(leaf, topk_ids, topk_weights)
        grads = torch.autograd.grad(y, [leaf, *factors.values()], grad)
        return {"y": y.detach(), **dict(zip(["x", *factors], grads, strict=True))}

    return step


def verify(name: str, actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """Raise where a result is another than expected."""
    for key, value in expected.items():
        error = float((actual[key].float() - value.float()).norm() / value.float().norm())
        if not error < limit:
            raise ValueError(f"{name}: {key} is off by {error:.1e}, more than {limit:.0e}.")


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one step, with the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def measure(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Median milliseconds of every implementation."""
    model = build(args)
    with torch.device(args.device):
        x = torch.randn(tokens, args.width, dtype=args.dtype)
        topk_weights, topk_ids = torch.rand(tokens, args.experts).topk(args.top_k)
    compiled: dict = {}
    steps = {
        name: make_step(model, name, (x, topk_ids, topk_weights), compiled)
        for name in args.implementations
    }
    results = {name: step() for name, step in steps.items()}
    expected = results[args.implementations[-1]]
    for name, result in results.items():
        verify(name, result, expected, TOLERANCE[args.dtype])
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(milliseconds(step, args.device))
    if args.device == "cuda":
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            print(f"T {tokens:6d}  {name:16s} {peak:8.0f} MB over weights and tokens")
    return {name: statistics.median(values) for name, values in times.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Defaults suit a CPU; Qwen3-30B-A3B is --width 2048 --hidden 768 --experts 128 --top-k 8 --dtype bfloat16."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora", description=__doc__)
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--tokens", default="128,1024")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    args.implementations = args.implementations.split(",")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parse(argv)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, E {args.experts}, "
        f"D {args.width}, H {args.hidden}, K {args.top_k}, r {args.rank}; forward and backward"
    )
    for tokens in map(int, args.tokens.split(",")):
        times = measure(args, tokens)
        slowest = times[args.implementations[-1]]
        for name, value in times.items():
            print(
                f"T {tokens:6d}  {name:16s} {value:8.2f} ms  {slowest / value:5.2f} x {args.implementations[-1]}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
