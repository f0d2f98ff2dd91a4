"""LoRA on transformers' experts: factors on rows against PEFT's own way, which adds them to the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_experts_per_tok": 2,
}
# Fused, and composed on transposed weights with bias; names of their weights.
CONFIGS = {
    "qwen3_moe": ("Qwen3MoeConfig", {"moe_intermediate_size": 16, "num_experts": 6}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 6}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["attention", "moe", "moe"],
            "num_hidden_layers": 3,
            "n_routed_experts": 6,
            "moe_intermediate_size": 16,
        },
    ),
}
FAMILIES = [*CONFIGS]


@pytest.fixture(scope="module", autouse=True)
def enabled():
    from moeops.integrations.peft import enable

    enable()


def lora_config(model: str = "qwen3_moe", **options):
    up = "up_proj" if model == "nemotron_h" else "gate_up_proj"
    return peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[],
        target_parameters=[f"experts.{up}", "experts.down_proj"],
        **options,
    )


def base_model(model: str = "qwen3_moe", implementation: str = "moeops", **options):
    torch.manual_seed(0)
    name, sizes = CONFIGS[model]
    config = getattr(transformers, name)(**{**COMMON, **sizes, **options})
    return transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )


def adapted(model: str = "qwen3_moe", implementation: str = "moeops", sizes=None, **options):
    """A model with one adapter that does something: PEFT starts with B = 0."""
    base = base_model(model, implementation, **(sizes or {}))
    made = peft.get_peft_model(base, lora_config(model, **options))
    randomise(made)
    return made


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def token_ids(columns: int = 7):
    return torch.randint(COMMON["vocab_size"], (2, columns))


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | grads


@pytest.mark.parametrize("model", FAMILIES)
def test_training_step_equals_stock_peft(model):
    lora, ids = adapted(model), token_ids()
    ours = gradients(lora, ids)
    lora.set_experts_implementation("eager")  # which PEFT serves in its own way
    stock = gradients(lora, ids)
    assert ours.keys() == stock.keys()
    assert sum("lora_B" in name for name in ours) == 4
    for name, value in ours.items():
        torch.testing.assert_close(value, stock[name], rtol=1e-4, atol=1e-6, msg=name)
        assert value.abs().max() > 0, name


def test_no_weight_is_folded_or_reparametrised(monkeypatch):
    lora = adapted()

    def refuse(*args, **kwargs):
        raise AssertionError("a weight-sized tensor was asked for")

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", refuse)
    wrapper = type(next(m for m in lora.modules() if type(m).__name__ == "ParamWrapper"))
    monkeypatch.setattr(wrapper, "get_delta_weight", refuse)
    gradients(lora, token_ids())
    assert all(not module.__dict__.get("_moeops_lora") for module in lora.modules())


def test_compiled_training_step(fresh_dynamo):
    lora = adapted(sizes={"num_hidden_layers": 1})
    compiled = torch.compile(lora, fullgraph=True, backend="aot_eager")
    for columns in (7, 9):
        ids = token_ids(columns)
        expected = gradients(lora, ids)
        for name, value in gradients(compiled, ids).items():
            name = name.removeprefix("_orig_mod.")
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("model", FAMILIES)
def test_round_trips_are_bit_equal(model, tmp_path):
    """An adapter is saved, loaded, switched off and merged as without moeops."""
    lora, ids = adapted(model).eval(), token_ids()
    expected = lora(input_ids=ids).logits
    lora.save_pretrained(tmp_path)
    base = base_model(model).eval()
    plain = base(ids).logits
    with lora.disable_adapter():
        assert torch.equal(lora(input_ids=ids).logits, plain)
    assert not torch.equal(expected, plain)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)

    stock = adapted(model, "eager").eval()
    merged, stock_merged = (m.merge_and_unload().state_dict() for m in (lora, stock))
    assert merged.keys() == stock_merged.keys()
    assert all(torch.equal(value, stock_merged[name]) for name, value in merged.items())


def test_several_active_adapters():
    lora = peft.get_peft_model(base_model(), lora_config())
    lora.add_adapter("second", peft.LoraConfig(**{**lora_config().to_dict(), "r": 5}))
    randomise(lora)
    lora.base_model.set_adapter(["default", "second"])
    lora.eval()
    ids, logits = token_ids(), []
    for implementation in ("moeops", "batched_mm"):
        lora.set_experts_implementation(implementation)
        logits.append(lora(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    lora.base_model.set_adapter("default")
    assert (lora(input_ids=ids).logits - logits[0]).abs().max() > 1e-3


def test_dropout_on_rows(tmp_path):
    lora, ids = adapted(lora_dropout=0.5), token_ids()
    lora.train()
    first, second = (lora(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    without = adapted().eval()
    lora.eval()
    assert torch.equal(lora(input_ids=ids).logits, without(input_ids=ids).logits)
    lora.save_pretrained(tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).lora_dropout == 0.5
    lora.train()
    lora.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match=r"lora_dropout of adapter 'default' must be 0.*got 0.5"):
        lora(input_ids=ids)


class Dequantize(nn.Module):
    """What quantised weights do on access: integers and a scale in, a float tensor out."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, quantised):
        return quantised.float() * self.scale


def test_quantised_experts_train():
    model = base_model()
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name).detach()
            scale = weight.abs().max() / 127
            integers = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
            setattr(layer.mlp.experts, name, integers)
            nn.utils.parametrize.register_parametrization(
                layer.mlp.experts, name, Dequantize(scale), unsafe=True
            )
    targets = [
        f"model.layers.{i}.mlp.experts.{name}"
        for i in range(2)
        for name in ("gate_up_proj", "down_proj")
    ]
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=targets)
    lora, ids = peft.get_peft_model(model, config), token_ids()
    randomise(lora)
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(4):
        grads = gradients(lora, ids)
        assert sum("lora_" in name and float(g.abs().max()) > 0 for name, g in grads.items()) == 8
        losses.append(float(grads["loss"]))
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_enabling_twice_changes_nothing():
    from peft.tuners.lora.layer import ParamWrapper

    from moeops.integrations.peft import enable

    before = dict(vars(ParamWrapper))
    enable()
    assert dict(vars(ParamWrapper)) == before


def test_another_peft_is_refused(monkeypatch):
    from peft.tuners.lora.layer import ParamWrapper

    from moeops.integrations.peft import enable

    with monkeypatch.context() as patched:
        patched.delattr(ParamWrapper, "_activate_lora")
        with pytest.raises(RuntimeError, match=r"peft 0.20 to 0.21 have, got peft \d"):
            enable()
    monkeypatch.setattr(ParamWrapper, "update_layer", lambda self, adapter_name, r: None)
    with pytest.raises(RuntimeError, match=r"ParamWrapper must have"):
        enable()


def test_other_experts_stay_with_peft():
    """The name of the implementation decides, also after a change of it, and so does the parameter."""
    from moeops.integrations.peft import takes_factors

    model = base_model()
    experts = model.model.layers[0].mlp.experts
    assert takes_factors(experts, "gate_up_proj")
    assert takes_factors(experts, "down_proj")
    assert not takes_factors(experts, "gate_up_proj_bias")
    assert not takes_factors(model.model.layers[0].mlp.gate, "weight")
    model.set_experts_implementation("eager")
    assert not takes_factors(experts, "gate_up_proj")
