"""The pass over hand-made graphs of a backward, and the division of gradients among windows; no ranks are needed."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from cases import each
from moeops.comm import RankGroup
from moeops.compile import explain
from moeops.compile.explain import known_bytes
from moeops.compile.gradient_slices import GradientSlices
from moeops.compile.windows import schedule_by, windows_of
from moeops.cost.laws import BytesLaw
from moeops.cost.model import CostModel
from moeops.cost.schedule import MlpSizes
from moeops.cost.slices import bytes_within, plan_slices
from moeops.dispatch import ExpertRanks, Gather
from moeops.dispatch.degrees import Degrees
from moeops.dispatch.options import build_dispatcher

C10D = torch.ops._c10d_functional
SEND, REDUCE, WAIT = (
    C10D.all_to_all_single.default, C10D.all_reduce.default, C10D.wait_tensor.default,
)  # fmt: skip
TOGETHER = C10D.all_reduce_coalesced.default
MIB = 1 << 20
MODEL = CostModel.from_rates(
    products_per_second=1e12,
    link_bytes_per_second=1e10,
    message_seconds=1e-6,
    memory_bytes_per_second=1e12,
    dtypes=("float32",),
)


class Backward:
    """A graph of one layer after another: each has dense gradients before it and exchanges rows there and back."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.returned: list[Node] = []
        self.saved = self._value(self.graph.placeholder("saved"), 4, 4)
        self.rows = self._value(self.graph.placeholder("tangents"), 4, 4)

    def _value(self, node: Node, *shape: int) -> Node:
        with self.mode:
            node.meta["val"] = torch.empty(*shape)
        return node

    def call(self, target, *args, shape=(4, 4), layer=None) -> Node:
        node = self._value(self.graph.call_function(target, args), *shape)
        if layer is not None:
            node.meta["fwd_nn_module_stack"] = {"0": ("model", nn.Module), layer: ("l", nn.Module)}
        return node

    def dense(self, *shapes, late: bool = False) -> list[Node]:
        """Gradients of parameters, averaged as ``average_gradient`` does unless that is to come."""
        grads = []
        for shape in shapes:
            grad = self.call(torch.ops.aten.outer.default, self.rows, self.saved, shape=shape)
            grads.append(grad)
            if not late:
                self.average(grad)
        return grads

    def average(self, grad: Node) -> None:
        shape = grad.meta["val"].shape
        grad = self.call(torch.ops.aten.div.Tensor, grad, 2, shape=shape)
        start = self.call(REDUCE, grad, "sum", "data", shape=shape)
        self.returned.append(self.call(WAIT, start, shape=shape))

    def exchange(self, rows: Node, layer: str) -> Node:
        sent = self.call(SEND, rows, [2, 2], [2, 2], "experts", layer=layer)
        return self.call(WAIT, sent, layer=layer)

    def layer(self, name: str) -> None:
        inside = self.exchange(self.rows, name)
        self.rows = self.exchange(self.call(torch.ops.aten.neg.default, inside, layer=name), name)

    def run(self, rewrite: GradientSlices) -> int:
        self.graph.output((*self.returned, self.rows))
        return rewrite(self.graph)

    def order(self) -> list[str]:
        names = {SEND: "send", REDUCE: "sum", TOGETHER: "sums", WAIT: "wait"}
        return [names[node.target] for node in self.graph.nodes if node.target in names]

    def summed(self) -> list[list[int]]:
        """Elements in each collective that sums."""
        found = []
        for node in self.graph.nodes:
            if node.target in (REDUCE, TOGETHER):
                values = node.args[0] if node.target is TOGETHER else [node.args[0]]
                found.append([value.meta["val"].numel() for value in values])
        return found


def two_layers() -> Backward:
    backward = Backward()
    backward.dense((3,), (4,))
    backward.layer("last")
    backward.dense((5,))
    backward.layer("first")
    backward.dense((6,), (7,))
    return backward


