"""Parameters of transformers' MoE blocks in moeops' layers: same outputs, and the same tensors after a round trip."""

from __future__ import annotations

import importlib

import pytest
import torch

from moeops import Glu
from moeops.gates import MixtralGate, NaiveGate, Qwen3Gate
from moeops.layers import FMoETransformerMLP

pytest.importorskip("moeops.integrations.transformers", exc_type=ImportError)

from moeops.integrations.transformers.convert import (
    from_transformers,
    to_transformers,
)

E, D, H, K = 5, 12, 7, 2


def make_block(model: str, name: str, config: str, **options) -> torch.nn.Module:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    sizes = {"hidden_size": D, "num_experts_per_tok": K, **options}
    made = getattr(importlib.import_module(f"transformers.models.{model}"), config)(**sizes)
    made._experts_implementation = "eager"
    block = getattr(module, name)(made)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block.double()


BLOCKS = {
    "qwen3": (
        lambda: make_block(
            "qwen3_moe",
            "Qwen3MoeSparseMoeBlock",
            "Qwen3MoeConfig",
            num_experts=E,
            moe_intermediate_size=H,
            norm_topk_prob=True,
        ),
        Qwen3Gate,
    ),
    "mixtral": (
        lambda: make_block(
            "mixtral",
            "MixtralSparseMoeBlock",
            "MixtralConfig",
            num_local_experts=E,
            intermediate_size=H,
        ),
        MixtralGate,
    ),
}


def one_by_one(state: dict, names: tuple[str, str, str]) -> dict:
    """What a model's files hold: a tensor per expert and projection."""
    split = {k: v for k, v in state.items() if ".experts." not in f".{k}"}
    for e in range(E):
        gate, up = state["experts.gate_up_proj"][e].chunk(2)
        for name, value in zip(names, (gate, up, state["experts.down_proj"][e]), strict=True):
            split[f"experts.{e}.{name}.weight"] = value
    return split


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_become_layers_and_back(kind):
    build, gate = BLOCKS[kind]
    block = build()
    state = block.state_dict()
    x = torch.randn(3, 4, D, dtype=torch.float64)
    expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    names = ("gate_proj", "up_proj", "down_proj") if kind == "qwen3" else ("w1", "w3", "w2")
    for given in (state, one_by_one(state, names)):
        layer = FMoETransformerMLP(
            E, D, H, activation="swiglu", top_k=K, gate=gate, bias=False, dtype=torch.float64
        )
        layer.load_state_dict(from_transformers(given))
        # The blocks take their softmax in float32.
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    back = to_transformers(layer.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_the_layout_of_gpt_oss():
    """Transposed weights, gate and up rows in turns, biases, and a router of another name, inside of a model."""
    place = "model.layers.0.mlp."
    state = {
        f"{place}router.weight": torch.randn(E, D),
        f"{place}router.bias": torch.randn(E),
        f"{place}experts.gate_up_proj": torch.randn(E, D, 2 * H),
        f"{place}experts.gate_up_proj_bias": torch.randn(E, 2 * H),
        f"{place}experts.down_proj": torch.randn(E, H, D),
        f"{place}experts.down_proj_bias": torch.randn(E, D),
        "model.layers.0.norm.weight": torch.randn(D),
        "model.gate.weight": torch.randn(1),  # not beside experts
    }
    ours = from_transformers(state, transposed=True, interleaved=True)
    assert ours.keys() == {
        *(f"{place}experts.{name}" for name in ("w_up", "b_up", "w_down", "b_down")),
        *(f"{place}gate.gate.{name}" for name in ("weight", "bias")),
        "model.layers.0.norm.weight",
        "model.gate.weight",
    }
    up = ours[f"{place}experts.w_up"]
    theirs = state[f"{place}experts.gate_up_proj"]
    assert torch.equal(up[:, :H], theirs[:, :, 0::2].transpose(1, 2))
    assert torch.equal(up[:, H:], theirs[:, :, 1::2].transpose(1, 2))
    assert torch.equal(
        ours[f"{place}experts.b_up"][:, H], state[f"{place}experts.gate_up_proj_bias"][:, 1]
    )
    back = to_transformers(ours, transposed=True, interleaved=True, router="router")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("interleaved", [False, True], ids=["one_by_one", "in_turns"])
def test_a_block_of_gpt_oss_becomes_a_layer(interleaved):
    """With its rows in another order, or as they are."""
    block = make_block(
        "gpt_oss", "GptOssMLP", "GptOssConfig", num_local_experts=E, intermediate_size=H
    )
    experts = block.experts
    layer = FMoETransformerMLP(
        E,
        D,
        H,
        activation=Glu("silu", experts.alpha, experts.limit, 1.0, interleaved),
        top_k=K,
        gate=NaiveGate,
        dtype=torch.float64,
    )
    state = from_transformers(block.state_dict(), transposed=True, interleaved=not interleaved)
    layer.load_state_dict(state)
    x = torch.randn(3, 4, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x), block(x)[0])


def test_experts_without_a_gate_and_missing_ones():
    up, down = torch.randn(E, H, D), torch.randn(E, D, H)
    ours = from_transformers({"experts.up_proj": up, "experts.down_proj": down})
    assert torch.equal(ours["experts.w_up"], up)
    assert to_transformers(ours, gated=False).keys() == {"experts.up_proj", "experts.down_proj"}
    single = {f"experts.{e}.up_proj.weight": up[e] for e in range(E)}
    single |= {f"experts.{e}.down_proj.weight": down[e] for e in range(E)}
    assert torch.equal(from_transformers(single)["experts.w_up"], up)
    del single["experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"got others for experts\.3 than for experts\.0"):
        from_transformers(single)
