"""Times of one expert-parallel layer from a cost model. Dimensions: see ``configuration.py``."""

from __future__ import annotations

from typing import NamedTuple

from moeops.cost.laws import ITEM_BYTES, HostCost, permute_bytes
from moeops.cost.model import CostModel
from moeops.cost.schedule import WEIGHTS_SHARE, LayerSizes, MlpSizes, schedule_of
from moeops.dispatch.degrees import Degrees
from moeops.planner.configuration import DISPATCHERS, FORMS, Choice, Configuration

CHUNKS = (1, 2, 4, 8)
COUNT_BYTES = 4


class Times(NamedTuple):
    """Seconds of one direction.

    Attributes:
        parts: by part of the layer, as if each ran alone; of all chunks together.
        device: of the whole on the device, overlap counted.
        total: the same, or the host's where that is more.
        hidden: of the exchange, the seconds that other work covers.
    """

    parts: dict[str, float]
    device: float
    total: float
    hidden: float


class Prediction(NamedTuple):
    """One choice and its times."""

    choice: Choice
    forward: Times
    backward: Times

    @property
    def total(self) -> float:
        """Seconds of forward and backward."""
        return self.forward.total + self.backward.total

    @property
    def host_bound(self) -> bool:
        """Whether the device waits for the host for a twentieth of the time or more."""
        device = self.forward.device + self.backward.device
        return self.total > 1.05 * device


class _Work(NamedTuple):
    """Seconds of one direction's steps: before and after the chunks, and of each chunk.

    ``late`` is what of a chunk's experts runs behind those of all chunks, while the last answers travel.
    """

    before: float
    pack: float
    exchange: float
    experts: float
    unpack: float
    after: float
    late: float = 0.0


def exchange_seconds(model: CostModel, config: Configuration, num_bytes: float, form: str) -> float:
    """One exchange of a buffer of ``num_bytes`` on the busiest rank."""
    if form == "flat":
        return model.all_to_all_seconds(num_bytes, config.ranks, config.local_ranks)
    return model.hierarchical_seconds(num_bytes, config.ranks, config.local_ranks, form)


def predict(model: CostModel, config: Configuration, choice: Choice) -> Prediction:
    """Predict the times of one layer.

    Raises:
        ValueError: the model lacks a part that this configuration needs.
    """
    name = "local" if _is_local(config, choice) else choice.dispatcher
    host = model.host_cost(config.mode, name)
    router = [
        model.router_seconds(
            config.num_tokens, config.d_model, config.num_experts, config.dtype, backward
        )
        for backward in (False, True)
    ]
    forward, end = _forward(model, config, choice, router[0], host)
    degrees = choice.degrees
    n_chunks = degrees.backward
    work = _backward_work(model, config, choice)
    # The weights' gradients of the chunks are added up: two reads and a write for each chunk more.
    weights = config.expert_parameters * ITEM_BYTES[config.dtype]
    sums = (n_chunks - 1) * model.memory_seconds(3 * weights) if n_chunks > 1 else 0.0
    if not degrees.are_equal:  # what the forward kept is joined, and cut anew
        sums += model.memory_seconds(4 * _kept_bytes(config, choice))
    span, hidden = _schedule(model, work, n_chunks, 0.0)
    early = _beside_router(model, config, choice, router[1])[1]
    device = span + sums + router[1] - early
    hidden += early
    ahead = max(0.0, forward.total - end)
    total = device
    if host is not None:
        total = max(device, host.backward.seconds(n_chunks) - ahead)
    parts = _parts(work, n_chunks, "combine", "dispatch")
    parts = {"router": router[1], **parts}
    parts["experts"] += sums
    return Prediction(choice, forward, Times(parts, device, total, hidden))


def _kept_bytes(config: Configuration, choice: Choice) -> float:
    """Rows that arrived and their pre-activations."""
    width = (config.num_projections - 1) * config.hidden
    rows = config.rows(choice.dispatcher) * width * ITEM_BYTES[config.dtype]
    return rows + config.num_tokens * config.row_bytes


