"""Checks of rows that are encoded on the wires, run by every rank of a group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import make_pair
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from moeops.dispatch import codec_hooks
from processes import Ranks

D = 6
CASES = (
    ("mlp", {"dispatch": "exact"}),
    ("mlp", {"dispatch": "exact", "n_chunks": 2}),
    ("modules", {"dispatch": "exact"}),
    ("mlp", {"dispatch": "static", "capacity": 12, "n_chunks": 2}),
)
WIDTH = {"mlp": D, "modules": 3, "composed": D}
# Of a row of some width: a byte each, a scale, filled up to words.
BYTES = {6: 12, 3: 8}
CLOSE = {"int8": 0.04, "float8": 0.15}


class Sent(TorchDispatchMode):
    """Shapes and types of float rows that are sent, but for ids and weights, which are ``[R, 2 K]``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default and args[0].dim() == 2:
            self.rows.append((args[0].shape[1], args[0].dtype))
        return func(*args, **(kwargs or {}))


def step(run, layer, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), device=x.device).view_as(y)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_near(got: dict, expected: dict, close: float) -> None:
    """Within a part of each tensor's norm, and not equal."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm().clamp(min=1e-30)
        assert error < close, (name, float(error))
    assert not torch.equal(got["y"], expected["y"])
    assert not torch.equal(got["x"], expected["x"])


def tokens(ranks: Ranks) -> Tensor:
    x = torch.randn(9, D, device=ranks.device)
    x[:, 0] = torch.arange(9)
    return x


def check_rows_travel_as_bytes_both_ways(ranks: Ranks) -> None:
    """A byte for each number and a scale for each row, in the forward and the backward; numbers are near."""
    for kind, options in CASES:
        layer = make_pair(kind, ranks, dtype=torch.float32, **options)[0]
        x = tokens(ranks)
        expected = step(layer, layer, x)
        for name, close in CLOSE.items():
            layer.set_stage_hooks(**codec_hooks(name, D, d_out=WIDTH[kind]))
            with Sent() as sent:
                got = step(layer, layer, x)
            # The modules' leaky ReLU has another slope where a rounded number has the other sign.
            assert_near(got, expected, 0.3 if kind == "modules" else close)
            widths = {4 * width for width, dtype in sent.rows if dtype == torch.float32}
            coded = {BYTES[D], BYTES[WIDTH[kind]]}
            # Beside them, as before: ids and weights, 4 numbers of a token.
            assert widths - {16} == coded, (kind, options, sent.rows)
            whole = sum(row == (D, torch.float32) for row in sent.rows)
            assert whole == 0, (kind, options, sent.rows)


def check_compiled_rows_are_those_of_eager_code(ranks: Ranks) -> None:
    kind, options = CASES[1]
    layer = make_pair(kind, ranks, dtype=torch.float32, **options)[0]
    x = tokens(ranks)
    for name, backend in (("int8", "inductor"), ("float8", "aot_eager")):
        torch._dynamo.reset()
        layer.set_stage_hooks(**codec_hooks(name, D))
        expected = step(layer, layer, x)
        counter = CompileCounterWithBackend(backend)
        got = step(torch.compile(layer, fullgraph=True, backend=counter), layer, x)
        torch.testing.assert_close(got, expected)
        assert counter.frame_count == 1


def check_what_adds_rows_up_refuses_bits(ranks: Ranks) -> None:
    layer = make_pair("mlp", ranks, dispatch="gather")[0]
    with pytest.raises(NotImplementedError, match="GatherDispatcher: hooks must not encode"):
        layer.set_stage_hooks(**codec_hooks("int8", D))
    dist.barrier()
