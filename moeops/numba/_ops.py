"""Turn a signature and a function into a ``torch.library`` op: schema, CPU, CUDA, fake, gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops.numba import _launch, _loops
from moeops.numba._rules import Rule
from moeops.numba._signature import KINDS, Signature
from moeops.ops._library import has_tangent

_MAX_PLANS = 256  # per op
_KIND_TEXT = {
    "float": "float64, float32, bfloat16 or float16",
    "int": "int32 or int64",
    "bool": "bool",
}
_NUMBERS = {"int": int, "float": float, "bool": bool}
_REGISTERED: dict[str, Op] = {}

GradientFunction = Callable[
    [Mapping[str, Tensor | None], Mapping[str, Any], Mapping[str, Tensor]],
    Mapping[str, Tensor | None],
]


class _Library(torch.library.Library):
    """A library whose gradients refuse tangents, which torch would drop without an error."""

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        """Register a kernel, the gradient's with the refusal around it."""
        if dispatch_key == "Autograd":
            fn = self._without_tangents(f"{self.ns}::{op_name}", fn)
        return super().impl(op_name, fn, dispatch_key, **options)

    def _without_tangents(self, op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(keyset: Any, *args: Any, **options: Any) -> Any:
            if has_tangent(args):
                raise NotImplementedError(
                    f"{op}: arguments must have no tangent of forward-mode AD (torch.func.jvp), got one. A prototype "
                    "has a backward only: use torch.autograd.grad."
                )
            return kernel(keyset, *args, **options)

        return run


class Buffer(NamedTuple):
    """An output or scratch space as the kernel writes it, and the type in which it is returned."""

    shape: list[int]
    dtype: torch.dtype
    final: torch.dtype


class Plan(NamedTuple):
    """What a CUDA call needs and sizes, types and numbers decide, found out and checked at the first such call."""

    device: torch.device
    launcher: _launch.Launcher | None  # None where there is nothing to compute
    packed: list[Any]  # parameters, addresses to be filled in
    addresses: list[int]  # their places: inputs in the order of the call, then outputs
    buffers: list[Buffer]
    geometry: _launch.Geometry


class Op:
    """What the decorators return: call it like the op, or use ``torch.ops.<namespace>.<name>``.

    Attributes:
        name: ``"namespace::name"``.
        signature: what the signature string says.
        debug: check indices on CPU, and values also on CUDA; may be set. Starts true where the environment has
            ``MOEOPS_DEBUG_CHECKS=1``.
    """

    overload: Any
    row_threads = 128  # per block of a row rule
    finite: tuple[str, ...] = ()  # inputs in which NaN and infinity are errors
    cast: Mapping[
        torch.dtype, torch.dtype
    ] = {}  # types of tensors that the kernel gets in another type
    _library: Any

    def __init__(
        self, name: str, rule: Rule, signature: Signature, parameters: Sequence[str], replace: bool
    ) -> None:
        self.name = name
        self.rule = rule
        self.signature = signature
        self.parameters = tuple(parameters)  # of the CUDA kernel, in its order
        self.kernel = _launch.Kernel(name, self._build, rule.failed)
        self.debug = _loops.DEBUG
        self.poison = False  # fill outputs so that an unwritten element shows; set by check()
        self._gradient: Callable[..., Any] | None = None
        self._saves: tuple[str, ...] = ()
        # Places among inputs, then outputs: what is saved, the numbers, and what has no gradient.
        self._saved: list[int] = []
        self._numbers = [
            (place, item.name) for place, item in enumerate(signature.inputs) if not item.dims
        ]
        self._whole = [
            place
            for place, output in enumerate(signature.returned, len(signature.inputs))
            if not signature.is_float(output)
        ]
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self.replaced = replace
        self._defaults = tuple(item.default for item in signature.inputs)
        self._call = inspect.Signature(
            [
                inspect.Parameter(
                    item.name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=inspect.Parameter.empty if default is None else default,
                )
                for item, default in zip(signature.inputs, self._defaults, strict=True)
            ]
        )
        self.__doc__ = rule.function.__doc__
        self.__module__ = rule.function.__module__
        self.__name__ = rule.function.__name__
        self._register(replace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op: one tensor, or a tuple of tensors."""
        return self.overload(*args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The arguments of a call in the order of the schema, with the defaults filled in."""
        try:
            bound = self._call.bind(*args, **kwargs)
        except TypeError as err:
            raise TypeError(
                f"{self.name}: a call must have the arguments {self.signature.schema(self.name)}, got {len(args)} by "
                f"position and {list(kwargs)} by name: {err}. Check the call."
            ) from None
        bound.apply_defaults()
        return list(bound.arguments.values())

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the CUDA kernel of this op under Numba's simulator, on CPU tensors.

        Raises:
            RuntimeError: the process was not started with ``NUMBA_ENABLE_CUDASIM=1``.
        """

        def run(arguments: list[Any], sizes: Mapping[str, int]) -> None:
            geometry = self._geometry(sizes)
            if 0 not in geometry[0]:
                grid, block, shared = geometry
                self.kernel.dispatcher(cuda)[grid, block, 0, shared](*self._ordered(arguments))

        cuda = _launch.import_simulator()
        return self._on_host(self.bind(*args, **kwargs), run)

    def _on_host(
        self, values: Sequence[Any], run: Callable[[list[Any], Mapping[str, int]], None]
    ) -> Any:
        """Check a call and let ``run`` compute it on NumPy views of inputs and outputs, given the sizes too."""
        sizes, buffers = self._buffers(values)
        outputs = self._allocate(buffers, torch.device("cpu"))
        run([_loops.as_numpy(value) for value in (*self._arguments(values), *outputs)], sizes)
        return self._finish(outputs, buffers)

    def kernel_arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What the CUDA kernel is called with, outputs included, for this call."""
        values = self.bind(*args, **kwargs)
        _, buffers = self._buffers(values)
        device = self._first(values).device
        return self._ordered((*self._arguments(values), *self._allocate(buffers, device)))

    def __repr__(self) -> str:
        return f"<moeops.numba op {self.signature.schema(self.name)} from {self.rule.where}>"

    def gradient(
        self, function: GradientFunction | None = None, *, saves: Sequence[str] | None = None
    ) -> Any:
        """Decorator: the gradient as a function of plain PyTorch and ops, which is traced under a compiler.

        It is called as ``function(grads, inputs, outputs)`` with gradients of the outputs by name (``None`` where
        there is none), the op's inputs and outputs by name, and returns gradients of inputs by name.

        Args:
            function: the gradient.
            saves: names of the tensors it needs; ``None`` for all.

        Raises:
            ValueError: the op has a gradient already, or ``saves`` names something else than tensors.
        """

        def add(function: GradientFunction) -> GradientFunction:
            tensors = self.signature.tensor_names
            chosen = tuple(tensors if saves is None else saves)
            unknown = [name for name in chosen if name not in tensors]
            if unknown:
                raise ValueError(
                    f"{self.name}: saves must name tensors out of {list(tensors)}, got {unknown}. Remove them."
                )
            self._set_gradient(function, chosen)
            return function

        return add if function is None else add(function)

    def _set_gradient(self, function: Callable[..., Any], saves: tuple[str, ...]) -> None:
        if self._gradient is not None:
            raise ValueError(
                f"{self.name}: the gradient must be given once, got a second one. Drop score=, or this one."
            )
        self._gradient = function
        self._saves = saves
        names = [item.name for item in (*self.signature.inputs, *self.signature.returned)]
        self._saved = [names.index(name) for name in saves]

    def _register(self, replace: bool) -> None:
        namespace, _, name = self.name.partition("::")
        if not (namespace.isidentifier() and name.isidentifier()):
            raise ValueError(
                f"{self.name}: an op name must be 'namespace::name', got {self.name!r}. Pick a namespace of your own."
            )
        if namespace in ("aten", "prim", "moeops"):
            raise ValueError(
                f"{self.name}: an op's namespace must be your own, got {namespace!r}. Rename it."
            )
        old = _REGISTERED.get(self.name)
        if old is not None and replace:
            old._library._destroy()
        elif old is not None or hasattr(getattr(torch.ops, namespace), name):
            where = f"made from {old.rule.where}" if old is not None else "made elsewhere"
            raise ValueError(
                f"{self.name}: an op name must be free, got one {where}, and now {self.rule.where}. Rename one, or "
                "pass replace=True to run a notebook cell again."
            )
        library = _Library(namespace, "FRAGMENT")
        library.define(self.signature.schema(name), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, self._run_cpu, "CPU")
        library.impl(name, self._run_cuda, "CUDA")
        torch.library.register_fake(self.name, self._fake, lib=library)
        torch.library.register_autograd(
            self.name, self._run_gradient, setup_context=self._setup, lib=library
        )
        self._library = library
        self.overload = getattr(getattr(torch.ops, namespace), name).default
        _REGISTERED[self.name] = self

    def _filled(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments: torch leaves trailing ones out where they equal their defaults."""
        return (*values, *self._defaults[len(values) :])

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Positions, not names: this runs at every call that records a gradient.
        values = (*self._filled(inputs), *((output,) if isinstance(output, Tensor) else output))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[values[place] for place in self._whole])
        ctx.save_for_backward(*[values[place] for place in self._saved])
        ctx.scalars = {name: values[place] for place, name in self._numbers}

    def _run_gradient(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        own = self.signature
        if self._gradient is None:
            raise NotImplementedError(
                f"{self.name}: the op must have a gradient to be differentiated, got none for {self.rule.where}. "
                "Name a score=, or add one with @op.backward or @op.gradient; use torch.no_grad() if none is needed."
            )
        if all(grad is None for grad in grads):
            return (None,) * len(own.inputs)
        saved = dict(zip(self._saves, ctx.saved_tensors, strict=True))
        outputs = {item.name: saved.pop(item.name) for item in own.returned if item.name in saved}
        found = self._gradient(
            {
                item.name: grad
                for item, grad in zip(own.returned, grads, strict=True)
                if own.is_float(item)
            },
            {**saved, **ctx.scalars},
            outputs,
        )
        return tuple(found.get(item.name) for item in own.inputs)

    def _fake(self, *values: Any) -> Any:
        def check(holds: Any, message: Callable[[], str]) -> None:
            torch._check(holds, lambda: f"{self.name}: {message()}")

        values = self._filled(values)
        sizes = self.signature.sizes(values, check)
        like = self._first(values)
        outputs = tuple(
            like.new_empty(shape, dtype=dtype)
            for output, shape, dtype in self.signature.results(values, sizes)
            if not output.scratch
        )
        return outputs if len(outputs) != 1 else outputs[0]

    def _first(self, values: Sequence[Any]) -> Tensor:
        return next(value for value in values if isinstance(value, Tensor))

    def _checked_sizes(self, values: Sequence[Any]) -> dict[str, int]:
        """Check a call's arguments against the signature; the value of each size."""

        def check(holds: Any, message: Callable[[], str]) -> None:
            if not holds:
                raise ValueError(f"{self.name}: {message()}")

        own = self.signature
        sizes = own.sizes(values, check)
        first = self._first(values)
        for item, value in zip(own.inputs, values, strict=True):
            if item.dims:
                if value.dtype not in KINDS[item.kind]:
                    raise TypeError(
                        f"{self.name}: {item.name} must be {_KIND_TEXT[item.kind]}, got "
                        f"{_checks.describe(value)}. Cast it with .to()."
                    )
                _checks.check_device(self.name, item.name, value, own.tensors[0].name, first)
        for item in own.scalars:
            if item.kind == "int" and sizes[item.name] < 0:
                raise ValueError(
                    f"{self.name}: {item.name} must be at least 0, got {sizes[item.name]}. Check the call."
                )
        for condition in own.conditions:
            if not condition(sizes):
                named = ", ".join(f"{name} = {sizes[name]}" for name in condition.names)
                raise ValueError(
                    f"{self.name}: {condition.names[0]} must meet {condition.text}, got {named}. Change one of them."
                )
        return sizes

    def _buffers(self, values: Sequence[Any]) -> tuple[dict[str, int], list[Buffer]]:
        """Check a call; its sizes, and what its outputs and scratch spaces are."""
        sizes = self._checked_sizes(values)
        buffers = []
        for output, shape, final in self.signature.results(values, sizes):
            if min(shape, default=0) < 0:
                raise ValueError(
                    f"{self.name}: {output.name} must have sizes of at least 0, got {shape}. Check the int arguments."
                )
            dtype = self.cast.get(final, final)
            buffers.append(Buffer(shape, dtype, final))
        return sizes, buffers

    def _arguments(self, values: Sequence[Any]) -> list[Any]:
        """The inputs as the kernel takes them: tensors contiguous and in its types, floats as floats."""
        return [
            self._prepared(value) if isinstance(value, Tensor) else _NUMBERS[item.kind](value)
            for item, value in zip(self.signature.inputs, values, strict=True)
        ]

    def _prepared(self, value: Tensor) -> Tensor:
        return value.to(self.cast.get(value.dtype, value.dtype)).contiguous()

    def _ordered(self, arguments: Sequence[Any]) -> list[Any]:
        """Inputs and outputs in the order of the CUDA kernel's parameters."""
        named = dict(zip(self.signature.names, arguments, strict=True))
        return [named[name] for name in self.parameters]

    def _allocate(self, buffers: Sequence[Buffer], device: torch.device) -> list[Tensor]:
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, _ in buffers]
        if self.poison:
            for output in outputs:
                output.fill_(poison_of(output.dtype))
        return outputs

    def _finish(self, outputs: Sequence[Tensor], buffers: Sequence[Buffer]) -> Any:
        results = tuple(
            value if value.dtype == buffer.final else value.to(buffer.final)
            for item, value, buffer in zip(self.signature.outputs, outputs, buffers, strict=True)
            if not item.scratch
        )
        return results if len(results) != 1 else results[0]

    def _run_cpu(self, *values: Any) -> Any:
        raise NotImplementedError

    def _build(self, cuda: Any) -> Any:
        """Numba's dispatcher of the CUDA kernel."""
        raise NotImplementedError

    def _geometry(self, sizes: Mapping[str, int]) -> _launch.Geometry:
        """Grid, block and shared bytes of a launch."""
        raise NotImplementedError

    def _run_cuda(self, *values: Any) -> Any:
        values = self._filled(values)
        if self.debug:
            self._check_finite(values)
        key = tuple([(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in values])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(values)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        device = plan.device
        outputs = self._allocate(plan.buffers, device)
        launcher = plan.launcher
        if launcher is not None:
            packed = plan.packed.copy()
            tensors = [self._prepared(value) for value in values if isinstance(value, Tensor)]
            for place, tensor in zip(plan.addresses, (*tensors, *outputs), strict=True):
                packed[place] = tensor.data_ptr()
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            if torch.cuda.current_device() == device.index:
                launcher(packed, plan.geometry, stream)
            else:
                with torch.cuda.device(device):
                    launcher(packed, plan.geometry, stream)
        return self._finish(outputs, plan.buffers)

    def _plan(self, values: Sequence[Any]) -> Plan:
        """Check a call and compile for it; nothing is allocated or launched."""
        sizes, buffers = self._buffers(values)
        device = self._first(values).device
        geometry = self._geometry(sizes)
        if 0 in geometry[0]:
            return Plan(device, None, [], [], buffers, geometry)
        arguments = self._arguments(values)
        arguments += self._allocate(buffers, torch.device("meta"))
        ordered = self._ordered(arguments)
        with torch.cuda.device(device):
            launcher = self.kernel.launcher(device.index, ordered)
        packed, places = launcher.pack(ordered)
        tensors = [n for n, a in zip(self.parameters, ordered, strict=True) if torch.is_tensor(a)]
        place_of = dict(zip(tensors, places, strict=True))
        addresses = [place_of[name] for name in self.signature.names if name in place_of]
        return Plan(device, launcher, packed, addresses, buffers, geometry)

    def _check_finite(self, values: Sequence[Any]) -> None:
        for item, value in zip(self.signature.inputs, values, strict=True):
            if item.name in self.finite and not bool(torch.isfinite(value).all()):
                raise RuntimeError(
                    f"{self.name}: {item.name} must be finite, got NaN or infinity. Look for a router that diverged."
                )


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """What an unwritten element holds under a check: NaN, or a number no rule means."""
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else -0x5AFE5AFE
