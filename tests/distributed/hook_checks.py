"""Checks of FSMoE's hooks on rows between ranks, run by every rank of a group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hierarchy_checks import staged
from parallel_cases import D, all_to_one, assert_equals_whole, batch, make_pair, uneven
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from moeops import FMoETransformerMLP
from moeops.dispatch.hooks import STAGES
from moeops.distributed import ShadowPolicy
from processes import Ranks

ROW_STAGES = STAGES[1:-1]
CASES = (
    ("mlp", {"dispatch": "exact"}),
    ("composed", {"dispatch": "exact", "n_chunks": 3}),
    ("modules", {"dispatch": "exact", "n_chunks": 2}),
    ("mlp", {"dispatch": "static", "capacity": 12}),
    ("modules", {"dispatch": "static", "capacity": 12, "n_chunks": 5}),
    ("mlp", {"dispatch": "gather", "rows": 4.0}),
    ("modules", {"dispatch": "gather", "rows": 4.0, "max_tokens": 11}),
)


class RowHooks(nn.Module):
    """A hook of each name, with a parameter each, and the names of those that were called.

    Those on answers are linear: what a dispatcher sends back may be a sum over experts already.
    """

    def __init__(self, device):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        values = torch.rand(4, dtype=torch.float64, generator=generator) + 0.5
        self.factors = nn.Parameter(values.to(device))
        self.called = []

    def note(self, name):
        if not torch.compiler.is_compiling():
            self.called.append(name)

    def before_dispatch(self, rows):
        self.note("before_dispatch")
        return {"signs": rows < 0, "sizes": (rows * self.factors[0]).abs()}

    def after_dispatch(self, parts):
        self.note("after_dispatch")
        rows = torch.where(parts["signs"], -parts["sizes"], parts["sizes"])
        return torch.sin(rows) * self.factors[1]

    def before_combine(self, rows):
        self.note("before_combine")
        return rows * self.factors[2], rows

    def after_combine(self, parts):
        self.note("after_combine")
        return parts[0] * self.factors[3] - parts[1]

    def all(self):
        return {name: getattr(self, name) for name in ROW_STAGES}


def check_equals_one_rank(ranks: Ranks) -> None:
    cases = list(CASES)
    if ranks.size > 2:
        hierarchies = staged(ranks)
        cases = [("mlp", {"dispatch": "exact", "hierarchy": each}) for each in hierarchies]
        cases += [
            ("modules", {"dispatch": "exact", "hierarchy": hierarchies[0], "n_chunks": 2}),
            ("mlp", {"dispatch": "static", "capacity": 12, "hierarchy": hierarchies[0]}),
        ]
    for kind, options in cases:
        part, whole = make_pair(kind, ranks, **options)
        equals_whole(part, part, whole, kind, ranks, options)


def equals_whole(run, part, whole, kind, ranks, options) -> None:
    hooks, whole_hooks = RowHooks(ranks.device), RowHooks(ranks.device)
    part.set_stage_hooks(**hooks.all())
    whole.set_stage_hooks(**whole_hooks.all())
    equal = options["dispatch"] == "gather" and "max_tokens" not in options
    counts = [5] * ranks.size if equal else [2 + 3 * rank for rank in range(ranks.size)]
    for routing in (uneven, all_to_one):
        assert_equals_whole(run, part, whole, kind, ranks, counts, routing)
    if run is part:
        assert tuple(dict.fromkeys(hooks.called)) == ROW_STAGES
    total = hooks.factors.grad.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, whole_hooks.factors.grad)


def check_compiled_equals_one_rank(ranks: Ranks) -> None:
    for kind, options in (CASES[0], CASES[3], CASES[5]) if ranks.size == 2 else ():
        torch._dynamo.reset()
        part, whole = make_pair(kind, ranks, **options)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(part, fullgraph=True, backend=counter)

        def run(x, compiled=compiled):
            torch._dynamo.decorators.mark_unbacked(x, 0)
            return compiled(x)

        equals_whole(run, part, whole, kind, ranks, options)
        assert counter.frame_count == 1


def check_rows_travel_in_the_type_that_a_hook_made(ranks: Ranks) -> None:
    """Half of the bytes on the wires, there and back and in the backward; the numbers are rounded and no more."""
    for kind, options in CASES:
        options = {**options, "dtype": torch.float32}
        part, plain = (make_pair(kind, ranks, **options)[0] for _ in range(2))
        seen = []
        part.set_stage_hooks(
            before_dispatch=torch.Tensor.bfloat16,
            after_dispatch=lambda rows, seen=seen: (seen.append(rows.dtype), rows.float())[1],
            before_combine=torch.Tensor.bfloat16,
            after_combine=lambda rows, seen=seen: (seen.append(rows.dtype), rows.float())[1],
        )
        x = batch(5, ranks.device, torch.float32)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        y, expected = part(inputs[0]), plain(inputs[1])
        assert set(seen) == {torch.bfloat16}
        assert y.dtype == torch.float32
        assert not torch.equal(y, expected)
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        for out in (y, expected):
            out.sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0.05, atol=0.05)
        assert inputs[0].grad.shape == (5, D)


def check_dispatchers_that_bring_experts_refuse_hooks_on_rows(ranks: Ranks) -> None:
    for options in ({"replicas": {0: ranks.size - 1}}, {"shadowing": ShadowPolicy(0.0, 1.0, 0.0)}):
        part, _ = make_pair("mlp", ranks, **options)
        with pytest.raises(NotImplementedError, match="Dispatcher: after_dispatch must be None"):
            part.set_stage_hooks(before_moe_start=torch.abs, after_dispatch=torch.neg)
        assert part.stage_hooks.before_moe_start is None
        x = batch(4, ranks.device)
        expected = part(x)
        part.set_stage_hooks(before_moe_end=torch.neg)
        torch.testing.assert_close(part(x), -expected)


def check_shards_get_the_hooks_of_whole_experts(ranks: Ranks) -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(2)
        layer = FMoETransformerMLP(
            2,
            D,
            2 * ranks.size,
            world_size=ranks.size,
            dispatch="exact",
            expert_tensor_parallel_size=ranks.size,
            dtype=torch.float64,
            device=ranks.device,
        )
        layers.append(layer)
    layers[0].set_stage_hooks(after_combine=lambda rows: 3 * rows)
    x = batch(4, ranks.device)
    torch.testing.assert_close(layers[0](x), 3 * layers[1](x))
