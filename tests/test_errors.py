"""docs/errors.md is what the code says, and bad inputs end in its messages: argument, wish, what came, and advice."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import moeops
from moeops import FMoE, FMoELinear, FMoETransformerMLP, TokenPlan, gates
from moeops.dispatch import Auto, Exact, Gather, StageHooks, Static
from moeops.distributed import (
    DistributedGroupedDataParallel,
    ShadowPolicy,
    build_hierarchy,
    clip_grad_norm_,
    expert_range,
    load_checkpoint,
    merge_checkpoint,
    rank_group,
    read_extra,
)

ROOT = Path(__file__).resolve().parents[1]
KINDS = (TypeError, ValueError, RuntimeError, NotImplementedError, FileNotFoundError)
FORM = re.compile(
    r"([^\n]+, moeops/csrc/[\w/.]+:\d+, )?(?P<op>[\w. ]+): (?P<argument>.+?) must (?P<wanted>.+), got:? (?P<got>.+)"
    r"[.] (?P<advice>\S.*)",
    re.DOTALL,
)
# What stands in the place of arguments: other libraries' hooks say what they must, and errors of moeops itself.
OTHER_FORMS = re.compile(
    r"has no stand-in|module \{__name__\} has no attribute|^\{name\}: \{\.\.\.\}$|"
    r"does not fit: \{err\}$|This is an error in moeops|^moeops: a gated activation|^\{op\}: MOEOPS_KERNELS=hopper"
)


def load_script():
    spec = importlib.util.spec_from_file_location("list_errors", ROOT / "scripts/list_errors.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def read_table() -> list[tuple[str, str]]:
    """Type and message of every row."""
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \| `(.*)` \|$", text, re.MULTILINE)
    return [(kind, message.replace("\\|", "|")) for kind, message in rows]


TABLE = read_table()


def pattern(message: str) -> re.Pattern:
    """What matches a row's message with anything in the place of braces."""
    parts = re.split(r"\{[\w.]+\}", message)
    return re.compile(".*".join(map(re.escape, parts)) + "$", re.DOTALL)


PATTERNS = [(kind, message, pattern(message)) for kind, message in TABLE]


def test_the_page_is_what_the_code_says():
    script = load_script()
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), (
        "Write it: python scripts/list_errors.py"
    )
    assert len(TABLE) > 400


def test_every_message_has_the_form():
    """Shape checks in a graph have no numbers to show: sizes are symbols there."""
    wrong = [
        (kind, message)
        for kind, message in TABLE
        if kind != "RuntimeError in a graph"
        and not OTHER_FORMS.search(message)
        and not re.search(r"must .+, got:? .+", message)
    ]
    assert not wrong, "\n".join(f"{kind}: {message}" for kind, message in wrong)


# --- bad inputs ------------------------------------------------------------------------------------------

x = torch.randn(5, 8)
logits = torch.randn(5, 4)
ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [-1, 2]])
weights = torch.rand(5, 2)
plan = moeops.sort_tokens(ids, 4)
rows = moeops.permute_tokens(x, plan)
offsets = plan.expert_offsets
w_up, w_down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
mlp = partial(FMoETransformerMLP, 4, 8, 16)
modules = partial(FMoE, 4, 8, expert=lambda d: nn.Linear(d, d))


