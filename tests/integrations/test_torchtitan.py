"""torchtitan's MoE layer with moeops' overrides against the stock layer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchtitan.models.common.moe", exc_type=ImportError)

E, D, F, K = 5, 16, 24, 2
GROUPED = "moeops.integrations.torchtitan.grouped_experts"
ROUTED = "moeops.integrations.torchtitan.routed_experts"


def make_config():
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import (
        GroupedExperts,
        MoE,
        RoutedExperts,
        TokenChoiceTopKRouter,
    )
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    return MoE.Config(
        num_experts=E,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=E, top_k=K, gate=Linear.Config(in_features=D, out_features=E)
        ),
        load_balance_coeff=None,
    )


def make_layer(*imports: str, dtype=torch.bfloat16):
    from torchtitan.config.override import OverrideConfig, apply_overrides

    config = make_config()
    log = apply_overrides(OverrideConfig(imports=list(imports)), config)
    assert len(log) >= len(imports)
    layer = config.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return layer.to(dtype)


def run(layer, x, function=None):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = (layer if function is None else function)(leaf)
    y.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": leaf.grad} | grads


def assert_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, (name, float(error))


def truth(layer, x):
    """The stock layer's arithmetic in float64, expert by expert."""
    layer = layer.double()
    router, experts = layer.router, layer.routed_experts.inner_experts

    def forward(x):
        scores, ids, _ = router(x)
        tokens, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for k in range(K):
            expert = ids.flatten(0, 1)[:, k]
            gate = torch.einsum("td,tfd->tf", tokens, experts.w1_EFD[expert])
            up = torch.einsum("td,tfd->tf", tokens, experts.w3_EFD[expert])
            hidden = torch.nn.functional.silu(gate) * up
            down = torch.einsum("tf,tdf->td", hidden, experts.w2_EDF[expert])
            out = out + down * scores.flatten(0, 1)[:, k, None]
        return out.view_as(x)

    return run(layer, x.double(), forward)


@pytest.mark.parametrize("override", [GROUPED, ROUTED])
def test_values_gradients_and_names(override, fresh_dynamo):
    x = torch.randn(2, 11, D, dtype=torch.bfloat16)
    stock, ours = make_layer(), make_layer(override)
    assert {n: p.shape for n, p in stock.named_parameters()} == {
        n: p.shape for n, p in ours.named_parameters()
    }
    ours.load_state_dict(stock.state_dict())
    result = run(ours, x)
    assert_near(result, run(stock, x), 2e-2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_near(run(ours, x, compiled), result, 1e-2)
    # Without the cast to bfloat16 that the stock layer makes.
    single = make_layer(override, dtype=torch.float32)
    assert_near(run(single, x.float()), truth(make_layer(dtype=torch.float32), x.float()), 1e-5)


def test_products_on_rows_equal_the_stock_bits():
    x = torch.randn(2, 11, D, dtype=torch.bfloat16)
    assert torch.equal(make_layer(GROUPED)(x), make_layer()(x))


def test_float32_weights_beside_bfloat16_tokens():
    x = torch.randn(2, 11, D, dtype=torch.bfloat16)
    for override in (GROUPED, ROUTED):
        layer = make_layer(override)
        expected = layer(x)
        layer.routed_experts.inner_experts.float()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)


def test_one_op_for_tokens_of_this_rank_only():
    from torchtitan.config.override import OverrideConfig, apply_overrides
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    config = make_config()
    config.routed_experts.token_dispatcher = AllToAllTokenDispatcher.Config(num_experts=E, top_k=K)
    with pytest.raises(ValueError, match=r"must be LocalTokenDispatcher, got AllToAll"):
        apply_overrides(OverrideConfig(imports=[ROUTED]), config)


def test_one_op_for_plain_swiglu_experts_only():
    from moeops.integrations.torchtitan import grouped_experts, routed_experts

    config = make_config().routed_experts
    config.inner_experts = grouped_experts(config.inner_experts)  # stands for any other experts
    with pytest.raises(ValueError, match=r"must be GroupedExperts, got MoeopsGroupedExperts"):
        routed_experts(config)
