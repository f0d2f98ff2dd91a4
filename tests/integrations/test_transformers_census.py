"""The experts of every model in transformers: moeops against the model's own code."""

from __future__ import annotations

import copy

import census
import pytest
import torch

from moeops.layers import _weights
from tensor_kinds import Quantised, Wrapped, wrap

if census.installed() is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

NAMES = census.experts_names()
MODELS = {name.split(".")[0] for name in NAMES}
# Files of transformers 5.24, and of 5.8; more may be there, fewer mean that the search for them no longer works.
NUM_FILES = 67 if "hy_v4" in MODELS else 35
# Those that are not one op, and what they do that moe_mlp does not. A new file may be either.
COMPOSED = {
    "a gate of its own": "inkling2 inkling2_loop",
    "a norm": "muse_spark",
}
# Gates that compute in float32 whatever they are given, where moeops computes in float64.
FLOAT32_INSIDE = {"beam"}
T, K = 23, 3


@pytest.fixture(scope="module", autouse=True)
def registered():
    import moeops.integrations.transformers  # noqa: F401


def experts_of(model):
    """The class of a model's experts, in a transformers that has the model."""
    names = [name for name in NAMES if name.startswith(f"{model}.")]
    if not names:
        pytest.skip(f"the transformers that is installed has no experts of {model}")
    (name,) = names
    return name


def inputs(seed: int = 0):
    """Tokens, ids and weights, in which one expert gets no token and some tokens choose an expert twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((T, census.NUM_EXPERTS), generator=generator)
    ids[:, 1] = -1  # never chosen
    return (
        torch.randn((T, census.WIDTH), generator=generator, dtype=torch.float64),
        ids.topk(K, dim=1).indices,
        torch.rand((T, K), generator=generator, dtype=torch.float64),
    )


def run(experts, implementation, x, ids, weights):
    """Output and gradients of tokens, routing weights and parameters, by name, in float64."""
    experts = copy.deepcopy(experts)
    experts.config._experts_implementation = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(x, ids, weights)
    assert y.dtype == x.dtype
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    results = {"y": y, "x": x.grad, "weights": weights.grad}
    results |= {name: p.grad for name, p in experts.named_parameters()}
    return {name: value.detach().double() for name, value in results.items()}


def distance(actual, expected):
    """The largest error of any result, relative to that result's largest element."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected
    )


def test_every_file_is_found():
    assert len(MODELS) >= NUM_FILES


def test_which_are_one_op():
    from moeops.integrations.transformers import explain

    reports = {name: explain(census.tiny_experts(name, "moeops"))[0] for name in NAMES}
    assert [
        name for name, report in reports.items() if not report.fused and not report.reason
    ] == []
    for reason, models in COMPOSED.items():
        for model in MODELS.intersection(models.split()):
            (report,) = (r for name, r in reports.items() if name.startswith(f"{model}."))
            assert not report.fused
            assert report.reason.startswith(reason)
    known = MODELS.intersection(" ".join(COMPOSED.values()).split())
    others = [report for name, report in reports.items() if name.split(".")[0] not in known]
    assert sum(report.fused for report in others) >= NUM_FILES - len(known)
    lines = {name: str(report) for name, report in reports.items()}
    assert lines["qwen3_moe.Qwen3MoeExperts"] == (
        " (Qwen3MoeExperts): fused, silu(gate) * up; [E, 2H, D], gate then up"
    )
    if "aria" in MODELS:
        assert lines["aria.AriaExperts"].endswith("[E, D, 2H], gate then up")
    assert lines["nemotron_h.NemotronHExperts"].endswith("fused, no gate, relu_squared; [E, H, D]")
    assert lines["gpt_oss.GptOssExperts"].endswith(
        "fused, gate * sigmoid(1.702 * gate) * (up + 1), both clamped at 7; [E, D, 2H], gate and up interleaved, bias"
    )
    assert lines["gemma4.Gemma4TextExperts"].endswith(
        "fused, gelu_tanh(gate) * up; [E, 2H, D], gate then up"
    )
    if "inkling2" in MODELS:
        assert lines["inkling2.Inkling2Experts"].endswith(
            "a gate of its own (Inkling2Experts._apply_gate); [E, 2H, D], gate then up"
        )


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name):
    experts, given = census.tiny_experts(name), inputs()
    truth = run(experts, "eager", *given)
    # transformers' own second form says how far two right answers may lie from each other.
    yardstick = distance(run(experts, "batched_mm", *given), truth)
    limit = 1e-6 if name.split(".")[0] in FLOAT32_INSIDE else max(1e-12, 3 * yardstick)
    assert limit < 1e-5
    assert distance(run(experts, "moeops", *given), truth) < limit

    half = copy.deepcopy(experts).bfloat16()
    rounded = [t.bfloat16() if t.is_floating_point() else t for t in given]
    exact = run(
        half.double(), "eager", *(t.double() if t.is_floating_point() else t for t in rounded)
    )
    half = half.bfloat16()
    errors = {how: distance(run(half, how, *rounded), exact) for how in ("moeops", "eager")}
    assert errors["moeops"] < max(0.02, 1.5 * errors["eager"]), errors


