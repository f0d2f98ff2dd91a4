from __future__ import annotations

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from block_cases import call, uneven_plan
from torch.utils._python_dispatch import TorchDispatchMode

import moeops
from cases import each
from moeops import Glu, TokenPlan, reference
from moeops.ops.activations import ACTIVATIONS, up_width
from samples import (
    SAMPLES,
    SMALL,
    UNITS,
    Sample,
    assert_matches_reference,
    mlp_tensors,
    unit_for,
    unit_id,
)

bias_options = each("with_bias", [False, True], ids=["no_bias", "bias"])


@each("sample", SAMPLES, ids=str)
@bias_options
@each("activation", ["swiglu", "gelu"])
def test_moe_mlp(sample, activation, with_bias, values_dtype, device):
    plan = sample.plan(device)
    cpu_plan = TokenPlan(*(t.cpu() for t in plan))
    assert_matches_reference(
        call(moeops.moe_mlp, plan, activation),
        call(reference.moe_mlp, cpu_plan, activation),
        mlp_tensors(sample, values_dtype, device, activation, with_bias),
        values_dtype,
    )


@each("activation", [*ACTIVATIONS, *UNITS], ids=unit_id)
@bias_options
def test_activations(activation, with_bias, dtype, device):
    activation = unit_for(activation, dtype)
    if device == "cuda" and with_bias and dtype.itemsize == 2 and isinstance(activation, Glu):
        # The general kernels round before they add the bias, which carries values across any limit.
        activation = activation._replace(limit=None)
    sample = Sample("dropped", T=37, D=9, H=11, dropped=0.2)
    plan = sample.plan(device)
    cpu_plan = TokenPlan(*(t.cpu() for t in plan))
    assert_matches_reference(
        call(moeops.moe_mlp, plan, activation),
        call(reference.moe_mlp, cpu_plan, activation),
        mlp_tensors(sample, dtype, device, activation, with_bias),
        dtype,
    )


@each("sample", SMALL, ids=str)
@each("activation", ["swiglu", "geglu_tanh", "gelu", "silu", *UNITS[:2]], ids=unit_id)
@bias_options
def test_gradcheck(sample, activation, with_bias, device):
    plan = sample.plan(device)
    tensors = mlp_tensors(sample, torch.float64, device, activation, with_bias)
    names = list(tensors)
    leaves = tuple(t.detach().requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(
        lambda *values: call(moeops.moe_mlp, plan, activation)(
            **dict(zip(names, values, strict=True))
        ),
        leaves,
        fast_mode=True,
    )


def test_equals_the_composition_of_the_other_ops(device):
    sample = Sample("dropped", T=50, dropped=0.1)
    plan = sample.plan(device)
    t = mlp_tensors(sample, torch.float64, device, "swiglu", with_bias=True)
    rows = moeops.permute_tokens(t["x"], plan)
    pre = moeops.grouped_linear(rows, t["w_up"], plan.expert_offsets, bias=t["b_up"])
    hidden = reference.activate(pre, "swiglu")
    out = moeops.grouped_linear(hidden, t["w_down"], plan.expert_offsets, bias=t["b_down"])
    want = moeops.unpermute_tokens(out, plan, t["topk_weights"])
    torch.testing.assert_close(moeops.moe_mlp(t.pop("x"), plan, t.pop("topk_weights"), **t), want)


def test_other_output_width(device):
    sample = Sample("plain")
    plan = sample.plan(device)
    cpu_plan = TokenPlan(*(t.cpu() for t in plan))
    tensors = mlp_tensors(sample, torch.float64, device, "relu", with_bias=False)
    tensors["w_down"] = torch.randn(sample.E, 3, sample.H, dtype=torch.float64, device=device)
    y = assert_matches_reference(
        call(moeops.moe_mlp, plan, "relu"),
        call(reference.moe_mlp, cpu_plan, "relu"),
        tensors,
        torch.float64,
    )
    assert y.shape == (sample.T, 3)


@each("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_only_needed_gradients_are_computed(needed, device):
    sample = Sample("dropped", dropped=0.2)
    plan = sample.plan(device)
    tensors = mlp_tensors(sample, torch.float64, device, "swiglu", with_bias=True)
    block = call(moeops.moe_mlp, plan, "swiglu")
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    want = dict(
        zip(
            leaves,
            torch.autograd.grad(block(**leaves).square().sum(), leaves.values()),
            strict=True,
        )
    )
    wanted = [
        n for n, need in zip(("x", "topk_weights", "w_up", "b_down"), needed, strict=True) if need
    ]
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}
    grads = torch.autograd.grad(block(**leaves).square().sum(), [leaves[n] for n in wanted])
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, want[name], msg=lambda text, name=name: f"{name}: {text}")


