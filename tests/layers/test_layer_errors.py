"""Layers answer bad input with one clear error."""

from __future__ import annotations

import pytest
import torch
from layer_cases import D, H, make_layer
from torch import nn

from cases import each
from moeops import FMoE, FMoETransformerMLP
from moeops.distributed import Exact, Static
from moeops.gates import NaiveGate


class WrongGate(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


def gate_of(result):
    return lambda *args: WrongGate(result)


def ids(x, K=2):
    return torch.zeros(x.shape[0], K, dtype=torch.int64)


def weights(x, K=2):
    return torch.ones(x.shape[0], K)


@each(
    ("result", "error", "match"),
    [
        (
            lambda x: (weights(x), ids(x)),
            TypeError,
            r"WrongGate must return int32 or int64 topk_ids, got torch\.float32",
        ),
        (
            lambda x: (ids(x), ids(x)),
            TypeError,
            r"WrongGate must return float topk_weights, got torch\.int64",
        ),
        (
            lambda x: (ids(x).flatten(), weights(x)),
            ValueError,
            r"WrongGate must return topk_ids of shape \[6, K\], got .*\[12\]",
        ),
        (
            lambda x: (ids(x), weights(x, 3)),
            ValueError,
            r"WrongGate must return topk_weights of the shape .*\[6, 2\], got .*\[6, 3\]",
        ),
        (
            lambda x: (ids(x)[:3], weights(x)),
            ValueError,
            r"WrongGate must return topk_ids of shape \[6, K\], got .*\[3, 2\]",
        ),
        (
            lambda x: (ids(x), [1.0]),
            TypeError,
            r"WrongGate must return a tensor as topk_weights, got \[1\.0\]",
        ),
        (lambda x: (ids(x) + 99, weights(x)), RuntimeError, r"99"),
    ],
    ids=["swapped", "int_weights", "flat_ids", "other_k", "fewer_tokens", "list", "out_of_range"],
)
@each("kind", ["mlp", "modules"])
def test_gates_that_return_something_else(kind, result, error, match):
    layer = make_layer(kind, gate_of(result))
    with pytest.raises(error, match=match):
        layer(torch.randn(6, D))


@pytest.mark.parametrize("kind", ["mlp", "modules"])
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.randn(4, D + 1), ValueError, r"must have size .*8.* got torch\.float32 \[4, 9\]"),
        (
            torch.ones(4, D, dtype=torch.int64),
            TypeError,
            r"inp must be float64.*got torch\.int64 \[4, 8\]",
        ),
        (
            torch.ones(4, D, dtype=torch.complex64),
            TypeError,
            r"inp must be float64.*got torch\.complex64",
        ),
    ],
)
def test_tokens_that_do_not_fit(kind, x, error, match):
    with pytest.raises(error, match=match):
        make_layer(kind, "naive")(x)


@pytest.mark.parametrize(
    ("inp", "error", "match"),
    [
        ({}, ValueError, r"FMoE: moe_inp must hold a tensor, got an empty nest"),
        (
            [torch.randn(4, D), 3],
            TypeError,
            r"FMoE: moe_inp must be a tensor or a nest of tensors, got 3 \(int\)",
        ),
        (
            [torch.randn(4, D), torch.randn(5)],
            ValueError,
            r"FMoE: moe_inp must hold .* \[\[4, 8\], \[5\]\]",
        ),
        (
            [torch.randn(4), torch.randn(4, D)],
            ValueError,
            r"FMoE: moe_inp must have shape \[T, d_model\], got .*\[4\]",
        ),
    ],
)
def test_nests_that_do_not_fit(inp, error, match):
    with pytest.raises(error, match=match):
        make_layer("modules", "naive")(inp)


def test_fused_layer_takes_one_tensor():
    with pytest.raises(TypeError, match=r"FMoETransformerMLP: inp must be a tensor, got list"):
        make_layer("mlp", "naive")([torch.randn(4, D)])


