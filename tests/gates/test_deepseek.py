"""DeepSeekV3Gate against straight-line float64, and what its bias does over time."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from choice_checks import check_values
from gate_checks import (
    D,
    E,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
    layer_with,
)
from torch._dynamo.utils import counters

from cases import each
from host_syncs import no_host_syncs
from moeops.gates import DeepSeekV3Gate
from tolerances import assert_close


def order(values):
    """Indices by falling value, ties by lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def reference(logits, gate):
    """The choice, the weights and the loss, token by token, as the paper states them."""
    T, num_experts = logits.shape
    bias = gate.selection_bias.cpu().double()
    k, size = gate.top_k, num_experts // gate.num_groups
    all_ids, all_weights, plain, probs = [], [], [], []
    for t in range(T):
        s = 1 / (1 + torch.exp(-logits[t]))
        choice = (s + bias).tolist()
        worth = []
        for g in range(gate.num_groups):
            worth.append(sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:2]))
        groups = order(worth)[: gate.top_groups]
        ids = [e for e in order(choice) if e // size in groups][:k]
        all_ids.append(ids)
        all_weights.append(gate.scale * s[ids] / s[ids].sum())
        plain.append(order(s.tolist())[:k])
        probs.append(s / s.sum())
    losses = []
    S = gate.sequence_length or T
    for begin in range(0, T, S):
        rows = range(begin, min(begin + S, T))
        loss = logits.new_zeros(())
        for e in range(num_experts):
            f = num_experts / (k * len(rows)) * sum(e in plain[t] for t in rows)
            loss = loss + f * sum(probs[t][e] for t in rows) / len(rows)
        losses.append(loss)
    return torch.tensor(all_ids), torch.stack(all_weights), sum(losses) / len(losses)


GATES = {
    "plain": {"top_k": 2},
    "groups": {"top_k": 4, "num_groups": 4, "top_groups": 2, "scale": 2.5},
    "single": {"top_k": 3, "num_groups": 12, "top_groups": 3},
    "sequences": {"top_k": 3, "num_groups": 3, "top_groups": 1, "sequence_length": 5},
    "all": {"top_k": 12, "sequence_length": 1},
}


@each("training", [True, False], ids=["train", "eval"])
@each("name", GATES)
def test_values_and_gradients(name, training, dtype, device):
    num_experts = 12
    gate = DeepSeekV3Gate(D, num_experts, **GATES[name]).train(training)
    with torch.no_grad():
        gate.selection_bias.normal_(std=0.2)

    def wanted(logits):
        ids, weights, loss = reference(logits, gate)
        return ids, weights, None if gate.sequence_length is None else loss

    ids, _ = check_values(gate, wanted, dtype, device)
    loads = torch.bincount(ids.reshape(-1).cpu(), minlength=num_experts)
    assert torch.equal(gate.loads.cpu(), loads if training else torch.zeros_like(loads))


def test_gradcheck():
    options = {"num_groups": 3, "top_groups": 2, "sequence_length": 2, "scale": 2.5}
    gradcheck(DeepSeekV3Gate(D, E, 1, 3, **options))


def test_sequence_loss_is_one_at_balance_and_counts_each_sequence(device):
    gate = DeepSeekV3Gate(2, 2, top_k=1, sequence_length=2).to(device).double()
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor([[30.0, -30.0], [-30.0, 30.0]]))
    first, second = [1.0, 0.0], [0.0, 1.0]
    for tokens, want in (
        ([first, second, second, first], 1.0),
        ([first, first, second, second], 2.0),  # balanced over the batch, not within a sequence
        ([first, second, first], 1.5),  # the last sequence has one token
    ):
        gate(torch.tensor(tokens, dtype=torch.float64, device=device))
        assert_close(gate.get_loss(), torch.tensor(want), torch.float64)


@pytest.mark.parametrize("sequence_length", [None, 3])
def test_no_tokens(sequence_length, device):
    gate = DeepSeekV3Gate(D, E, sequence_length=sequence_length).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    loss = gate.get_loss()
    assert loss is None if sequence_length is None else float(loss.detach()) == 0
    gate.update_bias(0.5)
    assert not gate.selection_bias.any()


