"""Sample prototypes: routing rules that no native op has, and the plain top-k that others build on."""

from moeops.numba.gates.hash import hash_route
from moeops.numba.gates.naive import NaiveTopkGate, naive_topk
from moeops.numba.gates.top_p import TopPGate, top_p

__all__ = [
    "NaiveTopkGate",
    "TopPGate",
    "hash_route",
    "naive_topk",
    "top_p",
]
