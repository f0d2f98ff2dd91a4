"""Checks of layers whose ranks gather all tokens, run by every rank of a group."""

from __future__ import annotations

import copy
import itertools
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from layer_checks import HostReads, assert_equals_whole_on_own_tokens
from parallel_cases import (
    KINDS,
    ROUTINGS,
    all_to_one,
    assert_equals_whole,
    batch,
    copy_share,
    even,
    loss_of,
    make,
    make_pair,
    step,
    token_counts,
    uneven,
)
from torch.utils._python_dispatch import TorchDispatchMode

from moeops.comm.gathering import all_gather_rows, reduce_scatter_rows
from moeops.comm.groups import rank_group
from moeops.dispatch import Auto
from moeops.dispatch.exact import ExactDispatcher
from moeops.dispatch.gather import GatherDispatcher
from moeops.gates import ExpertChoiceGate, Llama4Gate, NaiveGate, SoftMoEGate
from processes import Ranks

# Room for every pair: a plan of all pairs, and one of those that fit.
EVERY_PAIR = ({"rows": 4.0}, {"rows": 1.999}, {"rows": 3.999, "max_tokens": 11})


def check_collectives(ranks: Ranks) -> None:
    """Gathered rows and scattered sums, and the gradient of one is the other's."""
    group = rank_group(dist.group.WORLD)
    everyone = torch.randn(ranks.size, 3, 2, dtype=torch.float64, device=ranks.device)
    dist.broadcast(everyone, 0)
    x = everyone[ranks.rank].clone().requires_grad_()
    y = all_gather_rows(x, group)
    assert torch.equal(y, everyone.flatten(0, 1))
    weights = torch.arange(1.0, y.numel() + 1, dtype=torch.float64, device=ranks.device).view_as(y)
    (grad,) = torch.autograd.grad((y * weights).sum() * (1 + ranks.rank), x, create_graph=True)
    share = weights.view_as(everyone)[ranks.rank]
    torch.testing.assert_close(grad, share * sum(range(1, ranks.size + 1)))
    x = (weights * (1 + ranks.rank)).requires_grad_()
    y = reduce_scatter_rows(x, group)
    torch.testing.assert_close(y, share * sum(range(1, ranks.size + 1)))
    (grad,) = torch.autograd.grad((y * everyone[ranks.rank]).sum(), x)
    assert torch.equal(grad, everyone.flatten(0, 1))
    flags = torch.tensor([[ranks.rank]], dtype=torch.int16, device=ranks.device)
    assert all_gather_rows(flags, group).flatten().tolist() == list(range(ranks.size))


def check_equals_one_rank(ranks: Ranks) -> None:
    for kind, options in itertools.product(KINDS, EVERY_PAIR):
        if options["rows"] < ranks.size - 1 or (kind != "mlp" and ranks.size > 2):
            continue
        part, whole = make_pair(kind, ranks, dispatch="gather", **options)
        for (name, counts), routing in itertools.product(
            token_counts(ranks.size).items(), ROUTINGS
        ):
            if name in ("equal", "none") or "max_tokens" in options:
                assert_equals_whole(part, part, whole, kind, ranks, counts, routing)


def check_weights_on_inputs_and_few_rows(ranks: Ranks) -> None:
    for gate, options in itertools.product((Llama4Gate, ExpertChoiceGate), EVERY_PAIR):
        if options["rows"] > ranks.size - 1:
            options = {**options, "gate": gate, "top_k": 2, "dispatch": "gather"}
            assert_equals_whole_on_own_tokens("mlp", ranks, options)


