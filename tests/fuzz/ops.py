"""Cases of the public ops: sizes, types, strides, plans and options."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moeops
from fuzz.comparing import (
    DTYPES,
    compare,
    draw_dtype,
    draw_tokens,
    dtype_of,
    seed_everything,
    unless_tied,
)
from moeops import Glu, LoraFactors, TokenPlan, reference
from samples import Sample, accumulate_dtype, mlp_tensors, unit_for

# Units with options are the arguments of Glu.
SMOOTH = (
    "swiglu",
    "geglu_tanh",
    "gelu",
    "silu",
    "relu_squared",
    ("silu", 1.702, None, 1.0, True),
    ("gelu_tanh", 1.0, None, -0.5, False),
)
ACTIVATIONS = (*SMOOTH, "relu", ("silu", 1.702, 0.7, 1.0, True), ("silu", 1.0, 0.7))
VALUES = ("normal", "normal", "spread", "ties")


class Problem(NamedTuple):
    """An op, its truth, their float arguments by name, and those without a gradient."""

    tensors: dict[str, Tensor]
    op: Callable[..., Any]
    truth: Callable[..., Any]
    frozen: tuple[str, ...] = ()
    plan: TokenPlan | None = None

    def with_garbage(self) -> Problem:
        """The same with NaN in all that nobody may read: rows and weights without a pair, tokens without an expert."""
        if self.plan is None:
            return self
        _, pair_to_row, offsets = self.plan
        live = pair_to_row < offsets[-1]
        unread = {
            "rows": torch.arange(self.plan.row_to_pair.shape[0]) >= offsets[-1],
            "topk_weights": ~live,
            "x": ~live.any(1),
        }
        for name in unread.keys() & self.tensors.keys():
            self.tensors[name][unread[name]] = float("nan")  # in place, which keeps the strides
        return self


def logits_like(
    sample: Sample, values: str, dtype: torch.dtype, width: int | None = None
) -> Tensor:
    """Router logits [T, E]: normal, far apart, or with many exact ties."""
    logits = sample.tensor(sample.T, width or sample.E, dtype=dtype)
    if values == "spread":
        return logits * 8
    return logits.mul(1.5).round() if values == "ties" else logits


def plans_of(sample: Sample) -> tuple:
    """A plan for the op, by the op, and the same by the reference."""
    ids = sample.ids()
    mine = moeops.sort_tokens(ids, sample.E, sample.num_rows)
    truth = reference.sort_tokens(ids, sample.E, sample.num_rows)
    return mine, truth


def route_draw(rng: Random, size: dict[str, Any]) -> dict[str, Any]:
    E = size["E"]
    groups = rng.choice([g for g in range(1, E + 1) if E % g == 0]) if rng.random() < 0.4 else 1
    top_groups = rng.randint(1, groups)
    # Groups are compared by scores, of which float32 rounds many large ones to 1.
    values = rng.choice(VALUES if groups == 1 else ("normal", "ties"))
    return {
        "K": rng.randint(1, min(8, E // groups * top_groups)),
        "score": rng.choice(("softmax", "sigmoid")),
        "renormalize": rng.random() < 0.5,
        "scale": rng.choice((1.0, 2.5)),
        "biased": rng.random() < 0.4,
        "num_groups": groups,
        "top_groups": top_groups,
        "values": values,
    }


def route_options(sample, biased, values, dtype, **options):
    bias = torch.randn(sample.E) if biased else None
    tensors = {"logits": logits_like(sample, values, dtype)}
    return tensors, {**options, "bias": bias}


def topk_route(sample, dtype, **options):
    tensors, options = route_options(sample, dtype=dtype, **options)
    return Problem(
        tensors,
        lambda logits: moeops.topk_route(logits, sample.K, **options),
        lambda logits: reference.topk_route(logits, sample.K, **options),
    )


def balance_draw(rng, size):
    options = route_draw(rng, size)
    options |= {
        "group_score": rng.choice(("top2", "sum")),
        "top_p": rng.choice((1.0, 1.0, 0.3, 0.8)),
        "min_score": rng.choice((0.0, 0.0, 0.15)),
        "temperature": rng.choice((None, None, 0.7, 2.0)),
        "counted": rng.choice((None, None, 1)),
        "sampled": rng.random() < 0.2,
    }
    if options["num_groups"] > 1 and options["group_score"] == "sum":
        options["values"] = "normal"  # equal members in another order add up to another rounded sum
    if options["sampled"]:
        # What is left over is drawn from softmax, of all experts.
        options |= {"num_groups": 1, "top_groups": 1, "score": "softmax", "biased": False}
    return options


def topk_route_balance(sample, dtype, temperature, counted, sampled, **options):
    tensors, options = route_options(sample, dtype=dtype, **options)
    if sampled:
        options["uniform"] = torch.rand(sample.T, dtype=accumulate_dtype(dtype))
    if temperature is not None:
        options["temperature"] = torch.tensor(temperature)
    options["num_counted"] = counted
    return Problem(
        tensors,
        lambda logits: moeops.topk_route_balance(logits, sample.K, **options),
        lambda logits: reference.topk_route_balance(logits, sample.K, **options),
    )


def chosen_draw(rng, size):
    return {
        "K": rng.randint(1, min(8, size["E"])),
        "score": rng.choice(("softmax", "sigmoid")),
        "renormalize": rng.random() < 0.5,
        "scale": rng.choice((1.0, 2.5)),
        "values": rng.choice(VALUES),
    }


def chosen_weights(sample, dtype, values, **options):
    ids = torch.rand(sample.T, sample.E).argsort(-1)[:, : sample.K]
    ids = torch.where(torch.rand(ids.shape) < sample.dropped, -1, ids)
    return Problem(
        {"logits": logits_like(sample, values, dtype)},
        lambda logits: moeops.chosen_weights(logits, ids, **options),
        lambda logits: reference.chosen_weights(logits, ids, **options),
    )


def prototypes_draw(rng, size):
    E = size["E"]
    return {
        "K": rng.choice([k for k in range(1, min(E, 16) + 1) if E % k == 0]),
        "values": rng.choice(VALUES),
    }


def prototype_route(sample, dtype, values):
    return Problem(
        {"logits": logits_like(sample, values, dtype)},
        lambda logits: moeops.prototype_route(logits, sample.K),
        lambda logits: reference.prototype_route(logits, sample.K),
    )


def values_draw(rng, size):
    return {"values": rng.choice(VALUES)}


def relu_route(sample, dtype, values):
    return Problem(
        {"logits": logits_like(sample, values, dtype)}, moeops.relu_route, reference.relu_route
    )


def noisy_draw(rng, size):
    return {"K": rng.randint(1, min(6, size["E"])), "min_noise": rng.choice((0.01, 0.5))}


def noisy_topk_route(sample, dtype, min_noise):
    tensors = {
        name: sample.tensor(sample.T, sample.E, dtype=dtype)
        for name in ("clean", "spread", "noise")
    }
    # Narrow noise makes the load a staircase, whose gradients no rounded type has.
    tensors["spread"] = tensors["spread"].abs()
    return Problem(
        tensors,
        lambda **t: moeops.noisy_topk_route(*t.values(), sample.K, min_noise=min_noise),
        lambda **t: reference.noisy_topk_route(*t.values(), sample.K, min_noise=min_noise),
        ("noise",),
    )


def alignment_draw(rng, size):
    E = size["E"]
    return {"per_group": rng.choice([g for g in range(1, E + 1) if E % g == 0])}


def alignment_sum(sample, dtype, per_group):
    K = min(sample.K, per_group)
    group = torch.randint(sample.E // per_group, (sample.T, 1))
    ids = torch.rand(sample.T, per_group).argsort(-1)[:, :K] + group * per_group
    ids = torch.where(torch.rand(ids.shape) < sample.dropped, -1, ids)
    return Problem(
        {"logits": sample.tensor(sample.T, sample.E, dtype=dtype)},
        lambda logits: moeops.alignment_sum(logits, ids, per_group),
        lambda logits: reference.alignment_sum(logits, ids, per_group),
    )


def score_draw(rng, size):
    return {"values": rng.choice(VALUES), "score": rng.choice(("softmax", "sigmoid"))}


def score_sums(sample, dtype, values, score):
    return Problem(
        {"logits": logits_like(sample, values, dtype)},
        lambda logits: moeops.score_sums(logits, score=score),
        lambda logits: reference.score_sums(logits, score=score),
    )


def sort_draw(rng, size):
    return {"beyond": rng.random() < 0.3, "ids": rng.choice(("int64", "int32"))}


def sort_tokens(sample, dtype, beyond, ids):
    chosen = sample.ids(dtype=dtype_of(ids))
    if beyond:
        chosen = torch.where(torch.rand(chosen.shape) < 0.2, sample.E + 3, chosen)
    options = {"drop_out_of_range": beyond}
    return Problem(
        {},
        lambda: moeops.sort_tokens(chosen, sample.E, sample.num_rows, **options),
        lambda: reference.sort_tokens(chosen, sample.E, sample.num_rows, **options),
    )


def count_tokens(sample, dtype):
    ids = sample.ids()
    return Problem(
        {},
        lambda: moeops.count_tokens(ids, sample.E),
        lambda: reference.count_tokens(ids, sample.E),
    )


def limit_draw(rng, size):
    order = rng.choice(("tokens", "choices", "priority"))
    return {"capacity": rng.choice((0, 1, 3, rng.randint(0, 40))), "order": order}


def limit_capacity(sample, dtype, capacity, order):
    ids = sample.ids()
    options = {"by_choice": order == "choices"}
    if order == "priority":
        options["priority"] = (sample.weights(dtype) * 8).round().to(dtype)  # ties
    return Problem(
        {},
        lambda: moeops.limit_capacity(ids, sample.E, capacity, **options),
        lambda: reference.limit_capacity(ids, sample.E, capacity, **options),
    )


def permute_tokens(sample, dtype):
    mine, truth = plans_of(sample)
    return Problem(
        {"x": sample.tensor(sample.T, sample.D, dtype=dtype)},
        lambda x: moeops.permute_tokens(x, mine),
        lambda x: reference.permute_tokens(x, truth),
        plan=truth,
    )


def unpermute_draw(rng, size):
    return {"weights": rng.choice((None, "same", "same", *DTYPES))}


def weights_of(sample, dtype, weights):
    """Routing weights, of the type that goes with the rows or of another one."""
    values = sample.weights(dtype)
    return values if weights == "same" else values.to(dtype_of(weights))


def unpermute_tokens(sample, dtype, weights):
    mine, truth = plans_of(sample)
    tensors = {"rows": sample.tensor(sample.R, sample.D, dtype=dtype)}
    if weights is not None:
        tensors["topk_weights"] = weights_of(sample, dtype, weights)
    return Problem(
        tensors,
        lambda rows, topk_weights=None: moeops.unpermute_tokens(rows, mine, topk_weights),
        lambda rows, topk_weights=None: reference.unpermute_tokens(rows, truth, topk_weights),
        plan=truth,
    )


def pad_draw(rng, size):
    return {"capacity": rng.choice((0, 1, 2, rng.randint(0, 30)))}


def pad_rows(sample, dtype, capacity):
    plan, _ = plans_of(sample)
    offsets = plan.expert_offsets
    return Problem(
        {"rows": sample.tensor(sample.R, sample.D, dtype=dtype)},
        lambda rows: moeops.pad_rows(rows, offsets, capacity),
        lambda rows: reference.pad_rows(rows, offsets, capacity),
        plan=plan,
    )


def unpad_rows(sample, dtype, capacity):
    offsets = plans_of(sample)[0].expert_offsets
    return Problem(
        {"padded": sample.tensor(sample.E, capacity, sample.D, dtype=dtype)},
        lambda padded: moeops.unpad_rows(padded, offsets, sample.R),
        lambda padded: reference.unpad_rows(padded, offsets, sample.R),
    )


def linear_draw(rng, size):
    return {"biased": rng.random() < 0.5, "rank": rng.choice((0, 0, 1, 3))}


def low_rank(sample, name, weight, rank, dtype):
    """Factors of an addition to ``weight [E, outputs, inputs]``, whose values stay near one."""
    _, outputs, inputs = weight.shape
    a = sample.tensor(sample.E, rank, inputs, dtype=dtype)
    b = sample.tensor(sample.E, outputs, rank, dtype=dtype)
    return {f"{name}_a": a * max(1, inputs) ** -0.5, f"{name}_b": b * rank**-0.5}


def grouped_linear(sample, dtype, biased, rank):
    plan, _ = plans_of(sample)
    offsets = plan.expert_offsets
    tensors = {
        "rows": sample.tensor(sample.R, sample.D, dtype=dtype),
        "weight": sample.tensor(sample.E, sample.H, sample.D, dtype=dtype),
    }
    if biased:
        tensors["bias"] = sample.tensor(sample.E, sample.H, dtype=dtype)
    if rank:
        tensors |= low_rank(sample, "lora", tensors["weight"], rank, dtype)

    def op(rows, weight, bias=None, lora_a=None, lora_b=None):
        lora = None if lora_a is None else LoraFactors(lora_a, lora_b, 0.5)
        return moeops.grouped_linear(rows, weight, offsets, bias=bias, lora=lora)

    def truth(rows, weight, bias=None, lora_a=None, lora_b=None):
        if lora_a is not None:
            weight = weight + 0.5 * lora_b @ lora_a
        return reference.grouped_linear(rows, weight, offsets, bias=bias)

    return Problem(tensors, op, truth, plan=plan)


def mlp_draw(rng, size):
    up, down = rng.choice((0, 0, 0, 1, 3)), rng.choice((0, 0, 0, 1, 3))
    # Rounding before the addition moves what is near zero or a limit, where gradients jump, to the other side.
    activations = SMOOTH if up else ACTIVATIONS
    every = ("x", "topk_weights", "w_up", "w_down")
    frozen = tuple(name for name in every if rng.random() < 0.25)
    return {
        "activation": rng.choice(activations),
        "biased": rng.random() < 0.5,
        "weights": rng.choice(("same", "same", *DTYPES)),
        "up_rank": up,
        "down_rank": down,
        "frozen": frozen if len(frozen) < len(every) else (),
    }


def moe_mlp(sample, dtype, activation, biased, weights, up_rank, down_rank, frozen):
    mine, plan = plans_of(sample)
    if isinstance(activation, tuple):
        activation = unit_for(Glu(*activation), dtype)
    tensors = mlp_tensors(sample, dtype, "cpu", activation, biased)
    tensors["topk_weights"] = weights_of(sample, dtype, weights)
    for name, rank in (("up", up_rank), ("down", down_rank)):
        if rank:
            tensors |= low_rank(sample, name, tensors[f"w_{name}"], rank, dtype)

    def op(x, topk_weights, up_a=None, up_b=None, down_a=None, down_b=None, **weights):
        return moeops.moe_mlp(
            x,
            mine,
            topk_weights,
            activation=activation,
            lora_up=None if up_a is None else LoraFactors(up_a, up_b, 0.5),
            lora_down=None if down_a is None else LoraFactors(down_a, down_b, 0.5),
            **weights,
        )

    def truth(x, topk_weights, up_a=None, up_b=None, down_a=None, down_b=None, **weights):
        if up_a is not None:
            weights["w_up"] = weights["w_up"] + 0.5 * up_b @ up_a
        if down_a is not None:
            weights["w_down"] = weights["w_down"] + 0.5 * down_b @ down_a
        return reference.moe_mlp(x, plan, topk_weights, activation=activation, **weights)

    return Problem(tensors, op, truth, tuple(frozen), plan)


def nothing(rng, size):
    return {}


# Name: what draws the options that only this op has, what makes the problem, and whether ids are plans, in which a
# token may have more slots than there are experts.
OPS: dict[str, tuple[Callable, Callable, bool]] = {
    "topk_route": (route_draw, topk_route, False),
    "topk_route_balance": (balance_draw, topk_route_balance, False),
    "chosen_weights": (chosen_draw, chosen_weights, False),
    "prototype_route": (prototypes_draw, prototype_route, False),
    "relu_route": (values_draw, relu_route, False),
    "noisy_topk_route": (noisy_draw, noisy_topk_route, False),
    "alignment_sum": (alignment_draw, alignment_sum, False),
    "score_sums": (score_draw, score_sums, False),
    "sort_tokens": (sort_draw, sort_tokens, True),
    "count_tokens": (nothing, count_tokens, True),
    "limit_capacity": (limit_draw, limit_capacity, True),
    "permute_tokens": (nothing, permute_tokens, True),
    "unpermute_tokens": (unpermute_draw, unpermute_tokens, True),
    "pad_rows": (pad_draw, pad_rows, True),
    "unpad_rows": (pad_draw, unpad_rows, True),
    "grouped_linear": (linear_draw, grouped_linear, True),
    "moe_mlp": (mlp_draw, moe_mlp, True),
}
# The expert block and its parts have most of the ways to go wrong.
SHARES = {"moe_mlp": 4, "grouped_linear": 3, "topk_route_balance": 3, "topk_route": 2}


def draw(rng: Random) -> dict[str, Any]:
    op = rng.choices(list(OPS), [SHARES.get(name, 1) for name in OPS])[0]
    own, _, plans = OPS[op]
    E = rng.choices((1, 2, rng.randint(3, 12), rng.randint(13, 70)), (1, 2, 8, 2))[0]
    size: dict[str, Any] = {"T": draw_tokens(rng), "E": E}
    if op in ("noisy_topk_route", "alignment_sum"):  # the truth walks over single numbers
        size |= {"T": min(size["T"], 12), "E": min(E, 12)}
    size |= {"K": rng.randint(1, min(6, size["E"])), "D": rng.choice((0, 1, 2, 7, 8, 16, 33, 70))}
    size |= {"H": rng.choice((0, 1, 3, 5, 8, 17)), "dropped": rng.choice((0.0, 0.0, 0.3, 0.9, 1.0))}
    if plans:
        if rng.random() < 0.2:
            size["only_experts"] = tuple(sorted(rng.sample(range(E), rng.randint(1, min(3, E)))))
        if rng.random() < 0.03:
            size["K"] = 0
        size["rows_per_pair"] = rng.choice((None, None, 0.0, 0.5, 0.75, 1.0, 1.5))
    options = {
        "op": op,
        "dtype": draw_dtype(rng),
        "strided": rng.random() < 0.3,
        "through_func": rng.choices((None, "vjp", "jvp", "vmap"), (84, 8, 4, 4))[0],
        "threads": rng.choice((1, 1, 1, 3)),
        "garbage": rng.random() < 0.3,
        "fill_empty": rng.random() < 0.3,
    }
    return options | size | own(rng, size)


SIZES = ("T", "K", "E", "D", "H", "only_experts", "dropped", "strided", "rows_per_pair")


def check(
    seed: int,
    *,
    op: str,
    dtype: str = "float64",
    through_func: str | None = None,
    fill_empty: bool = False,
    threads: int = 1,
    garbage: bool = False,
    backend: str | None = None,
    **options: Any,
) -> None:
    """One op on one problem; with ``fill_empty`` torch fills empty tensors with NaN, and what is not written shows."""
    sizes = {name: options.pop(name) for name in SIZES if name in options}

    def once(seed: int) -> None:
        seed_everything(seed, op)
        problem = OPS[op][1](Sample("case", **sizes), dtype_of(dtype), **options)
        if garbage:
            problem = problem.with_garbage()
        compare(
            problem.op,
            problem.truth,
            problem.tensors,
            dtype_of(dtype),
            frozen=problem.frozen,
            through_func=through_func if problem.tensors else None,
            backend=backend,
        )

    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(fill_empty)
    torch.set_num_threads(threads)
    try:
        unless_tied(once, seed, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
