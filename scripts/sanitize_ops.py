"""Every op once on CUDA, for awkward sizes and each dtype: what compute-sanitizer watches.

    compute-sanitizer --tool racecheck python3 scripts/sanitize_ops.py
    compute-sanitizer --tool initcheck python3 scripts/sanitize_ops.py --own-kernels

Values are the tests' business; this only has to reach every kernel in few launches. Inputs hold every element they
should, so initcheck may complain about nothing. --own-kernels leaves out the bfloat16 sizes whose products run in
torch's grouped kernel: it loads whole tiles of rows and drops those past a group's end, which initcheck reports, and
racecheck ends with an internal error beside it.
"""

from __future__ import annotations

import argparse

import torch

import moeops
from moeops import Glu
from moeops.ops.activations import up_width

# (tokens, experts, choices per token, model width, hidden width, share of dropped pairs, rows of the plan)
SHAPES = [
    (37, 5, 2, 24, 40, 0.3, None),  # whole vectors, ragged tiles
    (130, 33, 3, 33, 17, 0.3, None),  # no vectors, two registers of experts per lane
    (300, 8, 1, 136, 72, 0.0, None),  # more rows than a tile
    (41, 40, 40, 24, 16, 0.95, 200),  # most slots empty, rows to spare
    (0, 4, 2, 16, 16, 0.0, 3),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A random leaf on the device."""
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def route(T: int, E: int, K: int, drop: float, num_rows: int | None, dtype: torch.dtype) -> tuple:
    """Weights and a plan, through every way of choosing."""
    logits = leaf(T, E, dtype=dtype)
    bias = torch.randn(E, device="cuda")
    weights, ids = moeops.topk_route(logits, K)
    weights.sum().backward()
    moeops.topk_route(logits, K, score="sigmoid", renormalize=False, bias=bias)
    if E % 4 == 0 and K <= E // 2:
        moeops.topk_route(logits, K, bias=bias, num_groups=4, top_groups=2)
    for score in ("softmax", "sigmoid"):
        moeops.score_sums(logits, score).sum().backward()
    ids = ids.masked_fill(torch.rand(T, K, device="cuda") < drop, -1)
    moeops.limit_capacity(ids, E, 3)
    moeops.limit_capacity(ids, E, 3, by_choice=True)
    moeops.limit_capacity(ids, E, 3, priority=weights.detach())
    moeops.count_tokens(ids, E)
    moeops.count_tokens(ids.to(torch.int32)[:, 1:], 2049)  # too many experts for shared memory
    moeops.sort_tokens(ids, E, T * K // 9)  # too few rows: the last pairs are left out
    plan = moeops.sort_tokens(ids.to(torch.int32), E, num_rows)
    return weights.detach(), moeops.sort_tokens(ids, E, num_rows) if T else plan


def run(
    T: int,
    E: int,
    K: int,
    D: int,
    H: int,
    drop: float,
    num_rows: int | None,
    dtype: torch.dtype,
) -> None:
    """Forward and backward of every op."""
    weights, plan = route(T, E, K, drop, num_rows, dtype)
    x = leaf(T, D, dtype=dtype)
    routed = weights.clone().requires_grad_()
    rows = moeops.permute_tokens(x, plan)
    padded = moeops.pad_rows(rows, plan.expert_offsets, 7)
    rows = rows + moeops.unpad_rows(padded, plan.expert_offsets, rows.shape[0])
    moeops.unpermute_tokens(rows, plan).sum().backward(retain_graph=True)
    up, bias = leaf(E, D, D, dtype=dtype), leaf(E, D, dtype=dtype)
    rows = moeops.grouped_linear(rows, up, plan.expert_offsets, bias=bias)
    rows = moeops.grouped_linear(rows, up.transpose(1, 2), plan.expert_offsets)
    moeops.unpermute_tokens(rows, plan, routed).sum().backward()
    # racecheck takes tens of milliseconds per launch: biases with every other activation are enough.
    units = (Glu(alpha=1.702, limit=0.7, offset=1.0, interleaved=True), "geglu_tanh")
    names = ("swiglu", "gelu", "relu", "silu", "relu_squared", "swiglu")
    for i, activation in enumerate((*names, *units)):
        width = up_width(H, activation)
        weights_up, weights_down = leaf(E, width, D, dtype=dtype), leaf(E, D, H, dtype=dtype)
        biases = {"b_up": leaf(E, width, dtype=dtype), "b_down": leaf(E, D, dtype=dtype)}
        options = biases if i % 2 else {}
        y = moeops.moe_mlp(
            x, plan, routed, weights_up, weights_down, activation=activation, **options
        )
        y.square().sum().backward()


def main() -> None:
    """All shapes in all dtypes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--own-kernels", action="store_true", help="no product in torch's kernels")
    own_kernels = parser.parse_args().own_kernels
    torch.manual_seed(0)
    for dtype in DTYPES:
        for shape in SHAPES:
            whole_vectors = shape[3] % 8 == 0
            if not (own_kernels and dtype == torch.bfloat16 and whole_vectors):
                run(*shape, dtype)
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
