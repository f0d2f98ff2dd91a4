"""Turn a signature and a function into a ``torch.library`` op: schema, CPU, CUDA, fake, gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.numba import _cpu, _cuda
from moeops.numba._backward import backward_signature
from moeops.numba._rules import Rule
from moeops.numba._signature import Output, ScalarArg, Signature, TensorArg

_REGISTERED: dict[str, Op] = {}

GradientFunction = Callable[
    [Mapping[str, Tensor | None], Mapping[str, Any], Mapping[str, Tensor]],
    Mapping[str, Tensor | None],
]


def registered(name: str) -> Op:
    """The op that a decorator of this package has made under ``name``."""
    if name not in _REGISTERED:
        raise KeyError(f"moeops.numba: {name!r} must be an op made here, got one of neither kind.")
    return _REGISTERED[name]


class Op:
    """What the decorators return: call it like the op, or use ``torch.ops.<namespace>.<name>``.

    Attributes:
        name: ``"namespace::name"``.
        signature: what the signature string says.
        launch: ``"direct"`` or ``"numba"``; may be set.
        debug: compile for debugging: bounds checks on CPU, Numba's debug mode on CUDA; may be set. Starts true where
            the environment has ``MOEOPS_DEBUG_CHECKS=1``.
    """

    kernel: _cuda.Kernel
    overload: Any
    _library: Any

    def __init__(
        self, name: str, rule: Rule, signature: Signature, launch: str, replace: bool
    ) -> None:
        if launch not in _cuda.LAUNCHES:
            raise ValueError(
                f"{name}: launch must be one of {_cuda.LAUNCHES}, got {launch!r}. Use 'direct'."
            )
        self.name = name
        self.rule = rule
        self.signature = signature
        self.launch = launch
        self.debug = _cpu.DEBUG
        self.poison = False  # fill outputs so that an unwritten element shows; set by check()
        self._gradient: Callable[..., Any] | None = None
        self._saves: tuple[str, ...] = ()
        self._places: tuple[list[int], list[int], list[tuple[str, int]]] | None = None
        self._replaced = replace
        self._defaults = tuple(
            item.default if isinstance(item, ScalarArg) else None for item in signature.inputs
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
        names = [item.name for item in self.signature.inputs]
        values = dict(zip(names, args, strict=False))
        unknown = [name for name in kwargs if name not in names or name in values]
        values.update(kwargs)
        for item in self.signature.scalars:
            if item.default is not None:
                values.setdefault(item.name, item.default)
        missing = [name for name in names if name not in values]
        if unknown or missing or len(args) > len(names):
            raise TypeError(
                f"{self.name}: a call must have the arguments {self.signature.schema(self.name)}, got {len(args)} by "
                f"position and {list(kwargs)} by name. Check the call."
            )
        return [values[name] for name in names]

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the CUDA kernel of this op under Numba's simulator, on CPU tensors.

        Raises:
            RuntimeError: the process was not started with ``NUMBA_ENABLE_CUDASIM=1``.
        """
        _cuda.import_simulator()
        return self._simulate(self.bind(*args, **kwargs))

    def _simulate(self, values: Sequence[Any]) -> Any:
        raise NotImplementedError

    def numba_types(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Numba types of the CUDA kernel's arguments for this call."""
        return tuple(
            _cpu.numba_type(value) for value in self._kernel_args(self.bind(*args, **kwargs))
        )

    def _kernel_args(self, values: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

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

    def backward(self, rule: Callable[..., Any]) -> Op:
        """Decorator: the gradient as another row rule, compiled like the first.

        Its parameters are a choice of ``grad_<output>`` (float outputs, zeros where there is no gradient),
        ``grad_<input>`` (what it writes, one row each), and the op's own inputs and outputs.

        Returns:
            The op ``<name>_backward`` that it becomes.

        Raises:
            TypeError: a parameter is none of these.  ValueError: it writes no gradient, or one of a whole tensor.
        """
        from moeops.numba._row_op import RowOp  # a subclass of this one

        signature = backward_signature(self.name, self.signature, rule)
        op = RowOp(
            f"{self.name}_backward",
            Rule.read(f"{self.name}_backward", rule, signature),
            signature,
            threads=getattr(self, "row_threads", 128),
            launch=self.launch,
            replace=self._replaced,
        )
        written = [output.name for output in signature.outputs]

        def gradient(grads, inputs, outputs):
            known = {**inputs, **outputs}
            for name, grad in grads.items():
                known[f"grad_{name}"] = torch.zeros_like(outputs[name]) if grad is None else grad
            results = op(*(known[item.name] for item in signature.inputs))
            results = (results,) if isinstance(results, Tensor) else results
            return {
                name.removeprefix("grad_"): grad
                for name, grad in zip(written, results, strict=True)
            }

        needed = {item.name for item in signature.tensors}
        float_outputs = {o.name for o in self.signature.returned if self.signature.is_float(o)}
        tensors = self.signature.tensor_names
        # The shape of an output is needed where its gradient may be missing.
        saves = [
            n for n in tensors if n in needed or (n in float_outputs and f"grad_{n}" in needed)
        ]
        self._set_gradient(gradient, tuple(saves))
        return op

    def _set_gradient(self, function: Callable[..., Any], saves: tuple[str, ...]) -> None:
        if self._gradient is not None:
            raise ValueError(
                f"{self.name}: the gradient must be given once, got a second one. Drop score=, or this one."
            )
        self._gradient = function
        self._saves = saves
        self._places = None

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
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(self.signature.schema(name), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, self._cpu, "CPU")
        library.impl(name, self._cuda, "CUDA")
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
        saved, whole, scalars = self._setup_places()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[values[place] for place in whole])
        ctx.save_for_backward(*[values[place] for place in saved])
        ctx.scalars = {name: values[place] for name, place in scalars}

    def _setup_places(self) -> tuple[list[int], list[int], list[tuple[str, int]]]:
        """Where inputs, then outputs, hold what is saved, what has no gradient, and the numbers."""
        if self._places is None:
            own = self.signature
            names = [item.name for item in (*own.inputs, *own.returned)]
            self._places = (
                [names.index(name) for name in self._saves],
                [names.index(item.name) for item in own.returned if not own.is_float(item)],
                [(item.name, names.index(item.name)) for item in own.scalars],
            )
        return self._places

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
        inputs = {item.name: saved[item.name] for item in own.tensors if item.name in saved}
        outputs = {item.name: saved[item.name] for item in own.returned if item.name in saved}
        found = self._gradient(
            {
                item.name: grad
                for item, grad in zip(own.returned, grads, strict=True)
                if own.is_float(item)
            },
            {**inputs, **ctx.scalars},
            outputs,
        )
        return tuple(found.get(item.name) for item in own.inputs)

    def _fake(self, *values: Any) -> Any:
        values = self._filled(values)
        own = self.signature
        for item, value in zip(own.inputs, values, strict=True):
            if isinstance(item, TensorArg):
                fake_check(
                    value.dim() == len(item.dims),
                    f"{self.name}: {item.name} must have {len(item.dims)} dimensions. Reshape it first.",
                )
        sizes = own.sizes(
            values,
            lambda holds, message: torch._check(holds, lambda: f"{self.name}: {message()}"),
        )
        tensors = self._tensors(values)
        first = next(iter(tensors.values()))
        outputs = tuple(
            first.new_empty(
                [dim(sizes) for dim in output.dims], dtype=own.output_dtype(output, tensors)
            )
            for output in own.returned
        )
        return outputs if len(outputs) != 1 else outputs[0]

    def _tensors(self, values: Sequence[Any]) -> dict[str, Tensor]:
        return {
            item.name: value
            for item, value in zip(self.signature.inputs, values, strict=True)
            if isinstance(item, TensorArg)
        }

    def _checked_sizes(self, values: Sequence[Any]) -> dict[str, int]:
        """Check a call's arguments against the signature; the value of each size."""
        own = self.signature
        first = None
        for item, value in zip(own.inputs, values, strict=True):
            if isinstance(item, ScalarArg):
                continue
            if value.dim() != len(item.dims):
                raise ValueError(
                    f"{self.name}: {item.name} must have {len(item.dims)} dimensions, got "
                    f"{_checks.describe(value)}. Reshape it first."
                )
            if value.dtype not in _KINDS[item.kind]:
                raise TypeError(
                    f"{self.name}: {item.name} must be {_KIND_TEXT[item.kind]}, got {_checks.describe(value)}. "
                    "Cast it with .to()."
                )
            first = value if first is None else first
            if value.device != first.device:
                _checks.check_device(self.name, item.name, value, own.tensors[0].name, first)

        def check(holds: Any, message: Callable[[], str]) -> None:
            if not holds:
                raise ValueError(f"{self.name}: {message()}")

        sizes = own.sizes(values, check)
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

    def _allocate(
        self, output: Output, sizes: Mapping[str, int], dtype: torch.dtype, like: Tensor
    ) -> Tensor:
        shape = [dim(sizes) for dim in output.dims]
        if min(shape, default=0) < 0:
            raise ValueError(
                f"{self.name}: {output.name} must have sizes of at least 0, got {shape}. Check the int arguments."
            )
        result = torch.empty(shape, dtype=dtype, device=like.device)
        if self.poison:
            result.fill_(poison_of(dtype))
        return result

    def _cpu(self, *values: Any) -> Any:
        raise NotImplementedError

    def _cuda(self, *values: Any) -> Any:
        raise NotImplementedError

    def _on_device(self, device: torch.device, function: Callable[[], None]) -> None:
        if torch.cuda.current_device() == device.index:
            function()
        else:
            with torch.cuda.device(device):
                function()


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """What an unwritten element holds under a check: NaN, or a number no rule means."""
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else -0x5AFE5AFE


_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "float": _checks.FLOAT_DTYPES,
    "int": _checks.ID_DTYPES,
    "bool": (torch.bool,),
}
_KIND_TEXT = {
    "float": "float64, float32, bfloat16 or float16",
    "int": "int32 or int64",
    "bool": "bool",
}
