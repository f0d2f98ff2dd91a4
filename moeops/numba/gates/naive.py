"""Naive top-k: the softmax over the chosen logits. E experts, K slots."""

from __future__ import annotations

import math

from moeops.numba import _gate
from moeops.numba._decorators import route


def insert_best(values, weights, ids, top_k):
    """Put the ``top_k`` largest of ``values`` into ``weights``, best first, ties by lower index."""
    for k in range(top_k):
        weights[k] = -math.inf
        ids[k] = -1
    for e in range(len(values)):
        value = values[e]
        if value > weights[top_k - 1]:
            k = top_k - 1
            while k > 0 and value > weights[k - 1]:
                weights[k] = weights[k - 1]
                ids[k] = ids[k - 1]
                k -= 1
            weights[k] = value
            ids[k] = e


@route("moeops_numba::naive_topk", score="softmax_topk")
def naive_topk(logits, weights, ids, top_k):
    """Choose the largest logits; the weights are their softmax. Reference: ``moeops.reference.topk_route``."""
    insert_best(logits, weights, ids, top_k)
    best = weights[0]
    total = 0.0
    for k in range(top_k):
        weights[k] = math.exp(weights[k] - best)
        total += weights[k]
    for k in range(top_k):
        weights[k] /= total


NaiveTopkGate = _gate.as_gate(naive_topk, "NaiveTopkGate")