def check_lost_pairs(ranks: Ranks) -> None:
    """What finds no row is an error in the next forward, once, on every rank, with the number of pairs."""
    part, whole = make_pair("mlp", ranks, dispatch="gather", rows=1.0)
    for layer in (part, copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        x = batch(6 * ranks.size, ranks.device)
        mine = x.split(6)[ranks.rank]
        layer.gate.set_routing(all_to_one)
        part.dispatcher.raise_for_lost_pairs()  # another layer's are not this one's
        y = layer(mine)
        lost = 6 * ranks.size - 12
        if lost == 0:  # every token has one expert, and there are two slots
            layer(mine)
            continue
        # The last expert has room for the first 12 tokens of all.
        whole.gate.set_routing(all_to_one)
        kept = torch.arange(6, device=ranks.device) + 6 * ranks.rank < 12
        expected = torch.where(kept[:, None], whole(x).split(6)[ranks.rank], 0)
        torch.testing.assert_close(y, expected)
        with pytest.raises(RuntimeError, match=rf"got {lost} pairs without a row .* Raise rows"):
            layer(mine)
        layer.gate.set_routing(even)
        layer(mine)
        layer(mine)
    few, _ = make_pair("mlp", ranks, dispatch="gather", rows=0.5)
    few.gate.set_routing(even)
    few(mine)
    with pytest.raises(RuntimeError, match=f"got {6 * ranks.size} pairs without a row"):
        few.dispatcher.raise_for_lost_pairs()
    few.dispatcher.raise_for_lost_pairs()


def check_refusals(ranks: Ranks) -> None:
    """One error on every rank."""
    for options, error, message in (
        ({"rows": 0.0}, ValueError, "rows must be above 0 and finite, got 0.0"),
        ({"rows": "2"}, TypeError, r"rows must be a float or None .* got '2'"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be .*at least 0, got -1"),
        ({"rows": 1.0 + ranks.rank}, ValueError, "rows must be the same on every rank"),
    ):
        with pytest.raises(error, match=message):
            make("mlp", 2, ranks.device, world_size=ranks.size, dispatch="gather", **options)
    x = batch(4, ranks.device)
    mixing, _ = make_pair("mlp", ranks, dispatch="gather", gate=SoftMoEGate, top_k=1)
    with pytest.raises(NotImplementedError, match=r"must choose experts, got one that mixes"):
        mixing(x)
    part, whole = make_pair("mlp", ranks, dispatch="gather", rows=4.0, max_tokens=3)
    with pytest.raises(ValueError, match=r"max_tokens must be at least .* got 3 and 4 tokens"):
        part(x)
    torch.testing.assert_close(part(x[:3]), whole(x[:3]))


def check_numbers_of_tokens_that_differ(ranks: Ranks) -> None:
    """One error on every rank where all have a new number; else on the ranks that have one."""
    part, whole = make_pair("mlp", ranks, dispatch="gather", rows=4.0)
    for count in (4, 7):
        unequal = batch(count + ranks.rank, ranks.device)
        with pytest.raises(ValueError, match=rf"got those for sizes of \[{count}, {count + 1}"):
            part(unequal)
        x = batch(count, ranks.device)
        for _ in range(2):
            torch.testing.assert_close(part(x), whole(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEOPS_DEBUG_CHECKS", "1")
        torch.testing.assert_close(part(x), whole(x))
        with pytest.raises(ValueError, match=r"same shapes and dtypes on every rank .* max_tokens"):
            part(x.float() if ranks.rank == 1 else x)
    if ranks.device != "cpu":  # NCCL's watchdog would end the processes
        return
    # The ranks that have not changed wait for the others, here until the time-out.
    group = dist.new_group(timeout=timedelta(seconds=2))
    alone, _ = make_pair("mlp", ranks, dispatch="gather", rows=4.0, moe_group=group)
    torch.testing.assert_close(alone(x), whole(x))
    error, message = RuntimeError, "within the time-out of 2 s"
    if ranks.rank == 0:
        error, message = ValueError, r"a size of 9 on rank 0, where it was 7 before .* Pad shorter"
    with pytest.raises(error, match=message):
        alone(batch(9 if ranks.rank == 0 else 7, ranks.device))


class Order(TorchDispatchMode):
    """The order of collectives and products."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")
        if name[0] in ("_c10d_functional", "moeops") or name[1] in ("addmm", "mm"):
            self.events.append(name[1])
        return func(*args, **(kwargs or {}))


def check_order(ranks: Ranks) -> None:
    """Tokens travel while the gate works, and gradients while experts' are made; nothing is copied to the host."""
    part, _ = make_pair("mlp", ranks, dispatch="gather", rows=float(ranks.size))
    x = batch(6, ranks.device).requires_grad_()
    part.gate.set_routing(uneven)
    part(x)  # the first forward compares numbers of tokens
    with HostReads() as reads:
        loss_of(part(x)).backward()
    assert reads.names == []
    with Order() as forward:
        loss = loss_of(part(x))
    gather, wait = [ranks.gather], ["wait_tensor"]
    experts, scatter = ["sort_tokens", "moe_mlp"], ["reduce_scatter_tensor"]
    before, after = ["require_common_size", *gather, "addmm"], [*experts, *scatter, *wait]
    assert forward.events == [*before, *gather, *wait, *wait, *after]
    with Order() as backward:
        loss.backward()
    data, weights = ["moe_mlp_backward_data"], ["moe_mlp_backward_weights"] * 2
    sums = [n for n in backward.events if n in (*gather, *scatter, *wait, *data, *weights)]
    # Gradients of all outputs come; those of tokens and of choices go while those of experts are computed.
    assert sums == [*gather, *wait, *data, *scatter, *scatter, *weights, *wait, *wait]


def check_optimizer_steps(ranks: Ranks) -> None:
    """Two steps are those of one rank."""
    part, whole = make_pair("mlp", ranks, dispatch="gather", rows=float(ranks.size))
    layers = {
        part: torch.optim.Adam(part.parameters()),
        whole: torch.optim.Adam(whole.parameters()),
    }
    x = batch(6 * ranks.size, ranks.device)
    for _ in range(2):
        for layer, optimizer in layers.items():
            step(layer, layer, "mlp", x if layer is whole else x.split(6)[ranks.rank], uneven)
            if layer is part:
                for parameter in layer.gate.parameters():
                    dist.all_reduce(parameter.grad)
            optimizer.step()
    expected = copy.deepcopy(part)
    copy_share(whole, expected, ranks.rank)
    for (name, actual), value in zip(part.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual, value, msg=lambda text, n=name: f"{n}: {text}")


def check_masks_autocast_checkpoint_and_slices(ranks: Ranks) -> None:
    rows = {"dispatch": "gather", "rows": float(ranks.size)}
    part, whole = make_pair("mlp", ranks, mask_dict={1: 2.0}, **rows)
    x = batch(6, ranks.device)
    for layer in (part, whole):
        layer.gate.set_routing(uneven)
    mask = torch.tensor([0, 1, 0, 2, 0, 1], device=ranks.device)
    torch.testing.assert_close(part(x, mask), whole(x, mask))
    part32, whole32 = make_pair("mlp", ranks, dtype=torch.float32, **rows)
    with torch.autocast(ranks.device.partition(":")[0], torch.bfloat16):
        half = part32(x.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole32(x.float()), rtol=0.05, atol=0.05)
    tight, _ = make_pair("mlp", ranks, dispatch="gather", rows=1.99)
    x.requires_grad_()
    leaves = [x, *tight.parameters()]
    plain = torch.autograd.grad(loss_of(tight(x)), leaves)
    again = torch.utils.checkpoint.checkpoint(tight, x, use_reentrant=False)
    for actual, expected in zip(torch.autograd.grad(loss_of(again), leaves), plain, strict=True):
        assert torch.equal(actual, expected)
    # Slices of tokens that all ranks have are equal where they divide, and padded where not.
    for num_tokens, options in ((2 * ranks.size, {}), (2 * ranks.size + 1, {"max_tokens": 3})):
        torch.manual_seed(2)
        whole = make("mlp", 2 * ranks.size, ranks.device)
        options = {**rows, **options, "world_size": ranks.size, "slice_group": dist.group.WORLD}
        part = make("mlp", 2, ranks.device, **options)
        copy_share(whole, part, ranks.rank)
        x = batch(num_tokens, ranks.device)
        torch.testing.assert_close(part(x), whole(x))


def check_auto(ranks: Ranks) -> None:
    """The choice, in words too, and an error where ranks were not told the same."""
    for options, top_k, kind in (
        ({}, 4, ExactDispatcher),
        ({"equal_tokens": True}, 4, GatherDispatcher),
        ({"max_tokens": 9}, 4, GatherDispatcher),
        ({"equal_tokens": True}, 1, ExactDispatcher),
    ):
        layer = make(
            "mlp", 4, ranks.device, world_size=ranks.size, top_k=top_k, gate=NaiveGate,
            dispatch=Auto(**options),
        )  # fmt: skip
        assert type(layer.dispatcher) is kind
        assert getattr(layer.dispatcher, "max_tokens", None) == options.get("max_tokens")
        why = {
            ExactDispatcher: "may have different numbers of tokens"
            if top_k == 4
            else "more than 1",
            GatherDispatcher: f"{ranks.size} ranks, 4 experts per token",
        }[kind]
        assert f"dispatch={kind.__name__.removesuffix('Dispatcher')}(" in repr(layer)
        assert why in repr(layer)
        layer(
            batch(9 - ranks.rank if "max_tokens" in options else 9, ranks.device)
        ).sum().backward()
    with pytest.raises(ValueError, match=r"dispatch must be the same on every rank"):
        make("mlp", 2, ranks.device, world_size=ranks.size, top_k=4, gate=NaiveGate,
             dispatch=Auto(equal_tokens=ranks.rank == 0))  # fmt: skip
    with pytest.raises(TypeError, match="equal_tokens must be True or False, got 1"):
        make("mlp", 2, ranks.device, world_size=ranks.size, dispatch=Auto(equal_tokens=1))
