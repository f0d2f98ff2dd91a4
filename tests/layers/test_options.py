"""How a layer is asked for: arguments that both layers share, records of dispatchers, construction without memory."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from moeops import FMoE, FMoETransformerMLP
from moeops.dispatch import DispatchOptions, LocalDispatcher
from moeops.dispatch.base import ExpertRanks
from moeops.dispatch.options import DISPATCHES
from moeops.dispatch.static import StaticDispatcher
from moeops.distributed import Exact, ShadowPolicy, Static
from moeops.layers import FMoELinear, FusedExperts

D, H, E = 6, 5, 4


def make(**options) -> FMoETransformerMLP:
    return FMoETransformerMLP(E, D, H, **options)


def test_the_mlp_takes_every_argument_of_the_layer_below_with_its_default():
    below = inspect.signature(FMoE).parameters
    own = inspect.signature(FMoETransformerMLP).parameters
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in own.values())
    assert below.keys() - own.keys() == {"expert", "expert_call"}
    for name in below.keys() & own.keys():
        assert own[name].default == below[name].default, name


@pytest.mark.parametrize(
    "build",
    [
        lambda make: make(FMoETransformerMLP, E, D, H, activation="swiglu"),
        lambda make: make(FMoE, E, D, expert=lambda d_model: nn.Linear(d_model, 3)),
        lambda make: make(FMoELinear, E, D, H),
        lambda make: make(FusedExperts, E, D, H),
    ],
    ids=["FMoETransformerMLP", "FMoE", "FMoELinear", "FusedExperts"],
)
def test_skip_init(build):
    layer = build(nn.utils.skip_init)
    plain = build(lambda module_class, *args, **options: module_class(*args, **options))
    assert not any(p.is_meta for p in (*layer.parameters(), *layer.buffers()))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(7, D)
    args = (torch.tensor([3, 0, 2, 2]),) if isinstance(layer, FMoELinear) else ()
    options = {}
    if isinstance(layer, FusedExperts):
        options["expert_offsets"] = torch.tensor([0, 3, 3, 5, 7], dtype=torch.int32)
    assert torch.equal(layer(x, *args, **options), plain(x, *args, **options))


def test_a_name_is_its_record_with_defaults():
    assert {name: kind.__name__.lower() for name, kind in DISPATCHES.items()} == {
        name: name for name in DISPATCHES
    }
    assert isinstance(make(dispatch="exact").dispatcher, LocalDispatcher)
    assert isinstance(make(dispatch=Exact(n_chunks=2)).dispatcher, LocalDispatcher)
    for dispatch in ("static", Static(), Static(1.25)):
        dispatcher = make(dispatch=dispatch).dispatcher
        assert isinstance(dispatcher, StaticDispatcher)
        assert dispatcher.capacity == 1.25
    assert make(dispatch=Static(7, n_chunks=(3, 2))).dispatcher.degrees == (3, 2)


def test_records_are_values():
    policy = ShadowPolicy(1.0, 1.0, 0.0)
    assert Exact(shadowing=policy) == Exact(shadowing=ShadowPolicy(1.0, 1.0, 0.0))
    assert Static(1.0) != Static(2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Static(1.0).capacity = 2.0


@pytest.mark.parametrize("record", [Exact(), Static(3)], ids=["exact", "static"])
def test_every_option_is_compared_between_ranks(record):
    settings = record.settings(ExpertRanks("FMoE", E))
    assert settings.keys() == {
        "dispatch",
        *(f.name for f in dataclasses.fields(record) if f.compare),
    }


@dataclasses.dataclass(frozen=True)
class Counting(DispatchOptions):
    """A dispatcher of a user, with a record of its own."""

    limit: int = 1

    def check(self, ranks):
        if self.limit < 1:
            raise ValueError(f"{ranks.op}: limit must be at least 1, got {self.limit}. Use 1.")

    def build(self, ranks):
        dispatcher = LocalDispatcher(ranks.num_expert)
        dispatcher.limit = self.limit
        return dispatcher


def test_a_record_of_a_user():
    layer = make(dispatch=Counting(3))
    assert layer.dispatcher.limit == 3
    x = torch.randn(4, D)
    plain = make()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert Counting(3).settings(ExpertRanks("FMoE", E)) == {"dispatch": "Counting", "limit": 3}
    with pytest.raises(ValueError, match="FMoETransformerMLP: limit must be at least 1, got 0"):
        make(dispatch=Counting(0))
