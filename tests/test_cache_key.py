"""Compiled code in torch's caches belongs to the ops that it was compiled with."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import moeops
from moeops import _cache_key

PROGRAM = """
import sys, torch, moeops
from moeops import _cache_key
assert "torch._inductor.codecache" not in sys.modules
assert torch.compiler.config.cache_key_tag == "mine"
import torch._inductor.codecache
assert torch.compiler.config.cache_key_tag == f"mine moeops-{_cache_key.digest()}"
"""


def test_a_users_tag_stays():
    environment = {**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": "mine"}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120, env=environment)


def test_code_of_other_ops_is_not_taken(monkeypatch, fresh_dynamo):
    def compiled() -> tuple[int, int]:
        """Hits and misses of a compilation."""
        torch._dynamo.reset()
        counters.clear()
        weights, _ = torch.compile(moeops.topk_route)(torch.randn(3, 4, requires_grad=True), 2)
        weights.sum().backward()
        found = counters["aot_autograd"]
        return found["autograd_cache_hit"], found["autograd_cache_miss"]

    with fresh_cache(), torch.compiler.config.patch(cache_key_tag=""):
        _cache_key._add_tag()
        assert compiled() == (0, 1)
        assert compiled() == (1, 0)
        monkeypatch.setattr(_cache_key, "digest", lambda: "another")
        _cache_key._add_tag()
        assert compiled() == (0, 1)
