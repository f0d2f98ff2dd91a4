"""A picture of each gate's loads: ``python scripts/site/gate_loads.py --out FOLDER [--gates naive,switch]``.

Every gate trains the same layer for some steps on the same tokens, on CPU in float32, from the same seed, so that
pictures can be compared: few kinds of tokens, of which some are frequent, and a linear map per kind to learn. Left is
what the first tokens of the last step chose, right is how many tokens each expert had in the first and in the last
step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from pictures import OTHERS, OURS, new_figure, save, styled
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from lm.gates import (
    GATES,
    GateSpec,
    Sizes,
)

import moeops

TOKENS, WIDTH, EXPERTS, TOP_K, KINDS = 256, 16, 8, 2, 6
STEPS, RATE, LOSS_SCALE = 40, 1e-2, 0.1
SHOWN = 24  # tokens in the left panel


class Loads(NamedTuple):
    """What one gate did.

    Attributes:
        name: the gate's class.
        top_k: experts per token that it was asked for.
        choices: ``[SHOWN, E]`` weights of the first tokens in the last step, 0 where not chosen.
        kinds: ``[SHOWN]`` kind of each of these tokens.
        first: ``[E]`` loads in the first step.
        last: ``[E]`` loads in the last step.
        empty: share of the last step's slots that hold nothing.
    """

    name: str
    top_k: int
    choices: Tensor
    kinds: Tensor
    first: Tensor
    last: Tensor
    empty: float


def measure(spec: GateSpec) -> Loads:
    """Train with the gate of ``spec`` and watch it."""
    top_k = spec.top_k or TOP_K
    torch.manual_seed(0)
    data = Data()
    sizes = Sizes(experts=EXPERTS, top_k=top_k, d_model=WIDTH, context=TOKENS)
    cls, options = getattr(moeops.gates, spec.cls), spec.options(sizes)

    def gate(d_model: int, num_expert: int, world_size: int, top_k: int):
        return cls(d_model, num_expert, world_size, top_k, **options)

    layer = moeops.FMoETransformerMLP(EXPERTS, WIDTH, WIDTH, top_k=top_k, gate=gate)
    optimizer = torch.optim.Adam(layer.parameters(), RATE)
    monitor = moeops.LoadMonitor(layer)
    seen: list[Tensor] = []
    layer.routing_hooks = (
        *layer.routing_hooks,
        lambda _layer, _x, routing: seen.append(_weights(routing)),
    )
    loads = []
    for step in range(STEPS):
        x, target, kinds = data.batch()
        seen.clear()
        monitor.reset()
        with moeops.gates.token_ids(layer, kinds):
            y = layer(x)
        loss = (y - target).square().mean() + LOSS_SCALE * moeops.auxiliary_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moeops.update_gates(layer, (step + 1) / STEPS)
        loads.append(next(iter(monitor.summary().values())))
    return Loads(
        spec.cls, top_k, seen[-1][:SHOWN], kinds[:SHOWN], loads[0].loads, loads[-1].loads, loads[-1].dropped
    )  # fmt: skip


class Data:
    """Tokens of ``KINDS`` kinds around centres, the k-th kind 1 / (k + 1) as frequent as the first."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.centres = 1.5 * torch.randn(KINDS, WIDTH, generator=self.generator)
        self.maps = torch.randn(KINDS, WIDTH, WIDTH, generator=self.generator) / WIDTH**0.5
        self.shares = 1 / torch.arange(1, KINDS + 1)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[T, D]``, what the layer shall return ``[T, D]``, and kinds ``[T]``."""
        kinds = torch.multinomial(self.shares, TOKENS, replacement=True, generator=self.generator)
        noise = torch.randn(TOKENS, WIDTH, generator=self.generator)
        x = self.centres[kinds] + 0.5 * noise
        return x, torch.einsum("td,tdh->th", x, self.maps[kinds]), kinds


def _weights(routing) -> Tensor:
    """``[T, E]`` weights of a routing: by token and expert, 0 where the token does not go."""
    if isinstance(routing, moeops.SlotRouting):
        combine = routing.combine_weights.detach()
        return combine.unflatten(1, (EXPERTS, -1)).sum(2)
    ids, weights = routing.topk_ids, routing.topk_weights.detach()
    dense = torch.zeros(ids.shape[0], EXPERTS + 1)
    dense.scatter_add_(1, torch.where(ids < 0, EXPERTS, ids).long(), weights.float())
    return dense[:, :EXPERTS]


def draw(loads: Loads, path: Path) -> None:
    """Choices on the left, loads on the right."""
    figure = new_figure(7.2, 2.6)
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    order = torch.argsort(loads.kinds, stable=True)
    top = float(loads.choices.max()) or 1.0
    chosen = loads.choices[order].T.numpy()
    left.imshow(
        chosen, cmap="GnBu", vmin=0, vmax=top, aspect="auto", origin="lower", interpolation="none"
    )
    for place in torch.nonzero(loads.kinds[order].diff()).flatten().tolist():
        left.axvline(place + 0.5, color="gray", linewidth=0.8)
    left.set_ylabel("expert")
    left.set_xlabel(f"{SHOWN} tokens, by kind")
    left.set_xticks([])
    left.set_yticks([0, EXPERTS - 1])
    places = torch.arange(EXPERTS)
    mean = float(loads.last.sum()) / EXPERTS
    right.bar(places - 0.2, loads.first, 0.38, color=OTHERS[1], alpha=0.45, label="step 1")
    right.bar(places + 0.2, loads.last, 0.38, color=OURS, label=f"step {STEPS}")
    right.axhline(mean, color="gray", linestyle=":", linewidth=1, label=f"mean, {mean:.0f}")
    right.set_xticks(places.tolist())
    right.set_xlabel("expert")
    right.set_ylabel(f"of {TOKENS} tokens")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    save(figure, path)


def caption(loads: Loads) -> str:
    """The picture in numbers."""
    most = float(loads.last.max() / loads.last.mean())
    text = f"K = {loads.top_k}; largest load over the mean {most:.2f}"
    return f"{text}; {100 * loads.empty:.0f} % of the slots empty" if loads.empty else text


@contextmanager
def _deterministic() -> Iterator[None]:
    """One thread, so that sums have one order; the process gets its settings back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw_all(folder: Path, names: tuple[str, ...] = tuple(GATES)) -> dict[str, Loads]:
    """Measure and draw gates into ``folder/CLASS.svg``; returns what was measured, by class."""
    measured = {}
    with _deterministic(), styled():
        for name in names:
            loads = measure(GATES[name])
            draw(loads, folder / f"{loads.name}.svg")
            measured[loads.name] = loads
    return measured


def main() -> int:
    """Draw the gates that are named, all without names."""
    parser = argparse.ArgumentParser(
        prog="gate_loads.py", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--gates", default=",".join(GATES), help="comma list [all]")
    parser.add_argument("--out", type=Path, default=Path("runs/gates"), help="folder [%(default)s]")
    options = parser.parse_args()
    names = tuple(options.gates.split(","))
    if unknown := sorted(set(names) - set(GATES)):
        parser.error(f"--gates must be a comma list of {', '.join(GATES)}, got {unknown}")
    for loads in draw_all(options.out, names).values():
        print(f"{loads.name}: {caption(loads)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
