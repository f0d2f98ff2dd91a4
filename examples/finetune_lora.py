"""Fine-tune a Hugging Face Mixture-of-Experts model with LoRA on its experts, compiled; under two minutes on CPU.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --text my_folder --rank 8

No model is downloaded: a small Qwen3-MoE with random weights learns bytes of Python's standard library, and is saved.
It is loaded again as any model of the hub would be, with ``experts_implementation="moeops"``; then PEFT's LoRA on the
experts, and nothing else, learns another text: the prose of Python's language reference, or --text. The adapter is
saved, loaded and merged; all three give the same loss on held-out text. Writes model, adapter and results into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lm.data import Batches, load_corpus
from lm.errors import UsageError
from torch import Tensor, nn

try:
    import peft
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import moeops.integrations.peft
    from moeops.integrations.transformers import explain
except ImportError as err:
    sys.exit(f'{err}\nThis example needs pip install "moeops[peft]".')

BATCH, CONTEXT, HELD_OUT_BATCHES = 8, 96, 4
LEARNING_RATE, LORA_LEARNING_RATE = 3e-3, 5e-3
PROSE = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")


def new_config(num_layers: int) -> Qwen3MoeConfig:
    """Qwen3-MoE on bytes: 8 experts, 2 per token."""
    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=96,
        moe_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        norm_topk_prob=True,
        output_router_logits=False,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def loss_of(model: Callable, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the next byte."""
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model: nn.Module, batches: Batches, steps: int, learning_rate: float) -> list[float]:
    """Train what requires gradients; the whole step's forward and backward are one compiled graph each."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    compiled = torch.compile(model, fullgraph=True)
    losses = []
    for step in range(steps):
        loss = loss_of(compiled, *batches.train(step))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def bits_per_byte(model: nn.Module, batches: Batches) -> float:
    """Loss on held-out text."""
    model.eval()
    with torch.no_grad():
        parts = [float(loss_of(model, *part)) for part in batches.held_out(HELD_OUT_BATCHES)]
    return sum(parts) / len(parts) / math.log(2)


def load(folder: Path) -> nn.Module:
    """The saved model with its experts on moeops."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moeops")


def main(argv: list[str] | None = None) -> int:
    """Pretrain, adapt, save, load, merge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, default=PROSE, help="what the adapter learns")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_lora"))
    parser.add_argument("--steps", type=int, default=150, help="of the model, and of the adapter")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    args = parser.parse_args(argv)
    begin = time.perf_counter()

    device = torch.device("cpu")
    try:
        code = Batches(load_corpus(None), BATCH, CONTEXT, 0, device)
        prose = Batches(load_corpus(args.text), BATCH, CONTEXT, 0, device)
    except UsageError as err:
        parser.error(str(err))

    torch.manual_seed(0)
    config = new_config(args.layers)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moeops")
    losses = train(model, code, args.steps, LEARNING_RATE)
    print(
        f"pretrained on code, loss {losses[0]:.2f} -> {losses[-1]:.2f}, {time.perf_counter() - begin:.0f} s"
    )
    model.save_pretrained(args.out / "model")

    moeops.integrations.peft.enable()
    base = load(args.out / "model")
    print(*explain(base), sep="\n")
    lora = peft.LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base, lora)
    adapted.print_trainable_parameters()
    before = bits_per_byte(adapted, prose)
    adapter_losses = train(adapted, prose, args.steps, LORA_LEARNING_RATE)
    after = bits_per_byte(adapted, prose)
    print(f"adapted to prose, {before:.3f} -> {after:.3f} bits per byte of held-out text")

    adapted.save_pretrained(args.out / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(args.out / "model"), args.out / "adapter")
    results = {
        "losses": losses,
        "adapter_losses": adapter_losses,
        "before": before,
        "after": after,
        "loaded": bits_per_byte(loaded, prose),
        "merged": bits_per_byte(loaded.merge_and_unload(), prose),
        "seconds": time.perf_counter() - begin,
    }
    print(
        f"loaded {results['loaded']:.3f}, merged {results['merged']:.3f}, {results['seconds']:.0f} s in all"
    )
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
