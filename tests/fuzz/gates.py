"""Cases of gates that have a truth of their own: choices, weights, losses and gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import Any

import torch
from gate_checks import parameters_float64
from torch import Tensor

import moeops.gates
from fuzz.comparing import (
    assert_equal_choice,
    assert_gradient,
    draw_dtype,
    draw_tokens,
    dtype_of,
    seed_everything,
    unless_tied,
)
from moeops import reference
from reference_gates import hetumoe, variable
from samples import accumulate_dtype
from tolerances import assert_close


def ceil_of(factor: float, *sizes: int | Fraction) -> int:
    """The factor as it is written times sizes, rounded up."""
    product = Fraction(str(factor))
    for size in sizes:
        product *= size
    return math.ceil(product)


def limited(routing, capacity, num_experts, policy):
    ids, weights, loss = routing
    priority = weights.detach() if policy == "priority" else None
    ids = reference.limit_capacity(
        ids, num_experts, capacity, priority=priority, by_choice=policy == "choice"
    )
    return ids, weights, loss


def topk_truth(logits, k, score="softmax", renormalize=True, scale=1.0, balance=True):
    route = reference.topk_route_balance(
        logits, k, score=score, renormalize=renormalize, scale=scale
    )
    return route.topk_ids, route.topk_weights, route.balance_loss if balance else None


def gpt_oss_truth(logits, k, balance):
    _, _, loss = topk_truth(logits, k)
    ids = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    return ids, torch.softmax(logits.gather(1, ids), -1), loss if balance else None


def switch_truth(logits, k, capacity, drop_policy, **_options):
    T, E = logits.shape
    route = reference.topk_route_balance(logits, 1, renormalize=False)
    routing = route.topk_ids, route.topk_weights, route.balance_loss
    return limited(routing, ceil_of(capacity, Fraction(T, E)), E, drop_policy)


def gshard_truth(logits, k, capacity, drop_policy, **_options):
    T, E = logits.shape
    route = reference.topk_route_balance(logits, 2, num_counted=1)
    routing = route.topk_ids, route.topk_weights, route.balance_loss
    return limited(routing, ceil_of(capacity, Fraction(2 * T, E)), E, drop_policy)


def ktop1_truth(logits, k, capacity):
    T, E = logits.shape
    rows = None if capacity is None else ceil_of(capacity, Fraction(T * k, E))
    return hetumoe.ktop1_gate(logits, k, rows)


def expert_choice_truth(logits, k, capacity):
    ids, weights, _ = variable.expert_choice(logits, k, capacity)
    return ids, weights, None


def threshold_truth(logits, k, balance, dynamic, **options):
    ids, weights, loss, _ = variable.threshold(
        logits, k, balance=balance, dynamic=dynamic, **options
    )
    return ids, weights, loss if balance or dynamic else None


def deepspeed_truth(logits, k, capacity, min_capacity, **_options):
    T, E = logits.shape
    rows = None
    if capacity is not None:
        rows = max(ceil_of(capacity, Fraction(T * k, E)), min_capacity)
    return hetumoe.deepspeed_gate(logits, k, rows)


def tutel_truth(logits, k, capacity, drop_policy, renormalize, alignment):
    return hetumoe.tutel_gate(
        logits,
        logits,
        k,
        0.0 if capacity is None else capacity,
        prioritized=drop_policy == "batch",
        normalize=renormalize,
        alignment=alignment,
    )


def deepseek_truth(logits, k, sequence_length, **options):
    route = reference.topk_route(logits, k, score="sigmoid", **options)
    T, length = len(logits), sequence_length
    if length is None:
        return route.topk_ids, route.topk_weights, None
    # The loss counts the choices that scores alone would make.
    parts = [logits[begin : begin + length] for begin in range(0, T, length)]
    losses = [topk_truth(part, k, score="sigmoid")[2] for part in parts]
    return route.topk_ids, route.topk_weights, sum(losses) / len(losses)


def draw_deepseek(rng: Random, E: int) -> tuple[int, dict[str, Any]]:
    groups = rng.choice([g for g in range(1, E + 1) if E % g == 0])
    top_groups = rng.randint(1, groups)
    return rng.randint(1, min(4, E // groups * top_groups)), {
        "num_groups": groups,
        "top_groups": top_groups,
        "scale": rng.choice((1.0, 2.5)),
        "sequence_length": rng.choice((None, 1, 3, 100)),
    }


def llama4_truth(logits, k, balance):
    ids, weights, loss = variable.llama4(logits, k)
    return ids, weights, loss if balance else None


def factor(rng: Random) -> float:
    return rng.choice((0.3, 0.7, 1.0, 1.25, 4.0))


def draw_k(rng: Random, E: int) -> int:
    return rng.randint(1, min(5, E))


# Name: draws K and options for E experts, and the truth of logits [T, E], K and options.
GATES: dict[str, tuple[Callable, Callable]] = {
    "NaiveGate": (
        lambda rng, E: (draw_k(rng, E), {}),
        lambda logits, k: topk_truth(logits, k, balance=False),
    ),
    "TopKGate": (
        lambda rng, E: (
            draw_k(rng, E),
            {
                "score": rng.choice(("softmax", "sigmoid")),
                "renormalize": rng.random() < 0.5,
                "scale": rng.choice((1.0, 2.5)),
                "balance": rng.random() < 0.7,
            },
        ),
        topk_truth,
    ),
    "GptOssGate": (
        lambda rng, E: (draw_k(rng, E), {"balance": rng.random() < 0.7}),
        gpt_oss_truth,
    ),
    "Qwen3Gate": (
        lambda rng, E: (draw_k(rng, E), {"renormalize": rng.random() < 0.5, "balance": True}),
        topk_truth,
    ),
    "Llama4Gate": (
        lambda rng, E: (draw_k(rng, E), {"balance": rng.random() < 0.7}),
        llama4_truth,
    ),
    "SwitchGate": (
        lambda rng, E: (
            1,
            {
                "capacity": factor(rng),
                "switch_eps": 0.0,
                "drop_policy": rng.choice(("position", "priority")),
            },
        ),
        switch_truth,
    ),
    "GShardGate": (
        lambda rng, E: (
            2,
            {
                "capacity": factor(rng),
                "random_routing": False,
                "drop_policy": rng.choice(("choice", "position", "priority")),
            },
        ),
        gshard_truth,
    ),
    "DeepSeekV3Gate": (draw_deepseek, deepseek_truth),
    "KTop1Gate": (
        lambda rng, E: (
            rng.choice([k for k in range(1, min(E, 6) + 1) if E % k == 0]),
            {"capacity": rng.choice((None, factor(rng)))},
        ),
        ktop1_truth,
    ),
    "SAMGate": (
        lambda rng, E: (
            lambda groups: (
                rng.randint(1, min(4, E // groups)),
                {"num_groups": groups, "alignment": rng.choice((0.5, 1.0))},
            )
        )(rng.choice([g for g in range(1, E + 1) if E % g == 0])),
        hetumoe.sam_gate,
    ),
    "ExpertChoiceGate": (
        lambda rng, E: (draw_k(rng, E), {"capacity": factor(rng)}),
        expert_choice_truth,
    ),
    "ThresholdGate": (
        lambda rng, E: (
            draw_k(rng, E),
            {
                "top_p": rng.choice((0.3, 0.6, 1.0)),
                "min_prob": rng.choice((0.0, 0.1)),
                "renormalize": rng.random() < 0.5,
                "balance": rng.random() < 0.5,
                "dynamic": rng.choice((0.0, 0.1)),
                "row_budget": rng.choice((None, 1.0, 1.7)),
            },
        ),
        threshold_truth,
    ),
    "ReMoEGate": (
        lambda rng, E: (
            lambda k: (
                k,
                {
                    "coefficient": 0.5,
                    "balance": rng.random() < 0.5,
                    "max_k": rng.choice((None, rng.randint(k, E))),
                    "row_budget": rng.choice((None, 1.0, 2.3)),
                },
            )
        )(draw_k(rng, E)),
        lambda logits, k, **options: variable.remoe(logits, k, **options)[:3],
    ),
    "DeepSpeedGate": (
        lambda rng, E: (
            rng.randint(1, min(4, E)),
            {
                "capacity": rng.choice((None, factor(rng))),
                "min_capacity": rng.choice((0, 1, 4)),
                "use_rts": False,
                "top2_2nd_expert_sampling": False,
            },
        ),
        deepspeed_truth,
    ),
    "TutelGate": (
        lambda rng, E: (
            draw_k(rng, E),
            {
                "capacity": rng.choice((None, 0.7, 1.0, -0.7)),
                "drop_policy": rng.choice(("choice", "batch")),
                "renormalize": rng.random() < 0.5,
                "alignment": rng.choice((1, 4)),
            },
        ),
        tutel_truth,
    ),
}


def draw(rng: Random) -> dict[str, Any]:
    gate = rng.choice(list(GATES))
    E = rng.randint(2 if gate in ("GShardGate", "DeepSpeedGate") else 1, 12)
    top_k, options = GATES[gate][0](rng, E)
    return {
        "gate": gate,
        "T": min(draw_tokens(rng), 40),  # the truth walks over single numbers
        "E": E,
        "top_k": top_k,
        "D": rng.choice((1, 3, 8, 17)),
        "dtype": draw_dtype(rng),
        "training": rng.random() < 0.7,
        # Sequences have their places.
        "masked": 0.0 if options.get("sequence_length") else rng.choice((0.0, 0.0, 0.3, 1.0)),
        "strided": rng.random() < 0.3,
        "recomputed": rng.random() < 0.1,
        **options,
    }


def check(
    seed: int,
    *,
    gate: str,
    T: int,
    E: int,
    top_k: int,
    D: int,
    dtype: str = "float64",
    training: bool = True,
    masked: float = 0.0,
    strided: bool = False,
    recomputed: bool = False,
    **options: Any,
) -> None:
    """A gate on ``T`` tokens, a share ``masked`` of which is not there, against its truth on the others."""
    _, truth = GATES[gate]
    kind = dtype_of(dtype)

    def once(seed: int) -> None:
        seed_everything(seed, gate)
        module = getattr(moeops.gates, gate)(D, E, 1, top_k, **options).to(kind).train(training)
        x = torch.randn(D, T).t() if strided else torch.randn(T, D)
        x = x.to(kind)
        mask = (torch.rand(T) < masked).long() if masked else None
        _compare(module, x, mask, recomputed, lambda logits: truth(logits, top_k, **options), kind)

    unless_tied(once, seed, dtype)


def _compare(module, x: Tensor, mask: Tensor | None, recomputed: bool, truth, dtype) -> None:
    there = torch.ones(len(x), dtype=torch.bool) if mask is None else mask == 0
    leaf = x.clone()
    leaf[~there] = float("nan")
    leaf = (leaf if mask is None else torch.where(there[:, None], leaf, 0)).requires_grad_()
    given = {} if mask is None else {"mask": mask}
    if recomputed:
        routing = torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=False, **given)
    else:
        routing = module(leaf, **given)
    ids, weights = routing[:2]
    loss = module.get_loss()
    assert not module.has_loss
    assert bool((ids[~there] == -1).all()), "masked tokens have experts"

    params = parameters_float64(module)
    exact = x[there].double().requires_grad_()
    logits = exact @ params["gate.weight"].t()
    if "gate.bias" in params:
        logits = logits + params["gate.bias"]
    if len(exact) == 0:  # the truths divide by the number of tokens
        assert ids.shape[0] == weights.shape[0] == len(x)
        total = weights.sum() * 0 if loss is None else loss * 1
        assert float(total.detach()) == 0, f"loss {total} of no tokens"
        total.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is None or not parameter.grad.any(), name
        return
    want_ids, want_weights, want_loss = truth(logits)
    assert_equal_choice(ids[there], want_ids, "ids")
    router = accumulate_dtype(dtype)
    filled = want_ids >= 0
    assert_close(weights[there][filled], want_weights[filled], router, "weights")
    factors = torch.randn(want_weights.shape, dtype=torch.float64) * filled
    total = (weights[there] * factors.to(weights)).sum()
    want = (want_weights * factors).sum()
    assert (loss is None) == (want_loss is None), f"loss {loss}, expected {want_loss}"
    if loss is not None:
        assert_close(loss, want_loss, router, "loss")
        total, want = total + 3 * loss, want + 3 * want_loss
    total.backward()
    if want.requires_grad:
        want.backward()
    grad = torch.zeros_like(exact) if exact.grad is None else exact.grad
    assert_gradient(leaf.grad[there], grad, dtype, "gradient of x")
    assert not leaf.grad[~there].any(), "masked tokens have a gradient"
    for name, parameter in module.named_parameters():
        wanted = params[name].grad
        wanted = torch.zeros_like(params[name]) if wanted is None else wanted
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_gradient(got, wanted, dtype, f"gradient of {name}")