def test_slices_stand_behind_the_dispatch_and_waits_before_the_output():
    backward = two_layers()
    shapes = [node.meta["val"].shape for node in backward.returned]
    assert backward.run(GradientSlices()) == 5
    assert backward.order() == [
        *["send", "sums", "wait", "send", "wait"],
        *["send", "sum", "wait", "send", "wait"],
        *["sums", *["wait"] * 5],
    ]
    assert backward.summed() == [[3, 4], [5], [6, 7]]
    *returned, rows = next(n for n in backward.graph.nodes if n.op == "output").args[0]
    assert [node.meta["val"].shape for node in returned] == shapes
    assert rows.target is WAIT
    items = [n.meta["val"].shape for n in backward.graph.nodes if n.target is operator.getitem]
    assert items == [(3,), (4,), (6,), (7,)]


def test_gradients_are_summed_when_they_are_known_and_not_where_autograd_averages_them():
    backward = Backward()
    grads = backward.dense((3,), (4,), late=True)
    backward.layer("last")
    grads += backward.dense((5,), late=True)
    backward.layer("first")
    for grad in grads:
        backward.average(grad)
    assert backward.run(GradientSlices()) == 3
    assert backward.summed() == [[3, 4], [5]]
    assert "".join(name[0] for name in backward.order()[:4]) == "ssws"
    order = list(backward.graph.nodes)
    assert [node.target for node in order[2:6]] == [
        torch.ops.aten.outer.default, torch.ops.aten.div.Tensor,
    ] * 2  # fmt: skip