DATA_NEEDS = ("need_x", "need_topk_weights", "need_grad_pre", "need_weighted_hidden")
WEIGHT_NEEDS = ("need_w_up", "need_w_down", "need_b_up", "need_b_down")


@each("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_backward_ops_return_empty_tensors_for_what_is_not_needed(needs, device):
    sample = Sample("plain")
    t = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True)
    pre = sample.tensor(sample.R, 2 * sample.H, dtype=torch.float32, device=device)
    plan, grad_y = sample.plan(device), torch.randn_like(t["x"])
    weights = [t["w_up"], t["w_down"], t["b_up"], t["b_down"]]

    def data(*needed):
        return torch.ops.moeops.moe_mlp_backward_data(
            grad_y,
            t["x"],
            *plan,
            t["topk_weights"],
            *weights,
            pre,
            **dict(zip(DATA_NEEDS, needed, strict=True)),
        )

    every = data(True, True, True, True)
    hidden = pre.new_empty(sample.R, sample.H)
    for grad, source, need, whole in zip(
        data(*needs), (t["x"], t["topk_weights"], pre, hidden), needs, every, strict=True
    ):
        assert grad.shape == (source.shape if need else (0,))
        assert grad.dtype == torch.float32
        if need:
            assert torch.equal(grad, whole)

    def of_weights(kept, *needed):
        return torch.ops.moeops.moe_mlp_backward_weights(
            grad_y,
            t["x"],
            *plan,
            t["topk_weights"],
            *kept,
            **dict(zip(WEIGHT_NEEDS, needed, strict=True)),
        )

    w_up, w_down, b_up, _ = needs
    kept = [
        rows if need else rows.new_empty(0, 1)
        for rows, need in zip(every[2:], (w_up or b_up, w_down), strict=True)
    ]
    grads = of_weights(kept, *needs)
    every = of_weights(every[2:], True, True, True, True)
    for grad, source, need, whole in zip(grads, weights, needs, every, strict=True):
        assert grad.shape == (source.shape if need else (0,))
        assert grad.dtype == torch.float32
        if need:
            assert torch.equal(grad, whole)


def test_what_was_kept_is_gone_when_gradients_of_weights_are_made(device):
    """They may take its memory: the pre-activation's, unless the graph is kept for another pass, and its gradient's."""
    sample = Sample("plain")
    t = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=False)
    leaves = {n: v.requires_grad_() for n, v in t.items()}

    class Held(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.held = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.moeops.moe_mlp_backward_weights.default:
                self.held.append([ref() is not None for ref in self.refs])
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.moeops.moe_mlp_backward_data.default:
                self.refs = [weakref.ref(args[-1]), weakref.ref(out[2])]
            return out

    for retain in (False, True):
        y = call(moeops.moe_mlp, sample.plan(device), "swiglu")(**leaves)
        with Held() as mode:
            y.sum().backward(retain_graph=retain)
        assert mode.held == [[retain, True], [retain, False]]


def test_expanded_gradient(dtype, device):
    sample = Sample("plain")
    block = call(moeops.moe_mlp, sample.plan(device), "swiglu")
    tensors = mlp_tensors(sample, dtype, device, "swiglu", with_bias=True)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    y = block(**leaves)
    want = torch.autograd.grad(y, leaves.values(), torch.ones_like(y), retain_graph=True)
    for got, expected in zip(torch.autograd.grad(y.sum(), leaves.values()), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("dropped", dropped=0.4),
        Sample("few_rows", K=4, dropped=0.5, rows_per_pair=0.6),
        Sample("more_rows", dropped=0.3, rows_per_pair=1.5),
    ],
    ids=str,
)
def test_nan_of_a_dropped_pair_stays_out(sample, device):
    plan = sample.plan(device)
    tensors = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True)
    dead = plan.pair_to_row >= plan.expert_offsets[-1]
    assert dead.any()
    tensors["topk_weights"][dead] = float("nan")
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    y = call(moeops.moe_mlp, plan, "swiglu")(**leaves)
    assert y.isfinite().all()
    y.square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name
    assert (leaves["topk_weights"].grad[dead] == 0).all()


def test_keeps_only_inputs_and_pre_activation(device):
    sample = Sample("plain", T=64, D=32, H=16)
    tensors = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=False)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    plan = sample.plan(device)
    known = {t.data_ptr() for t in (*leaves.values(), *plan)}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(moeops.moe_mlp, plan, "swiglu")(**leaves)
    assert saved == [(sample.R, 2 * sample.H)]