def _forward(
    model: CostModel, config: Configuration, choice: Choice, router: float, host: HostCost | None
) -> tuple[Times, float]:
    """The forward, and when the host has queued it."""
    n_chunks = choice.degrees.forward
    work = _forward_work(model, config, choice)
    parts = {"router": router, **_parts(work, n_chunks, "dispatch", "combine")}
    if choice.dispatcher == "exact" and config.ranks > 1:
        # The device is idle from the copy of the counts until the host has queued something.
        counts = config.ranks * (2 * n_chunks + 2) * COUNT_BYTES
        copy = model.host_copy_seconds or 0.0
        wait = exchange_seconds(model, config, counts, choice.form) + copy
        parts["exchange"] += wait
        begin = router + wait
        first = 0.0 if host is None else max(0.0, host.first.seconds(n_chunks) - copy)
        queued = 0.0 if host is None else max(0.0, host.forward.seconds(n_chunks) - copy)
        span, hidden = _schedule(model, work, n_chunks, 0.0)
        total, _ = _schedule(model, work, n_chunks, first)
        times = Times(parts, begin + span, begin + max(total, queued), hidden)
        return times, begin + queued
    span, hidden = _schedule(model, work, n_chunks, 0.0)
    early = _beside_router(model, config, choice, router)[0]
    device = router + span - early
    hidden += early
    queued = 0.0
    if host is not None:
        queued = host.router.seconds(n_chunks) + host.forward.seconds(n_chunks)
    return Times(parts, device, max(device, queued), hidden), queued


def _is_local(config: Configuration, choice: Choice) -> bool:
    """Nothing is sent, and the block moves the rows itself."""
    return config.ranks == 1 and choice.dispatcher != "static"


def _beside_router(
    model: CostModel, config: Configuration, choice: Choice, router: float
) -> tuple[float, float]:
    """Seconds that the gate hides, forward and backward, where tokens are gathered while it works."""
    if choice.dispatcher != "gather" or config.ranks == 1:
        return 0.0, 0.0
    num_bytes = config.num_tokens * config.row_bytes
    seconds = model.gather_seconds(num_bytes, config.ranks, config.local_ranks)
    gather, scatter = (min(router, each) * (1 - (model.overlap_loss or 0.0)) for each in seconds)
    return gather, scatter


def _forward_work(model: CostModel, config: Configuration, choice: Choice) -> _Work:
    n_chunks = choice.degrees.forward
    rows = config.rows(choice.dispatcher)
    experts = _experts(model, config, rows / n_chunks, False)
    if _is_local(config, choice):
        return _Work(0.0, 0.0, 0.0, experts, 0.0, 0.0)
    tokens, pairs = config.num_tokens, config.num_pairs
    exchange = token_exchange_seconds(model, config, choice, n_chunks)
    if choice.dispatcher == "gather":  # the block moves rows
        return _Work(0.0, 0.0, exchange, experts, 0.0, 0.0)
    joined = 0.0
    if n_chunks > 1:
        joined_rows = rows if choice.dispatcher == "static" else tokens
        joined = model.memory_seconds(2 * joined_rows * config.row_bytes)
    if choice.dispatcher == "static":
        # Into buffers, and back into rows.
        padded = model.memory_seconds((pairs + rows) * config.row_bytes)
        moves = model.memory_seconds(permute_bytes(tokens, pairs, config.row_bytes))
        return _Work(moves + padded, 0.0, exchange, experts, 0.0, joined + padded + moves)
    moved = permute_bytes(tokens, config.sent_rows("exact"), config.row_bytes)
    part = model.memory_seconds(moved / n_chunks)
    return _Work(0.0, part, exchange, experts, part, joined)


def _backward_work(model: CostModel, config: Configuration, choice: Choice) -> _Work:
    """What the forward did, in reverse; static's weights' gradient reads the rows that came back once more."""
    n_chunks = choice.degrees.backward
    rows = config.rows(choice.dispatcher)
    experts = _experts(model, config, rows / n_chunks, True)
    if _is_local(config, choice):
        return _Work(0.0, 0.0, 0.0, experts, 0.0, 0.0)
    late = 0.0
    one_region = choice.dispatcher != "gather" or not choice.degrees.are_one
    if one_region and choice.form != "leader" and config.ranks > 1:
        late = WEIGHTS_SHARE * experts
        experts -= late
    tokens, pairs = config.num_tokens, config.num_pairs
    exchange = token_exchange_seconds(model, config, choice, n_chunks)
    if choice.dispatcher == "gather":
        return _Work(0.0, 0.0, exchange, experts, 0.0, 0.0, late)
    if choice.dispatcher == "static":
        moved = permute_bytes(tokens, pairs, config.row_bytes)
        padded = model.memory_seconds((pairs + rows) * config.row_bytes)
        before = model.memory_seconds(moved + pairs * config.row_bytes) + padded
        return _Work(
            before, 0.0, exchange, experts, 0.0, padded + model.memory_seconds(moved), late
        )
    moved = permute_bytes(tokens, config.sent_rows("exact"), config.row_bytes)
    part = model.memory_seconds(moved / n_chunks)
    return _Work(0.0, part, exchange, experts, part, 0.0, late)