def test_windows_decide_what_a_slice_holds():
    """With 1 s per byte, the first gradient's 12 bytes fit the first window, and nothing fits the next."""
    law = BytesLaw(0.0, 1.0)
    backward = two_layers()
    assert backward.run(GradientSlices(law, [12.0, 0.0])) == 5
    assert backward.summed() == [[3], [4, 5], [6, 7]]
    assert backward.order()[:3] == ["send", "sum", "wait"]
    # What was known before the last layer's combine begins behind that.
    assert backward.order()[5:9] == ["send", "wait", "send", "sums"]
    with pytest.raises(ValueError, match=r"one for each of the 2 layers .* got 3"):
        two_layers().run(GradientSlices(law, [1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"windows must be at least 0, got -1"):
        GradientSlices(law, -1.0)


def test_large_gradients_are_cut_into_rows():
    backward = Backward()
    backward.dense((8, MIB), (2,))
    backward.layer("last")
    backward.dense((4,))
    backward.layer("first")
    law = BytesLaw(0.0, 1.0)
    assert backward.run(GradientSlices(law, [2.5 * 4 * MIB, 1e9])) == 3
    assert backward.summed() == [[2 * MIB], [6 * MIB, 2, 4]]
    joined = [node for node in backward.graph.nodes if node.target is torch.ops.aten.cat.default]
    assert [node.meta["val"].shape for node in joined] == [(8, MIB)]


def without_layers() -> Backward:
    backward = Backward()
    backward.dense((3,), (4,))
    return backward


def without_gradients() -> Backward:
    backward = Backward()
    backward.layer("only")
    return backward


def with_one_way() -> Backward:
    """An exchange whose rows do not come back: no layer of experts."""
    backward = Backward()
    backward.dense((3,))
    backward.rows = backward.exchange(backward.rows, "gate")
    return backward


def with_sums_that_are_read() -> Backward:
    backward = Backward()
    backward.dense((4, 4))
    backward.rows = backward.call(torch.ops.aten.add.Tensor, backward.rows, backward.returned[0])
    backward.layer("only")
    return backward


def with_another_reduction() -> Backward:
    backward = Backward()
    grad = backward.call(torch.ops.aten.outer.default, backward.rows, backward.saved, shape=(3,))
    start = backward.call(REDUCE, grad, "max", "data", shape=(3,))
    backward.returned.append(backward.call(WAIT, start, shape=(3,)))
    backward.layer("only")
    return backward


@each(
    "make",
    [
        without_layers,
        without_gradients,
        with_one_way,
        with_sums_that_are_read,
        with_another_reduction,
    ],
    ids=lambda make: make.__name__,
)
def test_near_misses_are_left_as_they_are(make):
    backward = make()
    before = [(node.op, node.target, node.args) for node in backward.graph.nodes]
    assert backward.run(GradientSlices()) == 0
    after = [(node.op, node.target, node.args) for node in backward.graph.nodes]
    assert after[:-1] == before


def test_casts_behind_a_wait_move_with_it():
    backward = Backward()
    (grad,) = backward.dense((3,))
    cast = torch.ops.prims.convert_element_type.default
    backward.returned = [backward.call(cast, backward.returned[0], torch.bfloat16, shape=(3,))]
    backward.layer("only")
    assert backward.run(GradientSlices()) == 1
    assert backward.order() == ["send", "sum", "wait", "send", "wait", "wait"]
    assert grad.users


def test_models_that_reduce_elsewhere_are_refused():
    class Inside(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(ValueError, match="got DistributedDataParallel as '0', which averages"):
        GradientSlices.check(nn.Sequential(Inside()))


def test_ddp_that_skips_what_the_graph_averages_is_none_that_reduces_it():
    class Inside(nn.parallel.DistributedDataParallel):
        def __init__(self, module, skipped):
            nn.Module.__init__(self)
            self.module, self.parameters_to_ignore = module, skipped

    model = averaging_model()
    GradientSlices.check(
        Inside(model, {f"module.{name}" for name, _ in model.module.named_parameters()})
    )
    with pytest.raises(ValueError, match="got DistributedDataParallel as 'the model', which"):
        GradientSlices.check(Inside(model, {"module.0.weight"}))


class Averaging(nn.Module):
    """What ``DistributedGroupedDataParallel(in_graph=True)`` says of itself."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self.averaged_in_graph = {name: RankGroup("data", 2, 0) for name in names}


def averaging_model(n_chunks=(4, 3)) -> Averaging:
    """Dense layers of 3, 5 and 7 numbers around two layers of experts, whose gates have 2 each."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            ranks = ExpertRanks("FMoE", 4, RankGroup("experts", 2, 0), top_k=2)
            mlps = MlpSizes(64, 256, 3, "float32")
            self.dispatcher = build_dispatcher(Gather(n_chunks=n_chunks, mlps=mlps), ranks)
            self.gate, self.expert = (nn.Parameter(torch.zeros(n)) for n in (2, 100))

    dense = [nn.Linear(n - 1, 1) for n in (3, 5, 7)]
    names = [f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")]
    module = nn.Sequential(dense[0], Layer(), dense[1], Layer(), dense[2])
    return Averaging(module, [*names, "1.gate", "3.gate"])


def test_windows_are_those_of_the_cost_model():
    model = averaging_model()
    found = windows_of("options", model, MODEL, 4096)
    schedules = [
        schedule_by(layer.dispatcher, MODEL, 4096) for layer in (model.module[3], model.module[1])
    ]
    assert found.seconds == tuple(one.backward.window(3) for one in schedules)
    assert found.seconds[0] > 0
    assert found.law == MODEL.all_reduce_law(2)
    others = windows_of("options", model, MODEL, 4096, Degrees(1, 1)).seconds
    assert others == tuple(one.backward.undivided().window(1) for one in schedules) != found.seconds
    for wrong, message in (
        (model.module, "got none that is"),
        (Averaging(nn.Linear(2, 2), ["weight"]), "got no layer that exchanges rows"),
    ):
        with pytest.raises(ValueError, match=f"options: gradients must be averaged .* {message}"):
            windows_of("options", wrong, MODEL, 4096)
    with pytest.raises(ValueError, match=r"cost_model must know every layer .* knows 'module.3'"):
        windows_of("options", model)


def test_explain_says_what_slices_hold():
    model = averaging_model()
    # Behind the gate of a layer nothing of it is left to run beside.
    assert known_bytes(model) == [4 * 7, 4 * (5 + 2), 4 * (3 + 2)]
    text = explain(model, cost_model=MODEL, num_tokens=4096)
    law, windows = windows_of("options", model, MODEL, 4096)
    plan = plan_slices(known_bytes(model), (*windows, 0.0), law)
    assert "gradient slices: 0.000 MiB averaged among 2 ranks, alone " in text
    for name, size, window in zip("31", plan.num_bytes, windows, strict=False):
        seconds = f"{1e3 * law.seconds(size):.3f} ms in a window of {1e3 * window:.3f} ms"
        assert f"  behind the dispatch of module.{name}: 0.000 MiB, {seconds}\n" in text
    assert text.splitlines()[-1].startswith("  behind all layers: ")
    assert explain(model).endswith("ranks\n  no cost model")
    assert "gradient slices" not in explain(model.module, cost_model=MODEL, num_tokens=4096)


def test_the_cache_knows_law_and_windows():
    law = BytesLaw(1.0, 2.0)
    one, same = GradientSlices(law, [1.0]), GradientSlices(BytesLaw(1.0, 2.0), (1.0,))
    assert one.uuid() == same.uuid()
    assert one.uuid() != GradientSlices(law, [2.0]).uuid()
    assert one.uuid() != GradientSlices(BytesLaw(1.0, 3.0), [1.0]).uuid()


@each(
    ("known", "windows", "call", "per_byte"),
    [
        ((3, 2, 4), (2.5, 9.0, 1.0), 0.5, 1.0),
        ((0, 5, 0), (9.0, 1.0, 2.0), 1.0, 0.5),
        ((4, 0, 3), (0.0, 0.0, 0.0), 1.0, 1.0),
        ((1, 6), (20.0, 0.0), 0.3, 0.7),
        ((5, 1, 1), (3.1, 0.2, 1.4), 0.0, 0.9),
    ],
)
def test_plan_is_the_best_of_all(known, windows, call, per_byte):
    law = BytesLaw(call, per_byte)
    total = sum(known)

    def exposed(sizes) -> float:
        pairs = zip(sizes, windows, strict=True)
        return sum(max(0.0, law.seconds(size) - window) for size, window in pairs if size)

    possible = [
        sizes
        for sizes in itertools.product(range(total + 1), repeat=len(known))
        if sum(sizes) == total
        and all(sum(sizes[:n]) <= sum(known[:n]) for n in range(1, len(known)))
    ]
    plan = plan_slices(known, windows, law, units=total)
    best = min(map(exposed, possible))
    assert plan.exposed_seconds == pytest.approx(best)
    assert exposed([round(size) for size in plan.num_bytes]) == pytest.approx(best)


def test_edges_of_a_plan():
    law = BytesLaw(1.0, 0.5)
    assert plan_slices([0.0, 0.0], [1.0, 1.0], law).num_bytes == (0.0, 0.0)
    with pytest.raises(ValueError, match="as many as known_bytes, at least 1, got 2 and 1"):
        plan_slices([1.0], [1.0, 2.0], law)
    assert [bytes_within(law, seconds) for seconds in (0.5, 1.0, 3.0)] == [0.0, 0.0, 4.0]
    assert bytes_within(BytesLaw(1.0, 0.0), 2.0) == float("inf")


def test_law_of_an_all_reduce():
    model = CostModel.from_rates(
        products_per_second=1.0, link_bytes_per_second=10.0, message_seconds=0.25
    )
    law = model.all_reduce_law(4)
    assert law.seconds(0) == 6 * 0.25
    assert law.seconds(100.0) == pytest.approx(1.5 + 2 * 75.0 / 10)
    assert model.all_reduce_law(1) == BytesLaw(0.0, 0.0)
    with pytest.raises(ValueError, match="between_nodes"):
        model.all_reduce_law(4, 2)