def test_update_bias_moves_towards_the_mean_and_clears_the_loads(device):
    gate = DeepSeekV3Gate(D, 4).to(device)
    gate.loads.copy_(torch.tensor([5, 1, 3, 3]))
    gate.update_bias(0.25)
    assert gate.selection_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert gate.loads.tolist() == [0, 0, 0, 0]
    gate.loads.copy_(torch.tensor([1, 0, 0, 0]))
    gate.update_bias(0.25)
    assert gate.selection_bias.tolist() == [-0.5, 0.5, 0.25, 0.25]


def test_loads_add_up_over_forwards_and_stop_in_evaluation(device):
    gate = DeepSeekV3Gate(D, E).to(device)
    total = torch.zeros(E, dtype=torch.int64)
    for _ in range(3):
        ids, _ = gate(torch.randn(7, D, device=device))
        total += torch.bincount(ids.cpu().reshape(-1), minlength=E)
    gate.eval()(torch.randn(7, D, device=device))
    assert torch.equal(gate.loads.cpu(), total)
    with torch.no_grad():
        gate.train()(torch.randn(7, D, device=device))
    assert int(gate.loads.sum()) == int(total.sum()) + 14


def test_the_bias_balances_a_skewed_router_and_leaves_the_weights_alone(device):
    gate = DeepSeekV3Gate(D, E, 1, 2).to(device)
    x = torch.randn(512, D, device=device) + 1
    with torch.no_grad():
        gate.gate.weight[0] += 0.3

    def largest_share():
        return float(gate.loads.max()) / (2 * 512)

    gate(x)
    before = largest_share()
    for _ in range(200):
        gate.update_bias(0.005)
        ids, weights = gate(x)
    assert before > 0.4
    assert largest_share() < 0.2  # 1 / 6 is balance
    scores = torch.sigmoid(gate.gate(x)).gather(1, ids)
    assert_close(weights, scores / scores.sum(-1, keepdim=True), torch.float32)
    assert gate.selection_bias.grad is None


def test_replicas_that_sum_their_loads_keep_one_bias():
    one = DeepSeekV3Gate(D, E)
    replicas = [copy.deepcopy(one) for _ in range(2)]
    x = torch.randn(20, D)
    one(x)
    for replica, part in zip(replicas, x.split([13, 7]), strict=True):
        replica(part)
    summed = replicas[0].loads + replicas[1].loads  # what all_reduce leaves on each rank
    for gate in (one, *replicas):
        gate.loads.copy_(summed if gate is not one else one.loads)
        gate.update_bias(0.1)
    assert one.selection_bias.any()
    for replica in replicas:
        assert torch.equal(replica.selection_bias, one.selection_bias)


def test_state_dict_carries_bias_and_loads(tmp_path):
    gate, other = DeepSeekV3Gate(D, E), DeepSeekV3Gate(D, E)
    gate(torch.randn(9, D))
    gate.update_bias(0.3)
    gate(torch.randn(9, D))
    torch.save(gate.state_dict(), tmp_path / "gate.pt")
    other.load_state_dict(torch.load(tmp_path / "gate.pt", weights_only=True))
    assert set(gate.state_dict()) == {"gate.weight", "selection_bias", "loads"}
    for key, value in gate.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert other.loads.any()
    assert other.selection_bias.any()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_buffers_exact(cast):
    layer = layer_with(DeepSeekV3Gate)
    gate = layer.gate
    with torch.no_grad():
        gate.selection_bias.normal_()
        gate.loads += 10**9 + 1
    bias, loads = gate.selection_bias.clone(), gate.loads.clone()
    layer.to(cast)
    assert gate.gate.weight.dtype == cast
    assert gate.selection_bias.dtype == torch.float32
    assert torch.equal(gate.selection_bias, bias)
    assert torch.equal(gate.loads, loads)
    assert "selection_bias" in gate.state_dict()
    layer(torch.randn(5, D, dtype=cast))


def test_built_on_meta_and_cast():
    with torch.device("meta"):
        gate = DeepSeekV3Gate(D, E)
    gate = gate.to(torch.bfloat16).to_empty(device="cpu")
    gate.load_state_dict(DeepSeekV3Gate(D, E).state_dict())
    assert gate.selection_bias.dtype == torch.float32
    ids, _ = gate(torch.randn(5, D))
    assert ids.shape == (5, 2)


