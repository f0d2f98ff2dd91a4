"""Checks of transformers' expert parallelism on moeops' exchange, run by every rank of a group."""

from __future__ import annotations

import copy

import census
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from processes import Ranks

NUM_EXPERTS, K = 4, 2
PLAN = {
    "experts.gate_up_proj": "grouped_gemm",
    "experts.down_proj": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}


def whole_layer(implementation: str = "moeops") -> nn.Module:
    """All experts, the same on every rank."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import moeops.integrations.transformers  # noqa: F401

    config = census.TinyConfig(Qwen3MoeConfig(), implementation)
    config.num_experts = NUM_EXPERTS
    layer = nn.ModuleDict({"experts": Qwen3MoeExperts(config)}).double()
    torch.manual_seed(5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def spread(ranks: Ranks, layer: nn.Module, share_tokens: bool) -> nn.Module:
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    mesh = init_device_mesh(
        ranks.device.split(":")[0], (ranks.size, 1), mesh_dim_names=("ep", "one")
    )
    tp_mesh = mesh["ep"] if share_tokens else mesh["one"]
    return apply_expert_parallelism(layer, mesh["ep"], tp_mesh, PLAN, "moeops")


def batch(num_tokens: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_tokens, census.WIDTH, generator=generator, dtype=torch.float64)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator, dtype=torch.float64)
    weights, ids = scores.topk(K)
    return [x.to(device), ids.to(device), weights.to(device)]


def run(layer, given):
    x, ids, weights = given
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer["experts"](x, ids, weights)
    y.square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    return y.detach(), x.grad, weights.grad, grads


def own_experts(ranks: Ranks, grad):
    return grad.tensor_split(ranks.size)[ranks.rank]


def check_tokens_of_every_rank(ranks: Ranks):
    given = batch(13, ranks.device)
    # The last rank has no tokens.
    bounds = [13 * r // (ranks.size - 1) for r in range(ranks.size)] + [13]
    mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    layer = whole_layer().to(ranks.device)
    y, x_grad, weights_grad, grads = run(copy.deepcopy(layer), given)
    part = run(spread(ranks, layer, share_tokens=False), [t[mine] for t in given])
    for actual, whole in zip(part[:3], (y, x_grad, weights_grad), strict=True):
        torch.testing.assert_close(actual, whole[mine])
    for actual, whole in zip(part[3], grads, strict=True):
        local = actual.to_local() if isinstance(actual, DTensor) else actual
        torch.testing.assert_close(local, own_experts(ranks, whole))


def check_tokens_that_all_ranks_hold(ranks: Ranks):
    given = batch(7, ranks.device)
    layer = whole_layer().to(ranks.device)
    expected = run(copy.deepcopy(layer), given)
    actual = run(spread(ranks, layer, share_tokens=True), given)
    torch.testing.assert_close(actual[:3], expected[:3])
    for mine, whole in zip(actual[3], expected[3], strict=True):
        local = mine.to_local() if isinstance(mine, DTensor) else mine
        torch.testing.assert_close(local, own_experts(ranks, whole))


def check_other_experts_are_refused(ranks: Ranks):
    layer = spread(ranks, whole_layer("grouped_mm").to(ranks.device), share_tokens=False)
    with pytest.raises(
        ValueError, match=r"experts_implementation must be 'moeops', got 'grouped_mm'"
    ):
        run(layer, batch(3, ranks.device))
