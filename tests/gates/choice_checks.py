"""Compare gates with their references."""

from __future__ import annotations

import pytest
import torch
from gate_checks import D, assert_gradient, parameters_float64

from tolerances import assert_close


def check_values(gate, reference, dtype, device, T=13):
    """Ids, weights, loss and every gradient; ``reference(logits)`` returns (ids, weights, loss or None)."""
    gate = gate.to(device, dtype)
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    routing = gate(x)
    ids, weights = routing[:2]
    loss = gate.get_loss()

    params = parameters_float64(gate)
    x64 = x.detach().cpu().double().requires_grad_()
    logits = x64 @ params["gate.weight"].t()
    if "gate.bias" in params:
        logits = logits + params["gate.bias"]
    want_ids, want_weights, want_loss = reference(logits)
    assert ids.dtype == torch.int64
    assert weights.dtype == router_type
    assert torch.equal(ids.cpu(), want_ids)
    assert_close(weights, want_weights, router_type, "weights")

    factors = torch.randn(want_weights.shape, dtype=torch.float64)
    total = (weights * factors.to(weights)).sum()
    want = (want_weights * factors).sum()
    assert (loss is None) == (want_loss is None)
    if loss is not None:
        assert_close(loss, want_loss, router_type, "loss")
        total, want = total + 3 * loss, want + 3 * want_loss
    total.backward()
    want.backward()
    assert_gradient(x.grad, x64.grad, dtype, "gradient of x")
    for name, parameter in gate.named_parameters():
        assert_gradient(parameter.grad, params[name].grad, dtype, f"gradient of {name}")
    return routing


def refuses_nan(gate, match="logits must be finite, got"):
    """One clear error for a token that is not a number."""
    x = torch.randn(4, D)
    x[2, 3] = float("nan")
    with pytest.raises(RuntimeError, match=match):
        gate(x)
