"""MOEOPS_DEBUG_CHECKS=1: value checks on CUDA. The switch is read once per process, so each case has its own."""

import os
import subprocess
import sys

import pytest

PREAMBLE = """
import torch, moeops
logits = torch.randn(300, 8, device="cuda")
ids = torch.randint(0, 8, (300, 2), device="cuda")
"""


def run(code: str, enabled: bool) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MOEOPS_DEBUG_CHECKS": "1" if enabled else "0"}
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code + "\ntorch.cuda.synchronize(); print('done')"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


CASES = {
    "id too large": (
        "ids[7, 1] = 8; moeops.sort_tokens(ids, 8)",
        "sort_tokens: topk_ids must be from -1 to 7, got 1 ids outside",
    ),
    "negative id": (
        "ids[7, 1] = -3; moeops.limit_capacity(ids, 8, 4)",
        "limit_capacity: topk_ids must be from -1 to 7, got 1 ids outside",
    ),
    "id too large to count": (
        "ids[7, 1] = 8; print(moeops.count_tokens(ids, 8))",
        "count_tokens: topk_ids must be from -1 to 7, got 1 ids outside",
    ),
    "too few rows": (
        "plan = moeops.sort_tokens(ids, 8, 599); moeops.permute_tokens(logits, plan)",
        "sort_tokens: num_rows must be at least the 600 pairs that are kept, got 599",
    ),
    "nan logit": (
        "logits[5, 3] = float('nan'); moeops.topk_route(logits, 2)",
        "topk_route: logits must be finite, got NaN or infinity in 1 places",
    ),
    "nan logit of a balanced route": (
        "logits[5, 3] = float('nan'); moeops.topk_route_balance(logits, 2)",
        "topk_route_balance: logits must be finite, got NaN or infinity in 1 places",
    ),
    "infinite noise": (
        "n = logits.clone(); n[5, 3] = float('inf'); moeops.noisy_topk_route(logits, logits, n, 2)",
        "noisy_topk_route: logits must be finite, got NaN or infinity in 1 places",
    ),
}


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_switch_on_names_the_bad_value(name, cuda_device):
    code, message = CASES[name]
    result = run(code, enabled=True)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_switch_off_stays_inside_memory(name, cuda_device):
    result = run(CASES[name][0], enabled=False)
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout


@pytest.mark.cuda
def test_good_values_pass_with_the_switch_on(cuda_device):
    code = (
        "moeops.topk_route(logits, 2); moeops.sort_tokens(ids, 8); moeops.limit_capacity(ids, 8, 3)"
        "; moeops.sort_tokens(ids, 8, 600); moeops.count_tokens(ids, 8)"
    )
    assert run(code, enabled=True).returncode == 0


@pytest.mark.cuda
def test_switch_refuses_graph_capture(cuda_device):
    code = """
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    moeops.sort_tokens(ids, 8)
"""
    result = run(code, enabled=True)
    assert result.returncode != 0
    assert "MOEOPS_DEBUG_CHECKS must be off during CUDA graph capture" in result.stderr
