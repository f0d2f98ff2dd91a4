"""Shapes, routings and op arguments that every family is tested with.

T tokens, K experts per token, N = T * K pairs, R rows, E experts, D model width, H hidden width, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeops import Glu, TokenPlan, reference
from moeops.ops.activations import op_options, up_width
from tolerances import assert_close


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Sample:
    """One problem: sizes, how tokens choose their experts, and whether inputs are contiguous."""

    name: str
    T: int = 13
    K: int = 2
    E: int = 4
    D: int = 8
    H: int = 6
    only_experts: tuple[int, ...] | None = None  # the others stay empty
    dropped: float = 0.0  # share of pairs with id -1
    strided: bool = False
    rows_per_pair: float | None = None  # R / N of plans that ask for a number of rows

    def __str__(self) -> str:
        return self.name

    @property
    def N(self) -> int:
        return self.T * self.K

    @property
    def num_rows(self) -> int | None:
        """What ``sort_tokens`` is asked for."""
        return None if self.rows_per_pair is None else int(self.rows_per_pair * self.N)

    @property
    def R(self) -> int:
        return self.N if self.num_rows is None else self.num_rows

    def tensor(self, *shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Random values; for a strided sample neither the first nor the last dimension is dense."""
        if not self.strided:
            return torch.randn(shape).to(device, dtype)
        wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1).transpose(0, -1).contiguous()
        return wide.to(device, dtype).transpose(0, -1)[..., : 2 * shape[-1] : 2]

    def weights(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """Routing weights [T, K] in the type that goes with rows of ``dtype``."""
        values = torch.rand(self.T, self.K) + 0.1
        if self.strided:
            values = values.t().contiguous().t()
        return values.to(device, accumulate_dtype(dtype))

    def ids(self, device: str = "cpu", dtype: torch.dtype = torch.int64) -> Tensor:
        """Chosen experts [T, K], different for the choices of one token where there are enough experts."""
        pool = torch.tensor(self.only_experts or range(self.E))
        scores = torch.rand(self.T, max(len(pool), self.K))
        ids = pool[scores.argsort(-1)[:, : self.K] % len(pool)]
        ids = torch.where(torch.rand(self.T, self.K) < self.dropped, -1, ids)
        if self.num_rows is not None:  # what is kept fits, and a row is left over
            nth = (ids >= 0).view(-1).cumsum(0).view(ids.shape)
            ids = torch.where(nth < self.R, ids, -1)
        if self.strided:
            ids = ids.t().contiguous().t()
        return ids.to(device, dtype)

    def plan(self, device: str = "cpu") -> TokenPlan:
        plan = reference.sort_tokens(self.ids(), self.E, self.num_rows)
        return TokenPlan(*(t.to(device) for t in plan))


SAMPLES = (
    Sample("plain"),
    Sample("no_tokens", T=0),
    Sample("one_token", T=1),
    Sample("empty_experts", E=7, only_experts=(1, 4)),
    Sample("all_to_one", T=17, K=1, only_experts=(2,)),
    Sample("top_1", K=1),
    Sample("top_all", K=4),
    Sample("one_expert", K=1, E=1),
    Sample("many_experts", T=40, K=4, E=512),
    Sample("dropped", dropped=0.4),
    Sample("all_dropped", T=5, dropped=1.0),
    Sample("odd", T=11, K=3, E=5, D=7, H=5),
    Sample("one_column", D=1, H=1),
    Sample("strided", D=7, strided=True),
    Sample("few_rows", K=6, E=6, D=7, H=5, dropped=0.6, rows_per_pair=0.5),
    Sample("more_rows", dropped=0.3, rows_per_pair=1.5),
    Sample("no_rows", T=5, dropped=1.0, rows_per_pair=0.0),
    # Most slots are empty, and a warp looks at them in three steps; rows of whole vectors.
    Sample("expert_choice", T=41, K=70, E=70, D=136, H=24, dropped=0.95, rows_per_pair=0.06),
    # Wide and long enough for several threads, column blocks and thread blocks.
    Sample("wide", T=97, K=2, E=3, D=515, H=259),
    Sample("long", T=20011, K=2, E=5, D=3, H=2, dropped=0.1),
)
# Gated units with options: gpt-oss's, DeepSeek-V4's, Megatron's with everything, and what else there is.
UNITS = (
    Glu(alpha=1.702, limit=0.7, offset=1.0, interleaved=True),
    Glu(limit=0.7),
    Glu(alpha=1.702, offset=1.0),
    Glu("gelu_tanh", limit=0.7, offset=-0.5, interleaved=True),
    Glu(interleaved=True),
)
# Halfway between two numbers of the type, so that no rounding carries a value across: a clamp's gradient jumps there.
LIMITS = {torch.bfloat16: 359 / 512, torch.float16: 2871 / 4096}


def unit_for(activation: str | Glu, dtype: torch.dtype) -> str | Glu:
    """An activation as it suits values that are rounded to ``dtype``."""
    if not isinstance(activation, Glu) or activation.limit is None:
        return activation
    return activation._replace(limit=LIMITS.get(dtype, activation.limit))


def unit_id(activation: str | Glu) -> str:
    """The name of an activation among a test's parameters."""
    if isinstance(activation, str):
        return activation
    options = ("alpha" if activation.alpha != 1 else "", "limit" if activation.limit else "")
    options += ("offset" if activation.offset else "", "turns" if activation.interleaved else "")
    return "_".join((activation.gate, *filter(None, options)))


SMALL = tuple(
    s for s in SAMPLES if s.name in ("plain", "dropped", "empty_experts", "strided", "few_rows")
)


def assert_matches_reference(
    op: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Value of ``op(**tensors)`` and its gradient for every tensor against ``truth`` in float64 on the CPU.

    ``dtype`` is the type the op computes in. Returns the op's value.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    exact = {
        name: t.detach().to("cpu", torch.float64).requires_grad_() for name, t in tensors.items()
    }
    actual, expected = op(**leaves), truth(**exact)
    assert actual.device == next(iter(tensors.values())).device
    assert_close(actual, expected, dtype)
    grad = torch.randn(expected.shape).to(actual.device, actual.dtype)
    actual_grads = torch.autograd.grad(actual, tuple(leaves.values()), grad)
    expected_grads = torch.autograd.grad(
        expected, tuple(exact.values()), grad.to("cpu", torch.float64)
    )
    for name, got, want in zip(tensors, actual_grads, expected_grads, strict=True):
        assert got.dtype == tensors[name].dtype
        assert_close(got, want, dtype, f"gradient of {name}")
    return actual


@dataclass(frozen=True)
class OpCase:
    """All arguments of one bare op call, in the order of the schema: ``op(*positional, **keywords)``.

    ``token_dims`` names, by argument position, the dimension that grows with the number of tokens; ``token_ints`` are
    the positions of integers that do. ``differentiable`` are the positions that get a gradient.
    """

    op: str
    args: tuple
    token_dims: dict[int, int]
    differentiable: tuple[int, ...] = ()
    token_ints: tuple[int, ...] = ()

    @property
    def overload(self):
        return getattr(torch.ops.moeops, self.op).default

    @property
    def positional(self) -> tuple:
        """The arguments before the star of the schema."""
        named = zip(self.overload._schema.arguments, self.args, strict=False)
        return tuple(value for argument, value in named if not argument.kwarg_only)

    @property
    def keywords(self) -> dict[str, object]:
        """The arguments after the star, by name."""
        named = zip(self.overload._schema.arguments, self.args, strict=False)
        return {argument.name: value for argument, value in named if argument.kwarg_only}

    def run(self) -> object:
        """What the op returns."""
        return self.overload(*self.positional, **self.keywords)

    def with_grad(self) -> OpCase:
        """The same arguments as leaves that ask for gradients."""
        args = tuple(
            a.detach().requires_grad_(i in self.differentiable) if isinstance(a, Tensor) else a
            for i, a in enumerate(self.args)
        )
        return replace(self, args=args)

    def _places(self) -> list[int]:
        return [i for i, a in enumerate(self.args) if isinstance(a, Tensor) or i in self.token_ints]

    def inputs(self) -> list[Tensor]:
        """The tensor arguments; an integer that follows the token count comes as the length of a tensor."""
        values = [self.args[i] for i in self._places()]
        return [v if isinstance(v, Tensor) else torch.zeros(v) for v in values]

    def input_token_dims(self) -> list[int | None]:
        """For each of ``inputs``, the dimension that grows with the number of tokens."""
        return [0 if i in self.token_ints else self.token_dims.get(i) for i in self._places()]

    def as_function(self) -> Callable[..., object]:
        """A function of ``inputs``, with everything else written into it as a constant."""
        places = self._places()
        names = [f"input_{i}" for i in range(len(places))]
        args = [repr(a) for a in self.args]
        for place, name in zip(places, names, strict=True):
            args[place] = f"{name}.shape[0]" if place in self.token_ints else name
        for place, argument in enumerate(self.overload._schema.arguments[: len(args)]):
            if argument.kwarg_only:
                args[place] = f"{argument.name}={args[place]}"
        source = f"lambda {', '.join(names)}: op({', '.join(args)})"
        return eval(source, {"op": self.overload})


def _topk_route(p, dtype, device, groups):
    bias = torch.randn(p.E).to(device) if groups else None
    num_groups, top_groups = 1, 1
    if groups:
        num_groups, top_groups = (2, 1) if p.E % 2 == 0 and p.K <= p.E // 2 else (p.E, p.K)
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    args = (
        logits,
        p.K,
        bias,
        "sigmoid" if groups else "softmax",
        True,
        1.5,
        num_groups,
        top_groups,
    )
    return OpCase("topk_route", args, {0: 0}, (0,))


def _topk_route_backward(p, dtype, device):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    ids = torch.rand(p.T, p.E).argsort(-1)[:, : p.K].to(device)
    args = (p.weights(dtype, device), logits, ids, "softmax", True, 1.5)
    return OpCase("topk_route_backward", args, {0: 0, 1: 0, 2: 0})


def _chosen_weights(p, dtype, device):
    args = (p.tensor(p.T, p.E, dtype=dtype, device=device), p.ids(device), "softmax", True, 1.5)
    return OpCase("chosen_weights", args, {0: 0, 1: 0}, (0,))


def _topk_route_balance(p, dtype, device, kind):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    plain = {"num_groups": 1, "top_groups": 1, "worth": "top2", "top_p": 1.0, "counted": None}
    bias, uniform, score = None, None, "softmax"
    if kind == "sampled":
        uniform = torch.rand(p.T).to(device, accumulate_dtype(dtype))
        plain |= {"top_p": 0.6, "counted": 1}
    if kind == "groups":
        by_halves = p.E % 2 == 0 and p.K <= p.E // 2
        bias, score = torch.randn(p.E).to(device), "sigmoid"
        plain |= {"num_groups": 2 if by_halves else p.E, "top_groups": 1 if by_halves else p.K}
        plain |= {"worth": "sum" if by_halves else "top2"}
    num_groups, top_groups, worth, top_p, counted = plain.values()
    temperature = torch.tensor(0.7, device=device) if kind == "sampled" else None
    args = (logits, p.K, bias, uniform, temperature, score, kind != "sampled", 1.5)
    args += (num_groups, top_groups, worth, top_p, 0.01, counted)
    token_dims = {0: 0, 3: 0} if kind == "sampled" else {0: 0}
    return OpCase("topk_route_balance", args, token_dims, (0,))


def _topk_route_balance_backward(p, dtype, device, all_grads):
    acc = accumulate_dtype(dtype)
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    ids = torch.rand(p.T, p.E).argsort(-1)[:, : p.K].to(device)
    counts = reference.count_tokens(ids, p.E)
    grads = (None, None, torch.randn((), dtype=acc, device=device))
    if all_grads:
        grads = (p.weights(dtype, device), torch.randn(p.E).to(device, acc), grads[2])
    score = "softmax" if all_grads else "sigmoid"
    temperature = None if all_grads else torch.tensor(0.7, device=device)
    args = (*grads, logits, temperature, ids, counts, score, True, 1.5)
    token_dims = {0: 0, 3: 0, 5: 0} if all_grads else {3: 0, 5: 0}
    return OpCase("topk_route_balance_backward", args, token_dims)


def _prototypes(p):
    return p.K if p.E % p.K == 0 else p.E


def _prototype_route(p, dtype, device):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    return OpCase("prototype_route", (logits, _prototypes(p)), {0: 0}, (0,))


def _prototype_route_backward(p, dtype, device):
    acc, K = accumulate_dtype(dtype), _prototypes(p)
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    ids = torch.randint(p.E // K, (p.T, K)) + torch.arange(K) * (p.E // K)
    counts = reference.count_tokens(ids, p.E).to(device)
    grads = (torch.randn(p.T, K).to(device, acc), None, torch.randn((), dtype=acc, device=device))
    args = (*grads, logits, ids.to(device), counts)
    return OpCase("prototype_route_backward", args, {0: 0, 3: 0, 4: 0})


def _relu_route(p, dtype, device):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    return OpCase("relu_route", (logits,), {0: 0}, (0,))


def _relu_route_backward(p, dtype, device):
    acc = accumulate_dtype(dtype)
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    grads = (p.tensor(p.T, p.E, dtype=acc, device=device), torch.randn(p.E).to(device, acc), None)
    args = (*grads, logits, (logits > 0).sum(0, dtype=torch.int32))
    return OpCase("relu_route_backward", args, {0: 0, 3: 0})


def _noisy_topk_route(p, dtype, device):
    args = tuple(p.tensor(p.T, p.E, dtype=dtype, device=device) for _ in range(3))
    return OpCase("noisy_topk_route", (*args, p.K, 0.01), {0: 0, 1: 0, 2: 0}, (0, 1))


def _noisy_topk_route_backward(p, dtype, device, all_grads):
    acc = accumulate_dtype(dtype)
    tensors = [p.tensor(p.T, p.E, dtype=dtype, device=device) for _ in range(3)]
    order = torch.rand(p.T, p.E).argsort(-1)
    runner_up = order[:, p.K] if p.K < p.E else torch.full((p.T,), -1)
    sums = [(torch.rand(p.E) + 0.5).to(device, acc) for _ in range(2)]
    grads = (None, None, None, torch.randn((), dtype=acc, device=device))
    if all_grads:
        vectors = [torch.randn(p.E).to(device, acc) for _ in range(2)]
        grads = (p.weights(dtype, device), *vectors, grads[3])
    ids = order[:, : p.K].to(device)
    args = (*grads, *tensors, ids, runner_up.to(device), *sums, 0.01)
    token_dims = {4: 0, 5: 0, 6: 0, 7: 0, 8: 0} | ({0: 0} if all_grads else {})
    return OpCase("noisy_topk_route_backward", args, token_dims)


def _alignment(p, dtype, device, backward):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    args = (logits, p.ids(device), max(1, p.E // 2))
    if not backward:
        return OpCase("alignment_sum", args, {0: 0, 1: 0}, (0,))
    grad = torch.randn((), dtype=accumulate_dtype(dtype), device=device)
    return OpCase("alignment_sum_backward", (grad, *args), {1: 0, 2: 0})


def _score_sums(p, dtype, device, score):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    return OpCase("score_sums", (logits, score), {0: 0}, (0,))


def _score_sums_backward(p, dtype, device, score):
    logits = p.tensor(p.T, p.E, dtype=dtype, device=device)
    grad_sums = torch.randn(p.E).to(device, accumulate_dtype(dtype))
    return OpCase("score_sums_backward", (grad_sums, logits, score), {1: 0})


def _sort_tokens(p, dtype, device, with_rows):
    if not with_rows:
        return OpCase("sort_tokens", (p.ids(device), p.E, None, False), {0: 0})
    if p.num_rows is None:
        p = replace(p, rows_per_pair=0.75)
    return OpCase("sort_tokens", (p.ids(device), p.E, p.R, False), {0: 0}, token_ints=(2,))


def _count_tokens(p, dtype, device):
    return OpCase("count_tokens", (p.ids(device), p.E), {0: 0})


def _limit_capacity(p, dtype, device, by_priority, by_choice=False):
    priority = p.weights(dtype, device) if by_priority else None
    token_dims = {0: 0, 3: 0} if by_priority else {0: 0}
    return OpCase("limit_capacity", (p.ids(device), p.E, 3, priority, by_choice), token_dims)


def _permute_tokens(p, dtype, device):
    args = (p.tensor(p.T, p.D, dtype=dtype, device=device), *p.plan(device))
    return OpCase("permute_tokens", args, {0: 0, 1: 0, 2: 0}, (0,))


def _unpermute_tokens(p, dtype, device, weighted):
    rows = p.tensor(p.R, p.D, dtype=dtype, device=device)
    weights = p.weights(dtype, device) if weighted else None
    token_dims = {0: 0, 1: 0, 2: 0} | ({4: 0} if weighted else {})
    differentiable = (0, 4) if weighted else (0,)
    return OpCase("unpermute_tokens", (rows, *p.plan(device), weights), token_dims, differentiable)


def _unpermute_tokens_backward(p, dtype, device):
    grad_y = p.tensor(p.T, p.D, dtype=dtype, device=device)
    rows = p.tensor(p.R, p.D, dtype=dtype, device=device)
    args = (grad_y, rows, *p.plan(device), p.weights(dtype, device))
    return OpCase("unpermute_tokens_backward", args, {0: 0, 1: 0, 2: 0, 3: 0, 5: 0})


def _pad_rows(p, dtype, device):
    rows = p.tensor(p.R, p.D, dtype=dtype, device=device)
    return OpCase("pad_rows", (rows, p.plan(device).expert_offsets, 5), {0: 0}, (0,))


def _unpad_rows(p, dtype, device):
    padded = p.tensor(p.E, 5, p.D, dtype=dtype, device=device)
    return OpCase("unpad_rows", (padded, p.plan(device).expert_offsets, p.R), {}, (0,), (2,))


def _grouped_linear(p, dtype, device, with_bias):
    rows = p.tensor(p.R, p.D, dtype=dtype, device=device)
    weight = p.tensor(p.E, p.H, p.D, dtype=dtype, device=device)
    bias = p.tensor(p.E, p.H, dtype=dtype, device=device) if with_bias else None
    args = (rows, weight, p.plan(device).expert_offsets, bias)
    return OpCase("grouped_linear", args, {0: 0}, (0, 1, 3) if with_bias else (0, 1))


def _grouped_linear_weight_grad(p, dtype, device):
    grad = p.tensor(p.R, p.H, dtype=dtype, device=device)
    rows = p.tensor(p.R, p.D, dtype=dtype, device=device)
    args = (grad, rows, p.plan(device).expert_offsets)
    return OpCase("grouped_linear_weight_grad", args, {0: 0, 1: 0}, (0, 1))


def _grouped_sum(p, dtype, device):
    rows = p.tensor(p.R, p.D, dtype=dtype, device=device)
    return OpCase("grouped_sum", (rows, p.plan(device).expert_offsets), {0: 0}, (0,))


def mlp_tensors(
    p: Sample, dtype: torch.dtype, device: str, activation: str, with_bias: bool
) -> dict[str, Tensor]:
    """x, topk_weights, weights and, if asked for, biases of a moe_mlp whose values stay near one."""
    up = up_width(p.H, activation)
    shapes = {"x": (p.T, p.D), "w_up": (p.E, up, p.D), "w_down": (p.E, p.D, p.H)}
    if with_bias:
        shapes |= {"b_up": (p.E, up), "b_down": (p.E, p.D)}
    tensors = {n: p.tensor(*s, dtype=dtype, device=device) for n, s in shapes.items()}
    tensors["w_up"] = tensors["w_up"] * max(1, p.D) ** -0.5
    tensors["w_down"] = tensors["w_down"] * max(1, p.H) ** -0.5
    return tensors | {"topk_weights": p.weights(dtype, device)}


def _moe_mlp(p, dtype, device, activation, with_bias):
    t = mlp_tensors(p, dtype, device, activation, with_bias)
    block = (t["topk_weights"], t["w_up"], t["w_down"], t.get("b_up"), t.get("b_down"))
    args = (t["x"], *p.plan(device), *block, *op_options(activation).values())
    differentiable = (0, *(i for i, a in enumerate(block, start=4) if a is not None))
    return OpCase("moe_mlp", args, {0: 0, 1: 0, 2: 0, 4: 0}, differentiable)


def _moe_mlp_backward_data(p, dtype, device, activation, with_bias, needs):
    options = tuple(op_options(activation).values())
    block = _moe_mlp(p, dtype, device, activation, with_bias).args[: -len(options)]
    grad_y = p.tensor(p.T, p.D, dtype=dtype, device=device)
    pre = p.tensor(p.R, up_width(p.H, activation), dtype=dtype, device=device)
    args = (grad_y, *block, pre, *options, *needs)
    return OpCase("moe_mlp_backward_data", args, {0: 0, 1: 0, 2: 0, 3: 0, 5: 0, 10: 0})


def _moe_mlp_backward_weights(p, dtype, device, needs):
    grad_y, x = (p.tensor(p.T, p.D, dtype=dtype, device=device) for _ in range(2))
    grad_pre = p.tensor(p.R, 2 * p.H, dtype=dtype, device=device)
    hidden = p.tensor(p.R, p.H, dtype=dtype, device=device)
    args = (grad_y, x, *p.plan(device), p.weights(dtype, device), grad_pre, hidden, *needs)
    return OpCase("moe_mlp_backward_weights", args, {0: 0, 1: 0, 2: 0, 3: 0, 5: 0, 6: 0, 7: 0})


OP_CASES: dict[str, list[Callable[[Sample, torch.dtype, str], OpCase]]] = {
    "topk_route": [
        lambda *a: _topk_route(*a, groups=False),
        lambda *a: _topk_route(*a, groups=True),
    ],
    "topk_route_backward": [_topk_route_backward],
    "topk_route_balance": [
        lambda *a: _topk_route_balance(*a, kind="plain"),
        lambda *a: _topk_route_balance(*a, kind="sampled"),
        lambda *a: _topk_route_balance(*a, kind="groups"),
    ],
    "topk_route_balance_backward": [
        lambda *a: _topk_route_balance_backward(*a, all_grads=True),
        lambda *a: _topk_route_balance_backward(*a, all_grads=False),
    ],
    "prototype_route": [_prototype_route],
    "prototype_route_backward": [_prototype_route_backward],
    "relu_route": [_relu_route],
    "relu_route_backward": [_relu_route_backward],
    "noisy_topk_route": [_noisy_topk_route],
    "noisy_topk_route_backward": [
        lambda *a: _noisy_topk_route_backward(*a, all_grads=True),
        lambda *a: _noisy_topk_route_backward(*a, all_grads=False),
    ],
    "chosen_weights": [_chosen_weights],
    "alignment_sum": [lambda *a: _alignment(*a, backward=False)],
    "alignment_sum_backward": [lambda *a: _alignment(*a, backward=True)],
    "score_sums": [
        lambda *a: _score_sums(*a, score="softmax"),
        lambda *a: _score_sums(*a, score="sigmoid"),
    ],
    "score_sums_backward": [
        lambda *a: _score_sums_backward(*a, score="softmax"),
        lambda *a: _score_sums_backward(*a, score="sigmoid"),
    ],
    "sort_tokens": [
        lambda *a: _sort_tokens(*a, with_rows=False),
        lambda *a: _sort_tokens(*a, with_rows=True),
    ],
    "count_tokens": [_count_tokens],
    "limit_capacity": [
        lambda *a: _limit_capacity(*a, by_priority=False),
        lambda *a: _limit_capacity(*a, by_priority=True),
        lambda *a: _limit_capacity(*a, by_priority=False, by_choice=True),
    ],
    "permute_tokens": [_permute_tokens],
    "unpermute_tokens": [
        lambda *a: _unpermute_tokens(*a, weighted=True),
        lambda *a: _unpermute_tokens(*a, weighted=False),
    ],
    "unpermute_tokens_backward": [_unpermute_tokens_backward],
    "pad_rows": [_pad_rows],
    "unpad_rows": [_unpad_rows],
    "grouped_linear": [
        lambda *a: _grouped_linear(*a, with_bias=True),
        lambda *a: _grouped_linear(*a, with_bias=False),
    ],
    "grouped_linear_weight_grad": [_grouped_linear_weight_grad],
    "grouped_sum": [_grouped_sum],
    "moe_mlp": [
        lambda *a: _moe_mlp(*a, activation="swiglu", with_bias=False),
        lambda *a: _moe_mlp(*a, activation="gelu", with_bias=True),
        lambda *a: _moe_mlp(*a, activation=UNITS[0], with_bias=True),
    ],
    "moe_mlp_backward_data": [
        lambda *a: _moe_mlp_backward_data(*a, "swiglu", True, (True, True, True, True)),
        lambda *a: _moe_mlp_backward_data(*a, "gelu", False, (False, True, False, True)),
        lambda *a: _moe_mlp_backward_data(*a, "relu", True, (True, False, False, False)),
        lambda *a: _moe_mlp_backward_data(*a, UNITS[0], True, (True, True, True, False)),
    ],
    "moe_mlp_backward_weights": [
        lambda *a: _moe_mlp_backward_weights(*a, (True, True, True, True)),
        lambda *a: _moe_mlp_backward_weights(*a, (False, True, True, False)),
        lambda *a: _moe_mlp_backward_weights(*a, (True, False, False, True)),
        lambda *a: _moe_mlp_backward_weights(*a, (True, True, True, True, True, True)),
        lambda *a: _moe_mlp_backward_weights(*a, (False, True, True, False, True, False)),
    ],
}


def op_cases(
    op: str, sample: Sample, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[OpCase]:
    """Every kind of call of ``op`` on one sample."""
    return [build(sample, dtype, device) for build in OP_CASES[op]]
