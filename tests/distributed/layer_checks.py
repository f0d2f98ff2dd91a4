"""Checks of expert-parallel layers, run by every rank of a group."""

from __future__ import annotations

import copy
import itertools
import pickle
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from parallel_cases import (
    KINDS,
    ROUTINGS,
    all_to_one,
    assert_equals_whole,
    batch,
    copy_share,
    dropped,
    loss_of,
    make,
    make_pair,
    share,
    step,
    token_counts,
    uneven,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moeops import LoadMonitor, RoutingReplay
from moeops.dispatch.local import LocalDispatcher
from moeops.distributed import expert_range
from moeops.gates import ExpertChoiceGate, Llama4Gate, SoftMoEGate
from processes import Ranks

# A capacity with room for every pair, so that nothing is dropped.
DISPATCHES = (
    {"dispatch": "exact"},
    {"dispatch": "exact", "n_chunks": 3},
    {"dispatch": "static", "capacity": 12},
    {"dispatch": "static", "capacity": 12, "n_chunks": 5},
)


def check_equals_one_rank(ranks: Ranks) -> None:
    cases = list(itertools.product(KINDS, DISPATCHES))
    for kind, options in cases if ranks.size == 2 else cases[:5]:
        part, whole = make_pair(kind, ranks, **options)
        for counts, routing in itertools.product(token_counts(ranks.size).values(), ROUTINGS):
            assert_equals_whole(part, part, whole, kind, ranks, counts, routing)


def check_equals_one_rank_for_slots(ranks: Ranks) -> None:
    """A gate that mixes the tokens of this rank: the whole layer sees this rank's tokens only."""
    for kind, options in itertools.product(("mlp", "modules"), (DISPATCHES[0], *DISPATCHES[2:])):
        options = {**options, "gate": partial(SoftMoEGate, num_slots=2), "top_k": 1}
        assert_equals_whole_on_own_tokens(kind, ranks, options)
    options = {"gate": options["gate"], "top_k": 1, "n_chunks": 2}
    part, _ = make_pair("mlp", ranks, **options)
    with pytest.raises(NotImplementedError, match="n_chunks must be 1 for a gate that mixes"):
        part(batch(3, ranks.device))


def check_equals_one_rank_for_weights_on_inputs(ranks: Ranks) -> None:
    for options in DISPATCHES:
        assert_equals_whole_on_own_tokens("mlp", ranks, {**options, "gate": Llama4Gate, "top_k": 2})


def check_equals_one_rank_for_few_rows(ranks: Ranks) -> None:
    for options in DISPATCHES:
        options = {**options, "gate": ExpertChoiceGate}
        assert_equals_whole_on_own_tokens("mlp", ranks, options)


def check_static_drops_by_sending_rank(ranks: Ranks) -> None:
    """What one rank drops depends on its tokens only: the same layer on one rank drops the same."""
    for kind, capacity, n_chunks in itertools.product(KINDS, (1, 2, 0.5, 1.25), (1, 2)):
        options = {"dispatch": "static", "capacity": capacity}
        part, whole = make_pair(kind, ranks, n_chunks=n_chunks, **options)
        local = make(kind, 2 * ranks.size, ranks.device, **options)
        local.load_state_dict(whole.state_dict())
        for routing in (uneven, all_to_one):
            assert_same_on_own_tokens(part, local, kind, ranks, 7, routing)
    few = make("mlp", 2 * ranks.size, ranks.device, dispatch="static", capacity=1)
    few.gate.set_routing(all_to_one)
    y = few(batch(5, ranks.device))
    assert y[0].abs().sum() > 0
    assert y[1:].abs().sum() == 0


def assert_equals_whole_on_own_tokens(kind: str, ranks: Ranks, options: dict) -> None:
    part, whole = make_pair(kind, ranks, **options)
    assert_same_on_own_tokens(part, whole, kind, ranks, 8, None)


def assert_same_on_own_tokens(part, local, kind, ranks, num_tokens, routing) -> None:
    """Each rank has another batch; ``local`` computes this rank's with all experts."""
    x = batch(num_tokens, ranks.device) * torch.tensor([1.0] + [0.5 + ranks.rank] * 5).to(
        ranks.device, torch.float64
    )
    actual = step(part, part, kind, x, routing)
    expected = step(local, local, kind, x, routing)
    for name, value in expected.items():
        if name.startswith("experts."):
            dist.all_reduce(value)
    gradients = share(local, ranks.rank, part.num_expert, expected)
    assert gradients.keys() == actual.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, n=name: f"{n}: {text}")


