"""Checks for several processes: gates that ask other ranks for their counts decide what one rank with all tokens would.

Eager and compiled; each compares with the float64 reference.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import processes
from moeops import losses
from moeops.gates import (
    DCGate,
    DeepSeekV3Gate,
    GShardGate,
    ReMoEGate,
    SwipeGate,
    SwitchGate,
    TopKGate,
    apply_capacity,
    balance_loss,
    update_coefficients,
)
from reference_gates import fastmoe as fast

D, E_LOCAL = 6, 3
# Tokens of each rank: even, uneven, none on a rank, none at all.
SPLITS = ([20, 20], [31, 9], [0, 17], [0, 0])


def assert_all(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu())


class Ranks(processes.Ranks):
    """This rank, the same tokens of all ranks, and gates with their group."""

    @property
    def num_experts(self):
        return E_LOCAL * self.size

    @property
    def group(self):
        return dist.group.WORLD

    def splits(self):
        return [[*split, *[5] * (self.size - 2)] for split in SPLITS]

    def tokens(self, split, seed=0):
        """Skewed towards some experts, so that something overflows."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(split), D, generator=generator, dtype=torch.float64) + 0.5
        return [part.to(self.device) for part in x.split(split)]

    def gate(self, cls, *args, **options):
        torch.manual_seed(7)
        gate = cls(D, E_LOCAL, self.size, *args, **options)
        gate.group = self.group  # what a layer with a group does
        return gate.double().to(self.device)

    def check(self, gate, reference, compiled):
        """Outputs and loss of this rank, and their gradients, against ``reference(logits of all ranks)``."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        module = torch.compile(gate, fullgraph=True, backend=counter) if compiled else gate
        for number, split in enumerate(self.splits()):
            tokens = self.tokens(split, number)
            x = tokens[self.rank].clone().requires_grad_()
            if compiled:
                torch._dynamo.decorators.mark_unbacked(x, 0)
            torch.manual_seed(100 + self.rank)
            ids, weights = module(x)
            loss = gate.get_loss()
            logits = [(t.cpu() @ gate.gate.weight.cpu().t() + gate.gate.bias.cpu()) for t in tokens]
            noise = []
            for r, part in enumerate(split):
                torch.manual_seed(100 + r)
                noise.append(torch.rand(part, dtype=torch.float64, device=self.device).cpu())
            want_ids, want_weights, want_losses = reference(logits, noise)
            assert torch.equal(ids.cpu(), want_ids[self.rank]), (split, ids, want_ids[self.rank])
            assert_all([weights], [want_weights[self.rank]])
            total, want = weights.square().sum(), want_weights[self.rank].square().sum()
            if loss is not None:
                assert_all([loss], [want_losses[self.rank]])
                total, want = total + 3 * loss, want + 3 * want_losses[self.rank]
            else:
                assert want_losses is None
            parameters = (gate.gate.weight, gate.gate.bias)
            gradients = torch.autograd.grad(total, parameters)
            assert_all(gradients, torch.autograd.grad(want, parameters))
        assert counter.frame_count == (1 if compiled else 0)


def check_apply_capacity(ranks):
    ranks = Ranks(*ranks)
    for number, split in enumerate(ranks.splits()):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(-1, ranks.num_experts, (sum(split), 3), generator=generator)
        ids = list(ids.split(split))
        for policy in ("position", "choice"):
            for capacity in (0, 2, 7):
                order = fast.queue(ids, None, policy)
                want = fast.keep(ids, order, ranks.num_experts, capacity)[ranks.rank]
                mine = ids[ranks.rank].to(ranks.device)
                got = apply_capacity(
                    mine, None, ranks.num_experts, capacity, policy=policy, group=ranks.group
                )
                assert torch.equal(got.cpu(), want)


def check_masks(ranks):
    """Padding on one rank alone, which passes a mask: what the tokens that are there get without it."""
    ranks = Ranks(*ranks)
    for cls, top_k, options in (
        (DCGate, 2, {"capacity": 0.8, "random_routing": False, "balance": "global"}),
        (
            SwitchGate,
            1,
            {"capacity": 0.8, "switch_eps": 0.0, "global_capacity": True, "balance": "global"},
        ),
        (TopKGate, 2, {"balance": "global"}),
        (SwipeGate, 2, {}),
    ):
        gate = ranks.gate(cls, top_k, **options)
        for split in ranks.splits():
            x = ranks.tokens(split)[ranks.rank]
            ids, weights = gate(x)
            loss = gate.get_loss()
            mask = None
            if ranks.rank == 0:
                mask = torch.arange(2 * len(x) + 3, device=ranks.device) % 2
                mask[2 * len(x) :] = 1
                there, both = mask == 0, x.new_zeros(len(mask), D)
                both[there] = x
                masked_ids, masked_weights = gate(both, mask=mask)
                assert bool((masked_ids[~there] == -1).all())
                masked_ids, masked_weights = masked_ids[there], masked_weights[there]
            else:
                masked_ids, masked_weights = gate(x)
            assert torch.equal(masked_ids, ids), (cls, split)
            assert_all([masked_weights], [weights])
            if loss is not None:
                assert_all([gate.get_loss()], [loss])


def check_dc(ranks):
    ranks = Ranks(*ranks)
    for policy, compat, compiled in (
        ("choice", False, False),
        ("choice", False, True),
        ("position", True, False),
    ):
        gate = ranks.gate(DCGate, 2, 0.8, drop_policy=policy, compat=compat)

        def reference(logits, noise, policy=policy, compat=compat):
            return fast.gshard(
                logits,
                noise,
                0.8,
                policy=policy,
                world_size=ranks.size,
                per_owner=True,
                compat=compat,
            )

        ranks.check(gate, reference, compiled)
        ids, _ = gate(ranks.tokens(ranks.splits()[0])[ranks.rank])
        assert int((ids == -1).sum()) > 0


def check_switch(ranks):
    ranks = Ranks(*ranks)

    def reference(logits, noise):
        ids = [fast.best(z, 1) for z in logits]
        probs = [fast.softmax(z) for z in logits]
        rows = -(-8 * sum(z.shape[0] for z in logits) // (10 * ranks.num_experts))
        kept = fast.keep(ids, fast.queue(ids, None, "position"), ranks.num_experts, rows)
        weights = [p.gather(1, i) for p, i in zip(probs, ids, strict=True)]
        return kept, weights, fast.balance_losses(probs, ids)

    for compiled in (False, True):
        options = {"switch_eps": 0.0, "global_capacity": True, "balance": "global"}
        ranks.check(ranks.gate(SwitchGate, 1, capacity=0.8, **options), reference, compiled)


def check_gshard_global_loss(ranks):
    ranks = Ranks(*ranks)

    def reference(logits, noise):
        ids, weights, _ = fast.gshard(logits, None, 1e5)
        probs = [fast.softmax(z) for z in logits]
        firsts = [i[:, :1] for i in ids]
        return ids, weights, fast.balance_losses(probs, firsts)

    options = {"random_routing": False, "capacity": None, "balance": "global"}
    ranks.check(ranks.gate(GShardGate, 2, **options), reference, compiled=False)


def check_top_k_global_loss(ranks):
    ranks = Ranks(*ranks)

    def reference(logits, noise):
        ids = [fast.best(z, 2) for z in logits]
        probs = [fast.softmax(z) for z in logits]
        weights = [p.gather(1, i) for p, i in zip(probs, ids, strict=True)]
        weights = [w / w.sum(1, keepdim=True) for w in weights]
        return ids, weights, fast.balance_losses(probs, ids)

    for compiled in (False, True):
        ranks.check(ranks.gate(TopKGate, 2, balance="global"), reference, compiled)


def check_swipe(ranks):
    ranks = Ranks(*ranks)

    def reference(logits, noise, k=2):
        return *fast.swipe(logits, k), None

    for k in (1, 2, 4):
        gate = ranks.gate(SwipeGate, k)
        ranks.check(gate, lambda logits, noise, k=k: reference(logits, noise, k), compiled=False)
        for split in ranks.splits():
            ids, _ = gate(ranks.tokens(split)[ranks.rank])
            received = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device)
            received += (ids // E_LOCAL).reshape(-1).bincount(minlength=ranks.size)
            dist.all_reduce(received)
            assert int(received.sum()) == k * sum(split)
            assert int(received.max()) <= -(-k * sum(split) // ranks.size)
    ranks.check(ranks.gate(SwipeGate, 2), reference, compiled=True)


def check_gates_without_a_layer_ask_the_whole_job(ranks):
    ranks = Ranks(*ranks)
    x = ranks.tokens([20] * ranks.size)[ranks.rank]
    for cls, options in (
        (SwipeGate, {}),
        (DCGate, {}),
        (SwitchGate, {"global_capacity": True}),
        (SwitchGate, {"balance": "global"}),
    ):
        told = ranks.gate(cls, **options)
        alone = cls(D, E_LOCAL, ranks.size, **options).double().to(ranks.device)
        assert alone.group is None
        alone.load_state_dict(told.state_dict())
        for gate in (alone, torch.compile(alone, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(3)
            expected = told(x)
            torch.manual_seed(3)
            assert_all(gate(x), expected)
            if told.has_loss:
                assert_all([alone.get_loss()], [told.get_loss()])


def check_one_balanced_choice(ranks):
    """Step by step it is what the gate does; another rank's room may be another."""
    ranks = Ranks(*ranks)
    gate = ranks.gate(SwipeGate, 2)
    for split in ranks.splits():
        x = ranks.tokens(split)[ranks.rank]
        expected, _ = gate(x)
        ids, _ = gate.eval()(x)
        gate.train()
        room = torch.full((ranks.size,), -(-2 * sum(split) // ranks.size), device=ranks.device)
        for k in range(2):
            column, room = gate.balance_choice(ids[:, k], room, k)
            assert torch.equal(column, expected[:, k])
        assert int(room.sum()) == -(-2 * sum(split) // ranks.size) * ranks.size - 2 * sum(split)
    # Of rank 0's choices one fits, and the others go to the last rank's expert number 2.
    room = torch.tensor([1, *[0] * (ranks.size - 2), 40], device=ranks.device)
    ids, room = gate.balance_choice(torch.zeros(5, dtype=torch.int32, device=ranks.device), room, 2)
    moved = (ranks.size - 1) * E_LOCAL + 2
    assert ids.tolist() == [0 if ranks.rank == 0 else moved, *[moved] * 4]
    assert ids.dtype == torch.int32
    assert room.tolist() == [*[0] * (ranks.size - 1), 41 - 5 * ranks.size]
    with pytest.raises(ValueError, match="room"):
        gate.balance_choice(ids, room[1:])


def check_mean_of_losses_is_the_loss_of_all_tokens(ranks):
    ranks = Ranks(*ranks)
    split = [8] * ranks.size
    for compute in (losses.switch_loss, losses.gshard_loss):
        logits = torch.cat(ranks.tokens(split))
        ids = fast.best(logits, 2)
        leaf = logits.split(split)[ranks.rank].clone().requires_grad_()
        loss = compute(leaf, ids.split(split)[ranks.rank], group=ranks.group)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        whole = logits.clone().requires_grad_()
        want = compute(whole, ids)
        want.backward()
        assert_all(
            [mean / ranks.size, leaf.grad / ranks.size], [want, whole.grad.split(split)[ranks.rank]]
        )
    probs = torch.full((4, ranks.num_experts), 1 / ranks.num_experts, device=ranks.device)
    ids = torch.zeros(4, 1, dtype=torch.int64, device=ranks.device)
    assert_all([balance_loss(probs, ids, group=ranks.group)], [torch.ones(())])


def check_deepseek(ranks):
    ranks = Ranks(*ranks)
    torch.manual_seed(7)
    gate = DeepSeekV3Gate(D, E_LOCAL, ranks.size).double().to(ranks.device)
    one, compiled = copy.deepcopy(gate), copy.deepcopy(gate)
    compiled.group = ranks.group

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(speed):
        compiled.update_bias(speed)

    for number, split in enumerate(ranks.splits()):
        tokens = ranks.tokens(split, number)
        one(torch.cat(tokens))
        one.world_size = 1
        one.update_bias(0.25)
        one.world_size = ranks.size
        for other in (gate, compiled):
            other(tokens[ranks.rank])
        gate.update_bias(0.25, ranks.group)
        update(0.25)
        for other in (gate, compiled):
            assert torch.equal(other.selection_bias, one.selection_bias)
            assert not other.loads.any()
    assert one.selection_bias.any()
    with pytest.raises(ValueError, match=r"update_bias: group must be set with world_size"):
        gate.update_bias(0.25)


def check_remoe(ranks):
    """The same coefficient on every rank, that of one rank with all tokens; eager, compiled and over a model."""
    ranks = Ranks(*ranks)
    torch.manual_seed(7)
    gate = ReMoEGate(D, E_LOCAL, ranks.size, 2, coefficient=0.5).double().to(ranks.device)
    one, compiled, model = (copy.deepcopy(gate) for _ in range(3))
    one.world_size = 1
    model = torch.nn.ModuleList((model, copy.deepcopy(model)))
    compiled.group = model[0].group = model[1].group = ranks.group

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update():
        compiled.update_coefficient(1.5)

    for number, split in enumerate(ranks.splits()):
        tokens = [t - number for t in ranks.tokens(split, number)]  # ever fewer are positive
        one(torch.cat(tokens))
        one.update_coefficient(1.5)
        for other in (gate, compiled, *model):
            other(tokens[ranks.rank])
        gate.update_coefficient(1.5, ranks.group)
        update()
        update_coefficients(model, 1.5)
        for other in (gate, compiled, *model):
            assert_all([other.coefficient], [one.coefficient])
            assert not other.active.any()
            assert not other.tokens.any()
    assert float(one.coefficient) != 0.5
    with pytest.raises(ValueError, match=r"update_coefficient: group must be set with world_size"):
        gate.update_coefficient()


def check_errors_and_copies(ranks):
    ranks = Ranks(*ranks)
    x = ranks.tokens([4] * ranks.size)[ranks.rank]
    torch.manual_seed(7)
    wrong = DCGate(D, 1, ranks.size + 1, group=ranks.group).double().to(ranks.device)
    with pytest.raises(
        ValueError, match=rf"world_size = {ranks.size + 1} ranks .* got {ranks.size}"
    ):
        wrong(x)
    lost = SwitchGate(D, 4, balance="global").double().to(ranks.device)
    with pytest.raises(ValueError, match=r"group must be set for a loss over all ranks"):
        lost(x)
    gate = ranks.gate(SwipeGate, 2)
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert other.group == gate.group
        assert torch.equal(gate(x)[0], other(x)[0])
