"""Where the tokens of a model went: expert loads, counted on the device. T tokens, K experts per token, E experts."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeops._masks import hide_masked
from moeops.gates.recording import add_up
from moeops.layers.moe import FMoE
from moeops.layers.walk import LayerHook, add_hook, find_layers, remove_hook
from moeops.ops.sorting import count_tokens
from moeops.types import Routing, SlotRouting

MODES = ("training", "evaluation", "all")
_COUNTS = ("tokens", "slots", "empty", "unrouted", "forwards")
_COLUMNS = (
    "step", "layer", "tokens", "experts_per_token", "dropped", "unrouted", "max_over_mean", "cv",
    "entropy", "num_dead", "loads",
)  # fmt: skip


@dataclass(frozen=True)
class LayerLoad:
    """What one layer's gate did since the last reset; plain numbers on the host.

    A number that needs a load or a token is NaN where there was none.

    Attributes:
        loads: ``[E]`` float64 on the CPU: token-expert pairs of each expert; behind a gate that mixes tokens
            (``SlotRouting``) the sum of the expert's combine weights, which add up to the number of tokens.
        tokens: tokens the gate saw.
        slots: slots it had for them, ``T * K`` or the ``num_rows`` of its ``Routing``; for ``SlotRouting`` ``T``.
        empty: slots without an expert.
        without_expert: tokens without any expert; the layer returns zeros for them.
        forwards: calls of the layer.
    """

    loads: Tensor
    tokens: int
    slots: int
    empty: int
    without_expert: int
    forwards: int

    @property
    def dropped(self) -> float:
        """Share of the slots that hold nothing: dropped by the gate, or left unused where K varies."""
        return self.empty / self.slots if self.slots else math.nan

    @property
    def unrouted(self) -> float:
        """Share of the tokens without any expert."""
        return self.without_expert / self.tokens if self.tokens else math.nan

    @property
    def experts_per_token(self) -> float:
        """Mean over the tokens."""
        return float(self.loads.sum()) / self.tokens if self.tokens else math.nan

    @property
    def max_over_mean(self) -> float:
        """Largest load over the mean load: 1 at perfect balance, at most ``E``."""
        mean = float(self.loads.mean())
        return float(self.loads.max()) / mean if mean else math.nan

    @property
    def cv(self) -> float:
        """Coefficient of variation of the loads, standard deviation over mean: 0 at perfect balance."""
        mean = float(self.loads.mean())
        return float(self.loads.std(correction=0)) / mean if mean else math.nan

    @property
    def entropy(self) -> float:
        """Entropy of the experts' shares in units of ``log(E)``: 1 at perfect balance, 0 with all on one expert."""
        total = float(self.loads.sum())
        if not total:
            return math.nan
        if len(self.loads) == 1:
            return 1.0
        shares = self.loads[self.loads > 0] / total
        return float(-(shares * shares.log()).sum()) / math.log(len(self.loads))

    @property
    def dead(self) -> list[int]:
        """Experts without any load."""
        return torch.nonzero(self.loads == 0).flatten().tolist()


