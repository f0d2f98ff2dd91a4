"""Compare gates with their references."""

from __future__ import annotations

import pytest
import torch
from gate_checks import D, assert_gradient, parameters_float64

from tolerances import assert_close


def linear_logits(x, params):
    """What a router ``gate.gate`` makes of the tokens."""
    logits = x @ params["gate.weight"].t()
    return logits + params["gate.bias"] if "gate.bias" in params else logits


def check_values(
    gate, reference, dtype, device, T=13, *, x=None, router=linear_logits, seed=None, call=None
):
    """Ids, weights, loss and every gradient against float64; returns what the gate did.

    ``reference(router(x, params))`` returns (ids, weights, loss or None). ``x`` are the tokens, random ones by
    default; ``seed`` is set before the gate draws, and before the reference; ``call(x)`` runs the gate.
    """
    gate = gate.to(device, dtype)
    x = torch.randn(T, D) if x is None else x
    x = x.to(device, dtype).requires_grad_()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    if seed is not None:
        torch.manual_seed(seed)
    routing = (call or gate)(x)
    ids, weights = routing[:2]
    loss = gate.get_loss()
    assert not gate.has_loss

    params = parameters_float64(gate)
    x64 = x.detach().cpu().double().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    want_ids, want_weights, want_loss = reference(router(x64, params))
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
        if params[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert_gradient(parameter.grad, params[name].grad, dtype, f"gradient of {name}")
    return routing


def refuses_nan(gate, match="logits must be finite, got"):
    """One clear error for a token that is not a number."""
    x = torch.randn(4, D)
    x[2, 3] = float("nan")
    with pytest.raises(RuntimeError, match=match):
        gate(x)
