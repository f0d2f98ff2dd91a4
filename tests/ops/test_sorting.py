from __future__ import annotations

import pytest
import torch

import moeops
from cases import each, every_pair
from moeops import reference
from samples import SAMPLES, Sample

INTS = [torch.int32, torch.int64]
ID_DTYPES = pytest.mark.parametrize("id_dtype", INTS, ids=["int32", "int64"])


@each("sample, id_dtype", every_pair(SAMPLES, INTS))
def test_sort_tokens(sample, id_dtype, device, filled):
    ids = sample.ids(device, id_dtype)
    plan = moeops.sort_tokens(ids, sample.E, sample.num_rows)
    truth = reference.sort_tokens(ids.cpu(), sample.E, sample.num_rows)
    for name, got, want in zip(plan._fields, plan, truth, strict=True):
        assert got.dtype == torch.int32, name
        assert got.device == ids.device, name
        assert got.is_contiguous(), name
        assert torch.equal(got.cpu(), want), name


@each("sample", SAMPLES, ids=str)
def test_maps_are_inverse_permutations(sample, device):
    ids = sample.ids(device)
    row_to_pair, pair_to_row, offsets = moeops.sort_tokens(ids, sample.E)
    everyone = torch.arange(sample.N, device=device)
    assert torch.equal(row_to_pair.sort().values, everyone.int())
    assert torch.equal(pair_to_row.reshape(-1)[row_to_pair.long()], everyone.int())
    counts = torch.bincount(ids[ids >= 0], minlength=sample.E)
    assert torch.equal(offsets[1:].long(), counts.cumsum(0))
    in_order = ids.reshape(-1)[row_to_pair.long()]
    live = int(offsets[-1])
    assert torch.equal(in_order[:live], in_order[:live].sort().values)
    assert (in_order[live:] == -1).all()


FULL = torch.tensor([[1, -1, 0], [0, 1, -1]])  # four pairs that count
BY_ROWS = {
    4: ([2, 3, 0, 4], [[2, 4, 0], [1, 3, 4]], [0, 2, 4]),
    5: ([2, 3, 0, 4, 0], [[2, 5, 0], [1, 3, 5]], [0, 2, 4]),
    6: ([2, 3, 0, 4, 1, 5], [[2, 4, 0], [1, 3, 5]], [0, 2, 4]),
    8: ([2, 3, 0, 4, 1, 5, 0, 0], [[2, 4, 0], [1, 3, 5]], [0, 2, 4]),
}


@each("num_rows", BY_ROWS)
def test_number_of_rows_by_hand(num_rows, device, filled):
    plan = moeops.sort_tokens(FULL.to(device), 2, num_rows)
    assert tuple(t.tolist() for t in plan) == BY_ROWS[num_rows]


def test_rows_without_tokens(device):
    plan = moeops.sort_tokens(torch.zeros(0, 2, dtype=torch.int64, device=device), 3, 5)
    assert plan.row_to_pair.tolist() == [0] * 5
    assert plan.pair_to_row.shape == (0, 2)
    assert plan.expert_offsets.tolist() == [0] * 4


@ID_DTYPES
@pytest.mark.parametrize("num_rows", [0, 3])
def test_too_few_rows(num_rows, id_dtype):
    with pytest.raises(
        RuntimeError,
        match=rf"sort_tokens: num_rows must be at least the 4 pairs that are kept, got {num_rows}\.",
    ):
        moeops.sort_tokens(FULL.to(id_dtype), 2, num_rows)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [2, 3000])
