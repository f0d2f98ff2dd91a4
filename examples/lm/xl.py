"""Transformer-XL with experts, written as for FastMoE. B streams, L bytes of a segment, M of memory, D model width.

Dai et al. 2019, "Transformer-XL: attentive language models beyond a fixed-length context", arXiv:1901.02860.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeops.integrations.fmoe

moeops.integrations.fmoe.install()  # from here on `import fmoe` is moeops

from fmoe import FMoETransformerMLP
from fmoe.gates import GShardGate, NaiveGate, SwitchGate

VOCABULARY = 256  # bytes
GATES = {"naive": NaiveGate, "gshard": GShardGate, "switch": SwitchGate}


@dataclass(frozen=True)
class XLConfig:
    """Sizes of the model.

    Attributes:
        gate: a key of ``GATES``.
        layers: number of blocks.
        d_model: ``D``.
        heads: attention heads per block.
        d_hidden: hidden width of one expert.
        experts: experts per layer.
        top_k: experts per token.
        dropout: of embeddings, attention's and experts' outputs, and inside of experts.
        memory: ``M``, positions before a segment that attention sees.
    """

    gate: str
    layers: int
    d_model: int
    heads: int
    d_hidden: int
    experts: int
    top_k: int
    dropout: float
    memory: int


class RelativeAttention(nn.Module):
    """Causal attention to a segment and its memory, by content and by distance.

    The score of query ``i`` and key ``j`` is ``(q_i + u) k_j + (q_i + v) W_r r_(i - j)``, with sinusoids ``r`` of the
    distance, and ``u`` and ``v`` of each head.
    """

    def __init__(self, config: XLConfig):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        width = config.d_model // config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.distance = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.heads, 1, width))  # u
        self.distance_bias = nn.Parameter(torch.zeros(config.heads, 1, width))  # v
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, memory: Tensor, sinusoids: Tensor, hidden: Tensor) -> Tensor:
        """Attend, add, normalise.

        Args:
            x: ``[B, L, D]``.
            memory: ``[B, M, D]``.
            sinusoids: of distances ``M + L - 1`` to 0, ``[M + L, D]``.
            hidden: True where a query must not see a key, ``[L, M + L]``.

        Returns:
            ``[B, L, D]``.
        """
        length, width = x.shape[1], x.shape[2] // self.heads
        q, k, v = self.qkv(torch.cat((memory, x), 1)).chunk(3, -1)  # each [B, M + L, D]
        q = q.narrow(1, memory.shape[1], length)
        q, k, v = (part.unflatten(2, (self.heads, width)).transpose(1, 2) for part in (q, k, v))
        r = self.distance(sinusoids).unflatten(1, (self.heads, width)).permute(1, 2, 0)
        by_distance = shift((q + self.distance_bias) @ r) / width**0.5  # [B, heads, L, M + L]
        scores = by_distance.masked_fill(hidden, float("-inf"))
        y = F.scaled_dot_product_attention(q + self.content_bias, k, v, attn_mask=scores)
        y = self.out(y.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


def shift(scores: Tensor) -> Tensor:
    """Turn scores of distances ``N - 1`` to 0 into scores of keys 0 to ``N - 1``, for the last ``L`` of ``N`` queries.

    Query ``i`` of the ``L`` is at position ``N - L + i``, and so ``N - L + i - j`` behind key ``j``. Keys after a query
    get any score.

    Args:
        scores: ``[B, heads, L, N]``.

    Example:
        >>> shift(torch.tensor([[[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]]]))[0, 0].tolist()
        [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0]]
    """
    batch, heads, length, num_keys = scores.shape
    # One column more shifts each row of the flat numbers by one against the row before.
    padded = F.pad(scores, (1, 0)).view(batch, heads, num_keys + 1, length)
    return padded[:, :, 1:].reshape(batch, heads, length, num_keys)


class ExpertsMLP(FMoETransformerMLP):
    """FastMoE's layer in the place of a position-wise MLP: experts, residual, norm."""

    def __init__(self, config: XLConfig):
        activation: nn.Module = nn.ReLU()
        if config.dropout > 0:
            activation = nn.Sequential(activation, nn.Dropout(config.dropout))
        super().__init__(
            num_expert=config.experts,
            d_model=config.d_model,
            d_hidden=config.d_hidden,
            activation=activation,
            top_k=config.top_k,
            gate=GATES[config.gate],
        )
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inp: Tensor) -> Tensor:
        """Map ``[B, L, D]`` to ``[B, L, D]``."""
        return self.layer_norm(inp + self.dropout(super().forward(inp)))


