"""Checks for several processes: DistributedDataParallel with local experts trains what one process trains."""

from __future__ import annotations

import torch
from layer_cases import D, make_layer
from torch.nn.parallel import DistributedDataParallel

from processes import Ranks

STEPS = 3
TOKENS = 12  # over all ranks


def build(kind: str, device: str):
    torch.manual_seed(11)
    layer = make_layer(kind, "naive", device)
    with torch.no_grad():
        # Expert 3 gets no token anywhere, and expert 0 none on the last rank.
        layer.gate.gate.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))
    return layer


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def check(ranks: Ranks, kind: str, compiled: bool = False) -> None:
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(TOKENS, D, generator=generator) for _ in range(STEPS)]
    reference = build(kind, ranks.device)
    train(reference, [x.to(ranks.device) for x in batches])

    layer = build(kind, ranks.device)
    model = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    train(DistributedDataParallel(model), [ranks.split(x) for x in batches])
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient on rank {ranks.rank}"
    state = layer.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def check_fused_experts(ranks):
    check(ranks, "mlp")


def check_compiled(ranks):
    check(ranks, "mlp", compiled=True)


def check_modules(ranks):
    check(ranks, "modules")
