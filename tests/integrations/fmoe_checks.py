"""Checks of programs written for FastMoE, run by every rank of a group."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from fmoe_cases import D, Expert, H, assert_same, by_hand, mlps
from torch import nn

import moeops.integrations.fmoe as stand_in
from moeops.comm.groups import RankGroup
from processes import Ranks

stand_in.install()

import fmoe
from fmoe import functions
from fmoe.gates.utils import limit_by_capacity

E_LOCAL = 2


def everywhere(ranks: Ranks, x: torch.Tensor) -> list[torch.Tensor]:
    """What every rank has, by rank; sizes may differ."""
    found = [None] * ranks.size
    dist.all_gather_object(found, x.detach().cpu())
    return found


def some_ids(ranks: Ranks, num_tokens: int, top_k: int = 2) -> torch.Tensor:
    torch.manual_seed(ranks.rank)
    return torch.randint(-1, E_LOCAL * ranks.size, (num_tokens, top_k), device=ranks.device)


def check_groups(ranks: Ranks) -> None:
    assert functions.get_moe_group().size() == ranks.size
    half = [dist.new_group([first, first + 1]) for first in range(0, ranks.size, 2)]
    own = half[ranks.rank // 2]
    functions.ensure_comm(torch.zeros(1), own)
    assert functions.get_moe_group() is own
    assert fmoe.utils.get_rank_0_in_comm(own) == ranks.rank // 2 * 2
    functions.ensure_comm(torch.zeros(1), None)
    assert functions.get_moe_group() is fmoe.utils.get_torch_default_comm()
    with pytest.raises(ValueError, match=rf"a group of {ranks.size + 1} ranks, got one of"):
        functions.count_by_gate(torch.zeros(3, dtype=torch.int64), 2, ranks.size + 1)


def check_counts_scatter_and_gather(ranks: Ranks) -> None:
    """A rank receives expert by expert, and of each expert rank by rank, in the order of tokens."""
    for num_tokens in (5 + 2 * ranks.rank, 0 if ranks.rank else 4):
        ids = some_ids(ranks, num_tokens)
        x = torch.arange(num_tokens, dtype=torch.float64, device=ranks.device)
        x = torch.stack((torch.full_like(x, ranks.rank), x), 1).requires_grad_()
        pos, local, received, counts, rows = functions.prepare_forward(ids, E_LOCAL, ranks.size)
        all_ids, all_x = everywhere(ranks, ids), everywhere(ranks, x)
        want, want_received = [], []
        for expert in range(ranks.rank * E_LOCAL, (ranks.rank + 1) * E_LOCAL):
            for other, tokens in zip(all_ids, all_x, strict=True):
                chosen = (other == expert).nonzero()[:, 0]
                want.append(tokens[chosen])
                want_received.append(len(chosen))
        by_rank = torch.tensor(want_received).view(E_LOCAL, ranks.size)
        assert received.tolist() == by_rank.t().flatten().tolist()
        assert counts.tolist() == by_rank.sum(1).tolist()
        args = (local, received)
        sent = functions.MOEScatter.apply(x, pos // 2, *args, rows, ranks.size)
        assert torch.equal(sent.cpu(), torch.cat(want))
        back = functions.MOEGather.apply(3 * sent, pos, *args, ids.numel(), ranks.size)
        expected = 3 * x.repeat_interleave(2, 0) * (ids.flatten() >= 0)[:, None]
        assert torch.equal(back, expected)
        (grad,) = torch.autograd.grad(back.sum(), x)
        assert torch.equal(grad, 3.0 * (ids >= 0).sum(1, keepdim=True).expand(-1, 2))


def check_capacity(ranks: Ranks) -> None:
    """Earlier ranks come first."""
    ids = some_ids(ranks, 7 + ranks.rank)
    sent, received, kept = limit_by_capacity(ids, E_LOCAL, ranks.size, 5)
    room = dict.fromkeys(range(E_LOCAL * ranks.size), 5)
    for rank, other in enumerate(everywhere(ranks, ids)):
        want = other.flatten()
        for place, expert in enumerate(want.tolist()):
            if expert >= 0:
                room[expert] -= 1
                want[place] = expert if room[expert] >= 0 else -1
        if rank == ranks.rank:
            assert kept.flatten().tolist() == want.tolist()
    counts = [int((kept == e).sum()) for e in range(E_LOCAL * ranks.size)]
    assert sent.tolist() == counts
    assert int(received.sum()) == sum(
        int((k // E_LOCAL == ranks.rank).sum()) for k in everywhere(ranks, kept)
    )


def check_swipe_once(ranks: Ranks) -> None:
    """A gate outside of a layer; every rank says how much it can take, and nobody gets more."""
    gate = fmoe.gates.SwipeGate(4, E_LOCAL, ranks.size).to(ranks.device)
    for room, bias in ((10, 0), (16, 3)):
        ids = some_ids(ranks, 10, 1)[:, 0].clamp_min(0)
        moved, left = gate.swipe_once(ids, torch.tensor(room), bias)
        assert left.device.type == "cpu"
        taken = sum(int((m // E_LOCAL == ranks.rank).sum()) for m in everywhere(ranks, moved))
        assert taken <= room
        assert int(left) == room - taken
        assert bool((moved[moved != ids] % E_LOCAL == bias % E_LOCAL).all())


def check_slices(ranks: Ranks) -> None:
    world = dist.group.WORLD
    x = torch.randn(3 * ranks.size, 2, dtype=torch.float64, device=ranks.device)
    x = x.requires_grad_()
    part = functions.Slice.apply(x, ranks.rank, ranks.size, world)
    assert torch.equal(part, x[3 * ranks.rank : 3 * ranks.rank + 3])
    whole = functions.AllGather.apply(part * (1 + ranks.rank), ranks.rank, ranks.size, world)
    factor = torch.arange(1, ranks.size + 1, device=ranks.device).repeat_interleave(3)[:, None]
    assert torch.equal(whole, x * factor)
    weight = torch.randn_like(whole)
    grad_part, grad = torch.autograd.grad((weight * whole).sum(), (part, x))
    assert_same(grad_part, (weight * factor)[3 * ranks.rank : 3 * ranks.rank + 3])
    assert_same(grad, weight * factor)
    with pytest.raises(ValueError, match=r"Slice: inp must have a multiple of"):
        functions.Slice.apply(x[1:], ranks.rank, ranks.size, world)


def whole_and_part(ranks: Ranks, kind: str, **options):
    """All experts on this rank, and this rank's share of them, with the same parameters."""
    torch.manual_seed(3)
    size = E_LOCAL * ranks.size
    args = (D, H) if kind == "mlp" else (D,)
    build = fmoe.FMoETransformerMLP if kind == "mlp" else fmoe.FMoE
    expert = {} if kind == "mlp" else {"expert": Expert}
    whole = build(size, *args, **expert)
    part = build(E_LOCAL, *args, world_size=ranks.size, **expert, **options)
    part.gate.load_state_dict(whole.gate.state_dict())
    first = ranks.rank * E_LOCAL
    with torch.no_grad():
        if kind == "mlp":
            for own, other in zip(
                part.experts.parameters(), whole.experts.parameters(), strict=True
            ):
                own.copy_(other[first : first + E_LOCAL])
        else:
            for own, other in zip(part.experts, whole.experts[first:], strict=False):
                own.load_state_dict(other.state_dict())
    return whole.double().to(ranks.device), part.double().to(ranks.device)


