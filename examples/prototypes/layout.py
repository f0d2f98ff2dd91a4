"""Sorting and moving tokens: block kernels with shared memory. T tokens, K slots, N = T * K pairs, E experts, D width.

The plan is that of ``moeops.sort_tokens`` with as many rows as pairs.
"""

from __future__ import annotations

import numba
import torch
from numba import cuda, int32

from moeops.numba import block_kernel, narrow, row_kernel, widen

THREADS = 256
MAX_TOP_K = 64


def expert_of(topk_id, num_experts):
    """The block that owns a pair: its expert, or one past the last for a dropped pair."""
    return topk_id if 0 <= topk_id < num_experts else num_experts


@block_kernel(
    "example::sort_tokens",
    "topk_ids[T, K]: int, num_experts: int -> "
    "row_to_pair[T * K]: int32, pair_to_row[T, K]: int32, expert_offsets[num_experts + 1]: int32",
    grid=lambda num_experts: num_experts + 1,
    threads=lambda T: THREADS if T > 64 else 32,
)
def sort_tokens(topk_ids, num_experts, row_to_pair, pair_to_row, expert_offsets):
    """Stable sort of the pairs by expert. Block e -> the rows of expert e, the last block -> the dropped pairs.

    Every block reads all ids twice: once to count the pairs of earlier experts, which is where its rows start, and
    once to place its own, with a scan over the threads in shared memory for each stretch of tokens.
    """
    shared = cuda.shared.array(THREADS, int32)
    block = cuda.blockIdx.x
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    num_tokens, top_k = topk_ids.shape

    count = 0
    for t in range(thread, num_tokens, threads):
        for k in range(top_k):
            if expert_of(topk_ids[t, k], num_experts) < block:
                count += 1
    shared[thread] = count
    cuda.syncthreads()
    step = threads // 2
    while step > 0:
        if thread < step:
            shared[thread] += shared[thread + step]
        cuda.syncthreads()
        step //= 2
    start = shared[0]
    cuda.syncthreads()
    if thread == 0:
        expert_offsets[block] = start

    for first in range(0, num_tokens, threads):
        t = first + thread
        mine = 0
        if t < num_tokens:
            for k in range(top_k):
                if expert_of(topk_ids[t, k], num_experts) == block:
                    mine += 1
        shared[thread] = mine
        cuda.syncthreads()
        step = 1
        while step < threads:
            before = shared[thread - step] if thread >= step else 0
            cuda.syncthreads()
            shared[thread] += before
            cuda.syncthreads()
            step *= 2
        row = start + shared[thread] - mine
        start += shared[threads - 1]
        cuda.syncthreads()
        if mine > 0:
            for k in range(top_k):
                if expert_of(topk_ids[t, k], num_experts) == block:
                    row_to_pair[row] = t * top_k + k
                    pair_to_row[t, k] = row
                    row += 1


@numba.njit(nogil=True)
def _counting_sort(topk_ids, num_experts, row_to_pair, pair_to_row, expert_offsets):
    num_tokens, top_k = topk_ids.shape
    place = [0] * (num_experts + 2)
    for t in range(num_tokens):
        for k in range(top_k):
            e = topk_ids[t, k]
            place[(e if 0 <= e < num_experts else num_experts) + 1] += 1
    for e in range(num_experts + 1):
        place[e + 1] += place[e]
        expert_offsets[e] = place[e]
    for t in range(num_tokens):
        for k in range(top_k):
            e = topk_ids[t, k]
            e = e if 0 <= e < num_experts else num_experts
            row_to_pair[place[e]] = t * top_k + k
            pair_to_row[t, k] = place[e]
            place[e] += 1


@sort_tokens.cpu
def _sort_tokens_cpu(topk_ids, num_experts):
    row_to_pair = topk_ids.new_empty(topk_ids.numel(), dtype=torch.int32)
    pair_to_row = topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)
    expert_offsets = topk_ids.new_empty(num_experts + 1, dtype=torch.int32)
    outputs = (row_to_pair, pair_to_row, expert_offsets)
    arrays = [output.numpy() for output in outputs]
    _counting_sort(topk_ids.contiguous().numpy(), num_experts, *arrays)
    return outputs


