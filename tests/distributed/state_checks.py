"""Checks of what state dicts hold of experts on several ranks, run by every rank of a group."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_cases import batch, make
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moeops.distributed import use_dtensor_state
from processes import Ranks

REFUSED = r"moeops\.distributed\.save_checkpoint .* under whose name every rank has other experts"


def trained(ranks: Ranks, seed: int):
    """A layer after a step, with its optimizer; every rank's values are others."""
    torch.manual_seed(seed + ranks.rank)
    layer = make("mlp", 2, ranks.device, world_size=ranks.size)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(batch(7, ranks.device)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return layer, optimizer


def values(layer, optimizer):
    found = {f"p.{n}": p.detach().clone() for n, p in layer.experts.named_parameters()}
    for name, parameter in layer.experts.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert type(value) is torch.Tensor
            found[f"{key}.{name}"] = value.clone()
    return found


def check_plain_for_all_but_dcp(ranks: Ranks) -> None:
    layer, other = trained(ranks, 10)[0], trained(ranks, 50)[0]
    state = layer.state_dict()
    weight = state["experts.w_up"]
    assert torch.equal(weight, layer.experts.w_up)
    assert type(weight * 2) is torch.Tensor
    assert weight.data_ptr() == layer.experts.w_up.data_ptr()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for copied in (loaded, pickle.loads(pickle.dumps(state))):
        assert type(copied["experts.w_up"]) is torch.Tensor
        assert torch.equal(copied["experts.w_up"], weight)
    for assign in (False, True):
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert all(type(p) is nn.Parameter for p in other.parameters())
        assert all(map(torch.equal, layer.parameters(), other.parameters()))
    assert type(layer.state_dict(keep_vars=True)["experts.w_up"]) is nn.Parameter
    alone = make("mlp", 2, ranks.device).state_dict()
    assert all(type(value) is torch.Tensor for value in alone.values())


def check_dcp_is_refused(ranks: Ranks) -> None:
    """For every kind of experts, when they are saved and when they are loaded."""
    layers = [make(kind, 2, ranks.device, world_size=ranks.size) for kind in ("mlp", "modules")]
    if ranks.size == 4:
        mesh = init_device_mesh(ranks.device.partition(":")[0], (2, 2), mesh_dim_names=("a", "b"))
        layers.append(make("mlp", 2, ranks.device, device_mesh=mesh["b"]))
        fully_shard(layers[-1].experts, mesh=mesh["a"])
    for number, layer in enumerate(layers):
        state = {"model": get_model_state_dict(layer)}
        folder = ranks.folder / f"refused{number}"
        with pytest.raises(BaseException, match=REFUSED):
            dcp.save(state, checkpoint_id=folder)
        dist.barrier()
    with pytest.raises(NotImplementedError, match="must be whole and fused, got modules"):
        use_dtensor_state(layers[1])
    if ranks.size == 4:
        with pytest.raises(NotImplementedError, match="must not be sharded by FSDP2, got w_up"):
            use_dtensor_state(layers[2])


def check_dtensor_state(ranks: Ranks) -> None:
    layer, optimizer = trained(ranks, 10)
    expected = values(layer, optimizer)
    other, other_optimizer = trained(ranks, 50)
    for pair in ((layer, optimizer), (other, other_optimizer)):
        use_dtensor_state(*pair)
    model_state, optimizer_state = get_state_dict(layer, optimizer)
    assert isinstance(model_state["experts.w_up"], DTensor)
    assert model_state["experts.w_up"].shape[0] == 2 * ranks.size
    folder = ranks.folder / "dtensors"
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
    )
    actual = values(other, other_optimizer)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert all(type(p) is nn.Parameter for p in other.parameters())
    # In one process, the whole layer.
    whole = make("mlp", 2 * ranks.size, ranks.device)
    state = whole.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder, no_dist=True)
    own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    assert torch.equal(state["experts.w_up"][own], layer.experts.w_up)


def check_full_state(ranks: Ranks) -> None:
    """Whole experts, gathered and handed out again."""
    layer, other = trained(ranks, 10)[0], trained(ranks, 50)[0]
    use_dtensor_state(layer)
    use_dtensor_state(other)
    full = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))
    assert full["experts.w_up"].shape[0] == 2 * ranks.size
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, full if ranks.rank == 0 else {}, options=options)
    for name, parameter in other.experts.named_parameters():
        assert torch.equal(parameter, layer.experts.get_parameter(name))
