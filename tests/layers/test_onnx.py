"""Layers as ONNX programs, run by onnxruntime; every op is exported as what it is made of."""

from __future__ import annotations

import pytest
import torch
from layer_cases import D, make_layer

from moeops.gates import DeepSeekV3Gate, SoftMoEGate

pytestmark = pytest.mark.slow
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime onnxscript")
pytest.importorskip("onnxscript", reason="pip install onnx onnxruntime onnxscript")


def check(program, layer, tmp_path, tokens):
    path = tmp_path / "layer.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    (name,) = (tensor.name for tensor in session.get_inputs())
    for T in tokens:
        x = torch.randn(T, D)
        (y,) = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "gate"),
    [
        ("mlp", "switch"),  # with a capacity
        ("composed", DeepSeekV3Gate),
        ("mlp", SoftMoEGate),
    ],
)
def test_export_with_dynamic_token_counts(kind, gate, tmp_path):
    layer = make_layer(kind, gate).eval()
    tokens = {0: torch.export.Dim("tokens", min=2, max=4096)}
    program = torch.onnx.export(
        layer, (torch.randn(6, D),), dynamo=True, verbose=False, dynamic_shapes=(tokens,)
    )
    check(program, layer, tmp_path, (6, 2, 33))


def test_a_program_that_was_exported_before(tmp_path):
    layer = make_layer("mlp", "naive").eval()
    exported = torch.export.export(layer, (torch.randn(6, D),), strict=True)
    assert "moeops.moe_mlp" in str(exported.graph)
    check(torch.onnx.export(exported, dynamo=True, verbose=False), layer, tmp_path, (6,))