@bias_options
@each("threads", [1, 2, 5])
def test_experts_of_several_blocks(with_bias, threads, values_dtype):
    plan, num_tokens = uneven_plan([700, 0, 257, 256, 1, 514], 2)
    sample = Sample("uneven", T=num_tokens, E=6, D=40, H=300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_matches_reference(
            call(moeops.moe_mlp, plan, "swiglu"),
            call(reference.moe_mlp, plan, "swiglu"),
            mlp_tensors(sample, values_dtype, "cpu", "swiglu", with_bias),
            values_dtype,
        )
    finally:
        torch.set_num_threads(before)


def test_same_bits_every_time(device):
    plan, num_tokens = uneven_plan([300, 90, 0, 410, 128, 96], 2)
    plan = TokenPlan(*(t.to(device) for t in plan))
    sample = Sample("uneven", T=num_tokens, E=6, D=64, H=96)
    tensors = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}

    def run():
        y = call(moeops.moe_mlp, plan, "swiglu")(**leaves)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves.values())]

    first = run()
    for _ in range(10):
        for got, want in zip(run(), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_threads_inside_a_mode(mode, device):
    # The threads that share the work know nothing of the caller's mode, nor of its parameters.
    sample = Sample("wide", T=97, E=8, D=32, H=16)
    plan = sample.plan(device)
    tensors = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True)
    want = call(moeops.moe_mlp, plan, "swiglu")(**tensors)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    with mode():
        inside = {n: t.clone() for n, t in tensors.items()}
        inside["w_up"] = leaves["w_up"]
        got = call(moeops.moe_mlp, plan, "swiglu")(**inside)
    assert torch.equal(got, want)


def test_rows_without_tokens(device):
    sample = Sample("no_tokens", T=0)
    plan = moeops.sort_tokens(sample.ids(device), sample.E, 5)
    tensors = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    y = call(moeops.moe_mlp, plan, "swiglu")(**leaves)
    assert y.shape == (0, sample.D)
    for grad in torch.autograd.grad(y.sum(), leaves.values()):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.cuda
def test_memory_follows_rows_and_not_pairs(cuda_device):
    sample = Sample("expert_choice", T=4096, K=64, E=64, D=256, H=64, dropped=0.97)
    sample = replace(sample, rows_per_pair=1 / 32)
    plan = moeops.sort_tokens(sample.ids("cuda"), sample.E, sample.num_rows)
    tensors = mlp_tensors(sample, torch.bfloat16, "cuda", "swiglu", with_bias=True)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(moeops.moe_mlp, plan, "swiglu")(**leaves).sum().backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < sample.N * sample.D * 2 / 2  # bytes of half an [N, D] in bfloat16


def test_autocast(device):
    sample = Sample("plain")
    plan = sample.plan(device)
    leaves = {
        n: t.requires_grad_()
        for n, t in mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True).items()
    }
    with torch.autocast(device, dtype=torch.bfloat16):
        y = call(moeops.moe_mlp, plan, "swiglu")(**leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}


def test_public_errors(device):
    sample = Sample("plain")
    plan = sample.plan(device)
    good = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=True)

    def block(activation="swiglu", **changed):
        return call(moeops.moe_mlp, plan, activation)(**{**good, **changed})

    for changed, error, text in (
        ({"activation": "tanh"}, ValueError, r"activation must be one of .* got 'tanh'"),
        ({"activation": "gelu"}, ValueError, r"w_up must have size 6 in dim.*\[4, 12, 8\]"),
        ({"activation": Glu("tanh")}, ValueError, r"the gate of activation must be .* got 'tanh'"),
        ({"activation": Glu(limit=-1.0)}, ValueError, r"the limit of activation must .* got -1"),
        ({"activation": Glu("gelu_tanh", 2.0)}, ValueError, r"the alpha of activation .* got 2"),
        ({"x": good["x"][1:]}, ValueError, r"x must have size 13 in dimension 0 .*\[12, 8\]"),
        (
            {"x": good["x"].double()},
            TypeError,
            r"w_up must be torch.float64 like x, got torch.float32",
        ),
        ({"w_up": good["w_up"][1:]}, ValueError, r"w_up must have size 4 in dim.*\[3, 12, 8\]"),
        ({"w_up": good["w_up"][:, :, 1:]}, ValueError, r"w_up must have size 8 .*\[4, 12, 7\]"),
        ({"w_down": good["w_down"][0]}, ValueError, r"w_down must have 3 dimensions.*\[8, 6\]"),
        ({"b_up": good["b_up"][:, 1:]}, ValueError, r"b_up must have size 12 .*\[4, 11\]"),
        ({"b_down": good["b_down"].half()}, TypeError, r"b_down must be torch.float32 .*float16"),
        (
            {"topk_weights": good["topk_weights"][:, :1]},
            ValueError,
            r"topk_weights must .*\[13, 1\]",
        ),
    ):
        with pytest.raises(error, match=f"moe_mlp: {text}"):
            block(**changed)


