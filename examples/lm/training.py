"""The training loop: one compiled graph per step, validation, checkpoints, a clean stop on Ctrl-C."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import moeops
from lm.checkpoint import FORMAT, read_state, resuming
from lm.data import Batches
from lm.errors import UsageError
from lm.model import GPT, ModelConfig
from lm.parallel import ONE_RANK, Ranks, balance_over_ranks
from moeops import LoadMonitor
from moeops.distributed import (
    DistributedGroupedDataParallel,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)

BITS = 1 / math.log(2)  # nats to bits
LOG_EVERY = 10  # steps between two looks at the losses, which wait for the device
FINAL_LR = 0.1  # of the peak, at the end of the cosine


@dataclass(frozen=True)
class TrainConfig:
    """What a run does; a checkpoint goes on only with the same values.

    Attributes:
        batch: sequences per step.
        steps: optimizer steps.
        lr: peak learning rate: a short linear warm-up, then a cosine down to a tenth.
        weight_decay: of AdamW, on matrices only.
        aux_loss_weight: factor on the gates' auxiliary loss.
        dtype: ``float32``, or ``bfloat16`` for autocast with float32 weights.
        seed: of the weights and of the data order.
    """

    batch: int
    steps: int
    lr: float
    weight_decay: float
    aux_loss_weight: float
    dtype: str
    seed: int


@dataclass
class History:
    """What the plots show.

    Attributes:
        train: loss in bits per byte, one entry per step.
        held_out: pairs of step and bits per byte.
        seconds: pairs of the same steps and the time of all training steps so far, without validations and without the
            first step of each process, which compiles.
        load: pairs of step and the experts' shares since the pair before, ``[layers][E]``.
        dropped: pairs of step and the share of empty slots since the pair before, ``[layers]``.
        experts_per_token: the same for the mean number of experts.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[tuple[int, float]] = field(default_factory=list)
    load: list[tuple[int, list[list[float]]]] = field(default_factory=list)
    dropped: list[tuple[int, list[float]]] = field(default_factory=list)
    experts_per_token: list[tuple[int, list[float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        model: as trained so far.
        history: of the whole run, resumed parts included.
        finished: False after Ctrl-C.
        tokens_per_second: training steps of this process alone, without the first one, which compiles; 0 if none.
        start_up_seconds: the first step of this process.
        graphs: compiled by ``torch.compile`` in this process; 1 unless something broke or recompiled.
    """

    model: GPT
    history: History
    finished: bool
    tokens_per_second: float
    start_up_seconds: float
    graphs: int


class StopRequest:
    """Becomes true at the first Ctrl-C; the second one interrupts at once.

    Not so with several ranks: torchrun sends every Ctrl-C on, so that each rank gets two of them, and ends what has
    not ended by itself after half a minute.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self.requested = False
        self._patient = num_ranks > 1

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle SIGINT inside the block."""
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.requested:
            if self._patient:
                return
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("Ctrl-C: saving after this step; once more stops at once.")


class Stopwatch:
    """Adds up the time and the steps between ``start`` and ``stop``."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self.steps = 0
        self._device = device
        self._begin = 0.0

    def start(self) -> None:
        """Begin a stretch, the device's queue being empty."""
        self._wait()
        self._begin = time.perf_counter()

    def stop(self, steps: int) -> None:
        """End a stretch of ``steps`` steps once the device has finished them."""
        self._wait()
        self.seconds += time.perf_counter() - self._begin
        self.steps += steps

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rate of a step counted from 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, decaying matrices and expert weights but not norms and biases."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def make_step(model: GPT, config: TrainConfig, device: torch.device, *, compiled: bool) -> Callable:
    """The function from tokens and targets to both losses, one graph when ``compiled``."""
    low_precision = config.dtype == "bfloat16"

    def losses(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            return model.losses(tokens, targets)

    return torch.compile(losses, fullgraph=True, dynamic=False) if compiled else losses


@torch.no_grad()
def evaluate(
    model: GPT, losses: Callable, windows: list[tuple[Tensor, Tensor]], ranks: Ranks
) -> float:
    """Held-out loss in bits per byte, over all ranks' windows. Eager mode, which saves a second compilation."""
    device = windows[0][0].device
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # a gate that draws random numbers draws the same ones each time
        total = sum(losses(tokens, targets)[0].item() for tokens, targets in windows)
    model.train()
    return (
        float(ranks.mean(torch.tensor(total, dtype=torch.float64, device=device)))
        / len(windows)
        * BITS
    )


class Trainer:
    """One model, its data and its checkpoint.

    Args:
        name: shown beside the progress bar.
        model_config: sizes of the model.
        config: what the run does.
        batches: where the data comes from.
        windows: fixed held-out batches.
        fingerprint: of the text.
        checkpoint: folder to write, and to read when ``resume``.
        device: where to train.
        compiled: use ``torch.compile``.
        eval_every: steps between two validations, each of which also saves a checkpoint.
        resume: go on from ``checkpoint``.
        saves: write ``checkpoint``.
        ranks: the processes that train together; ``batches`` and ``windows`` are this one's share.
        expert_parallel: divide the experts among the ranks.
        num_shards: with ``expert_parallel``, ranks that share the hidden units of each expert.
    """

    def __init__(
        self,
        name: str,
        model_config: ModelConfig,
        config: TrainConfig,
        batches: Batches,
        windows: list[tuple[Tensor, Tensor]],
        fingerprint: str,
        checkpoint: Path,
        device: torch.device,
        *,
        compiled: bool,
        eval_every: int,
        resume: bool,
        saves: bool = True,
        ranks: Ranks = ONE_RANK,
        expert_parallel: bool = False,
        num_shards: int = 1,
    ):
        self._name = name
        self._config = config
        self._batches = batches
        self._windows = windows
        self._checkpoint = checkpoint
        self._saves = saves
        self._device = device
        self._compiled = compiled
        self._eval_every = eval_every
        self._identity = {**asdict(model_config), **asdict(config), "text": fingerprint}
        self._step = 0
        self._history = History()
        self._pending: list[Tensor] = []  # losses that still live on the device
        self._ranks = ranks
        divided = expert_parallel and ranks.size > 1 and model_config.gate is not None
        torch.manual_seed(config.seed)
        whole = None
        try:
            self._model = GPT(model_config)
            if divided:
                whole, self._model = self._model, GPT(model_config, ranks.size, num_shards)
        except (ValueError, TypeError) as err:
            raise UsageError(f"the options must fit each other, got: {err}") from err
        if whole is not None and not resume:
            self._start_as(whole)
        self._model.to(device)
        self._parallel = None
        if ranks.size > 1:
            balance_over_ranks(self._model, ranks)
            self._parallel = DistributedGroupedDataParallel(self._model)
            torch.manual_seed(config.seed + 1 + ranks.rank)  # gates draw for other tokens
        self._optimizer = make_optimizer(self._model, config)
        self._monitor = None if model_config.gate is None else LoadMonitor(self._model)
        if resume:
            self._load()

    def _start_as(self, whole: GPT) -> None:
        """Take the weights that one rank draws: saved once, and cut for these ranks like any checkpoint."""
        start = self._checkpoint.with_name(f"{self._checkpoint.name}.start")
        save_checkpoint(start, whole)
        load_checkpoint(start, self._model)
        if self._ranks.is_first:
            shutil.rmtree(start)

    @property
    def model(self) -> GPT:
        """The model in its present state."""
        return self._model

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    def run(self, stop: StopRequest) -> Result:
        """Train to the last step or to Ctrl-C; the checkpoint is written either way, if it is at all."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager = make_step(self._model, self._config, self._device, compiled=False)
        losses = eager
        if self._compiled:
            losses = make_step(self._model, self._config, self._device, compiled=True)
        stopwatch = Stopwatch(self._device)
        earlier = self._history.seconds[-1][1] if self._history.seconds else 0.0
        start_up = 0.0
        steps = self._config.steps
        bar = tqdm(
            total=steps,
            initial=self._step,
            desc=self._name,
            unit="step",
            dynamic_ncols=True,
            disable=not self._ranks.is_first,
        )
        with bar:
            while self._step < steps and not self._ranks.any(stop.requested, self._device):
                if start_up == 0.0:  # the first step compiles and is not part of the speed
                    first = Stopwatch(self._device)
                    first.start()
                    self._train_step(losses)
                    first.stop(1)
                    start_up = first.seconds
                    bar.update()
                else:
                    self._train_some(losses, stopwatch, stop, bar)
                self._flush()
                if self._step % self._eval_every == 0 or self._step == steps:
                    held_out = evaluate(self._model, eager, self._windows, self._ranks)
                    self._history.held_out.append((self._step, held_out))
                    self._history.seconds.append((self._step, earlier + stopwatch.seconds))
                    self._save()
                bar.set_postfix_str(self._describe(stopwatch))
        if self._step < steps:
            self._save()
        return Result(
            model=self._model,
            history=self._history,
            finished=self._step >= steps,
            tokens_per_second=self._tokens_per_second(stopwatch),
            start_up_seconds=start_up,
            graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
        )

    def _train_some(
        self, losses: Callable, stopwatch: Stopwatch, stop: StopRequest, bar: tqdm
    ) -> None:
        """Train up to the next step at which something is looked at."""
        every = math.gcd(LOG_EVERY, self._eval_every)
        first = self._step
        stopwatch.start()
        while True:
            self._train_step(losses)
            bar.update()
            if self._step % every == 0 or self._step == self._config.steps:
                break
            if stop.requested and self._ranks.size == 1:  # several must stop at the same step
                break
        stopwatch.stop(self._step - first)

    def _train_step(self, losses: Callable) -> None:
        rate = learning_rate(self._step, self._config.steps, self._config.lr)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, auxiliary = losses(*self._batches.train(self._step))
        except RuntimeError as err:  # on CPU the router refuses NaN before the loss shows it
            if "logits must be finite" not in str(err):
                raise
            raise _diverged(self._step) from err
        (loss + self._config.aux_loss_weight * auxiliary).backward()
        if self._parallel is not None:
            self._parallel.allreduce_gradients()
        clip_grad_norm_(self._model, 1.0)
        self._optimizer.step()
        moeops.update_gates(self._model, (self._step + 1) / self._config.steps)
        self._optimizer.zero_grad()
        self._pending.append(loss.detach())
        self._step += 1

    def _flush(self) -> None:
        """Move losses from the device into the history, and the load at every tenth step."""
        values = (self._ranks.mean(torch.stack(self._pending)) * BITS).tolist()
        self._pending.clear()
        self._history.train.extend(values)
        if not math.isfinite(values[-1]):
            raise _diverged(self._step)
        if self._monitor is not None and (
            self._step % LOG_EVERY == 0 or self._step == self._config.steps
        ):
            self._log_load(self._monitor)

    def _log_load(self, monitor: LoadMonitor) -> None:
        """Move what the gates did from the device into the history."""
        group = torch.distributed.group.WORLD if self._ranks.size > 1 else None
        layers = monitor.summary(group).values()
        monitor.reset()
        shares = [(layer.loads / layer.loads.sum().clamp(min=1)).tolist() for layer in layers]
        self._history.load.append((self._step, shares))
        self._history.dropped.append((self._step, [layer.dropped for layer in layers]))
        per_token = [layer.experts_per_token for layer in layers]
        self._history.experts_per_token.append((self._step, per_token))

    def _describe(self, stopwatch: Stopwatch) -> str:
        recent = self._history.train[-LOG_EVERY:]
        parts = [f"{sum(recent) / len(recent):.3f} bits/byte"]
        if stopwatch.steps:
            parts.append(f"{self._tokens_per_second(stopwatch):,.0f} tokens/s")
        if self._history.load:
            shares = [share for layer in self._history.load[-1][1] for share in layer]
            parts.append(f"expert load {min(shares):.0%} to {max(shares):.0%}")
        if self._history.held_out:
            parts.append(f"held-out {self._history.held_out[-1][1]:.3f}")
        return ", ".join(parts)

    def _tokens_per_second(self, stopwatch: Stopwatch) -> float:
        tokens = stopwatch.steps * self._config.batch * self._model.config.context
        return tokens / stopwatch.seconds if stopwatch.steps else 0.0

    def _save(self) -> None:
        """Write the whole model, wherever its experts are, and what else it takes to go on; all ranks take part."""
        if not self._saves:
            return
        ranks = self._ranks
        random_state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self._device)
        monitor = {} if self._monitor is None else self._monitor.state_dict()
        state = {
            "format": FORMAT,
            "config": self._identity,
            "step": self._step,
            "monitor": {name: ranks.mean(totals) * ranks.size for name, totals in monitor.items()},
            "history": asdict(self._history),
            "random_state": ranks.gather(random_state),
        }
        save_checkpoint(self._checkpoint, self._model, self._optimizer, state)

    def _load(self) -> None:
        ranks = self._ranks
        state = read_state(self._checkpoint, self._identity)
        with resuming(self._checkpoint):
            load_checkpoint(self._checkpoint, self._model, self._optimizer)
        self._step = state["step"]
        if self._monitor is not None and ranks.is_first:  # the counters are those of all ranks
            self._monitor.load_state_dict(state["monitor"])
        self._history = History(**state["history"])
        if len(state["random_state"]) != ranks.size:
            return  # ranks that were not there before go on from the seed
        random_state = state["random_state"][ranks.rank]
        torch.set_rng_state(random_state["cpu"])
        if self._device.type == "cuda" and "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self._device)


def _diverged(step: int) -> UsageError:
    return UsageError(f"the loss must stay finite, got something else at step {step}. Lower --lr.")