def _experts(model: CostModel, config: Configuration, rows: float, backward: bool) -> float:
    return model.expert_seconds(
        rows,
        config.d_model,
        config.hidden,
        config.num_projections,
        config.dtype,
        backward,
        num_experts=config.local_experts,
    )


def token_exchange_seconds(
    model: CostModel, config: Configuration, choice: Choice, n_chunks: int = 1
) -> float:
    """One of so many chunks, the mean of both ways.

    The busiest rank receives what it sends back, so its rows count both ways. Ids and weights, or their gradients,
    travel one way.
    """
    if choice.dispatcher == "static":
        num_bytes = config.rows("static") * config.row_bytes
        return exchange_seconds(model, config, num_bytes / n_chunks, choice.form)
    token = config.row_bytes + config.choice_bytes / 2
    if choice.dispatcher == "gather":
        num_bytes = config.num_tokens * token / n_chunks
        return sum(model.gather_seconds(num_bytes, config.ranks, config.local_ranks)) / 2
    share = token / n_chunks
    if choice.form == "2d":
        return _by_node_seconds(model, config, share)
    return exchange_seconds(model, config, config.sent_rows("exact") * share, choice.form)


def by_node_bytes(config: Configuration, token_bytes: float) -> tuple[float, float]:
    """Bytes that leave a rank inside of its node and between nodes where a token goes to each node once."""
    local, nodes = config.local_ranks, config.nodes
    tokens = config.num_tokens * config.imbalance
    inside = tokens * config.reached(config.ranks) * token_bytes * (local - 1) / local
    return inside, tokens * config.reached(nodes) * token_bytes * (nodes - 1) / nodes


def _by_node_seconds(model: CostModel, config: Configuration, token_bytes: float) -> float:
    """Between nodes, then inside of them; what arrived is copied in between."""
    local, nodes = config.local_ranks, config.nodes
    near, far = by_node_bytes(config, token_bytes)
    seconds = model.link("inside_node").seconds(near, local - 1)
    seconds += model.link("between_nodes").seconds(far, nodes - 1)
    return seconds + model.memory_seconds(near + far)


def _parts(work: _Work, n_chunks: int, first: str, last: str) -> dict[str, float]:
    return {
        first: work.before + n_chunks * work.pack,
        "exchange": 2 * n_chunks * work.exchange,
        "experts": n_chunks * (work.experts + work.late),
        last: n_chunks * work.unpack + work.after,
    }


def _schedule(
    model: CostModel, work: _Work, n_chunks: int, first_expert: float
) -> tuple[float, float]:
    """Seconds until the end, and those of exchanges that run beside other work.

    Two queues, as the dispatchers fill them: all chunks are packed and sent, each is computed when it is there and goes
    back, each is unpacked when it is back. No expert starts before ``first_expert``. Where both queues are busy, the
    overlap loss of the shorter one's time is added.
    """
    compute, link = work.before, 0.0
    computing: list[tuple[float, float]] = []
    linking: list[tuple[float, float]] = []

    def run(busy: list[tuple[float, float]], begin: float, seconds: float) -> float:
        busy.append((begin, begin + seconds))
        return begin + seconds

    there, back = [], []
    for _ in range(n_chunks):
        compute = run(computing, compute, work.pack)
        link = run(linking, max(link, compute), work.exchange)
        there.append(link)
    for arrival in there:
        compute = run(computing, max(compute, arrival, first_expert), work.experts)
        link = run(linking, max(link, compute), work.exchange)
        back.append(link)
    compute = run(computing, compute, n_chunks * work.late)
    for arrival in back:
        compute = run(computing, max(compute, arrival), work.unpack)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in computing for b in linking)
    return compute + work.after + (model.overlap_loss or 0.0) * both, both