# Argument that must be named, and what to call.
CASES: list[tuple[str, Callable[[], object]]] = [
    # ops
    ("logits", lambda: moeops.topk_route("x", 1)),
    ("logits", lambda: moeops.topk_route(logits[0], 1)),
    ("logits", lambda: moeops.topk_route(logits.long(), 1)),
    ("top_k", lambda: moeops.topk_route(logits, 0)),
    ("top_k", lambda: moeops.topk_route(logits, 5)),
    ("top_k", lambda: moeops.topk_route(logits, 1.5)),
    ("top_k", lambda: moeops.topk_route(logits, True)),
    ("score", lambda: moeops.topk_route(logits, 2, score="relu")),
    ("bias", lambda: moeops.topk_route(logits, 2, bias=torch.zeros(3))),
    ("bias", lambda: moeops.topk_route(logits, 2, bias=torch.zeros(4, dtype=torch.int64))),
    ("num_groups", lambda: moeops.topk_route(logits, 2, num_groups=3, top_groups=1)),
    ("top_groups", lambda: moeops.topk_route(logits, 2, num_groups=2, top_groups=3)),
    ("uniform", lambda: moeops.topk_route_balance(logits, 2, uniform=torch.rand(3))),
    ("temperature", lambda: moeops.topk_route_balance(logits, 2, temperature=torch.ones(3))),
    ("group_score", lambda: moeops.topk_route_balance(logits, 2, group_score="max")),
    ("topk_ids", lambda: moeops.chosen_weights(logits, ids.float())),
    ("topk_ids", lambda: moeops.chosen_weights(logits, ids[:3])),
    ("score", lambda: moeops.chosen_weights(logits, ids, score="x")),
    ("score", lambda: moeops.score_sums(logits, score="x")),
    ("logits", lambda: moeops.score_sums(logits[0])),
    ("spread", lambda: moeops.noisy_topk_route(logits, logits[:2], logits, 2)),
    ("noise", lambda: moeops.noisy_topk_route(logits, logits, logits.double(), 2)),
    ("num_prototypes", lambda: moeops.prototype_route(logits, 3)),
    ("logits", lambda: moeops.relu_route(logits.int())),
    ("experts_per_group", lambda: moeops.alignment_sum(logits, ids, 0)),
    ("topk_ids", lambda: moeops.count_tokens(ids.float(), 4)),
    ("num_experts", lambda: moeops.count_tokens(ids, 0)),
    ("topk_ids", lambda: moeops.sort_tokens(ids[0], 4)),
    ("topk_ids", lambda: moeops.sort_tokens(ids + 9, 4)),
    ("num_experts", lambda: moeops.sort_tokens(ids, "4")),
    ("num_rows", lambda: moeops.sort_tokens(ids, 4, -1)),
    ("num_rows", lambda: moeops.sort_tokens(ids, 4, 3)),
    ("capacity", lambda: moeops.limit_capacity(ids, 4, -1)),
    ("priority", lambda: moeops.limit_capacity(ids, 4, 2, priority=weights[:2])),
    ("priority", lambda: moeops.limit_capacity(ids, 4, 2, priority=weights, by_choice=True)),
    ("x", lambda: moeops.permute_tokens(x[:3], plan)),
    ("x", lambda: moeops.permute_tokens(x.long(), plan)),
    ("plan", lambda: moeops.permute_tokens(x, ids)),
    ("row_to_pair", lambda: moeops.permute_tokens(x, TokenPlan(plan[0].long(), *plan[1:]))),
    ("rows", lambda: moeops.unpermute_tokens(rows[:3], plan)),
    ("topk_weights", lambda: moeops.unpermute_tokens(rows, plan, weights[:2])),
    ("expert_offsets", lambda: moeops.pad_rows(rows, offsets.long(), 3)),
    ("expert_offsets", lambda: moeops.pad_rows(rows, offsets[:1], 3)),
    ("capacity", lambda: moeops.pad_rows(rows, offsets, -3)),
    ("padded", lambda: moeops.unpad_rows(rows, offsets, 10)),
    ("num_rows", lambda: moeops.unpad_rows(torch.randn(4, 3, 8), offsets, -1)),
    ("weight", lambda: moeops.grouped_linear(rows, torch.randn(4, 6, 7), offsets)),
    ("weight", lambda: moeops.grouped_linear(rows, torch.randn(3, 6, 8), offsets)),
    ("weight", lambda: moeops.grouped_linear(rows, torch.randn(4, 6, 8).double(), offsets)),
    ("bias", lambda: moeops.grouped_linear(rows, w_up, offsets, bias=torch.zeros(4, 3))),
    ("lora", lambda: moeops.grouped_linear(rows, w_up, offsets, lora=3)),
    ("x", lambda: moeops.moe_mlp(x[:2], plan, weights, w_up, w_down)),
    ("w_up", lambda: moeops.moe_mlp(x, plan, weights, w_up[:2], w_down)),
    ("w_up", lambda: moeops.moe_mlp(x, plan, weights, w_up, w_down[..., :3])),
    ("w_down", lambda: moeops.moe_mlp(x, plan, weights, w_up, w_down[0])),
    ("b_up", lambda: moeops.moe_mlp(x, plan, weights, w_up, w_down, b_up=torch.zeros(4, 5))),
    ("activation", lambda: moeops.moe_mlp(x, plan, weights, w_up, w_down, activation="tanh")),
    ("topk_weights", lambda: moeops.moe_mlp(x, plan, weights.long(), w_up, w_down)),
    # layers
    ("num_expert", lambda: FMoETransformerMLP(0, 8, 16)),
    ("d_model", lambda: FMoETransformerMLP(4, 0, 16)),
    ("d_hidden", lambda: FMoETransformerMLP(4, 8, -1)),
    ("top_k", lambda: mlp(top_k=5)),
    ("top_k", lambda: mlp(top_k=0)),
    ("activation", lambda: mlp(activation="tanh")),
    ("init", lambda: mlp(init="zeros")),
    ("dispatch", lambda: mlp(dispatch="fast")),
    ("dispatch", lambda: mlp(dispatch=3)),
    ("gate", lambda: mlp(gate=3)),
    ("slice_gradients", lambda: mlp(slice_gradients="max")),
    ("expert_tensor_parallel_size", lambda: mlp(expert_tensor_parallel_size=2)),
    ("world_size", lambda: mlp(world_size=0)),
    ("moe_group", lambda: mlp(moe_group=3)),
    ("mask", lambda: mlp(mask=torch.ones(3))(x)),
    ("mask_dict", lambda: mlp(mask=torch.zeros(5, dtype=torch.long), mask_dict={"x": 0})(x)),
    ("inp", lambda: mlp()(x[:, :5])),
    ("inp", lambda: mlp()(x.long())),
    ("inp", lambda: mlp()("tokens")),
    ("expert", lambda: FMoE(4, 8, expert=3)),
    ("expert_call", lambda: modules(expert_call="x")),
    ("moe_inp", lambda: modules()([])),
    ("moe_inp", lambda: modules()({"a": x, "b": x[:3]})),
    ("in_feat", lambda: FMoELinear(4, 0, 3)),
    ("init", lambda: FMoELinear(4, 8, 3, init="x")),
    # gates
    ("num_expert", lambda: gates.NaiveGate(8, 0)),
    ("top_k", lambda: gates.NaiveGate(8, 4, top_k=5)),
    ("capacity", lambda: gates.SwitchGate(8, 4, capacity=-1.0)),
    ("capacity", lambda: gates.GShardGate(8, 4, capacity="x")),
    ("top_k", lambda: gates.GShardGate(8, 4, top_k=3)),
    ("drop_policy", lambda: gates.SwitchGate(8, 4, drop_policy="last")),
    ("jitter", lambda: gates.SwitchGate(8, 4, jitter="noise")),
    ("balance", lambda: gates.TopKGate(8, 4, balance="x")),
    ("score", lambda: gates.TopKGate(8, 4, score="x")),
    ("num_groups", lambda: gates.SAMGate(8, 4, num_groups=3)),
    ("top_groups", lambda: gates.DeepSeekV3Gate(8, 4, num_groups=2, top_groups=3)),
    ("bias_speed", lambda: gates.DeepSeekV3Gate(8, 4, bias_speed=-1.0)),
    ("top_p", lambda: gates.ThresholdGate(8, 4, top_p=2.0)),
    ("min_prob", lambda: gates.ThresholdGate(8, 4, min_prob=-1.0)),
    ("row_budget", lambda: gates.ReMoEGate(8, 4, row_budget=0.0)),
    ("coefficient", lambda: gates.ReMoEGate(8, 4, coefficient=-1.0)),
    ("key", lambda: gates.HashGate(8, 4, key="x")),
    ("num_buckets", lambda: gates.HashGate(8, 4, num_buckets=0)),
    ("frequencies", lambda: gates.HashGate(8, 4, frequencies=torch.ones(3, 3))),
    ("num_slots", lambda: gates.SoftMoEGate(8, 4, num_slots=0)),
    ("capacity", lambda: gates.ExpertChoiceGate(8, 4, capacity=0.0)),
    ("gate_noise", lambda: gates.TutelGate(8, 4, gate_noise=-1.0)),
    ("noisy_gate_policy", lambda: gates.DeepSpeedGate(8, 4, noisy_gate_policy="x")),
    ("min_noise", lambda: gates.NoisyGate(8, 4, min_noise=-1.0)),
    ("proj_dim", lambda: gates.XMoEGate(8, 4, proj_dim=0)),
    ("gpus_per_node", lambda: gates.FasterGate(8, 4, gpus_per_node=0)),
    ("temperature", lambda: gates.DenseToSparseGate(8, 4, temperature=-1.0)),
    ("policy", lambda: gates.apply_capacity(ids, weights, 4, 2, policy="x")),
    ("progress", lambda: moeops.update_gates(mlp(), 2.0)),
    # losses, monitors, dispatchers, ranks, files
    ("model", lambda: moeops.auxiliary_loss(3)),
    ("mode", lambda: moeops.LoadMonitor(mlp(), mode="x")),
    ("model", lambda: moeops.LoadMonitor(nn.Linear(2, 2))),
    ("model", lambda: moeops.RoutingReplay(nn.Linear(2, 2))),
    ("n_chunks", lambda: mlp(dispatch=Exact(n_chunks=0))),
    ("hierarchy", lambda: mlp(dispatch=Exact(hierarchy=3))),
    ("capacity", lambda: mlp(dispatch=Static(-1))),
    ("capacity", lambda: mlp(dispatch=Static("x"))),
    ("n_chunks", lambda: mlp(dispatch=Static(2, n_chunks=0.5))),
    ("rows", lambda: mlp(dispatch=Gather(rows=0.0))),
    ("max_tokens", lambda: mlp(dispatch=Gather(max_tokens=-1))),
    ("max_tokens", lambda: mlp(dispatch=Auto(max_tokens=-1))),
    ("row_seconds", lambda: ShadowPolicy(-1.0, 1.0, 1.0)),
    ("max_shadows", lambda: ShadowPolicy(1.0, 1.0, 1.0, -1)),
    ("before_dispatch", lambda: StageHooks(before_dispatch=3)),
    ("group", lambda: rank_group(3)),
    ("group", lambda: rank_group("world")),
    ("node_size", lambda: build_hierarchy(None, 2)),
    ("num_experts", lambda: expert_range(0, None)),
    ("model", lambda: clip_grad_norm_(iter([]), 1.0)),
    ("torch.distributed", lambda: DistributedGroupedDataParallel(mlp())),
    ("path", lambda: load_checkpoint("/nowhere", mlp())),
    ("path", lambda: read_extra("/nowhere")),
    ("layout", lambda: merge_checkpoint("/nowhere", "out", layout="x")),
]


def test_bad_inputs():
    """Every one ends in an error of the table, in the form of all errors, which names the argument."""
    wrong, rows_met = [], set()
    for number, (argument, call) in enumerate(CASES):
        try:
            got = call()
        except KINDS as err:
            kind, text = type(err).__name__, str(err)
        except Exception as err:
            wrong.append(f"{number} {argument}: {type(err).__name__}: {err}")
            continue
        else:
            wrong.append(f"{number} {argument}: no error, but {str(got)[:80]}")
            continue
        found = [message for k, message, rule in PATTERNS if k == kind and rule.search(text)]
        form = FORM.fullmatch(text)
        if not found:
            wrong.append(f"{number} {argument}: not in docs/errors.md: {kind}: {text}")
        elif form is None or not re.search(rf"\b{argument}\b", form["argument"]):
            wrong.append(f"{number} {argument}: not in form: {kind}: {text}")
        else:
            rows_met.add(max(found, key=len))
    assert not wrong, f"{len(wrong)} of {len(CASES)}:\n" + "\n".join(wrong)
    assert len(CASES) >= 100
    assert len(rows_met) >= 50
