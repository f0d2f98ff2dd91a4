"""Switch with jitter on the logits, and its gradient as a rule of its own. T tokens, E experts, one slot."""

from __future__ import annotations

import math

import torch

from moeops.gates.functional import apply_capacity, expert_capacity
from moeops.losses import balance_loss
from moeops.numba import as_gate, route

JITTER = 0.1
CAPACITY = 1.2


@route("example::switch_jitter", "noise[T, E]", require=("top_k == 1",))
def switch_jitter(logits, noise, weights, ids, top_k):
    """Choose the best of ``logits * noise``; the weight is its probability among all experts.

    Reference: ``moeops.reference.topk_route(logits * noise, 1, renormalize=False)``.
    """
    best = 0
    for e in range(len(logits)):
        if logits[e] * noise[e] > logits[best] * noise[best]:
            best = e
    top = logits[best] * noise[best]
    total = 0.0
    for e in range(len(logits)):
        total += math.exp(logits[e] * noise[e] - top)
    for k in range(top_k):
        weights[k] = 1.0 / total
        ids[k] = best


@switch_jitter.backward
def switch_jitter_backward(logits, noise, weights, ids, top_k, grad_weights, grad_logits):
    """``d p_best / d z_e = noise_e * p_best * ([e is best] - p_e)``."""
    for k in range(top_k):
        top = logits[ids[k]] * noise[ids[k]]
        for e in range(len(logits)):
            p = weights[k] * math.exp(logits[e] * noise[e] - top)
            same = 1.0 if e == ids[k] else 0.0
            grad_logits[e] = grad_weights[k] * noise[e] * weights[k] * (same - p)


def _noise(gate, logits):
    """Factors from ``U(1 - JITTER, 1 + JITTER)`` in training, 1 in evaluation."""
    if not gate.training:
        return torch.ones_like(logits)
    return 1 + JITTER * (2 * torch.rand_like(logits) - 1)


def _loss(gate, logits, ids, weights, mask=None):
    return balance_loss(torch.softmax(logits, dim=-1), ids, mask=mask)


def _drop(gate, logits, ids, weights, mask=None):
    def capacity(num_tokens):
        return expert_capacity(CAPACITY, num_tokens, 1, gate.tot_expert)

    return apply_capacity(ids, weights, gate.tot_expert, capacity, mask=mask), weights


SwitchJitterGate = as_gate(
    switch_jitter, "SwitchJitterGate", inputs={"noise": _noise}, loss=_loss, routing=_drop
)
