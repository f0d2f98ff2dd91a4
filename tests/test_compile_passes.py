"""Passes over graphs, in one process: what they change, what they leave alone, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch._inductor import config
from torch.fx import symbolic_trace

from moeops import FMoETransformerMLP
from moeops.compile import Order, options
from moeops.compile.passes import LAST, Pass, PassList


def test_options_are_those_of_inductor():
    chosen = options(FMoETransformerMLP(4, 8, 16))
    known = config.get_config_copy()
    assert set(chosen) <= set(known)
    assert chosen["reorder_for_peak_memory"] is False
    assert set(options(FMoETransformerMLP(4, 8, 16), passes=[])) == {"reorder_for_peak_memory"}


@pytest.mark.parametrize(
    ("model", "passes", "error", "message"),
    [
        (3, [], TypeError, r"options: model must be a torch.nn.Module, got 3 \(int\)"),
        (None, ["fast"], ValueError, r"options: a pass must be one of .*'order'.*, got 'fast'"),
        (None, [len], TypeError, r"options: a pass must be one of .* or a moeops.compile.Pass"),
    ],
)
def test_what_is_refused(model, passes, error, message):
    with pytest.raises(error, match=message):
        options(FMoETransformerMLP(4, 8, 16) if model is None else model, passes=passes)


class Elsewhere(Pass):
    hook = "no_such_hook"


def test_a_hook_that_is_not_there_is_refused(monkeypatch):
    layer = FMoETransformerMLP(4, 8, 16)
    with pytest.raises(ValueError, match=r"Elsewhere: hook must be one of .*, got 'no_such_hook'"):
        options(layer, passes=[Elsewhere()])
    monkeypatch.setattr("moeops.compile.passes.config", object())
    with pytest.raises(RuntimeError, match=rf"options: torch must have .*{LAST}, got torch .*2.11"):
        options(layer, passes=["order"])


def test_a_graph_without_collectives_is_left_alone():
    traced = symbolic_trace(lambda x: torch.relu(x) + 1)
    before = traced.graph.python_code("self").src
    assert Order()(traced.graph) == 0
    assert traced.graph.python_code("self").src == before


def test_passes_are_known_by_source_and_settings():
    """Torch 2.11 keys a pass before autograd by its pickle, and all others by ``uuid``."""

    class Never(Pass):
        hook = LAST

    one, same, other = PassList([Order()]), PassList([Order()]), PassList([])
    assert one.uuid() == same.uuid() != other.uuid()
    assert pickle.dumps(one) == pickle.dumps(same) != pickle.dumps(other)
    assert pickle.loads(pickle.dumps(one)).uuid() == one.uuid()
    assert PassList([Never()]).uuid() != one.uuid()
