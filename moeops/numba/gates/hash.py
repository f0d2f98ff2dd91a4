"""Hash routing: experts by token id, without a router. T tokens, E experts, K slots."""

from __future__ import annotations

import numpy as np

from moeops.numba._decorators import row_kernel


def scramble(key):
    """A bijection of 31-bit numbers in which every bit of the key matters (a Murmur-style mixer)."""
    key = ((key ^ (key >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    key = ((key ^ (key >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    return key ^ (key >> 16)


@row_kernel(
    "moeops_numba::hash_route",
    "token_ids[T]: int, num_experts: int, top_k: int, seed: int = 0 -> "
    "weights[T, top_k]: float32, ids[T, top_k]: int64",
    require=("1 <= top_k <= num_experts",),
)
def hash_route(token_ids, num_experts, top_k, seed, weights, ids):
    """Send a token id to ``top_k`` different experts that depend on nothing else; equal weights.

    The experts are ``(first + k * step) mod E`` with two numbers drawn from the id, ``step`` coprime to ``E``.
    Reference: ``moeops.reference.gates_prototypes.hash_route``.
    """
    key = scramble((np.int64(token_ids) & 0x7FFFFFFF) ^ scramble(seed & 0x7FFFFFFF))
    first = key % num_experts
    step = 1 + scramble(key) % num_experts
    while True:
        a = step
        b = num_experts
        while b != 0:
            a, b = b, a % b
        if a == 1:
            break
        step += 1
    for k in range(top_k):
        ids[k] = (first + k * step) % num_experts
        weights[k] = 1.0 / top_k
