"""Experts whose weights travel: decisions here, layers on 2 and 4 processes in shadow_checks.py."""

from __future__ import annotations

import math

import pytest
import torch

from moeops.comm.groups import RankGroup
from moeops.cost.model import CostModel
from moeops.dispatch.replicas import place_replicas, route_to_holders
from moeops.dispatch.shadowing import choose_shadows
from moeops.distributed import ShadowPolicy
from moeops.types import Routing
from processes import run_checks


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo(world_size, tmp_path):
    run_checks("shadow_checks", world_size, "gloo", tmp_path)


@pytest.mark.distributed
@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("shadow_checks", world_size, "nccl", tmp_path)


def predict(counts, num_expert, policy, shadows) -> float:
    """Seconds of a forward, row by row as they would go."""
    size = len(counts)
    computed, sent, received = [0] * size, [0] * size, [0] * size
    for source in range(size):
        for expert, rows in enumerate(counts[source]):
            owner = expert // num_expert
            if source == owner or expert in shadows:
                computed[source] += rows
            else:
                computed[owner] += rows
                sent[source] += rows
                received[owner] += rows
    slowest = max(
        c * policy.row_seconds + max(s, r) * policy.exchange_seconds
        for c, s, r in zip(computed, sent, received, strict=True)
    )
    return slowest + len(shadows) * policy.fetch_seconds


def choose_slowly(counts, num_expert, policy) -> set[int]:
    loads = [sum(column) for column in zip(*counts, strict=True)]
    order = sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))
    shadows: set[int] = set()
    for expert in order[: policy.max_shadows]:
        if predict(counts, num_expert, policy, shadows | {expert}) >= predict(
            counts, num_expert, policy, shadows
        ):
            break
        shadows.add(expert)
    return shadows


def test_choice_is_the_greedy_rule(device):
    """Against a simulation; powers of two make both exact."""
    generator = torch.Generator().manual_seed(0)
    taken = []
    for case in range(60):
        size, num_expert = (1, 2, 3, 4)[case % 4], (1, 2, 5)[case % 3]
        skew = torch.rand(size * num_expert, generator=generator) ** 6 * 40
        counts = torch.poisson(skew.expand(size, -1), generator=generator).long()
        policy = ShadowPolicy(0.5, (0.0, 0.25, 4.0)[case % 3], (0.0, 2.0, 16.0)[case % 3], 4)
        chosen = choose_shadows(counts.to(device), num_expert, policy)
        expected = choose_slowly(counts.tolist(), num_expert, policy)
        assert set(chosen.nonzero().flatten().tolist()) == expected
        taken.append(len(expected))
    assert {0, 1, 2} <= set(taken)


def test_choice_goes_by_what_arrives(device):
    """Both ranks send as much, so that what a rank sends says nothing: the loads of experts differ."""
    counts = torch.tensor([[0, 0, 1, 9], [0, 0, 0, 10]], device=device)
    policy = ShadowPolicy(1.0, 1.0, 3.0)
    assert choose_shadows(counts, 2, policy).tolist() == [False, False, False, True]
    # 1 + 9 rows of expert 3 stay: 20 + 10 seconds become 11 + 1 + 3; the other row is not worth 3.
    assert predict(counts.tolist(), 2, policy, set()) == 30
    assert predict(counts.tolist(), 2, policy, {3}) == 15
    dear = ShadowPolicy(1.0, 1.0, 18.0)
    assert not choose_shadows(counts, 2, dear).any()


def test_policy_of_rates_is_that_of_fastermoe():
    """A two-layer MLP in float32: 3 products forward and backward per weight, 4 transfers of a row."""
    flops, bandwidth, width, hidden, size = 1e12, 1e9, 512, 2048, 4
    model = CostModel.from_rates(
        products_per_second=flops / 2, link_bytes_per_second=bandwidth, dtypes=("float32",)
    )
    policy = ShadowPolicy.from_cost_model(model, width, hidden, world_size=size, max_shadows=7)
    assert math.isclose(policy.row_seconds, 3 * 4 * width * hidden / flops)
    assert math.isclose(policy.exchange_seconds, 4 * width * 4 / bandwidth)
    weights = 2 * width * hidden * 4
    # To every rank a share, and from it to all others; gradients likewise.
    assert math.isclose(policy.fetch_seconds, 4 * weights * (size - 1) / size / bandwidth)
    assert policy.max_shadows == 7
    forward = ShadowPolicy.from_cost_model(model, width, hidden, world_size=size, backward=False)
    assert math.isclose(forward.row_seconds, policy.row_seconds / 3)
    assert math.isclose(forward.fetch_seconds, policy.fetch_seconds / 2)
    alone = ShadowPolicy.from_cost_model(model, width, hidden, world_size=1)
    assert alone.exchange_seconds == alone.fetch_seconds == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("row_seconds", -1.0), ("exchange_seconds", math.inf), ("fetch_seconds", math.nan)],
)
def test_policy_refuses_costs(name, value):
    costs = {"row_seconds": 1.0, "exchange_seconds": 1.0, "fetch_seconds": 1.0, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be at least 0 and finite, got {value}"):
        ShadowPolicy(**costs)
    with pytest.raises(ValueError, match="max_shadows must be at least 1, got 0"):
        ShadowPolicy(1.0, 1.0, 1.0, max_shadows=0)


def test_pairs_are_spread_evenly(device):
    """Every pair goes to a holder of its expert, its own rank if that is one; the others to all of them alike."""
    num_expert, size = 3, 4
    holders = {expert: {expert // num_expert} for expert in range(num_expert * size)}
    replicas = {0: (1, 2), 4: (0, 2, 3), 5: 3, 11: (0,)}
    for expert, ranks in replicas.items():
        holders[expert] |= {ranks} if isinstance(ranks, int) else set(ranks)
    placement = place_replicas("Test", replicas, num_expert, RankGroup("0", size, 1))
    table, slots = placement.table().to(device), placement.num_slots
    assert slots == num_expert + 2
    ids = torch.randint(-1, num_expert * size, (400, 3), device=device)
    for rank in range(size):
        routed = route_to_holders(Routing(ids, ids.double()), table, slots, rank)
        assert torch.equal(routed.topk_weights, ids.double())
        assert torch.equal(routed.topk_ids < 0, ids < 0)
        for expert, ranks in holders.items():
            chosen = routed.topk_ids[ids == expert]
            experts_of_slots = [
                target * num_expert + slot
                if slot < num_expert
                else placement.on_rank(target)[slot - num_expert]
                for target, slot in ((s // slots, s % slots) for s in chosen.tolist())
            ]
            assert set(experts_of_slots) == {expert}
            per_rank = torch.bincount(chosen // slots, minlength=size).tolist()
            if rank in ranks:
                assert per_rank[rank] == len(chosen)
            else:
                shares = [per_rank[holder] for holder in ranks]
                assert sum(shares) == len(chosen)
                assert max(shares) - min(shares) <= 1


def test_no_replicas_are_no_placement():
    assert place_replicas("Test", {}, 2, None) is None
    assert place_replicas("Test", {1: ()}, 2, None) is None
    with pytest.raises(ValueError, match="from 0 to 0, got 1 for expert 0"):
        place_replicas("Test", {0: 1}, 2, None)