def test_type_of_tokens_and_weights_must_agree():
    with pytest.raises(TypeError, match=r"w_up must be torch\.bfloat16 like x"):
        make_layer("mlp", "naive")(torch.randn(4, D).bfloat16())


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.zeros(5).long(), ValueError, r"mask must have one entry for each of the 6 tokens, got .*\[5\]"),
        (torch.zeros(6).cfloat(), TypeError, r"mask must be a tensor of numbers or bools, got torch\.complex64"),
        ([0] * 6, TypeError, r"mask must be a tensor of numbers or bools, got \[0, 0"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit(mask, error, match):
    with pytest.raises(error, match=match):
        make_layer("mlp", "naive")(torch.randn(6, D), mask)


def linear(d_model):
    return nn.Linear(d_model, d_model)


@each(
    ("build", "error", "match"),
    [
        (lambda: FMoE(0, D, expert=linear), ValueError, r"FMoE: num_expert must be at least 1, got 0"),
        (lambda: FMoE(2, -1, expert=linear), ValueError, r"FMoE: d_model must be at least 1, got -1"),
        (lambda: FMoE(2.5, D, expert=linear), TypeError, r"FMoE: num_expert must be an int, got 2\.5"),
        (lambda: FMoE(4, D, top_k=5, expert=linear), ValueError, r"FMoE: top_k must be at most the 4 experts, got 5"),
        (lambda: FMoE(4, D, top_k=0, expert=linear), ValueError, r"FMoE: top_k must be at least 1, got 0"),
        (lambda: FMoE(4, D, world_size=0, expert=linear), ValueError, r"FMoE: world_size must be at least 1, got 0"),
        (lambda: FMoE(4, D, world_size=2, expert=linear), RuntimeError, r"world_size must be 1 before .* got 2"),
        (lambda: FMoE(4, D, mp_group="g", expert=linear), TypeError, r"FMoE: mp_group does not fit: .* got 'g'"),
        (lambda: FMoE(4, D, slice_group="g", expert=linear), TypeError, r"FMoE: slice_group does not fit: .* got 'g'"),
        (lambda: FMoE(4, D, slice_group="g", mp_group="h", expert=linear), ValueError, r"mp_group must be None where"),
        (lambda: FMoE(4, D, moe_group="g", expert=linear), TypeError, r"FMoE: moe_group does not fit: .* got 'g'"),
        (lambda: FMoE(4, D, moe_group=-100, expert=linear), ValueError, r"group must hold this rank"),
        (lambda: FMoE(4, D, moe_group="g", device_mesh="m", expert=linear), ValueError, r"moe_group must be None"),
        (lambda: FMoE(4, D, device_mesh="m", expert=linear), ValueError, r"device_mesh must have 1 dimension"),
        (lambda: FMoE(4, D, dispatch="fast", expert=linear), ValueError, r"dispatch must be one of .* got 'fast'"),
        (lambda: FMoE(4, D, dispatch=Static, expert=linear), TypeError, r"or a record such as .* got <class"),
        (lambda: FMoE(4, D, dispatch=Static(None), expert=linear), TypeError, r"capacity must be an int or a float"),
        (lambda: FMoE(4, D, dispatch=Static(0), expert=linear), ValueError, r"FMoE: capacity must be above 0"),
        (lambda: FMoE(4, D, dispatch=Exact(capacity=2.0)), TypeError, r"unexpected keyword argument 'capacity'"),
        (lambda: FMoE(4, D, dispatch="static", n_chunks=2), TypeError, r"FMoE: n_chunks .*dispatch\.Static\(n_chunks="),
        (lambda: FMoE(4, D, dispatch=Static(2.0), n_chunks=2), TypeError, r"n_chunks=2 as .*dispatch\.Static\("),
        (lambda: FMoETransformerMLP(4, D, H, capacity=2.0), TypeError, r"capacity must be .*Static\(capacity="),
        (lambda: FMoETransformerMLP(4, D, H, mlps=1), TypeError, r"unexpected keyword argument 'mlps'"),
        (lambda: FMoE(4, D, dispatch=Exact(n_chunks=0)), ValueError, r"FMoE: n_chunks must be at least 1, got 0"),
        (lambda: FMoE(4, D, gate="naive", expert=linear), TypeError, r"FMoE: gate must be .* got 'naive'"),
        (lambda: FMoE(4, D, gate=lambda *a: 3, expert=linear), TypeError, r"FMoE: gate must be .* got 3 \(int\)"),
        (lambda: FMoE(4, D, expert=nn.Linear(D, D)), TypeError, r"FMoE: expert must be .* ready module Linear"),
        (lambda: FMoE(4, D, expert=lambda d: d), TypeError, r"FMoE: expert must build an nn\.Module, got 8"),
        (lambda: FMoE(d_model=D, expert=[3, 3]), TypeError, r"FMoE: expert must build an nn\.Module, got 3"),
        (lambda: FMoE(4, D, expert=[]), ValueError, r"FMoE: num_expert must be at least 1, got 0"),
        (lambda: FMoE(4, D, expert=linear, mask=[1]), TypeError, r"FMoE: mask must be .*\[1\]"),
        (lambda: FMoE(4, D, expert=linear, mask_dict={0: 1}), ValueError, r"FMoE: mask_dict .* got 0"),
        (lambda: FMoE(4, D, expert=linear, mask_dict={1: "a"}), TypeError, r"FMoE: mask_dict .* got 'a'"),
        (lambda: FMoETransformerMLP(4, D, 0), ValueError, r"FMoETransformerMLP: d_hidden must be at least 1, got 0"),
        (lambda: FMoETransformerMLP(4, D, H, "tanh"), ValueError, r"activation must be one of .* got 'tanh'"),
        (lambda: FMoETransformerMLP(4, D, H, 3), TypeError, r"activation must be one of .* got 3"),
        (lambda: FMoETransformerMLP(4, D, H, expert=linear), TypeError, r"unexpected keyword argument 'expert'"),
        (lambda: FMoETransformerMLP(4, D, H, bogus=1), TypeError, r"bogus"),
        (lambda: make_layer("mlp", "switch", top_k=2), ValueError, r"SwitchGate: top_k must be 1, got 2"),
    ],
)  # fmt: skip
def test_bad_constructor_arguments(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_gate_for_another_number_of_experts():
    with pytest.raises(
        ValueError, match=r"gate must choose among the layer's 4 experts, got one for 5"
    ):
        FMoETransformerMLP(4, D, H, gate=NaiveGate(D, 5, 1))


class Cut(nn.Module):
    def __init__(self, d_model):
        super().__init__()

    def forward(self, x):
        return x[1:]


class Text(nn.Module):
    def __init__(self, d_model):
        super().__init__()

    def forward(self, x):
        return "rows"


@pytest.mark.parametrize(
    ("experts", "error", "match"),
    [
        (
            [linear, lambda d: nn.Linear(d, 3)],
            ValueError,
            r"rows of the same shape, got \[3\] from expert 1 and \[8\]",
        ),
        ([Cut, Cut], ValueError, r"FMoE: expert \d must return its \d+ rows in dimension 0, got"),
        (
            [Text, Text],
            TypeError,
            r"FMoE: experts must return tensors, got 'rows' \(str\) from expert 0",
        ),
        (
            [nn.Identity(), lambda d: WrongGate(lambda x: [x])],
            ValueError,
            r"experts must all return the same structure",
        ),
        (
            [lambda d: WrongGate(lambda x: x.long())],
            TypeError,
            r"experts must return float tensors .*int64",
        ),
    ],
)
def test_experts_that_do_not_fit(experts, error, match):
    layer = FMoE(d_model=D, top_k=1, expert=experts)
    with pytest.raises(error, match=match):
        layer(torch.randn(40, D))


def test_layer_without_experts():
    layer = FMoE(2, D)
    with pytest.raises(RuntimeError, match=r"FMoE: expert must be given"):
        layer(torch.randn(3, D))
