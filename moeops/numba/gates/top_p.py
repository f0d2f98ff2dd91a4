"""Top-p among the best: as many experts as it takes, at most K. E experts, K slots."""

from __future__ import annotations

import math

from moeops.numba import _gate
from moeops.numba._decorators import route
from moeops.numba.gates.naive import insert_best


@route("moeops_numba::top_p", "mass: float = 0.8, margin: float = 0.0", score="softmax_topk")
def top_p(logits, weights, ids, top_k, mass, margin):
    """Take experts best first until they hold the share ``mass`` of the ``top_k`` best, and all within ``margin``.

    ``q`` is the softmax over the ``top_k`` largest logits. Expert ``k`` is taken while the sum of the earlier ``q`` is
    below ``mass``, and also where its logit lies less than ``margin`` below that of the last one taken so: a near tie
    is not cut. The weights are the softmax over the taken ones; the other slots have id -1 and weight 0.
    Reference: ``moeops.reference.gates_prototypes.top_p``.
    """
    insert_best(logits, weights, ids, top_k)
    best = weights[0]
    total = 0.0
    for k in range(top_k):
        total += math.exp(weights[k] - best)
    taken = 0.0
    floor = math.inf
    count = 0
    for k in range(top_k):
        if taken < mass * total or k == 0:
            floor = weights[k] - margin
            count += 1
        elif weights[k] > floor:
            count += 1
        taken += math.exp(weights[k] - best)
    total = 0.0
    for k in range(top_k):
        if k < count:
            weights[k] = math.exp(weights[k] - best)
            total += weights[k]
        else:
            weights[k] = 0.0
            ids[k] = -1
    for k in range(count):
        weights[k] /= total


TopPGate = _gate.as_gate(top_p, "TopPGate")