def check_data_and_expert_parallel(ranks: Ranks) -> None:
    """The README's parallel use: N ranks train what one rank trains, or what FastMoE trains."""
    for kind in ("mlp", "list"):
        for compat in (False, True):
            whole, part = whole_and_part(ranks, kind)
            whole.mark_parallel_comm()
            part.mark_parallel_comm()
            model = fmoe.DistributedGroupedDataParallel(part, compat=compat)
            assert set(model.comms) == {"dp", "gate", "moe", "world"}
            x = torch.randn(4 * ranks.size, D, dtype=torch.float64, device=ranks.device)
            dist.broadcast(x, 0)
            y = model(x.chunk(ranks.size)[ranks.rank])
            expected = whole(x)
            assert_same(y, expected.chunk(ranks.size)[ranks.rank])
            y.square().sum().backward()
            model.allreduce_params()
            (expected.square().sum() / ranks.size).backward()
            assert_same(part.gate.gate.weight.grad, whole.gate.gate.weight.grad)
            first = ranks.rank * E_LOCAL
            if kind == "mlp":
                own, other = (
                    part.experts.w_up.grad,
                    whole.experts.w_up.grad[first : first + E_LOCAL],
                )
            else:
                own, other = part.experts[1].up.weight.grad, whole.experts[first + 1].up.weight.grad
            assert_same(own, other * (ranks.size if compat else 1))
    with pytest.raises(TypeError, match=r"Pass groups by name: dp_group="):
        fmoe.DistributedGroupedDataParallel(nn.Linear(1, 1), dist.group.WORLD)


