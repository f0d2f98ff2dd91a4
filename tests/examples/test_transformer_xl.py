"""The Transformer-XL example: its attention and memory by definition, one graph, and a short run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

for package in ("matplotlib", "numpy", "tqdm"):  # the extra "examples"
    pytest.importorskip(package, reason="needs the extra `examples`")

import transformer_xl
from lm.xl import RelativeAttention, Streams, TransformerXL, XLConfig

from cases import each

B, L, D, HEADS = 2, 4, 8, 2


def make_config(memory, **options) -> XLConfig:
    sizes = {"layers": 2, "d_model": D, "heads": HEADS, "d_hidden": 6, "experts": 4, "top_k": 2}
    return XLConfig(**{"gate": "naive", "dropout": 0.0, "memory": memory, **sizes, **options})


def make_model(memory, **options) -> TransformerXL:
    torch.manual_seed(3)
    model = TransformerXL(make_config(memory, **options)).double()
    for block in model.blocks:  # zero at the start
        torch.nn.init.normal_(block.attention.content_bias)
        torch.nn.init.normal_(block.attention.distance_bias)
    return model


@each("memory", [0, 3, 6])
def test_attention_by_its_definition(memory):
    model = make_model(memory)
    attention: RelativeAttention = model.blocks[0].attention
    x = torch.randn(B, L, D, dtype=torch.float64)
    before = torch.randn(B, memory, D, dtype=torch.float64)
    num_keys, width = memory + L, D // HEADS
    hidden = torch.arange(num_keys) > torch.arange(memory, num_keys)[:, None]
    hidden[:, : memory // 2] = True  # not yet there
    got = attention(x, before, model._sinusoids(torch.arange(num_keys).flip(0)), hidden)

    w_q, w_k, w_v = attention.qkv.weight.chunk(3)
    keys = torch.cat((before, x), 1)
    y = torch.zeros(B, L, D, dtype=torch.float64)
    for b in range(B):
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            u, v = attention.content_bias[head, 0], attention.distance_bias[head, 0]
            for i in range(L):
                q = (w_q @ x[b, i])[part]
                seen = range(memory // 2, memory + i + 1)
                scores = []
                for j in seen:
                    angles = (memory + i - j) * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
                    r = attention.distance.weight @ torch.cat((angles.sin(), angles.cos()))
                    scores.append((q + u) @ (w_k @ keys[b, j])[part] + (q + v) @ r[part])
                weights = torch.stack(scores).div(width**0.5).softmax(0)
                values = torch.stack([(w_v @ keys[b, j])[part] for j in seen])
                y[b, i, part] = weights @ values
    torch.testing.assert_close(got, attention.norm(x + attention.out(y)))


def test_segments_with_memory_are_one_long_segment():
    """As far as attention may look back, which is the memory's length for the first byte of a segment."""
    segments, memory = make_model(2 * L), make_model(0)
    memory.load_state_dict(segments.state_dict())
    tokens = torch.randint(256, (B, 3 * L))
    whole, _ = memory(tokens, memory.empty_memory(B))
    state, parts = segments.empty_memory(B), []
    for part in tokens.split(L, 1):
        logits, state = segments(part, state)
        parts.append(logits)
        assert not state[0].requires_grad
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert int(state[1]) == 2 * L
    forgetful, _ = segments(tokens[:, L : 2 * L], segments.empty_memory(B))
    assert not torch.allclose(forgetful, parts[1])


def test_one_graph_for_all_segments():
    model = make_model(L, gate="gshard")
    counter = CompileCounterWithBackend("aot_eager")
    losses = torch.compile(model.losses, fullgraph=True, backend=counter)
    state = model.empty_memory(B)
    for tokens in torch.randint(256, (4, B, L + 1)).unbind(0):
        inputs = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), state)
        loss, balance, state = losses(*inputs)
        (loss + balance).backward()
    assert counter.frame_count == 1
    assert all(p.grad is not None for p in model.parameters())


def test_streams_read_a_text_in_order():
    text = torch.arange(41, dtype=torch.uint8)
    streams = Streams(text, 2, 6, "cpu")
    read = [streams.segment(step) for step in range(4)]
    assert [tokens[0].tolist() for tokens, *_ in read[:3]] == [
        list(range(start, start + 6)) for start in (0, 6, 12)
    ]
    assert read[1][0][1, 0] == 26
    assert all(torch.equal(targets, tokens + 1) for tokens, targets, _ in read)
    assert [fresh for *_, fresh in read] == [True, False, False, True]
    with pytest.raises(ValueError, match="too short for 8 streams of 6 bytes"):
        Streams(text, 8, 6, "cpu")


def run(*options) -> int:
    return transformer_xl.main(["--quick", "--eager", "--device", "cpu", *map(str, options)])


def test_a_short_run_learns(text, tmp_path, capsys):
    assert run("--text", text, "--out", tmp_path, "--dropout", "0.1", "--gate", "gshard") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [report["step"] for report in metrics["reports"]] == [30, 60]
    assert metrics["reports"][-1]["held_out"] < 6  # 8 bits at the start
    assert f"{metrics['reports'][-1]['held_out']:.3f}" in capsys.readouterr().out


@each(
    "options, message",
    [
        (("--heads", "3"), "--d-model must be even and a multiple of --heads = 3, got 32"),
        (("--memory", "-1"), "--memory must be at least 0, got -1"),
        (("--gate", "switch"), "--top-k must be 1 for the switch gate, got 2"),
        (("--top-k", "5"), "--top-k must be at most --experts = 4, got 5"),
        (("--dropout", "1"), "--dropout must be below 1, got 1.0"),
        (("--paper",), "not allowed with argument"),
        (("--batch", "1000000"), "too short for 1000000 streams"),
    ],
)
def test_bad_options_end_in_one_line(options, message, text, tmp_path, capsys):
    assert run("--text", text, "--out", tmp_path, *options) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


def test_the_paper_s_configuration_is_fastmoe_s():
    options = transformer_xl.parse_options(["--paper"])
    config = {name: getattr(options, name) for name in transformer_xl.PAPER}
    assert config == transformer_xl.PAPER
    sizes = ("layers", "d_model", "heads", "d_hidden", "experts", "top_k")
    assert [config[name] for name in sizes] == [12, 512, 8, 1024, 64, 2]
    assert math.isclose(transformer_xl.schedule(0, 1000), 1 / 20)
    names = ("dropout", "memory", *sizes)
    with torch.device("meta"):
        model = TransformerXL(XLConfig(gate="naive", **{name: config[name] for name in names}))
    experts = sum(p.numel() for block in model.blocks for p in block.mlp.experts.parameters())
    assert experts == 12 * 64 * (2 * 512 * 1024 + 512 + 1024)