@block_kernel(
    "example::permute",
    "x[T, D], row_to_pair[R]: int, pair_to_row[T, K]: int, expert_offsets[E1]: int -> rows[R, D]: x",
    grid=lambda T: T,
    threads=lambda D: min(THREADS, (D + 31) // 32 * 32) if D > 0 else 32,
    shared=lambda K: 4 * K,
    require=("R == T * K",),
)
def permute(x, row_to_pair, pair_to_row, expert_offsets, rows):
    """Copy tokens into expert order. Block -> token: read once, written K times; its rows lie in shared memory."""
    targets = cuda.shared.array(0, int32)
    t = cuda.blockIdx.x
    top_k = pair_to_row.shape[1]
    for k in range(cuda.threadIdx.x, top_k, cuda.blockDim.x):
        targets[k] = pair_to_row[t, k]
    cuda.syncthreads()
    num_live = expert_offsets[expert_offsets.shape[0] - 1]
    for d in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
        value = x[t, d]
        for k in range(top_k):
            row = targets[k]
            rows[row, d] = value if row < num_live else narrow(0.0, rows)


@row_kernel(
    "example::permute_by_row",
    "row_to_pair[R]: int, x[T, D], top_k: int, expert_offsets[E1]: int -> rows[R, D]: x",
)
def permute_by_row(row_to_pair, x, top_k, expert_offsets, rows, row):
    """The same as a rule: a row copies its token."""
    live = row < expert_offsets[len(expert_offsets) - 1]
    for d in range(x.shape[1]):
        rows[d] = x[row_to_pair // top_k, d] if live else 0.0


@permute.cpu
def _permute_cpu(x, row_to_pair, pair_to_row, expert_offsets):
    return permute_by_row(row_to_pair, x, max(1, pair_to_row.shape[1]), expert_offsets)


@permute.gradient(saves=("row_to_pair", "pair_to_row", "expert_offsets"))
def _permute_gradient(grads, inputs, outputs):
    plan = (inputs["row_to_pair"], inputs["pair_to_row"], inputs["expert_offsets"])
    grad = grads["rows"].contiguous()
    ones = grad.new_ones(plan[1].shape, dtype=torch.float32)
    return {"x": unpermute(grad, ones, *plan)}


@block_kernel(
    "example::unpermute",
    "rows[R, D], weights[T, K], row_to_pair[R]: int, pair_to_row[T, K]: int, expert_offsets[E1]: int -> y[T, D]: rows",
    grid=lambda T: T,
    threads=lambda D: min(THREADS, (D + 31) // 32 * 32) if D > 0 else 32,
    require=("R == T * K", f"K <= {MAX_TOP_K}"),
)
def unpermute(rows, weights, row_to_pair, pair_to_row, expert_offsets, y):
    """Weighted sum of a token's rows, in float32. Block -> token, thread -> columns; the plan lies in shared memory."""
    sources = cuda.shared.array(MAX_TOP_K, int32)
    t = cuda.blockIdx.x
    top_k = pair_to_row.shape[1]
    num_live = expert_offsets[expert_offsets.shape[0] - 1]
    for k in range(cuda.threadIdx.x, top_k, cuda.blockDim.x):
        row = pair_to_row[t, k]
        sources[k] = row if row < num_live else -1
    cuda.syncthreads()
    for d in range(cuda.threadIdx.x, y.shape[1], cuda.blockDim.x):
        total = widen(narrow(0.0, rows))
        for k in range(top_k):
            row = sources[k]
            if row >= 0:
                total += widen(rows[row, d]) * widen(weights[t, k])
        y[t, d] = narrow(total, y)


@row_kernel(
    "example::unpermute_by_row",
    "weights[T, K], pair_to_row[T, K]: int, rows[R, D], expert_offsets[E1]: int -> y[T, D]: rows",
)
def unpermute_by_row(weights, pair_to_row, rows, expert_offsets, y):
    """The same as a rule: a token sums its rows."""
    num_live = expert_offsets[len(expert_offsets) - 1]
    for d in range(len(y)):
        y[d] = 0.0
    for k in range(len(pair_to_row)):
        row = pair_to_row[k]
        if row < num_live:
            for d in range(len(y)):
                y[d] += weights[k] * rows[row, d]


@unpermute.cpu
def _unpermute_cpu(rows, weights, row_to_pair, pair_to_row, expert_offsets):
    return unpermute_by_row(weights, pair_to_row, rows, expert_offsets)


@unpermute.gradient(saves=("rows", "weights", "row_to_pair", "pair_to_row", "expert_offsets"))
def _unpermute_gradient(grads, inputs, outputs):
    rows, weights, pair_to_row = inputs["rows"], inputs["weights"], inputs["pair_to_row"]
    plan = (inputs["row_to_pair"], pair_to_row, inputs["expert_offsets"])
    grad = grads["y"].contiguous()
    live = pair_to_row < plan[2][-1]  # [T, K]
    by_row = torch.where(live, weights, 0).reshape(-1)[plan[0].long()]  # [R]
    picked = rows[pair_to_row.long()].to(weights.dtype)  # [T, K, D]
    products = (picked * grad.to(weights.dtype)[:, None, :]).sum(-1)
    return {
        "rows": (permute(grad, *plan).to(weights.dtype) * by_row[:, None]).to(rows.dtype),
        "weights": torch.where(live, products, 0),
    }