def test_bare_op_refuses_what_would_corrupt_memory():
    sample = Sample("plain")
    plan = sample.plan()
    t = mlp_tensors(sample, torch.float32, "cpu", "swiglu", with_bias=True)
    block_tensors = (t["topk_weights"], t["w_up"], t["w_down"], t["b_up"], t["b_down"])
    good = [t["x"], *plan, *block_tensors]

    def block(position, value, activation="swiglu"):
        args = list(good)
        args[position] = value
        return torch.ops.moeops.moe_mlp(*args, activation=activation)

    for position, value, text in (
        (0, t["x"][1:], r"x must have size 13 in dimension 0, got shape \[12, 8\]"),
        (4, t["topk_weights"].double(), r"topk_weights must be float32.*got Double"),
        (5, t["w_up"][:, 1:], r"w_up must have size 12 in dimension 1, got shape \[4, 11, 8\]"),
        (6, t["w_down"].double(), r"w_down must be Float like x, got Double"),
        (7, t["b_up"][1:], r"b_up must have size 4 in dimension 0, got shape \[3, 12\]"),
        (8, t["b_down"][:, 1:], r"b_down must have size 8 in dimension 1, got shape \[4, 7\]"),
        (1, plan[0] + 1, r"row_to_pair must be in \[0, 26\), got 26"),
        (3, plan[2] + 1, r"expert_offsets must start with 0, got 1 at \[0\]"),
    ):
        with pytest.raises(RuntimeError, match=f"moe_mlp: {text}"):
            block(position, value)
    with pytest.raises(RuntimeError, match=r"activation must be .* got 'tanh'"):
        block(0, t["x"], "tanh")
    for options, text in (
        ({"activation": "geglu_tanh", "alpha": 2.0}, "alpha must be 1 with geglu_tanh, got 2"),
        ({"limit": 0.0}, "limit must be above 0, got 0"),
        ({"activation": "relu", "interleaved": True}, "must be left out with relu"),
    ):
        with pytest.raises(RuntimeError, match=f"moe_mlp: .*{text}"):
            torch.ops.moeops.moe_mlp(*good, **options)
    pre = torch.randn(26, 11)
    with pytest.raises(RuntimeError, match=r"pre_activation must have size 12 .*\[26, 11\]"):
        torch.ops.moeops.moe_mlp_backward_data(t["x"], *good, pre)
    rows = torch.randn(26, 12)
    for name, grad_pre, hidden in (
        ("grad_pre", rows[1:], rows),
        ("weighted_hidden", rows, rows[1:]),
    ):
        with pytest.raises(RuntimeError, match=rf"{name} must have size 26 in dimension 0"):
            torch.ops.moeops.moe_mlp_backward_weights(
                t["x"], t["x"], *plan, t["topk_weights"], grad_pre, hidden
            )


@each("activation", [*ACTIVATIONS, *UNITS], ids=unit_id)
def test_activations_far_out(activation, device):
    x = torch.cat([torch.linspace(-120, 120, 2003), torch.tensor([0.0, -0.0, 1e-30, 3e4, -3e4])])
    x = x.float()[:, None]
    num_tokens = x.shape[0]
    plan = reference.sort_tokens(torch.zeros(num_tokens, 1, dtype=torch.int64), 1)
    tensors = {
        "x": x.to(device),
        "w_up": torch.ones(1, up_width(1, activation), 1, device=device),
        "w_down": torch.ones(1, 1, 1, device=device),
        "topk_weights": torch.ones(num_tokens, 1, device=device),
    }
    on_device = TokenPlan(*(t.to(device) for t in plan))
    y = call(moeops.moe_mlp, on_device, activation)(**tensors).cpu()
    want = call(reference.moe_mlp, plan, activation)(
        **{n: t.cpu().double() for n, t in tensors.items()}
    )
    # Each value by itself: the other tests allow an error relative to the largest one.
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)

    tensors["x"] = torch.full_like(tensors["x"], float("nan"))
    assert call(moeops.moe_mlp, on_device, activation)(**tensors).isnan().all()