class HostReads(TorchFunctionMode):
    """Count what brings values to the host."""

    READS = ("cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.READS or (name == "to" and "cpu" in [str(a) for a in args[1:]]):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def check_host_copies(ranks: Ranks) -> None:
    """One for the exact dispatcher, whatever the chunks and the experts are, and none for the static one."""
    for kind, options in itertools.product(("mlp", "modules"), DISPATCHES):
        part, _ = make_pair(kind, ranks, **options)
        x = batch(6, ranks.device).requires_grad_()
        with HostReads() as reads:
            loss_of(part(x)).backward()
        # tolist reads what cpu has copied.
        expected = ["cpu", "tolist"] if options["dispatch"] == "exact" else []
        assert reads.names == expected, (kind, options, reads.names)


def check_synchronisations(ranks: Ranks) -> None:
    """The same as CUDA sees it."""
    if ranks.device == "cpu":
        return
    for kind, options in itertools.product(("mlp", "modules"), DISPATCHES):
        part, _ = make_pair(kind, ranks, **options)
        x = batch(6, ranks.device).requires_grad_()
        loss_of(part(x)).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss_of(part(x)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        syncs = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        assert len(syncs) == (options["dispatch"] == "exact"), (kind, options, syncs)


class Order(TorchDispatchMode):
    """The order in which exchanges begin and end and experts run."""

    NAMES: ClassVar = {
        "_c10d_functional.all_to_all_single.default": "send",
        "_c10d_functional.wait_tensor.default": "wait",
        "moeops.moe_mlp.default": "experts",
        "moeops.moe_mlp_backward_data.default": "experts",
        "moeops.moe_mlp_backward_weights.default": "weights",
    }

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in self.NAMES:
            self.events.append(self.NAMES[str(func)])
        return func(*args, **(kwargs or {}))


def check_chunks_are_in_flight(ranks: Ranks) -> None:
    """Every dispatch begins before the first expert runs, and every chunk returns while the next is computed.

    The last ones of the backward return while the weights' gradients are computed.
    """

    def steps(there: int, back: int, weights: int = 0) -> list[str]:
        """Exchanges of a chunk on either way."""
        one = ["wait"] * there + ["experts"] + ["send"] * back
        return ["send"] * 3 * there + one * 3 + ["weights"] * weights + ["wait"] * 3 * back

    for options in ({"dispatch": "exact"}, {"dispatch": "static", "capacity": 6}):
        part, _ = make_pair("mlp", ranks, n_chunks=3, **options)
        x = batch(9, ranks.device).requires_grad_()
        with Order() as forward:
            loss = loss_of(part(x))
        with Order() as backward:
            loss.backward()
        if options["dispatch"] == "exact":  # tokens, and what the gate chose for them
            assert forward.events == ["send", "wait", *steps(2, 1)]
            assert backward.events == steps(1, 2, weights=6)
        else:
            assert forward.events == steps(1, 1)
            assert backward.events == steps(1, 1, weights=6)


def check_mask_and_autocast_and_checkpoint(ranks: Ranks) -> None:
    part, whole = make_pair("mlp", ranks, mask_dict={1: 2.0})
    x = batch(6, ranks.device)
    part.gate.set_routing(uneven)
    whole.gate.set_routing(uneven)
    mask = torch.tensor([0, 1, 0, 2, 0, 1], device=ranks.device)
    torch.testing.assert_close(part(x, mask), whole(x, mask))
    part32, whole32 = make_pair("mlp", ranks, dtype=torch.float32)
    with torch.autocast(ranks.device.partition(":")[0], torch.bfloat16):
        half = part32(x.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole32(x.float()), rtol=0.05, atol=0.05)
    x.requires_grad_()
    plain = torch.autograd.grad(loss_of(part(x)), [x, *part.parameters()])
    again = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
    for actual, expected in zip(
        torch.autograd.grad(loss_of(again), [x, *part.parameters()]), plain, strict=True
    ):
        assert torch.equal(actual, expected)


def check_load_monitor(ranks: Ranks) -> None:
    """Every rank counts its own tokens over all experts; a group's sum is what one rank counts for the whole batch."""
    group = dist.group.WORLD
    for routing, options in itertools.product((uneven, dropped, all_to_one), DISPATCHES[::2]):
        part, whole = make_pair("mlp", ranks, **options)
        counts = [3 + 2 * rank for rank in range(ranks.size)]
        x = batch(sum(counts), ranks.device)
        monitors = []
        for layer, tokens in ((part, x.split(counts)[ranks.rank]), (whole, x)):
            layer.gate.set_routing(routing)
            monitors.append(LoadMonitor(layer))
            layer(tokens)
        own = monitors[0].summary()[""]
        everyone = monitors[0].summary(group)[""]
        wanted = monitors[1].summary()[""]
        first = sum(counts[: ranks.rank])
        index = torch.arange(first, first + counts[ranks.rank])
        ids = routing(index, 2 * ranks.size).flatten()
        loads = torch.bincount(ids[ids >= 0], minlength=2 * ranks.size)
        assert own.loads.tolist() == loads.tolist()
        assert own.tokens == counts[ranks.rank]
        assert everyone.loads.tolist() == wanted.loads.tolist()
        for name in ("tokens", "slots", "empty", "without_expert", "experts_per_token", "dropped"):
            assert getattr(everyone, name) == getattr(wanted, name), name
        assert everyone.forwards == ranks.size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loads.csv"
        monitors[0].write_csv(path, 1, group)
        assert path.exists() == (ranks.rank == 0)


def check_routing_replay(ranks: Ranks) -> None:
    """What each rank records, it replays; all of it together is what one rank replays for the whole batch."""
    part, whole = make_pair("mlp", ranks)
    counts = [3 + 2 * rank for rank in range(ranks.size)]
    x = batch(sum(counts), ranks.device)
    mine = x.split(counts)[ranks.rank]
    part.gate.set_routing(uneven)
    replay = RoutingReplay(part)
    replay.record()
    y = part(mine)
    decisions = replay.take()
    part.gate.set_routing(all_to_one)
    with torch.no_grad():
        part.gate.gate.weight.zero_()
    replay.stop()
    assert not torch.allclose(part(mine), y)
    replay.replay(decisions)
    torch.testing.assert_close(part(mine), y)
    every: list = [None] * ranks.size
    dist.all_gather_object(every, [t.detach().cpu() for t in decisions[""]])
    together = RoutingReplay(whole)
    together.replay(
        {"": tuple(torch.cat(parts).to(ranks.device) for parts in zip(*every, strict=True))}
    )
    torch.testing.assert_close(whole(x).split(counts)[ranks.rank], y)


def check_copies_of_a_layer(ranks: Ranks) -> None:
    part, _ = make_pair("mlp", ranks)
    x = batch(4, ranks.device)
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert torch.equal(other(x), part(x))


def check_several_groups(ranks: Ranks) -> None:
    """Layers over all ranks and over halves live side by side; a mesh dimension names a group."""
    half = ranks.size // 2
    mesh = init_device_mesh(
        ranks.device.partition(":")[0], (2, half), mesh_dim_names=("data", "experts")
    )
    inner = Ranks(ranks.rank % half, half, ranks.device)
    wide, whole_wide = make_pair("mlp", ranks)
    torch.manual_seed(5)
    whole = make("mlp", 2 * half, ranks.device)
    by_mesh = make("mlp", 2, ranks.device, device_mesh=mesh["experts"])
    by_group = make("mlp", 2, ranks.device, world_size=half, moe_group=mesh.get_group("experts"))
    for layer in (by_mesh, by_group):
        assert layer.world_size == half
        copy_share(whole, layer, inner.rank)
    x = batch(5, ranks.device)
    for _ in range(2):
        torch.testing.assert_close(wide(x), whole_wide(x))
        torch.testing.assert_close(by_mesh(x), whole(x))
        torch.testing.assert_close(by_group(x), whole(x))
    assert isinstance(by_mesh.dispatcher, LocalDispatcher) == (half == 1)


def check_one_rank_is_local(ranks: Ranks) -> None:
    groups = [dist.new_group([rank]) for rank in range(ranks.size)]
    layer = make("mlp", 2, ranks.device, world_size=1, moe_group=groups[ranks.rank])
    assert isinstance(layer.dispatcher, LocalDispatcher)


def check_slices(ranks: Ranks) -> None:
    """Ranks with the same tokens, remainder included: everyone gets the outputs and gradients of all."""
    group = dist.group.WORLD
    for options in ({}, {"world_size": ranks.size}):
        for name in ("slice_group", "mp_group"):
            torch.manual_seed(2)
            whole = make("mlp", 2 * options.get("world_size", 1), ranks.device)
            part = make("mlp", 2, ranks.device, **options, **{name: group})
            if options:
                copy_share(whole, part, ranks.rank)
            else:
                part.load_state_dict(whole.state_dict())
            mask = torch.zeros(4 * ranks.size + 1, dtype=torch.long, device=ranks.device)
            mask[2] = 1
            for num_tokens in (4 * ranks.size + 1, 1, 0, 2 * ranks.size):
                x = batch(num_tokens, ranks.device)
                this = mask[:num_tokens] if num_tokens > 2 else None
                actual = step(partial(part, mask=this), part, "mlp", x, uneven)
                expected = step(partial(whole, mask=this), whole, "mlp", x, uneven)
                if options:
                    expected = share(whole, ranks.rank, 2, expected)
                for key, value in expected.items():
                    if key.startswith("gate.") or (not options and key.startswith("experts.")):
                        dist.all_reduce(actual[key])
                        actual[key] /= ranks.size
                    elif key.startswith("experts."):
                        actual[key] /= ranks.size  # the losses of W ranks have reached it
                    torch.testing.assert_close(
                        actual[key], value, msg=lambda t, k=key, n=num_tokens: f"{k} {n}: {t}"
                    )


def check_slice_gradients(ranks: Ranks) -> None:
    """As in FastMoE, those of gate and experts are this rank's slice's: their sum is what one rank computes."""
    whole = make("mlp", 2, ranks.device)
    options = {"slice_group": dist.group.WORLD, "slice_gradients": "fastmoe"}
    part = make("mlp", 2, ranks.device, **options)
    part.load_state_dict(whole.state_dict())
    x = batch(4 * ranks.size + 1, ranks.device)
    actual = step(part, part, "mlp", x, uneven)
    for key, value in step(whole, whole, "mlp", x, uneven).items():
        if key.startswith(("gate.", "experts.")):
            dist.all_reduce(actual[key])
        torch.testing.assert_close(actual[key], value, msg=lambda t, k=key: f"{k}: {t}")
    with pytest.raises(ValueError, match=r"slice_gradients must be one of .* got 'sum'"):
        make("mlp", 2, ranks.device, slice_gradients="sum")


def check_groups_are_torchs(ranks: Ranks) -> None:
    """A program may hand a layer's groups to torch.distributed."""
    world = dist.group.WORLD
    layer = make("mlp", 2, ranks.device, world_size=ranks.size, slice_group=world)
    for group in (layer.moe_group, copy.deepcopy(layer).slice_group):
        assert (group.size(), group.rank()) == (ranks.size, ranks.rank)
        total = torch.ones(1, device=ranks.device)
        dist.all_reduce(total, group=group)
        assert float(total) == ranks.size
    alone = make("mlp", 2, ranks.device)
    assert alone.moe_group is alone.slice_group is None


def check_arguments_that_differ(ranks: Ranks) -> None:
    """An error on every rank, which names both values; and the ranks still work together afterwards."""
    last = ranks.rank == ranks.size - 1
    cases = [
        ({"top_k": 1 if last else 2}, ValueError, "top_k must be the same on every rank"),
        ({"dispatch": "static", "capacity": 3 + last}, ValueError, "capacity must be the same"),
        ({"n_chunks": 1 + last}, ValueError, "n_chunks must be the same"),
        ({"dtype": torch.float32 if last else torch.float64}, ValueError, "dtype must be the same"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            make("mlp", 2, ranks.device, world_size=ranks.size, **options)
        assert f"of {ranks.size}" in str(caught.value)
    with pytest.raises(ValueError, match="num_expert must be the same on every rank"):
        make("mlp", 2 + last, ranks.device, world_size=ranks.size)
    # One rank fails by itself, the others are told.
    error, message = (
        (ValueError, "top_k must be at most") if last else (RuntimeError, "an error on rank")
    )
    with pytest.raises(error, match=message):
        make("mlp", 2, ranks.device, world_size=ranks.size, top_k=99 if last else 2)
    with pytest.raises(ValueError, match=r"num_experts must be a multiple of the . ranks .* got 5"):
        expert_range(ranks.size * 2 + 1 if ranks.size == 2 else 5, dist.group.WORLD)
    with pytest.raises(ValueError, match="world_size must be the size of the group"):
        make("mlp", 2, ranks.device, world_size=ranks.size + 1)
    alone = [dist.new_group([rank]) for rank in range(ranks.size)]
    with pytest.raises(ValueError, match="must hold this rank"):
        make("mlp", 2, ranks.device, world_size=2, moe_group=alone[ranks.rank - 1])
    part, whole = make_pair("mlp", ranks)
    x = batch(4, ranks.device)
    torch.testing.assert_close(part(x), whole(x))


def check_rows_that_differ(ranks: Ranks) -> None:
    """Another dtype on one rank: sent along with the counts, so every rank sees it before any row moves."""
    part, whole = make_pair("modules", ranks)
    x = batch(4, ranks.device)
    part.float() if ranks.rank == 0 else part
    with pytest.raises(ValueError, match=r"same size and dtype on every rank .* on rank 0"):
        part(x.float() if ranks.rank == 0 else x)
    part.double()
    torch.testing.assert_close(part(x), whole(x), rtol=1e-5, atol=1e-5)