def auto_choices(model: CostModel, config: Configuration) -> list[Choice]:
    """What ``n_chunks=AutoChunks(cost_model=model, num_tokens=T)`` chooses for each dispatcher.

    Between nodes for those with a hierarchy: a layer without one does not know where its ranks are.
    """
    if config.ranks == 1 or config.local_ranks == 1 < config.nodes:
        return []
    form = "2d" if config.nodes > 1 else "flat"
    chosen = []
    for dispatcher in DISPATCHERS if form == "flat" else ("exact", "static"):
        mlps = MlpSizes(config.d_model, config.hidden, config.num_projections, config.dtype)
        sizes = LayerSizes(
            dispatcher,
            mlps,
            config.num_tokens,
            config.top_k * config.tensor_parallel,
            config.ranks,
            config.local_experts,
            config.capacity,
            config.local_ranks if form == "2d" else 0,
        )
        best = schedule_of(sizes, model).best()
        degrees = Degrees(best.forward, best.backward)
        chosen.append(
            Choice(dispatcher, degrees.forward if degrees.are_equal else (*degrees,), form)
        )
    return chosen


def choices(config: Configuration) -> list[Choice]:
    """Every choice that means something with these ranks."""
    if config.ranks == 1:
        return [Choice(dispatcher) for dispatcher in DISPATCHERS if dispatcher != "gather"]
    forms = FORMS if config.nodes > 1 and config.local_ranks > 1 else FORMS[:1]
    in_chunks = [
        Choice(dispatcher, n_chunks, form)
        for dispatcher in DISPATCHERS
        if dispatcher != "gather"
        for form in forms
        for n_chunks in CHUNKS
    ]
    return [*in_chunks, Choice("gather")]


def recommend(config: Configuration, predictions: list[Prediction]) -> tuple[Prediction, str]:
    """The choice to make, and why.

    The first of ``choices`` that is within one percent of the fastest, where static counts only if its capacity covers
    the imbalance, and gather if its rows do.
    """
    safe = [p for p in predictions if _keeps_all(config, p.choice.dispatcher)]
    fastest = min(p.total for p in safe)
    best = next(p for p in safe if p.total <= 1.01 * fastest)
    return best, _reason(config, predictions, best)


def _keeps_all(config: Configuration, dispatcher: str) -> bool:
    if dispatcher == "static":
        return config.capacity_factor >= config.imbalance
    return dispatcher == "exact" or config.kept_rows("gather") >= config.rows("gather")


def _reason(config: Configuration, predictions: list[Prediction], best: Prediction) -> str:
    """Compared with the other dispatcher, other numbers of chunks, and the flat exchange."""
    by_choice = {p.choice: p for p in predictions}
    rival: Prediction | None
    texts = []
    whys = {
        "exact": "exact waits for a copy of the counts to the host",
        "gather": "gather sends every token to every rank, and needs as many on each",
        "static": f"static computes and sends {config.capacity_factor:g} times the rows, whatever is in them",
    }
    if not _keeps_all(config, "static"):
        whys["static"] = (
            f"static would drop rows: its capacity is below the imbalance of {config.imbalance:g}"
        )
    for other, why in whys.items():
        rivals = [p for p in predictions if p.choice.dispatcher == other]
        if rivals and other != best.choice.dispatcher:
            rival = min(rivals, key=lambda p: p.total)
            more = 1e3 * (rival.total - best.total)
            texts.append(f"{rival.choice}: {more:+.3f} ms; {why}.")
    if config.ranks > 1 and best.choice.dispatcher != "gather":
        n_chunks = 2 if best.choice.n_chunks == 1 else 1
        rival = by_choice[best.choice._replace(n_chunks=n_chunks)]
        hidden = 1e3 * abs(
            best.forward.hidden + best.backward.hidden
            - rival.forward.hidden - rival.backward.hidden
        )  # fmt: skip
        more = 1e3 * (rival.total - best.total)
        what = (
            f"would hide {hidden:.3f} ms of the exchange"
            if n_chunks == 2
            else f"hides {hidden:.3f} ms less of the exchange"
        )
        texts.append(
            f"{rival.choice}: {more:+.3f} ms; it {what}, and calls, reads of the weights and host work are per chunk."
        )
    if best.choice.dispatcher == "gather":
        texts.append(
            "gather is right where all ranks have as many tokens: Auto(equal_tokens=True) takes it."
        )
    rival_form = "2d" if best.choice.form == "flat" else "flat"
    rival = by_choice.get(best.choice._replace(form=rival_form))
    if rival is not None:
        more = 1e3 * (rival.total - best.total)
        why = {
            "2d": "in two stages, rows travel inside the node and between nodes",
            "flat": "without stages, every rank of other nodes gets a message",
        }[rival_form]
        texts.append(f"{rival.choice}: {more:+.3f} ms; {why}.")
    return " ".join(texts)