def test_update_bias_compiles_and_follows_a_changing_speed():
    torch._dynamo.reset()
    counters.clear()
    gate = DeepSeekV3Gate(D, E)
    other = copy.deepcopy(gate)

    @partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x, speed):
        _, weights = gate(x)
        gate.update_bias(speed)
        return weights

    for speed in (0.5, 0.25, 0.125):
        x = torch.randn(11, D)
        _, weights = other(x)
        other.update_bias(speed)
        torch.testing.assert_close(step(x, speed), weights)
        assert torch.equal(gate.selection_bias, other.selection_bias)
        assert not gate.loads.any()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    gate = DeepSeekV3Gate(D, E)
    x = torch.randn(16, D, requires_grad=True)
    _, weights = torch.utils.checkpoint.checkpoint(gate, x, use_reentrant=reentrant)
    weights.square().sum().backward()
    assert int(gate.loads.sum()) == 32


@pytest.mark.cuda
def test_no_host_sync(cuda_device):
    gate = DeepSeekV3Gate(D, E, sequence_length=4).to(cuda_device)
    x = torch.randn(32, D, device=cuda_device)
    gate(x)
    with no_host_syncs():
        gate(x)
        gate.update_bias(0.1)


def test_equals_transformers():
    models = pytest.importorskip("transformers.models")
    module = models.deepseek_v3.modeling_deepseek_v3
    config = models.deepseek_v3.DeepseekV3Config(
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        hidden_size=D,
    )
    router = module.DeepseekV3TopkRouter(config)
    x = torch.randn(64, D)
    gate = DeepSeekV3Gate(D, 16, 1, 4, num_groups=4, top_groups=2, scale=2.5)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(std=0.1)
        gate.gate.weight.copy_(router.weight)
        gate.selection_bias.copy_(router.e_score_correction_bias)
        results = router(x)
    if not isinstance(results, tuple):
        pytest.skip("this version's router returns logits only")
    _, want_weights, want_ids = results
    ids, weights = gate(x)
    want_ids, by_id = want_ids.sort(-1)  # theirs come in no order
    ids, by_our_id = ids.sort(-1)
    assert torch.equal(ids, want_ids)
    assert_close(weights.gather(1, by_our_id), want_weights.gather(1, by_id), torch.float32)


GROUPED = partial(DeepSeekV3Gate, num_groups=3, top_groups=2, scale=2.5, sequence_length=4)


@pytest.mark.parametrize(
    ("build", "backend", "training"),
    [
        (GROUPED, "inductor", True),
        (DeepSeekV3Gate, "aot_eager", True),
        (GROUPED, "aot_eager", False),
    ],
    ids=["grouped_inductor", "plain", "grouped_eval"],
)
def test_compile(build, backend, training, device):
    check_compile(build, device, backend, training=training)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(strict, training, device):
    check_export(GROUPED, device, strict, training)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_checkpoint(compile_it):
    check_checkpoint(GROUPED, compile_it)


@each(
    ("options", "error", "match"),
    [
        ({"num_groups": 4}, ValueError, r"num_groups must divide the 6 experts, got 4"),
        ({"num_groups": 0}, ValueError, r"num_groups must be at least 1, got 0"),
        ({"num_groups": 2.0}, TypeError, r"num_groups must be an int, got 2\.0"),
        ({"num_groups": 3, "top_groups": 4}, ValueError, r"top_groups must be .* got 4"),
        (
            {"num_groups": 3, "top_groups": 1, "top_k": 3},
            ValueError,
            r"top_k must be at most the 2 experts of the groups, got 3",
        ),
        ({"top_k": 7}, ValueError, r"top_k must be at most the 6 experts, got 7"),
        ({"scale": -1.0}, ValueError, r"scale must be above 0 and finite, got -1\.0"),
        ({"sequence_length": 0}, ValueError, r"sequence_length must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=f"DeepSeekV3Gate: {match}"):
        DeepSeekV3Gate(D, E, **options)


@pytest.mark.parametrize("speed", [-0.1, float("nan"), float("inf")])
def test_bad_speed(speed):
    with pytest.raises(ValueError, match=r"update_bias: speed must be at least 0 and finite, got"):
        DeepSeekV3Gate(D, E).update_bias(speed)
