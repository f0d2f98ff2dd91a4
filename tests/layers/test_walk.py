"""Layers of experts in a model: found through torch's wrappers, under the names that they have without."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moeops import FMoE, FMoETransformerMLP
from moeops.comm.groups import RankGroup
from moeops.distributed.checkpoint.state import ModelState
from moeops.layers.walk import clean_name, find_layers, named_layers, parameter_tags

D = 6


class Sharded(nn.Module):
    """The names that FSDP1 gives."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def fused():
    return FMoETransformerMLP(2, D, 5, activation="relu")


def modules():
    return FMoE(2, D, expert=lambda d_model: nn.Linear(d_model, d_model))


WRAPPERS = {
    "plain": lambda layer: layer,
    "compiled": torch.compile,
    "checkpointed": checkpoint_wrapper,
    "sharded": Sharded,
    "all": lambda layer: torch.compile(Sharded(checkpoint_wrapper(layer))),
}


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("", ""),
        ("_orig_mod", ""),
        ("_fsdp_wrapped_module._orig_mod.blocks.0.w", "blocks.0.w"),
        ("blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module.w", "blocks.0.w"),
        ("blocks._orig_mod", "blocks"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("_orig_mods.w", "_orig_mods.w"),
    ],
)
def test_names_without_wrappers(raw, name):
    assert clean_name(raw) == name


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_no_names(wrap):
    """Hooks of a monitor and keys of a checkpoint are the same with and without."""
    model = nn.ModuleDict(
        {"a": wrap(fused()), "b": nn.Sequential(wrap(modules())), "c": nn.Linear(D, D)}
    )
    plain = nn.ModuleDict({"a": fused(), "b": nn.Sequential(modules()), "c": nn.Linear(D, D)})
    assert list(find_layers("op", model)) == ["a", "b.0"]
    assert [name for name, _ in named_layers(wrap(nn.Sequential(fused())))] == ["0"]
    wanted = ModelState("op", plain).model_pieces()
    assert ModelState("op", model).model_pieces().keys() == wanted.keys()
    assert [layer.record() for layer in ModelState("op", model).layers] == [
        layer.record() for layer in ModelState("op", plain).layers
    ]


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="op: model must have an FMoE layer, got none in Linear"):
        find_layers("op", nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"op: model must be a torch\.nn\.Module, got int"):
        find_layers("op", 3)


def tags(model):
    found = parameter_tags(model)
    return {name: found[p] for name, p in model.named_parameters() if p in found}


def test_tags_belong_to_the_layer():
    layer = fused()
    names = [name for name, _ in layer.named_parameters()]
    assert tags(layer) == {n: "gate" if n.startswith("gate") else "none" for n in names}


def test_tags_of_parameters_made_anew():
    layer = fused()
    layer.mark_parallel_comm("moe")
    before = tags(layer)
    layer.load_state_dict({n: t.clone() for n, t in layer.state_dict().items()}, assign=True)
    assert {p.dp_comm for p in layer.experts.parameters()} == {"moe"}
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(parameter.detach().clone()))
    assert tags(layer) == before
    layer.experts.w_up.dp_comm = "mine"  # the user's own
    assert tags(layer) == {**before, "experts.w_up": "mine"}


def test_tags_without_marks():
    assert tags(modules()) == {}
    layer = modules()
    layer.moe_ranks = RankGroup("0", 2, 0)
    assert set(tags(layer).values()) == {"gate", "none"}


@pytest.mark.parametrize("spread", [False, True])
def test_tags_of_layers_in_experts(spread):
    """All of an expert that is spread over ranks is nobody else's; what is copied has the inner layer's tags."""
    layer = FMoE(1, D, top_k=1, expert=lambda d_model: fused())
    layer.moe_ranks = RankGroup("0", 2, 0) if spread else None
    found = tags(layer)
    inner_gate = "experts.0.gate.gate.weight"
    assert found[inner_gate] == ("none" if spread else "gate")
    assert found["experts.0.experts.w_up"] == "none"
    assert found.get("gate.gate.weight") == ("gate" if spread else None)