def check_data_parallel_of_torch(ranks: Ranks) -> None:
    """The README's "no extra coding": torch's wrapper around layers that hold all experts."""
    torch.manual_seed(3)
    whole = fmoe.FMoETransformerMLP(E_LOCAL, D, H, top_k=2).double().to(ranks.device)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(whole))
    x = torch.randn(4 * ranks.size, D, dtype=torch.float64, device=ranks.device)
    dist.broadcast(x, 0)
    model(x.chunk(ranks.size)[ranks.rank]).square().mean().backward()
    whole(x).square().mean().backward()
    for own, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert_same(own.grad, expected.grad)


def check_schedule_and_shadows_by_environment(ranks: Ranks) -> None:
    names = {
        "FMOE_FASTER_SCHEDULE_ENABLE": "1",
        "FMOE_FASTER_GROUP_SIZE": "1",
        "FMOE_FASTER_SHADOW_ENABLE": "1",
        "FMOE_FASTER_GLBPLC_NETBW": "1e3",
        "FMOE_FASTER_GLBPLC_GPUTP": "1e3",
    }
    x = torch.randn(9, D, dtype=torch.float64, device=ranks.device)
    for kind in ("mlp", "list"):
        os.environ.update(names)
        try:
            whole, part = whole_and_part(ranks, kind)
        finally:
            for name in names:
                del os.environ[name]
        assert type(part.dispatcher).__name__ == "ShadowDispatcher"
        for layer in (whole, part):
            layer.gate.gate.bias.data[0] += 9  # expert 0 is hot
        assert_same(part(x), whole(x))
        ids, scores = whole.gate(x)
        if kind == "mlp":
            assert_same(whole(x), by_hand(x, ids, scores, mlps(whole)))
    from fmoe.fastermoe.shadow_policy import get_shadow_policy

    counts = torch.zeros(E_LOCAL * ranks.size, dtype=torch.int64)
    counts[0] = 10000
    policy = get_shadow_policy(16)
    assert not policy(counts, None, E_LOCAL, ranks.size, ranks.device).any()
    os.environ["FMOE_FASTER_SHADOW_ENABLE"] = "1"
    try:
        chosen = get_shadow_policy(16)(counts, None, E_LOCAL, ranks.size, ranks.device)
    finally:
        del os.environ["FMOE_FASTER_SHADOW_ENABLE"]
    assert chosen.nonzero().flatten().tolist() == [0]


def check_slice_group(ranks: Ranks) -> None:
    """Ranks with the same tokens; a layer says its size and rank, and compat sums as FastMoE does."""
    for compat in (False, True):
        torch.manual_seed(3)
        layer = fmoe.FMoETransformerMLP(
            E_LOCAL, D, H, slice_group=dist.group.WORLD, compat=compat
        ).to(ranks.device)
        assert (layer.slice_size, layer.slice_rank) == (ranks.size, ranks.rank)
        assert layer.slice_group.size() == ranks.size
        assert isinstance(layer.slice_ranks, RankGroup)
        assert layer.slice_gradients == ("fastmoe" if compat else "mean")
    assert fmoe.FMoETransformerMLP(E_LOCAL, D, H).slice_size == 1
