"""A byte-level GPT with Mixture-of-Experts MLPs. B sequences, S bytes each, T = B * S tokens, D model width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeops
from lm.gates import GATES, Sizes
from moeops import gates
from moeops.dispatch import codec_hooks
from moeops.distributed import Exact, Gather, Static
from moeops.layers import FMoETransformerMLP

VOCABULARY = 256  # bytes
# --shared-expert, and FMoETransformerMLP's shared_expert_gate: DeepSeek's, Qwen2-MoE's and PR-MoE's form.
SHARED = {"sum": None, "sigmoid": "sigmoid", "residual": "softmax"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Attributes:
        gate: a name in ``GATES``, or None for one dense MLP as wide as all experts of a token: equal active FLOPs.
        experts: experts per layer, or of each layer: PR-MoE's pyramid has more of them in later layers.
        top_k: experts per token.
        d_model: width of the residual stream.
        d_hidden: hidden width of one expert.
        layers: number of blocks.
        heads: attention heads per block.
        context: longest sequence in bytes.
        dispatch: how tokens get to experts: "exact", "gather", or "static" with room for ``capacity`` rows.
        capacity: of the static dispatcher: a factor on ``T * K / E``.
        shared_expert: a key of ``SHARED``: how an expert for all tokens is added; None for no such expert.
        wire: what rows are encoded as between ranks, "int8" or "float8"; ``None`` sends them as they are.
    """

    gate: str | None
    experts: int | tuple[int, ...]
    top_k: int
    d_model: int
    d_hidden: int
    layers: int
    heads: int
    context: int
    dispatch: str = "exact"
    capacity: float | None = None
    shared_expert: str | None = None
    wire: str | None = None

    def experts_of(self, layer: int) -> int:
        """Experts of a layer."""
        return self.experts if isinstance(self.experts, int) else self.experts[layer]

    @property
    def num_active(self) -> int:
        """Experts that work on a token."""
        return self.top_k + (self.shared_expert is not None)


def make_gate(config: ModelConfig, experts: int) -> Callable[..., nn.Module]:
    """The gate's class with its options, as a layer of so many experts calls it."""
    spec = GATES[config.gate]
    sizes = Sizes(experts, config.top_k, config.d_model, config.context)
    return partial(getattr(gates, spec.cls), **spec.options(sizes))


def make_dispatch(config: ModelConfig) -> Exact | Gather | Static:
    """How tokens get to experts, with its options."""
    if config.dispatch == "gather":
        return Gather()
    if config.dispatch == "static":
        assert config.capacity is not None
        return Static(config.capacity)
    return Exact()


class DenseMLP(nn.Module):
    """SwiGLU MLP: what one expert computes, wider."""

    def __init__(self, d_model: int, d_hidden: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_hidden)
        self.down = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``."""
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        half = config.d_model // config.heads // 2
        angles = torch.arange(config.context)[:, None] * 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)  # [context, half]
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``."""
        batch, length, d_model = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, S, head width]
        y = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, d_model))

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: ModelConfig, experts: int, world_size: int, num_shards: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model)
        if config.gate is None:
            self.mlp: nn.Module = DenseMLP(config.d_model, config.d_hidden * config.num_active)
        else:
            self.mlp = FMoETransformerMLP(
                experts // (world_size // num_shards),
                config.d_model,
                config.d_hidden,
                activation="swiglu",
                # Ranks with all experts average their gradients like everything else's.
                expert_dp_comm="dp" if world_size == 1 else "none",
                world_size=world_size,
                expert_tensor_parallel_size=num_shards,
                top_k=config.top_k,
                gate=make_gate(config, experts),
                dispatch=make_dispatch(config),
                shared_expert=None if config.shared_expert is None else config.d_hidden,
                shared_expert_gate=SHARED.get(config.shared_expert),
            )
            if config.wire is not None:
                self.mlp.set_stage_hooks(**codec_hooks(config.wire, config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Bytes to logits of the next byte.

    ``world_size`` ranks divide the experts, each with its own tokens; ``num_shards`` of them divide each expert.
    """

    def __init__(self, config: ModelConfig, world_size: int = 1, num_shards: int = 1):
        super().__init__()
        self.config = config
        self.expert_ranks = world_size // num_shards
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, config.experts_of(layer), world_size, num_shards)
            for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[B, S]`` int64 to logits ``[B, S, 256]``."""
        x = self.embedding(tokens)
        with gates.token_ids(self, tokens):  # for the hash gate, which looks experts up by byte
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))

    def losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats per byte, and the gates' auxiliary loss summed over the layers."""
        logits = self(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return loss, moeops.auxiliary_loss(self)

    def num_parameters(self) -> tuple[int, int]:
        """All parameters, those on other ranks included, and those that one token uses."""
        total = active = sum(p.numel() for p in self.parameters())
        if self.config.gate is None:
            return total, total
        for layer, block in enumerate(self.blocks):
            here = whole = 0  # parameters of experts, and with the shards on other ranks
            for name, parameter in block.mlp.experts.named_parameters():
                span = block.mlp.experts.shard_span(name)
                here += parameter.numel()
                whole += parameter.numel() // parameter.shape[span.dim] * span.size
            experts = whole * self.expert_ranks
            total += experts - here
            active += experts * self.config.top_k // self.config.experts_of(layer) - here
        return total, active

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, temperature: float, seed: int) -> bytes:
        """Continue ``prompt`` by sampling; leaves the global random state alone."""
        device = self.head.weight.device
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt)], device=device)
        was_training = self.training
        self.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for _ in range(num_bytes):
                logits = self(tokens[:, -self.config.context :])[0, -1].float().cpu()
                probabilities = (logits / temperature).softmax(0)
                chosen = torch.multinomial(probabilities, 1, generator=generator).to(device)
                tokens = torch.cat((tokens, chosen[None]), dim=1)
        self.train(was_training)
        return bytes(tokens[0].tolist())