class LoadMonitor:
    """Count what every gate of a model decides, on the device: no copy to the host and no graph break in the step.

    It watches the ``FMoE`` layers of a model from the moment it is made until ``remove``, and adds up until
    ``reset``. ``summary`` copies to the host, once for all layers; so does each ``write_*`` and ``heat_map``.

    - **torch.compile**: make the monitor before or after compiling, and before or after the first call; an already
      compiled layer is compiled once more. The counting is part of the one graph. ``torch.export`` leaves it out.
    - **Devices**: make it after ``model.to(device)``. The counters are no buffers of the model: they are not in its
      ``state_dict``, DDP does not broadcast them, and copies and pickles of the model are not watched.
    - **Gradient accumulation** adds micro-batches up. **Activation checkpointing** counts a token once, whatever
      ``use_reentrant`` is.
    - **Several ranks**: each counts its own tokens (with a ``slice_group`` those of its slice), over all ``E``
      experts of its gate, those on other ranks included. Reading with ``group=`` sums over a process group in one
      ``all_reduce``: all its ranks must call, and only its rank 0 writes files.
    - **Masked tokens** of a layer do not count.

    Args:
        model: any module with ``FMoE`` layers, compiled or not.
        mode: count in ``"training"`` mode of a layer, in ``"evaluation"``, or ``"all"``.

    Raises:
        ValueError: the model has no ``FMoE`` layer, or ``mode`` is unknown.  TypeError: ``model`` is not a module.
    Host sync: none in the step; one copy per reading.

    Example:
        >>> from moeops import FMoETransformerMLP
        >>> model = nn.Sequential(FMoETransformerMLP(4, 8, 16), FMoETransformerMLP(4, 8, 16))
        >>> with LoadMonitor(model) as monitor:
        ...     _ = model(torch.randn(10, 8))
        >>> first = monitor.summary()["0"]
        >>> first.tokens, int(first.loads.sum()), first.dropped
        (10, 20, 0.0)
    """

    def __init__(self, model: nn.Module, mode: str = "training") -> None:
        if mode not in MODES:
            raise ValueError(
                f"LoadMonitor: mode must be one of {MODES}, got {mode!r}. Pick one of them."
            )
        self._watched: dict[str, tuple[FMoE, _Counter]] = {}
        self._writers: dict[str, Any] = {}
        for name, layer in find_layers("LoadMonitor", model).items():
            counter = _Counter(layer, mode)
            add_hook(layer, counter)
            self._watched[name] = (layer, counter)

    def remove(self) -> None:
        """Stop watching; what was counted can still be read. A compiled layer is compiled once more."""
        for layer, counter in self._watched.values():
            remove_hook(layer, counter)
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> LoadMonitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def reset(self) -> None:
        """Count from 0 again. Host sync: none."""
        for _, counter in self._watched.values():
            counter.totals.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the counters, by layer: a checkpoint in the middle of an interval keeps it whole."""
        return {name: counter.totals.clone() for name, (_, counter) in self._watched.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            ValueError: the layers or their experts are others.
        """
        sizes = {name: [len(counter.totals)] for name, (_, counter) in self._watched.items()}
        got = {name: list(totals.shape) for name, totals in state.items()}
        if got != sizes:
            raise ValueError(
                f"LoadMonitor.load_state_dict: state must hold counters of shapes {sizes}, got {got}. "
                "Load it into a monitor of the same model."
            )
        for name, (_, counter) in self._watched.items():
            counter.totals.copy_(state[name])

    def summary(self, group: Any = None) -> dict[str, LayerLoad]:
        """Read the counters.

        Args:
            group: a ``torch.distributed`` process group to sum over; all its ranks must call. ``None`` for this
                rank alone.

        Returns:
            A ``LayerLoad`` for each layer, by the name of the layer in the model.

        Host sync: one copy.  With ``group`` one all-reduce.
        """
        counters = [counter for _, counter in self._watched.values()]
        device = counters[0].totals.device
        flat = torch.cat([counter.totals.to(device) for counter in counters])
        if group is not None:
            torch.distributed.all_reduce(flat, group=group)
        parts = flat.cpu().split([len(counter.totals) for counter in counters])
        return {
            name: _as_load(part, counter.num_experts)
            for (name, (_, counter)), part in zip(self._watched.items(), parts, strict=True)
        }

    def write_csv(self, path: str | os.PathLike[str], step: int, group: Any = None) -> None:
        """Append one line per layer; the file gets a header when it is new.

        Columns: step, layer, tokens, experts_per_token, dropped, unrouted, max_over_mean, cv, entropy, num_dead, and
        loads, the ``E`` numbers with spaces between them.

        Args:
            path: the file.
            step: what to call this reading.
            group: see ``summary``; rank 0 of the group writes.

        Raises:
            ValueError: the file holds something else.  OSError: it cannot be written.
        """
        summary = self.summary(group)
        if _writes(group):
            _append_csv(Path(path), step, summary)

    def write_tensorboard(self, writer: Any, step: int, group: Any = None) -> None:
        """Write scalars, and a histogram whose bins are the experts, under ``<layer>/...`` for each layer.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or a folder: a writer for it is made at the first
                call, flushed after each one, and closed by ``remove``.
            step: the global step.
            group: see ``summary``; rank 0 of the group writes.

        Raises:
            ImportError: a folder is given and tensorboard is not installed.
        """
        summary = self.summary(group)
        if not _writes(group):
            return
        if isinstance(writer, (str, os.PathLike)):
            folder = os.fspath(writer)
            if folder not in self._writers:
                self._writers[folder] = _open_writer(folder)
            writer = self._writers[folder]
        for name, load in summary.items():
            for tag, value in _scalars(load).items():
                writer.add_scalar(f"{name}/{tag}", value, step)
            num_experts, shares = len(load.loads), load.loads.tolist()
            if not any(shares):
                continue
            writer.add_histogram_raw(
                f"{name}/loads",
                min=0,
                max=num_experts,
                num=sum(shares),
                sum=sum(e * share for e, share in enumerate(shares)),
                sum_squares=sum(e * e * share for e, share in enumerate(shares)),
                bucket_limits=[e + 1 for e in range(num_experts)],
                bucket_counts=shares,
                global_step=step,
            )
        writer.flush()

    def heat_map(self, path: str | os.PathLike[str], group: Any = None) -> None:
        """Draw the loads over their layer's mean, layers downwards and experts to the right, into a picture file.

        Args:
            path: the file; its ending chooses the format.
            group: see ``summary``; rank 0 of the group writes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        summary = self.summary(group)
        if _writes(group):
            _draw(Path(path), summary)


class _Counter(LayerHook):
    """Adds up what one layer's gate returns."""

    def __init__(self, layer: FMoE, mode: str) -> None:
        self.num_experts = layer.tot_expert
        self.training = {"training": True, "evaluation": False}.get(mode)
        first = next(layer.parameters(), None)
        # float64 holds every count and the weights of slots; one tensor, so that a step adds once.
        self.totals = torch.zeros(
            self.num_experts + len(_COUNTS),
            dtype=torch.float64,
            device=None if first is None else first.device,
        )
        # CUDA graphs refuse to run a step that writes to an input whose address may change.
        torch._dynamo.mark_static_address(self.totals)

    def __call__(
        self, layer: FMoE, x: Any, routing: Routing | SlotRouting, mask: Tensor | None = None
    ) -> None:
        if self.training not in (None, layer.training):
            return
        if self.totals.device != routing[0].device:
            raise RuntimeError(
                f"LoadMonitor: the layer must stay on {self.totals.device}, where it was when the monitor was made, "
                f"got tokens on {routing[0].device}. Make the monitor after model.to(device)."
            )
        add_up(self.totals, _count(routing, self.num_experts, mask))


