"""Cases of layers on two ranks against the same layer on one: one pair of processes for all of them."""

from __future__ import annotations

import tempfile
import time
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parallel_cases import KINDS, K, as_input, batch, loss_of, make_pair, share
from torch import Tensor

from fuzz.comparing import dtype_of
from moeops.distributed import ShadowPolicy
from moeops.gates import ExpertChoiceGate, GShardGate, Llama4Gate, SwitchGate, TopKGate
from processes import GROUP_TIMEOUT, PRELOAD, Ranks, explain, start_rank

SIZE = 2
SECONDS = 2 * GROUP_TIMEOUT
# The weights of every expert that somebody else's tokens choose travel.
FREE = ShadowPolicy(1.0, 1.0, 0.0, max_shadows=3)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
# Gates that choose for the tokens of their own rank; others choose by a table.
GATES = {
    "topk": (TopKGate, {"balance": True}),
    "switch": (SwitchGate, {"capacity": 0.8, "switch_eps": 0.0}),
    "gshard": (GShardGate, {"capacity": 0.8, "random_routing": False}),
    "llama4": (Llama4Gate, {"balance": True}),
    "expert_choice": (ExpertChoiceGate, {"capacity": 0.8}),
}


def draw(rng: Random) -> dict[str, Any]:
    counts = tuple(rng.choice((0, 1, 3, rng.randint(2, 20))) for _ in range(SIZE))
    num_expert = rng.randint(1, 4)
    dispatch = rng.choice(("exact", "exact", "gather", "static"))
    options: dict[str, Any] = {"dispatch": dispatch}
    if dispatch == "gather":
        if rng.random() < 0.5:
            options["max_tokens"] = max(counts) + rng.randint(0, 3)
        else:
            counts = (counts[0],) * SIZE
        options["rows"] = rng.choice((None, 4.0))
    elif dispatch == "static":
        options |= {"capacity": max(1, K * max(counts)), "n_chunks": rng.randint(1, 3)}
    else:
        options["n_chunks"] = rng.randint(1, 3)
        sharing = rng.choice(("none", "none", "shadowing", "replicas"))
        if sharing == "shadowing":
            options["shadowing"] = True
        elif sharing == "replicas":
            expert = rng.randrange(num_expert * SIZE)
            options["replicas"] = {expert: 1 - expert // num_expert}
    kind = rng.choice(KINDS)
    gate = rng.choice(("table", "table", *GATES))
    if num_expert * SIZE < K or (kind == "nested" and gate != "table"):
        gate = "table"
    return {
        "kind": kind,
        "gate": gate,
        "counts": counts,
        "num_expert": num_expert,
        "dtype": rng.choice(("float64", "float64", "float32")),
        "dropped": rng.choice((0.0, 0.3, 1.0)),
        "masked": rng.choice((0.0, 0.0, 0.4)),
        "mask_dict": rng.choice((None, {1: 0.5})) if kind != "nested" else None,
        "options": options,
    }


class _Pair:
    """Two processes that form a group and wait for cases."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.ends, self.processes = [], []
        for rank in range(SIZE):
            here, there = context.Pipe()
            args = (rank, self.folder.name, there)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, seed: int, options: dict[str, Any]) -> list[str]:
        """Run a case on both ranks; return what failed. After a failure the pair must be closed."""
        for end in self.ends:
            end.send((seed, options))
        failures: list[str] = []
        deadline = time.monotonic() + SECONDS
        for rank, end in enumerate(self.ends):
            # A rank whose peer has failed may wait for it in a collective.
            left = 1.0 if failures else deadline - time.monotonic()
            try:
                text = end.recv() if end.poll(max(0.0, left)) else f"no answer in {left:.0f} s"
            except EOFError:
                text = "the process died"
            if text is not None:
                failures.append(f"rank {rank}: {text}")
        return failures

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        for end in self.ends:
            end.close()
        self.folder.cleanup()


_pairs: list[_Pair] = []


def close() -> None:
    """End the pair, if there is one."""
    while _pairs:
        _pairs.pop().close()


def check(seed: int, **options: Any) -> None:
    """A layer on two ranks against the same on one: outputs and all gradients."""
    if not _pairs:
        _pairs.append(_Pair())
    failures = _pairs[0].run(seed, options)
    if failures:
        close()
        raise AssertionError("\n".join(failures))


def _serve(rank: int, folder: str, end: Any) -> None:
    ranks = start_rank(rank, SIZE, "gloo", folder, GROUP_TIMEOUT)
    while True:
        try:
            seed, options = end.recv()
        except EOFError:  # nobody asks any more
            return
        try:
            _check(ranks, seed, **options)
        except Exception as err:
            end.send(f"{type(err).__name__}: {err}\n{explain(err)}")
        else:
            end.send(None)


def _check(
    ranks: Ranks,
    seed: int,
    *,
    kind: str,
    gate: str,
    counts: tuple[int, ...],
    num_expert: int,
    dtype: str,
    dropped: float,
    masked: float,
    mask_dict: dict[int, float] | None,
    options: dict[str, Any],
) -> None:
    options = {**options, "dtype": dtype_of(dtype), "mask_dict": mask_dict}
    if "shadowing" in options:
        options["shadowing"] = FREE
    if gate != "table":
        cls, own = GATES[gate]
        options["gate"] = lambda *args: cls(*args, **own)
        options["top_k"] = 1 if gate == "switch" else K
    part, whole = make_pair(kind, ranks, num_expert, **options)
    generator = torch.Generator().manual_seed(seed)  # the same on both ranks
    x = batch(sum(counts), "cpu", dtype_of(dtype))
    mask = (torch.rand(len(x), generator=generator) < masked).long() if masked else None
    if gate == "table":
        table = torch.rand(99, num_expert * SIZE, generator=generator).argsort(-1)[:, :K]
        table = torch.where(torch.rand(table.shape, generator=generator) < dropped, -1, table)
        for layer in (part, whole):
            layer.gate.set_routing(lambda *_: table)
    parts = list(x.split(counts))
    masks = [None] * SIZE if mask is None else list(mask.split(counts))
    actual = _step(part, kind, parts[ranks.rank], masks[ranks.rank])
    # What a gate counts are the tokens of one rank: the whole layer takes them one rank after the other.
    steps = [_step(whole, kind, *given) for given in zip(parts, masks, strict=True)]
    expected = {n: v for n, v in steps[ranks.rank].items() if not n.startswith("grad ")}
    gradients = {
        name.removeprefix("grad "): sum(step[name] for step in steps)
        for name in steps[0]
        if name.startswith("grad ")
    }
    own = share(whole, ranks.rank, num_expert, gradients)
    expected |= {f"grad {name}": value for name, value in own.items()}
    assert actual.keys() == expected.keys()
    tolerance = TOLERANCES[dtype_of(dtype)]
    for name, value in actual.items():
        if name.startswith("grad gate."):
            dist.all_reduce(value)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance * max(1.0, float(value.abs().max()) if value.numel() else 1.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def _step(layer: Any, kind: str, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Outputs, loss, and gradients by name."""
    layer.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    y = layer(as_input(kind, leaf), mask)
    total = loss_of(y)
    results = dict(y) if isinstance(y, dict) else {"y": y}
    loss = layer.gate.get_loss()
    if loss is not None:
        results["loss"] = loss
        total = total + loss
    total.backward()
    results = {name: value.detach() for name, value in results.items()}
    results["x"] = leaf.grad
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        results[f"grad {name}"] = parameter.grad.clone()
    return results