def test_too_few_rows_on_cuda_drop_the_last_pairs(T, cuda_device, filled):
    ids = FULL.repeat(T // 2, 1)
    num_rows = 3 * T // 2  # of the 2 T pairs that count
    want = reference.sort_tokens(ids, 2)
    plan = moeops.sort_tokens(ids.cuda(), 2, num_rows)
    assert torch.equal(plan.row_to_pair.cpu(), want.row_to_pair[:num_rows])
    assert plan.expert_offsets.tolist() == [0, T, num_rows]
    pair_to_row = torch.where(want.pair_to_row < num_rows, want.pair_to_row, num_rows)
    assert torch.equal(plan.pair_to_row.cpu(), pair_to_row)
    x = torch.randn(T, 8, device="cuda")
    rows = moeops.permute_tokens(x, plan)
    assert torch.equal(rows, x[plan.row_to_pair.long() // 3])


COUNTED = [
    *SAMPLES,
    Sample("many_ids", T=100_003, K=3, E=130, dropped=0.2),
    Sample("most_shared_bins", E=2048),
    Sample("global_bins", T=999, E=2049, dropped=0.1),
]


@each("sample, id_dtype", every_pair(COUNTED, INTS))
def test_count_tokens(sample, id_dtype, device, filled):
    ids = sample.ids(device, id_dtype)
    counts = moeops.count_tokens(ids, sample.E)
    assert counts.dtype == torch.int32
    assert counts.device == ids.device
    assert torch.equal(counts.cpu(), reference.count_tokens(ids.cpu(), sample.E))


@ID_DTYPES
@each("shape", [(), (0,), (7,), (2, 0, 3), (3, 4, 5)], ids=str)
def test_count_tokens_of_any_shape(shape, id_dtype, device):
    ids = torch.randint(-1, 4, shape).to(device, id_dtype)
    want = [int((ids == e).sum()) for e in range(4)]
    assert moeops.count_tokens(ids, 4).tolist() == want


@ID_DTYPES
def test_count_tokens_from_any_address(id_dtype, device):
    ids = torch.randint(-1, 5, (10_007,)).to(device, id_dtype)
    for first in range(5):  # whole vectors begin at every fourth, or second, id
        part = ids[first:]
        want = reference.count_tokens(part.cpu(), 5)
        assert torch.equal(moeops.count_tokens(part, 5).cpu(), want)


@ID_DTYPES
def test_drop_out_of_range(id_dtype, device):
    ids = torch.tensor([[0, 7], [3, 1], [-1, 4]], dtype=id_dtype, device=device)
    plan = moeops.sort_tokens(ids, 4, drop_out_of_range=True)
    want = reference.sort_tokens(ids.cpu(), 4, drop_out_of_range=True)
    assert want.expert_offsets.tolist() == [0, 1, 2, 2, 3]
    for got, expected in zip(plan, want, strict=True):
        assert torch.equal(got.cpu(), expected)


@each(
    "sample, capacity, priority_dtype, id_dtype",
    every_pair(SAMPLES, [0, 3, 10**6], [None, torch.float32, torch.bfloat16], INTS),
)
def test_limit_capacity(sample, capacity, priority_dtype, id_dtype, device, filled):
    ids = sample.ids(device, id_dtype)
    priority = None
    if priority_dtype is not None:
        # Few different values, so that ties decide.
        priority = torch.randint(-3, 3, ids.shape).to(device, priority_dtype)
    kept = moeops.limit_capacity(ids, sample.E, capacity, priority=priority)
    want = reference.limit_capacity(
        ids.cpu(), sample.E, capacity, priority=None if priority is None else priority.cpu()
    )
    assert kept.dtype == ids.dtype
    assert torch.equal(kept.cpu(), want)


@each("sample, capacity, id_dtype", every_pair(SAMPLES, [0, 3], INTS))
def test_limit_capacity_by_choice(sample, capacity, id_dtype, device, filled):
    ids = sample.ids(device, id_dtype)
    kept = moeops.limit_capacity(ids, sample.E, capacity, by_choice=True)
    want = reference.limit_capacity(ids.cpu(), sample.E, capacity, by_choice=True)
    assert kept.dtype == ids.dtype
    assert torch.equal(kept.cpu(), want)
    turned = moeops.limit_capacity(ids.t(), sample.E, capacity)
    assert torch.equal(kept, turned.t())


@each("sample", SAMPLES, ids=str)
@each("by_priority", [False, True], ids=["by_position", "by_priority"])
def test_capacity_keeps_the_right_pairs(sample, by_priority, device):
    capacity = 2
    ids = sample.ids(device)
    rank = torch.randperm(sample.N).view(ids.shape).to(device)  # all different
    kept = moeops.limit_capacity(
        ids, sample.E, capacity, priority=-rank.double() if by_priority else None
    )
    if not by_priority:
        rank = torch.arange(sample.N, device=device).view(ids.shape)
    assert torch.equal(kept[kept >= 0], ids[kept >= 0])
    for e in ids.unique().tolist():
        if e < 0:
            continue
        wanted = rank[ids == e].sort().values[:capacity]
        assert torch.equal(rank[kept == e].sort().values, wanted)


def test_priority_takes_nan_first_as_torch_sort_does(device):
    ids = torch.zeros(4, 1, dtype=torch.int64, device=device)
    priority = torch.tensor([[1.0], [float("nan")], [float("inf")], [-1.0]], device=device)
    kept = moeops.limit_capacity(ids, 1, 2, priority=priority)
    assert kept.view(-1).tolist() == [-1, 0, 0, -1]
    assert torch.equal(kept, reference.limit_capacity(ids, 1, 2, priority=priority))


def test_public_errors(device):
    ids = torch.zeros(4, 2, dtype=torch.int64, device=device)
    with pytest.raises(
        TypeError, match=r"sort_tokens: topk_ids must be int32 or int64, got torch.f"
    ):
        moeops.sort_tokens(ids.float(), 4)
    with pytest.raises(ValueError, match=r"sort_tokens: topk_ids must have 2 dimensions.*\[8\]"):
        moeops.sort_tokens(ids.view(-1), 4)
    with pytest.raises(ValueError, match=r"sort_tokens: num_experts must be at least 1, got 0"):
        moeops.sort_tokens(ids, 0)
    with pytest.raises(TypeError, match=r"sort_tokens: num_experts must be an int, got True"):
        moeops.sort_tokens(ids, True)
    with pytest.raises(ValueError, match=r"sort_tokens: num_rows must be at least 0, got -1"):
        moeops.sort_tokens(ids, 4, -1)
    with pytest.raises(TypeError, match=r"sort_tokens: num_rows must be an int, got 2\.5"):
        moeops.sort_tokens(ids, 4, 2.5)
    with pytest.raises(TypeError, match=r"count_tokens: topk_ids must be int32 or int64, got tor"):
        moeops.count_tokens(ids.float(), 4)
    with pytest.raises(ValueError, match=r"count_tokens: num_experts must be at least 1, got 0"):
        moeops.count_tokens(ids, 0)
    with pytest.raises(ValueError, match=r"limit_capacity: capacity must be at least 0, got -1"):
        moeops.limit_capacity(ids, 4, -1)
    with pytest.raises(ValueError, match=r"limit_capacity: priority must have size 2.*\[4, 1\]"):
        moeops.limit_capacity(ids, 4, 1, priority=torch.ones(4, 1, device=device))
    with pytest.raises(ValueError, match=r"limit_capacity: priority must be None with by_choice"):
        moeops.limit_capacity(ids, 4, 1, priority=torch.ones(4, 2, device=device), by_choice=True)
    with pytest.raises(TypeError, match=r"limit_capacity: priority must be float64.*torch.int64"):
        moeops.limit_capacity(ids, 4, 1, priority=ids)


@ID_DTYPES
@pytest.mark.parametrize("bad", [4, -2, 2**31 - 1])
def test_ids_out_of_range(bad, id_dtype):
    ids = torch.tensor([[0, 1], [3, bad]], dtype=id_dtype)
    for call in (
        lambda: moeops.sort_tokens(ids, 4),
        lambda: moeops.count_tokens(ids, 4),
        lambda: moeops.limit_capacity(ids, 4, 2),
        lambda: moeops.limit_capacity(ids, 4, 2, priority=torch.ones(2, 2)),
    ):
        with pytest.raises(
            RuntimeError, match=rf"topk_ids must be in \[-1, 4\), got {bad} at pair 3"
        ):
            call()


@pytest.mark.parametrize("num_rows", [-1, 2**31 - 1, 2**40])
def test_bare_op_refuses_rows_that_int32_cannot_number(num_rows, device):
    with pytest.raises(
        RuntimeError, match=rf"num_rows must be from 0 to 2\^31 - 2, got {num_rows}"
    ):
        torch.ops.moeops.sort_tokens(FULL.to(device), 2, num_rows)


def test_negative_ids_are_an_error_even_when_dropping():
    with pytest.raises(RuntimeError, match=r"got -7 at pair 0"):
        moeops.sort_tokens(torch.tensor([[-7]]), 4, drop_out_of_range=True)


def test_first_bad_id_is_named_whichever_thread_finds_it():
    ids = Sample("long", T=100_003, K=1).ids()
    ids[50_001] = 9
    ids[99_999] = 9
    with pytest.raises(RuntimeError, match=r"got 9 at pair 50001\."):
        moeops.sort_tokens(ids, 4)
