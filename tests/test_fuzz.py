"""Random cases of the day, and that the machinery which draws them sees what it must see."""

from __future__ import annotations

import time

import pytest
import torch

import moeops
from fuzz import comparing, layers, ops
from fuzz.run import KINDS, Case, check, draw, run
from moeops import reference

CASES = 1000


def test_cases_of_the_day(record_property):
    """A thousand cases, other ones every day; the end of the log says how to run them again."""
    seed = int(time.strftime("%Y%m%d"))
    report = run(CASES, seed)
    record_property("log", f"python -m tests.fuzz --cases {CASES} --seed {seed}\n{report.text()}")
    assert not report.failures, "\n\n".join(failure.text() for failure in report.failures)
    assert sum(report.counts.values()) == CASES
    assert set(report.counts) >= set(KINDS) - {"compiled"}  # of which a day may have none


def test_a_seed_is_one_case():
    for seed in range(200):
        assert draw(seed) == draw(seed)
    drawn = {draw(seed).kind for seed in range(2000)}
    assert drawn == set(KINDS)


def test_a_failing_case_prints_a_test_that_fails(monkeypatch):
    """The printed source, run as it is, raises what the case raised."""
    monkeypatch.setattr(reference, "score_sums", lambda logits, score: logits.sum(0))
    report = run(400, 1, kinds=("ops",), stop_after=1)
    (failure,) = report.failures
    assert failure.case.options["op"] in ("score_sums", "topk_route_balance")
    source = failure.case.as_test()
    assert source in failure.text()
    space: dict = {}
    exec(source, space)
    (test,) = (value for name, value in space.items() if name.startswith("test_"))
    with pytest.raises(AssertionError):
        test()
    monkeypatch.undo()
    test()


def wrong_rows(x, plan):
    rows = moeops.ops.permute.permute_tokens(x, plan)
    return rows.index_copy(0, torch.tensor([0]), rows[:1] * 1.1) if len(rows) else rows


def wrong_gradient(rows, plan, weights=None):
    y = moeops.ops.permute.unpermute_tokens(rows, plan, weights)
    return y.detach() + 1.01 * (y - y.detach())


@pytest.mark.parametrize(
    ("name", "fault", "op"),
    [
        ("permute_tokens", wrong_rows, "permute_tokens"),
        ("unpermute_tokens", wrong_gradient, "unpermute_tokens"),
        ("count_tokens", lambda ids, E: reference.count_tokens(ids.abs(), E), "count_tokens"),
    ],
)
def test_a_fault_of_an_op_is_seen(name, fault, op, monkeypatch):
    monkeypatch.setattr(moeops, name, fault)
    cases = [case for seed in range(400) if (case := draw(seed, ("ops",))).options["op"] == op]
    failed = 0
    for case in cases:
        try:
            check(case.kind, case.seed, **case.options)
        except AssertionError:
            failed += 1
    assert failed > len(cases) // 4


def test_a_layer_that_lets_masked_tokens_count_is_seen(monkeypatch):
    monkeypatch.setattr(moeops.layers.moe, "without_masked", lambda routing, mask: routing)
    monkeypatch.setattr(moeops.gates.SwitchGate, "takes_mask", False)
    with pytest.raises(AssertionError):
        layers.check(3, gate="switch", kind="mlp", T=20, D=8, masked="some")
    monkeypatch.undo()
    layers.check(3, gate="switch", kind="mlp", T=20, D=8, masked="some")


def test_near_ties_are_forgiven_where_types_are_rounded_and_only_there():
    seen = []

    def once(seed):
        seen.append(seed)
        if len(seen) == 1:
            raise comparing.OtherChoice("ids")

    comparing.unless_tied(once, 5, "bfloat16")
    drawn = []
    for seed in seen:
        comparing.seed_everything(seed, "case")
        drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == len(seen) == 1 + comparing.REPEATS
    seen.clear()
    with pytest.raises(comparing.OtherChoice):
        comparing.unless_tied(once, 5, "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_side_of_a_kink_is_forgiven_where_types_are_rounded_and_only_there(dtype, monkeypatch):
    """With this seed a pre-activation of autocast's relu has the other sign; not with others."""
    case = {"gate": "deepseek_sequences", "kind": "mlp", "T": 5, "D": 8, "losses": ("switch", "z")}
    case |= {"activation": "relu", "bias": False, "steps": 2, "mask_type": "int32"}
    check("layers", 20261129010770, dtype=dtype, autocast=dtype == "float32", **case)
    wrong = layers.assert_gradient
    monkeypatch.setattr(layers, "assert_gradient", lambda a, *rest, **o: wrong(a + 1, *rest, **o))
    with pytest.raises(AssertionError, match="side of relu's kink"):
        check("layers", 20261129010770, dtype=dtype, autocast=dtype == "float32", **case)


def test_every_public_op_has_cases():
    assert set(ops.OPS) == set(moeops.ops.__all__)
    assert Case("ops", 1, {"op": "count_tokens"}).as_test().startswith("from fuzz.run import check")