@torch.no_grad()
def _count(routing: Routing | SlotRouting, num_experts: int, mask: Tensor | None) -> Tensor:
    """Loads and the numbers of ``_COUNTS`` of one call, ``[E + 5]`` float64. The token count may be symbolic.

    Masked tokens have no ids and weights in the routing.
    """
    first = routing[0]
    one = torch.ones(1, dtype=torch.float64, device=first.device)
    tokens = hide_masked(torch.ones_like(first[:, :1], dtype=torch.float64), mask).sum(0)  # [1]
    if isinstance(routing, SlotRouting):
        loads = routing.combine_weights.sum(0, dtype=torch.float64).view(num_experts, -1).sum(1)
        return torch.cat((loads, tokens, tokens, 0 * one, 0 * one, one))
    ids = routing.topk_ids
    loads = count_tokens(ids, num_experts).to(torch.float64)
    slots = tokens * ids.shape[1]
    if routing.num_rows is not None:
        slots = slots.clamp(max=routing.num_rows)
    unrouted = hide_masked((ids < 0).all(1).to(torch.float64), mask).sum(0, keepdim=True)
    return torch.cat((loads, tokens, slots, slots - loads.sum(), unrouted, one))


def _as_load(totals: Tensor, num_experts: int) -> LayerLoad:
    loads, counts = totals[:num_experts], totals[num_experts:].tolist()
    return LayerLoad(loads, *(round(count) for count in counts))


def _scalars(load: LayerLoad) -> dict[str, float]:
    """The numbers of a layer that are worth a curve."""
    return {
        "experts_per_token": load.experts_per_token,
        "dropped": load.dropped,
        "unrouted": load.unrouted,
        "max_over_mean": load.max_over_mean,
        "cv": load.cv,
        "entropy": load.entropy,
        "num_dead": float(len(load.dead)),
    }


def _writes(group: Any) -> bool:
    return group is None or torch.distributed.get_rank(group) == 0


def _append_csv(path: Path, step: int, summary: dict[str, LayerLoad]) -> None:
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = file.readline().rstrip("\r\n")
        if header and header != ",".join(_COLUMNS):
            raise ValueError(
                f"LoadMonitor.write_csv: path must be a new file or one of its own, got {path} which begins with "
                f"{header[:80]!r}. Pass another path."
            )
        writer = csv.writer(file)
        if not header:
            writer.writerow(_COLUMNS)
        for name, load in summary.items():
            values = [f"{value:.6g}" for value in list(_scalars(load).values())[:-1]]
            loads = " ".join(f"{value:.12g}" for value in load.loads.tolist())
            writer.writerow([step, name, load.tokens, *values, len(load.dead), loads])


def _open_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise ImportError(
            "LoadMonitor.write_tensorboard: tensorboard must be installed, got "
            f"{err}. Run: pip install tensorboard"
        ) from err
    return SummaryWriter(folder)


def _draw(path: Path, summary: dict[str, LayerLoad]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ImportError(
            f"LoadMonitor.heat_map: matplotlib must be installed, got {err}. Run: pip install matplotlib"
        ) from err
    width = max(len(load.loads) for load in summary.values())
    rows = [_balanced(load, width) for load in summary.values()]
    finite = [value for row in rows for value in row if not math.isnan(value)]
    size = (min(20.0, 3 + 0.22 * width), min(20.0, 1.6 + 0.32 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    top = max([2.0, *finite])
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=0, vmax=top)
    axes.set_yticks(range(len(rows)), list(summary))
    axes.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="load (1 = equal share)")
    figure.savefig(path, dpi=110)


def _balanced(load: LayerLoad, width: int) -> list[float]:
    """Loads over their mean; NaN, which is drawn as nothing, without loads and past the last expert."""
    mean = float(load.loads.mean())
    values: Iterator[float] = (value / mean if mean else math.nan for value in load.loads.tolist())
    return [*values, *[math.nan] * (width - len(load.loads))]
