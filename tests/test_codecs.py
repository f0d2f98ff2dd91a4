"""Codecs of rows by themselves: what a row becomes and comes back as, gradients, and errors."""

from __future__ import annotations

import pytest
import torch

from cases import each
from moeops.dispatch import RowCodec, codec_hooks, register_codec


def there_and_back(name: str, rows: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    hooks = codec_hooks(name, rows.shape[1], dtype=dtype)
    return hooks["after_dispatch"](hooks["before_dispatch"](rows))


@each(("name", "step"), [("int8", 1 / 254), ("float8", 1 / 16)])
def test_rows_come_back_within_half_a_step(name, step):
    for width in (1, 3, 4, 7, 64):
        rows = torch.randn(5, width) * torch.tensor([1e-20, 1e-3, 1.0, 1e4, 1e20])[:, None]
        back = there_and_back(name, rows)
        largest = rows.abs().amax(1, keepdim=True)
        limit = step * (1 + 1e-3) * (rows.abs() if name == "float8" else largest)
        # Below the least normal number of float8, 2 ** -6, steps are equal.
        limit = limit.clamp_min(0) + (largest / 448 * 2**-10 if name == "float8" else 0)
        assert ((back - rows).abs() <= limit).all()
        sent = codec_hooks(name, width)["before_dispatch"](rows)
        assert sent.dtype == torch.float32
        assert 4 * sent.shape[1] == width + 4 + -width % 4


@each("name", ["int8", "float8"])
def test_edges(name):
    rows = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [-3.0, 3.0]])
    torch.testing.assert_close(there_and_back(name, rows), rows, rtol=0, atol=1e-44)
    assert there_and_back(name, torch.zeros(0, 3)).shape == (0, 3)
    assert not there_and_back(name, torch.tensor([[float("nan"), 1.0]])).isfinite().any()
    assert not there_and_back(name, torch.tensor([[float("inf"), 1.0]])).isfinite().all()
    assert there_and_back(name, torch.ones(2, 4, dtype=torch.bfloat16), torch.bfloat16).dtype == (
        torch.bfloat16
    )


def test_gradients_are_encoded_on_their_way():
    rows = torch.randn(4, 8, requires_grad=True)
    grad = torch.randn(4, 8)
    there_and_back("int8", rows).backward(grad)
    assert torch.equal(rows.grad, there_and_back("int8", grad))
    assert not torch.equal(rows.grad, grad)


def test_a_codec_of_ones_own():
    halves = RowCodec(
        lambda rows: rows.half().view(torch.uint8),
        lambda coded, width: coded.contiguous().view(torch.float16).float(),
        lambda width: 2 * width,
    )
    register_codec("halves of a test", halves)
    register_codec("halves of a test", halves)
    rows = torch.randn(3, 5)
    assert torch.equal(there_and_back("halves of a test", rows), rows.half().float())
    with pytest.raises(ValueError, match="name must be a new one, got 'int8'"):
        register_codec("int8", halves)


def test_errors():
    with pytest.raises(ValueError, match=r"name must be one of \('int8', 'float8'.*got 'int4'"):
        codec_hooks("int4", 8)
    with pytest.raises(TypeError, match=r"dtype must be one of .* got torch\.int8"):
        codec_hooks("int8", 8, dtype=torch.int8)
    encode = codec_hooks("int8", 8)["before_dispatch"]
    for rows in ({"x": torch.ones(2, 8)}, torch.ones(2, 8, dtype=torch.int32), torch.ones(2, 2, 2)):
        with pytest.raises(TypeError, match="rows must be one tensor"):
            encode(rows)