class Block(nn.Module):
    """Attention and experts."""

    def __init__(self, config: XLConfig):
        super().__init__()
        self.attention = RelativeAttention(config)
        self.mlp = ExpertsMLP(config)

    def forward(self, x: Tensor, memory: Tensor, sinusoids: Tensor, hidden: Tensor) -> Tensor:
        """Map ``[B, L, D]`` to ``[B, L, D]``."""
        return self.mlp(self.attention(x, memory, sinusoids, hidden))


class TransformerXL(nn.Module):
    """Bytes and the memory of those before to logits of the next byte."""

    def __init__(self, config: XLConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.d_model, VOCABULARY)

    def empty_memory(self, batch: int) -> tuple[Tensor, Tensor]:
        """Memory of streams that begin: states ``[layers, B, M, D]``, and how many of them are valid, ``[]`` int64."""
        c, weight = self.config, self.head.weight
        states = weight.new_zeros(c.layers, batch, c.memory, c.d_model)
        return states, torch.zeros((), dtype=torch.int64, device=weight.device)

    def forward(
        self, tokens: Tensor, memory: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Read a segment.

        Args:
            tokens: ``[B, L]`` int64.
            memory: of the segment before.

        Returns:
            Logits ``[B, L, 256]``, and the memory for the next segment, without gradients.
        """
        states, num_valid = memory
        length, size = tokens.shape[1], self.config.memory
        key = torch.arange(size + length, device=tokens.device)
        query = key[size:, None]
        hidden = (key > query) | (key < size - num_valid)
        sinusoids = self._sinusoids(key.flip(0))
        x = self.embedding(tokens) * self.config.d_model**0.5
        x = F.dropout(x, self.config.dropout, self.training)
        kept = []
        for block, state in zip(self.blocks, states, strict=True):
            kept.append(torch.cat((state, x.detach()), 1)[:, length:])
            x = block(x, state, sinusoids, hidden)
        return self.head(x), (torch.stack(kept), (num_valid + length).clamp(max=size))

    def losses(
        self, tokens: Tensor, targets: Tensor, memory: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Cross-entropy in nats per byte, the sum of the gates' losses, and the next memory."""
        logits, memory = self(tokens, memory)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        gate_losses = [block.mlp.gate.get_loss(clear=True) for block in self.blocks]
        balance = sum((g.sum() for g in gate_losses if g is not None), start=loss.new_zeros(()))
        return loss, balance, memory

    @torch.no_grad()
    def evaluate(self, streams: Streams, num_segments: int) -> float:
        """Mean cross-entropy in nats per byte of the first segments, memory included."""
        was_training = self.training
        self.eval()
        memory = self.empty_memory(streams.batch)
        losses = []
        for step in range(min(num_segments, streams.num_segments)):
            tokens, targets, _ = streams.segment(step)
            loss, _, memory = self.losses(tokens, targets, memory)
            losses.append(loss)
        self.train(was_training)
        return float(torch.stack(losses).mean())

    def _sinusoids(self, distance: Tensor) -> Tensor:
        """``[N]`` distances as ``[N, D]``."""
        half = torch.arange(0, self.config.d_model, 2, device=distance.device)
        angles = distance[:, None] * 10000.0 ** (-half / self.config.d_model)
        return torch.cat((angles.sin(), angles.cos()), 1).to(self.head.weight.dtype)


class Streams:
    """A text in ``B`` equal parts that are read side by side, in order.

    Args:
        text: ``[num_bytes]`` uint8.
        batch: ``B``.
        segment: ``L``.
        device: where segments go.
    """

    def __init__(self, text: Tensor, batch: int, segment: int, device: torch.device | str):
        length = (len(text) - 1) // batch
        self.batch = batch
        self.num_segments = length // segment
        if self.num_segments == 0:
            raise ValueError(
                f"a text of {len(text)} bytes is too short for {batch} streams of {segment} bytes"
            )
        self._length = segment
        self._tokens = text[: batch * length].view(batch, length).to(device)
        self._targets = text[1 : batch * length + 1].view(batch, length).to(device)

    def segment(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs and targets ``[B, L]`` int64 of a step, and whether the streams begin with it."""
        index = step % self.num_segments
        tokens, targets = (
            part.narrow(1, index * self._length, self._length).long()
            for part in (self._tokens, self._targets)
        )
        return tokens, targets, index == 0
