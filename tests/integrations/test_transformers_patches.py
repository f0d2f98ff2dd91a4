"""Experts for which transformers takes no implementation: the patched modules against the models' own code."""

from __future__ import annotations

import copy
import importlib
import inspect

import census
import pytest
import torch
from torch import nn

if census.installed() is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

# Layer, configuration, options, and whether the layer does its own routing.
LAYERS = {
    "llama4": ("Llama4TextMoe", "Llama4TextConfig", {"num_experts_per_tok": 2}, True),
    "llama4-top1": ("Llama4TextMoe", "Llama4TextConfig", {"num_experts_per_tok": 1}, True),
    "dbrx": ("DbrxExperts", "DbrxFFNConfig", {"ffn_hidden_size": 7, "hidden_size": 12}, False),
    "longcat_flash": ("LongcatFlashExperts", "LongcatFlashConfig", {"zero_expert_num": 2}, False),
    "step3p7": ("Step3p7Experts", "Step3p7TextConfig", {}, False),
    "jetmoe": ("JetMoeMoE", "JetMoeConfig", {"num_experts_per_tok": 2}, True),
}
T, K = 19, 3


def make_layer(case: str) -> nn.Module:
    class_name, config_name, options, _ = LAYERS[case]
    model = case.split("-")[0]
    folder = f"transformers.models.{model}"
    modeling = pytest.importorskip(f"{folder}.modeling_{model}", exc_type=ModuleNotFoundError)
    configuration = importlib.import_module(f"{folder}.configuration_{model}")
    if model == "dbrx" and "(-1, self.ffn" in inspect.getsource(modeling.DbrxExperts.forward):
        pytest.skip("the dbrx of this transformers needs experts as wide as the model")
    config = census.TinyConfig(getattr(configuration, config_name)(), "eager")
    vars(config).update(options)
    if model == "step3p7":
        layer = modeling.Step3p7Experts(config, swiglu_limit=0.4)
    else:
        layer = getattr(modeling, class_name)(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.Sequential(layer.double())


def inputs(case: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    x = torch.randn(T, census.WIDTH, dtype=torch.float64)
    if LAYERS[case][3]:
        return (x[None],)
    num_experts = census.NUM_EXPERTS + LAYERS[case][2].get("zero_expert_num", 0)
    ids = torch.rand(T, num_experts).topk(K, dim=1).indices
    return x, ids, torch.rand(T, K, dtype=torch.float64)


def run(layer, function, given):
    layer.zero_grad()
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in given]
    y = function(*leaves)
    outputs = dict(enumerate(y if isinstance(y, tuple) else (y,)))
    outputs[0].square().sum().backward()
    results = {f"output {i}": value for i, value in outputs.items()}
    results |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.requires_grad}
    results |= {name: p.grad for name, p in layer.named_parameters()}
    return {name: value.detach().clone() for name, value in results.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            actual[name], value, rtol=1e-12, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", LAYERS)
def test_values_and_gradients(case, fresh_dynamo):
    from moeops.integrations.transformers import explain, patch

    model, given = make_layer(case), inputs(case)
    layer = model[0]
    expected = run(layer, layer, given)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    reports = explain(model)
    assert all(r.implementation == "eager" and "call patch(model)" in r.reason for r in reports)

    names = patch(model)
    assert names == [report.name for report in reports] != []
    assert patch(model) == names
    assert all(report.implementation == "moeops" for report in explain(model))
    assert_same(run(layer, layer, given), expected)
    twin = copy.deepcopy(layer)
    assert_same(run(twin, twin, given), expected)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(run(layer, compiled, given), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_to_patch_is_an_error():
    from moeops.integrations.transformers import patch

    with pytest.raises(
        ValueError, match=r"must have experts of dbrx, jetmoe, .*got Linear without"
    ):
        patch(nn.Linear(2, 2))
