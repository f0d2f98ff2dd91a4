"""The grids of FastMoE's own tests, run by every rank of a group of 2, 4 or 8: its sizes and tolerances."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from fmoe_grids import DTYPES, KINDS, NUM_EXPERTS, D, Reference, T, compare, make_fused, near
from torch import nn

import moeops.integrations.fmoe as stand_in
from moeops.distributed import Exact, ShadowPolicy
from processes import Ranks

stand_in.install()

import fmoe
from fmoe.functions import ensure_comm
from fmoe.gates.faster_gate import FasterGate
from fmoe.layers import _fmoe_general_global_forward

_groups: dict[int, tuple] = {}


def on_own_device(check: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    """Run a check with what it makes on the rank's device."""

    @functools.wraps(check)
    def run(ranks: Ranks) -> None:
        with torch.device(ranks.device):
            check(ranks)

    return run


def groups_of(ranks: Ranks) -> tuple:
    """Ranks with the same tokens, 2 of 4, and those with other ones; made once."""
    if ranks.size not in _groups:
        same = max(ranks.size // 2, 1) if ranks.size == 4 else 1
        rows = [[j * same + i for i in range(same)] for j in range(ranks.size // same)]
        slices = [dist.new_group(row) for row in rows]
        others = [dist.new_group([row[i] for row in rows]) for i in range(same)]
        _groups[ranks.size] = (same, slices[ranks.rank // same], others[ranks.rank % same])
    return _groups[ranks.size]


def gather(own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


def compare_ranks(ranks: Ranks, layer: nn.Module, dtype: torch.dtype) -> None:
    same, slices, _ = groups_of(ranks)
    x = torch.rand(T, D).to(dtype)
    if same > 1:
        first = ranks.rank // same * same
        for tensor in (x, *(p.data for p in layer.gate.parameters())):
            value = tensor.float()
            dist.broadcast(value, first, group=slices)
            tensor.copy_(value)

    def own_part(grad: torch.Tensor) -> torch.Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total.chunk(ranks.size)[ranks.rank] / same

    compare(layer, Reference(layer, gather), x, own_part)


@on_own_device
def check_layers(ranks: Ranks) -> None:
    """Fused experts and experts of a list, on ranks with other tokens and with the same ones."""
    if ranks.size > 4:
        return
    same, slices, _ = groups_of(ranks)
    torch.manual_seed(42 + ranks.rank)
    options = {"world_size": ranks.size, "compat": True}
    if same > 1:
        options["slice_group"] = slices
    for num_expert, dtype in itertools.product(NUM_EXPERTS, DTYPES):
        compare_ranks(ranks, make_fused(num_expert, 2, **options).to(dtype), dtype)
        for expert in KINDS.values():
            layer = fmoe.FMoE(num_expert=num_expert, d_model=D, expert=expert, top_k=2, **options)
            compare_ranks(ranks, layer.to(dtype), dtype)


@on_own_device
def check_grouped_data_parallelism(ranks: Ranks) -> None:
    """Parameters that are tagged after the model was wrapped are averaged over the group of their tag."""
    if ranks.size > 4:
        return
    _, slices, others = groups_of(ranks)
    tags = {"0": "mp", "2": "dp", "4": "world"}
    members = {"mp": slices, "dp": others, "world": dist.group.WORLD}
    torch.manual_seed(42 + ranks.rank)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    wrapped = fmoe.DistributedGroupedDataParallel(
        copy.deepcopy(plain), mp_group=slices, dp_group=others, world_group=dist.group.WORLD
    )
    plain = copy.deepcopy(wrapped.module)
    for name, tag in tags.items():
        for parameter in wrapped.module.get_submodule(name).parameters():
            parameter.dp_comm = tag
    x = torch.randn(T, 8)
    for model in (plain, wrapped):
        model(x).mean().backward()
    wrapped.allreduce_params(reduce_after=False, fp32_allreduce=False)
    for name, tag in tags.items():
        expected = plain.get_submodule(name).weight.grad
        dist.all_reduce(expected, group=members[tag])
        actual = wrapped.module.get_submodule(name).weight.grad
        near(actual, expected / members[tag].size(), torch.float32)


@on_own_device
def check_swipe_gates(ranks: Ranks) -> None:
    """Every rank gets as many pairs as another, and scores are those of the experts that were chosen at last."""
    ensure_comm(torch.zeros(1), None)
    for num_expert, top_k in itertools.product((1, 4), (2, 4)):
        if top_k > num_expert * ranks.size:
            continue
        torch.manual_seed(ranks.rank)
        gate = fmoe.gates.SwipeGate(1024, num_expert, ranks.size, top_k)
        x = torch.rand(16, 1024)
        ids, scores = gate(x)
        taken = (ids.flatten() // num_expert).bincount(minlength=ranks.size)
        dist.all_reduce(taken)
        assert taken.tolist() == [16 * top_k] * ranks.size
        near(scores, gate.gate(x).gather(1, ids).softmax(-1), torch.float32)
        assert ids.shape == scores.shape == (16, top_k)
    for num_expert in (1, 4):
        gate = fmoe.gates.SwipeGate(4, num_expert, ranks.size)
        capacity = torch.tensor(32)
        for _ in range(2):
            ids = torch.randint(0, num_expert * ranks.size, (16,))
            before = capacity
            moved, capacity = gate.swipe_once(ids, capacity, 0)
            taken = (moved // num_expert).bincount(minlength=ranks.size)
            dist.all_reduce(taken)
            assert int(capacity) == int(before) - int(taken[ranks.rank]) >= 0
            assert bool((moved[moved != ids] % num_expert == 0).all())


@contextlib.contextmanager
def environment(**values: object) -> Iterator[None]:
    names = {f"FMOE_{name}": str(value) for name, value in values.items()}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


@on_own_device
def check_faster_gates(ranks: Ranks) -> None:
    """No more tokens leave their node than are allowed to."""
    if ranks.size != 8:
        return
    for num_expert, per_node in itertools.product((1, 4), (2, 4, 8)):
        with environment(TOPO_GPUS_PER_NODE=per_node, TOPO_OUTGOING_FRACTION=0.2):
            gate = FasterGate(1024, num_expert, ranks.size, ranks.rank // per_node)
        torch.manual_seed(ranks.rank)
        ids, _ = gate(torch.rand(16, 1024))
        assert bool((ids >= 0).all())
        away = ids[:, 0] // num_expert // per_node != ranks.rank // per_node
        assert int(away.sum()) <= math.ceil(16 * 0.2)


class Given(nn.Module):
    """A gate whose choices are given."""

    def __init__(self, ids: torch.Tensor):
        super().__init__()
        self.ids, self.top_k = ids, 2

    def forward(self, inp):
        return self.ids, torch.ones_like(self.ids, dtype=inp.dtype)


@on_own_device
def check_schedules_and_shadows(ranks: Ranks) -> None:
    """Chunks of tokens, and experts that come to the tokens, are equal to the naive function."""
    if ranks.size != 8:
        return
    ensure_comm(torch.zeros(1), None)
    cheap = ShadowPolicy(row_seconds=1.0, exchange_seconds=1.0, fetch_seconds=1e-9)
    for num_tokens, width, group_size, shadows in (
        (16, 1024, 4, None),
        *itertools.product((16,), (64,), (1, 2, 4), ("policy", "forced")),
        *itertools.product((512,), (64,), (1, 4), ("policy", "forced")),
    ):
        torch.manual_seed(ranks.rank)
        ids = torch.randint(0, ranks.size, (num_tokens, 2))
        expert = nn.Linear(width, width)
        x = torch.rand(num_tokens, width)
        results = []
        for kind in ("layer", "function"):
            own, inp = copy.deepcopy(expert), x.clone().requires_grad_()
            if kind == "function":
                rows = _fmoe_general_global_forward(
                    inp, ids, lambda r, _, own=own: own(r), 1, ranks.size
                )
                out = rows.view(num_tokens, 2, width).sum(1)
            else:
                options = {}
                if shadows == "forced":
                    options["dispatch"] = Exact(n_chunks=ranks.size // group_size, shadowing=cheap)
                faster = {"FASTER_SCHEDULE_ENABLE": 1, "FASTER_GROUP_SIZE": group_size}
                if shadows == "policy":
                    faster["FASTER_SHADOW_ENABLE"] = "ON"
                with environment(**faster):
                    layer = fmoe.FMoE(
                        d_model=width,
                        world_size=ranks.size,
                        gate=Given(ids),
                        expert=[own],
                        **options,
                    )
                assert f"n_chunks={ranks.size // group_size}" in layer.dispatch_text
                assert (type(layer.dispatcher).__name__ == "ShadowDispatcher") == bool(shadows)
                out = layer(inp)
            out.sum().backward()
            results.append((out, inp.grad, own.weight.grad, own.bias.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)