@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_float32_weights_under_autocast(name):
    experts, given = census.tiny_experts(name), inputs()
    truth = run(experts, "eager", *given)
    single = [t.float() if t.is_floating_point() else t for t in given]
    with torch.autocast("cpu", torch.bfloat16):
        results = run(experts.float(), "moeops", *single)
    assert 1e-5 < distance(results, truth) < 0.03


def test_tokens_of_another_type_than_the_weights():
    """Residuals and norms may stay in float32 beside half weights."""
    experts, (x, ids, weights) = (
        census.tiny_experts("qwen3_moe.Qwen3MoeExperts", "moeops"),
        inputs(),
    )
    experts.bfloat16()
    y = experts(x.float(), ids, weights)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, experts(x.bfloat16(), ids, weights).float(), rtol=0, atol=0)


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss", "muse_spark", "nemotron_h"])
def test_ids_of_other_ranks_add_nothing(model):
    """Expert parallelism gives experts of other ranks the id ``num_experts``."""
    name = experts_of(model)
    experts, (x, ids, weights) = census.tiny_experts(name), inputs()
    away = ids >= 2
    away[:4], away[4:8] = True, False
    masked = weights.masked_fill(away, 0.0)
    truth = run(experts, "eager", x, ids, masked)  # those pairs count as nothing
    truth["weights"] = truth["weights"].masked_fill(away, 0.0)
    experts._is_expert_parallel = True
    local = run(experts, "moeops", x, ids.masked_fill(away, experts.num_experts), masked)
    assert distance(local, truth) < (
        1e-6 if model == "muse_spark" else 1e-12
    )  # its norm is in float32


@pytest.mark.parametrize(
    "model", ["qwen3_moe", "aria", "nemotron_h", "gpt_oss", "gemma4", "inkling2", "muse_spark"]
)
def test_compiles_in_one_graph(model, fresh_dynamo):
    name = experts_of(model)
    experts, given = census.tiny_experts(name, "moeops"), inputs()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (T, 9):
        x, ids, weights = (t[:tokens] for t in given)
        results = []
        for function in (experts, compiled):
            experts.zero_grad()
            leaf = x.clone().requires_grad_()
            y = function(leaf, ids, weights)
            y.square().sum().backward()
            results.append(
                {"y": y, "x": leaf.grad} | {n: p.grad for n, p in experts.named_parameters()}
            )
        assert distance(*({n: v.detach().clone() for n, v in r.items()} for r in results)) < 1e-12


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_quantised_weights(model, monkeypatch):
    """Weights that can be dequantised are, in every call, with one warning; others are refused by name."""
    monkeypatch.setattr(_weights, "_warned", set())
    name = experts_of(model)
    experts, (x, ids, weights) = census.tiny_experts(name, "moeops"), inputs()
    plain = copy.deepcopy(experts)
    for weight in ("gate_up_proj", "down_proj"):
        setattr(plain, weight, torch.nn.Parameter(wrap(experts, weight, Quantised).dequantize()))
    with pytest.warns(UserWarning, match=r"gate_up_proj has the type Quantised") as caught:
        y = experts(x, ids, weights)
    assert torch.equal(experts(x, ids, weights), y)
    assert len(caught) == 1
    assert torch.equal(y, plain(x, ids, weights))
    wrap(plain, "down_proj", Wrapped)
    with pytest.raises(TypeError, match=r"Experts: down_proj must be .*dequantize.*, got Wrapped"):
        plain(x, ids, weights)
