"""Activation checkpointing of a layer with any gate, a load monitor and a recording: the numbers of one forward."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from every_gate import GATES
from gate_checks import D, E, assert_same
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import gate_classes
from cases import each
from moeops import FMoETransformerMLP, LoadMonitor, RoutingReplay


class Block(nn.Module):
    """Operators behind the layer too: a recomputation ends where nothing that was saved is missing."""

    def __init__(self, name):
        super().__init__()
        build, top_k, _, _ = GATES[name]
        self.moe = FMoETransformerMLP(E, D, 12, activation="swiglu", top_k=top_k, gate=build)
        self.scale = nn.Parameter(torch.rand(D) + 0.5)
        self.out = nn.Linear(D, D)

    def forward(self, x):
        return self.out(self.moe(x) * self.scale)


def products_saved(*_args):
    return create_selective_checkpoint_contexts(
        [torch.ops.aten.mul.Tensor, torch.ops.aten.mm.default]
    )


def nearly_everything_saved(*_args):
    """Everything, the library's own operators too; torch refuses to save what it writes to in place."""

    def policy(_context, op, *_args, **_kwargs):
        written = op.namespace == "aten" and (op._schema.is_mutable or "empty" in op.name())
        return CheckpointPolicy.PREFER_RECOMPUTE if written else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


WAYS = {
    "saved": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": products_saved},
    "nearly_everything": {"use_reentrant": False, "context_fn": nearly_everything_saved},
}


def step(call, block, x, keep_gradient):
    """One training step: gradients, the loss, buffers, loads and the recorded decision, by name."""
    torch.manual_seed(7)
    monitor, replay = LoadMonitor(block), RoutingReplay(block)
    replay.record()
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    total, results = y.square().sum(), {}
    loss = block.moe.gate.get_loss()
    if loss is not None:
        results["loss"] = loss.detach()
        total = total + (0.5 * loss if keep_gradient else 0)
    before = replay.take()["moe"]
    total.backward()
    assert block.moe.gate.get_loss() is None
    assert not block.moe.gate.has_loss
    assert replay.take() == {}
    results.update({f"grad {n}": p.grad for n, p in block.named_parameters()}, x=leaf.grad)
    results.update({f"buffer {n}": b.clone() for n, b in block.named_buffers()})
    results["loads"] = monitor.state_dict()["moe"]
    results["first"], results["second"] = before
    monitor.remove()
    replay.remove()
    return {name: value for name, value in results.items() if value is not None}


@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")
@each("way", WAYS)
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name, way):
    block = Block(name)
    other, x = copy.deepcopy(block), torch.randn(20, D)
    # A reentrant checkpoint runs the forward without gradients, so that the loss has none.
    keep_gradient = way != "reentrant"
    again = functools.partial(checkpoint, other, **WAYS[way])
    assert_same(step(again, other, x, keep_gradient), step(block, block, x, keep_gradient))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["switch", "deepseek", "remoe", "noisy"])
def test_checkpoint_around_a_compiled_block(name):
    block = Block(name)
    other, x = copy.deepcopy(block), torch.randn(20, D)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    again = functools.partial(checkpoint, compiled, use_reentrant=False)
    with torch._inductor.config.patch(fallback_random=True):
        for _ in range(2):
            assert_same(step(again, other, x, True), step(block, block, x, True))


def test_a_loss_or_decision_left_alone_outlives_the_recomputation():
    """As without a checkpoint: nobody asked for them before the backward."""
    block = Block("switch")
    replay, x = RoutingReplay(block), torch.randn(9, D, requires_grad=True)
    replay.record()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for call in (block, compiled):
        checkpoint(call, x, use_reentrant=False).sum().backward()
        assert block.moe.gate.has_loss
        assert block.moe.gate.get_loss().shape == ()
        assert block.moe.gate.get_loss() is None
        assert replay.take()["moe"][0].shape == (9, 1)
        assert replay.take() == {}


def test_the_table_has_every_gate():
    """The tests of this folder that walk over all gates take them from one table."""
    built = {type(build(D, E, 1, top_k)) for build, top_k, _, _ in GATES.values()}
    assert built == set(gate_classes.CLASSES)
