"""One PNG of a run: loss curves, and where each layer's tokens went."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lm.training import History

PANEL_COLUMNS = 4


def plot_run(path: Path, runs: dict[str, History], order0: float) -> None:
    """Draw losses by step and by time, and the expert load of the first run that has experts.

    Args:
        path: PNG file to write.
        runs: history by name; at most one has expert loads.
        order0: entropy of the held-out text in bits per byte.
    """
    load = next((history.load for history in runs.values() if history.load), [])
    num_layers = len(load[0][1]) if load else 0
    columns = min(PANEL_COLUMNS, max(1, num_layers))
    rows = math.ceil(num_layers / columns)
    figure = Figure(figsize=(11, 4.5 + 2.2 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[4.5] + [2.2] * rows)
    by_step, by_time = grid[0, :].subgridspec(1, 2).subplots(sharey=True)
    _plot_losses(by_step, runs, order0)
    _plot_losses_by_time(by_time, runs)
    if load:
        _plot_load(figure, grid, load, columns)
    figure.savefig(path, dpi=110)


def _plot_losses(axes, runs: dict[str, History], order0: float) -> None:
    for index, (name, history) in enumerate(runs.items()):
        color = f"C{index}"
        train = np.asarray(history.train)
        steps = np.arange(1, len(train) + 1)
        width = max(1, len(train) // 50)
        smooth = np.convolve(train, np.ones(width) / width, mode="valid")
        axes.plot(steps, train, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps[width - 1 :], smooth, color=color, linewidth=1.2, label=f"{name}: training")
        if history.held_out:
            held_out = np.asarray(history.held_out)
            axes.plot(*held_out.T, "o--", color=color, markersize=5, label=f"{name}: held-out")
    axes.axhline(order0, color="gray", linestyle=":", label=f"order-0 entropy, {order0:.2f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_losses_by_time(axes, runs: dict[str, History]) -> None:
    """What a user waits for: held-out losses beside the time of the training steps."""
    for index, (name, history) in enumerate(runs.items()):
        losses = dict(history.held_out)
        points = [(seconds, losses[step]) for step, seconds in history.seconds]
        axes.plot(
            *np.asarray(points).reshape(-1, 2).T,
            "o--",
            color=f"C{index}",
            markersize=5,
            label=f"{name}: held-out",
        )
    axes.set_xlabel("seconds of training steps")
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_load(figure, grid, load: list[tuple[int, list[list[float]]]], columns: int) -> None:
    steps = [step for step, _ in load]
    # Of each layer, which may have a number of experts of its own: [times, E], 1 is an equal share.
    shares = [np.asarray(times) for times in zip(*(layers for _, layers in load), strict=True)]
    balanced = [share * share.shape[1] for share in shares]
    highest = max(2.0, *(layer.max() for layer in balanced))
    panels = []
    for layer, values in enumerate(balanced):
        axes = figure.add_subplot(grid[1 + layer // columns, layer % columns])
        image = axes.imshow(
            values.T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=highest,
            extent=(0, steps[-1], -0.5, values.shape[1] - 0.5),
        )
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xlabel("step")
        if layer % columns == 0:
            axes.set_ylabel("expert")
        panels.append(axes)
    figure.colorbar(image, ax=panels, label="load (1 = equal share)")
