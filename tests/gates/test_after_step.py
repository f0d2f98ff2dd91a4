"""What gates do once per step: one call for a model, whatever its gates."""

from __future__ import annotations

import copy

import pytest
import torch
from gate_checks import D, E
from torch import nn

import moeops
from moeops.gates import (
    BaseGate,
    DeepSeekV3Gate,
    DenseToSparseGate,
    NaiveGate,
    ReMoEGate,
    update_coefficients,
)


def run(model, seed=0):
    torch.manual_seed(seed)
    for number, gate in enumerate(model):
        gate(torch.randn(40, D) + number)


def assert_same_state(actual, expected):
    state = expected.state_dict()
    assert state
    for name, value in actual.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("options", [{}, {"bias_speed": 0.125}], ids=["default", "fast"])
def test_bias_moves_by_its_speed(options):
    model = nn.ModuleList([DeepSeekV3Gate(D, E, **options)])
    run(model)
    expected = copy.deepcopy(model)
    expected[0].update_bias(options.get("bias_speed", 0.001))
    moeops.update_gates(model, 0.5)
    assert_same_state(model, expected)
    assert model[0].selection_bias.any()


@pytest.mark.parametrize("progress", [0.0, 0.3, 1])
def test_temperature_follows_its_schedule(progress):
    model = nn.ModuleList([DenseToSparseGate(D, E, temperature=2.0)])
    expected = copy.deepcopy(model)
    expected[0].anneal(progress)
    moeops.update_gates(model, progress)
    assert_same_state(model, expected)


def test_coefficients_are_updated_together():
    """One of the gates alone would go the other way."""
    model = nn.ModuleList([ReMoEGate(D, E, 1, E), ReMoEGate(D, E, 1, 1), ReMoEGate(D, E, 1, 1)])
    run(model)
    together, alone = copy.deepcopy(model), copy.deepcopy(model)
    update_coefficients(together)
    for gate in alone:
        gate.after_step(0.5)
    moeops.update_gates(model, 0.5)
    assert_same_state(model, together)
    assert len({float(gate.coefficient) for gate in model}) == 1
    assert len({float(gate.coefficient) for gate in alone}) == 2


def test_own_gates_are_called_and_others_left_alone():
    class Own(NaiveGate):
        seen = None

        def after_step(self, progress):
            self.seen = progress

    model = nn.Sequential(nn.Linear(D, D), Own(D, E), NaiveGate(D, E), DeepSeekV3Gate(D, E))
    before = copy.deepcopy(model)
    moeops.update_gates(model, 0.25)
    assert model[1].seen == 0.25
    assert_same_state(model, before)  # without loads the bias stays
    moeops.update_gates(nn.Linear(2, 2), 1.0)


def test_bad_arguments():
    assert BaseGate(2).after_step(0.0) is None
    for progress in (-0.1, 1.5, float("nan"), "half"):
        with pytest.raises(ValueError, match=rf"update_gates: progress .* got {progress!r}"):
            moeops.update_gates(NaiveGate(D, E), progress)
    with pytest.raises(TypeError, match=r"update_gates: model must be a torch.nn.Module, got 3"):
        moeops.update_gates(3, 0.5)
    with pytest.raises(
        ValueError, match=r"DeepSeekV3Gate: bias_speed must be at least 0 .* got -1"
    ):
        DeepSeekV3Gate(D, E, bias_speed=-1.0)
