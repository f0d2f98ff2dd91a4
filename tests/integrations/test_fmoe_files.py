"""What FastMoE has saved, and what it can load: state dicts, and the files of all ranks."""

from __future__ import annotations

import pytest
import torch
from fmoe_cases import D, Expert, H, assert_same
from torch import nn

import moeops
from moeops.integrations.fmoe.convert import megatron_file, merge_ranks, split_ranks

T, E = 9, 4


@pytest.mark.parametrize("layout", ["one", "each"])
def test_state_dicts_of_both_versions(layout, fmoe):
    """A program loads what it has saved with FastMoE."""
    layer = fmoe.FMoETransformerMLP(E, D, H)
    fused = fmoe.transformer._Expert(E, D, H, nn.GELU())
    state = {"gate.gate.weight": torch.randn(E, D), "gate.gate.bias": torch.randn(E)}
    for name, value in fused.state_dict().items():
        if layout == "one":
            state[f"experts.{name}"] = value
        else:
            state |= {f"experts.{e}.{name}": value[e : e + 1] for e in range(E)}
    layer.load_state_dict(state)
    counts = torch.tensor([2, 0, 3, 4])
    x = torch.randn(9, D)
    assert_same(layer.expert_fn(x, counts), fused(x, counts), torch.float32)


@pytest.mark.parametrize("layout", ["each", "one"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_files_of_all_ranks_become_one_and_back(world_size, layout, fmoe):
    model = nn.Sequential(nn.Linear(D, D), fmoe.FMoETransformerMLP(E, D, H))
    state = model.state_dict()
    states = split_ranks(state, world_size, layout)
    key = "1.experts.htoh4.weight" if layout == "one" else "1.experts.0.htoh4.weight"
    share = E // world_size if layout == "one" else 1
    for rank, own in enumerate(states):
        first = rank * (E // world_size)
        assert torch.equal(own[key], state["1.experts.w_up"][first : first + share])
        moeops.layers.FusedExperts(E // world_size, D, H, "gelu").load_state_dict(
            {k.removeprefix("1.experts."): v for k, v in own.items() if "experts" in k}
        )
    # As Megatron-LM's adapter saves them: the others have nothing but experts.
    states[1:] = [{k: v for k, v in own.items() if "experts" in k} for own in states[1:]]
    other = nn.Sequential(nn.Linear(D, D), fmoe.FMoETransformerMLP(E, D, H))
    other.load_state_dict(merge_ranks(states))
    x = torch.randn(T, D)
    assert torch.equal(other(x), model(x))


def test_files_of_the_adapter_for_megatron(fmoe, tmp_path):
    """Dicts of dicts, all of rank 0 and the experts of the others, in the folders that the adapter names."""
    layer = fmoe.FMoETransformerMLP(E, D, H)
    state = {
        "embedding": {"weight": torch.randn(5, D)},
        "encoder": {f"layers.0.mlp.{name}": value for name, value in layer.state_dict().items()},
    }
    parts = split_ranks({"language_model": state}, 2, experts_only=True)
    assert set(parts[1]["language_model"]) == {"encoder"}
    assert len(parts[1]["language_model"]["encoder"]) == 4 * E // 2
    for rank, part in enumerate(parts):
        file = megatron_file(tmp_path, rank, pipeline_rank=1)
        file.parent.mkdir()
        torch.save({"model": part}, file)
    folders = {file.parent.name for file in tmp_path.rglob("*.pt")}
    assert folders == {"mp_rank_00_001", "mp_rank_00_001_dp_rank_0001"}
    files = [megatron_file(tmp_path, rank, pipeline_rank=1) for rank in range(2)]
    merged = merge_ranks([torch.load(file)["model"] for file in files])["language_model"]
    assert torch.equal(merged["embedding"]["weight"], state["embedding"]["weight"])
    other = fmoe.FMoETransformerMLP(E, D, H)
    start = "layers.0.mlp."
    other.load_state_dict({k.removeprefix(start): v for k, v in merged["encoder"].items()})
    x = torch.randn(T, D)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match=r"got \['m\.experts\.b_up'\] on one of the ranks"):
        merge_ranks([{"m": {"experts.b_up": torch.ones(1)}}, {}])


def test_lists_of_experts_are_numbered_anew(fmoe):
    model = fmoe.FMoE(E, D, expert=Expert)
    states = split_ranks(model.state_dict(), 2)
    part = fmoe.FMoE(E // 2, D, expert=Expert)
    part.experts.load_state_dict(
        {k.removeprefix("experts."): v for k, v in states[1].items() if k.startswith("experts.")}
    )
    assert torch.equal(part.experts[0].up.weight, model.experts[2].up.weight)
    other = fmoe.FMoE(E, D, expert=Expert)
    other.load_state_dict(merge_ranks(states))
    x = torch.randn(T, D)
    assert torch.equal(other(x), model(x))


def test_files_that_do_not_fit():
    with pytest.raises(ValueError, match=r"world_size must be a divisor of the 4 experts"):
        split_ranks({"a.experts.b_up": torch.ones(4, 1)}, 3)
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'both'"):
        split_ranks({}, 1, "both")
    with pytest.raises(ValueError, match=r"gate\.bias must be equal .* on rank 1"):
        merge_ranks([{"gate.bias": torch.ones(1)}, {"gate.bias": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"\['experts\.1\.bias'\] on one of the ranks 0 and 1"):
        merge_ranks([{f"experts.{e}.bias": torch.ones(1) for e in range(n)} for n in (1, 2)])
    with pytest.raises(ValueError, match=r"one dict for each rank, got none"):
        merge_ranks([])


def test_noisy_gates_of_fastmoe_load(fmoe):
    gate, other = fmoe.gates.NoisyGate(D, E, 1), fmoe.gates.NoisyGate(D, E, 1)
    names = {"gate.weight": "w_gate", "noise.weight": "w_noise"}
    state = {f"gate.{names[k]}": v.t() for k, v in other.state_dict().items()}
    nn.ModuleDict({"gate": gate}).load_state_dict(state)
    x = torch.randn(T, D)
    assert torch.equal(gate.eval()(x)[1], other.eval()(x)[1])
