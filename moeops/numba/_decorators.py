"""The decorators that turn a function into an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from moeops.numba import scores
from moeops.numba._block_op import BlockOp
from moeops.numba._row_op import RowOp
from moeops.numba._signature import parse, split_items


def route(
    name: str,
    extra: str = "",
    *,
    score: str | None = None,
    scale: str | float = 1.0,
    require: Sequence[str] = (),
    threads: int = 128,
    replace: bool = False,
) -> Callable[[Callable[..., None]], RowOp]:
    """Decorator: a routing rule over one token's row becomes an op ``(logits, top_k, ...) -> (weights, ids)``.

    The rule reads ``logits [E]`` and writes ``weights [K]`` and ``ids [K]``, all of them, in any order of parameters;
    an id of -1 is a slot that holds nothing. It is plain scalar Python (see ``row_kernel``). The op takes logits
    ``[T, E]`` of any float type and returns weights ``[T, K]`` float32 (float64 for float64) and ids ``[T, K]`` int64.

    Args:
        name: ``"namespace::name"`` of the op; the namespace is yours.
        extra: further inputs and scratch rows of the rule, such as
            ``"bias[E], noise[T, E], scale: float = 1.0, _taken[T, E]: float32"``.
        score: what the weights are, for their gradient: a name of ``moeops.numba.scores``; ``None`` for no gradient,
            or one that is added with ``op.backward`` or ``op.gradient``.
        scale: with ``score``, the factor on the weights: a number, or the name of a float of ``extra``.
        require: further conditions on sizes, such as ``"E % num_groups == 0"``; ``1 <= top_k <= E`` always holds.
        threads: CUDA threads per block, a thread per row.
        replace: redefine an op of the same name that was made here, for notebooks.

    Raises:
        ValueError: the name is taken or a declaration does not fit.  TypeError: the rule's parameters are others.
    Calls raise ValueError or TypeError for arguments that do not fit, RuleError when the rule does not compile, and
    RuntimeError for a logit that is NaN or infinite (on CUDA with ``MOEOPS_DEBUG_CHECKS=1`` only).
    Gradients: ``logits`` through ``score``, and what a backward rule adds.  Host sync: none.

    Example:
        >>> @route("mylab::best", score="softmax")
        ... def best(logits, weights, ids, top_k):
        ...     for k in range(top_k):
        ...         ids[k] = k
        ...         weights[k] = 1.0 / len(logits)
        >>> best(torch.zeros(1, 4), top_k=2)[0].tolist()
        [[0.25, 0.25]]
    """
    if score is not None:
        scores.check_score(name, score)
    text = _route_signature(name, extra)
    signature = parse(name, text, require=("1 <= top_k <= E", *require))
    if isinstance(scale, str) and scale not in {
        item.name for item in signature.scalars if item.kind == "float"
    }:
        raise ValueError(
            f"{name}: scale must be a number or name a float of extra, got {scale!r}. Declare it: '{scale}: float'."
        )

    def decorate(function: Callable[..., None]) -> RowOp:
        op = RowOp(name, function, signature, finite=("logits",), threads=threads, replace=replace)
        if score is not None:

            def gradient(grads, inputs, outputs):
                factor = inputs[scale] if isinstance(scale, str) else scale
                grad = scores.logits_gradient(
                    score, grads["weights"], inputs["logits"], outputs["ids"], factor
                )
                return {"logits": grad}

            op.gradient(gradient, saves=("logits", "ids"))
        return op

    return decorate


def _route_signature(name: str, extra: str) -> str:
    """The signature of a routing rule with further inputs and scratch rows."""
    inputs: list[str] = []
    scratch: list[str] = []
    for part in split_items(extra):
        (scratch if part.startswith("_") else inputs).append(part)
    left = ", ".join(("logits[T, E]", "top_k: int", *inputs))
    right = ", ".join(("weights[T, top_k]: float", "ids[T, top_k]: int64", *scratch))
    return f"{left} -> {right}"


def row_kernel(
    name: str,
    signature: str,
    *,
    require: Sequence[str] = (),
    finite: Sequence[str] = (),
    threads: int = 128,
    replace: bool = False,
) -> Callable[[Callable[..., None]], RowOp]:
    """Decorator: a rule over one row becomes an op with the declared inputs and outputs.

    The signature reads ``"x[T, D], bias[D], scale: float = 1.0 -> y[T, D]: x, _tmp[T, D]: float32"``:

    - Inputs are tensors ``name[sizes]``, with ``: int`` (int32 or int64) or ``: bool`` where they do not hold floats,
      and numbers ``name: int``, ``: float`` or ``: bool`` with or without a default.
    - The first size of the first tensor is cut into rows. The rule gets one row of every tensor that begins with it
      (a number where there is no further size) and the whole of every other.
    - Outputs begin with the row size. Their type is that of an input, ``float`` (float32, or float64 if the first
      float input is), ``float32``, ``float64``, ``int32``, ``int64`` or ``bool``. The rule must write every element; an
      output ``[T]`` is an array of one. Names with an underscore are scratch rows, which are not returned.
    - Sizes are names, int parameters, and ``+ - * // %`` of them.

    The rule's parameters are these names in any order, and ``row``, the number of its row, if it wants it. It is
    scalar Python as Numba compiles it: loops, arithmetic, ``math.*``, indexing. Plain functions of its module that it
    calls are compiled with it. float16 and bfloat16 inputs are cast to float32 before the rule, and outputs of their
    type after it; a Python float is a float64.

    Args:
        name: ``"namespace::name"`` of the op.
        signature: as above.
        require: conditions on sizes and int parameters that a call must meet.
        finite: ``[T, n]`` inputs in which NaN and infinity are errors (on CUDA with ``MOEOPS_DEBUG_CHECKS=1`` only).
        threads: CUDA threads per block, a thread per row.
        replace: redefine an op of the same name that was made here.

    Raises:
        ValueError: the name is taken or the signature does not fit.  TypeError: the rule's parameters are others.
    Gradients: none until ``op.backward`` or ``op.gradient`` adds one; a backward without it is an error.

    Example:
        >>> @row_kernel("mylab::total", "x[T, D] -> y[T]: float")
        ... def total(x, y):
        ...     y[0] = 0.0
        ...     for d in range(len(x)):
        ...         y[0] += x[d]
        >>> total(torch.ones(2, 3)).tolist()
        [3.0, 3.0]
    """
    parsed = parse(name, signature, require=require)
    return partial(RowOp, name, signature=parsed, finite=finite, threads=threads, replace=replace)


def block_kernel(
    name: str,
    signature: str,
    *,
    grid: Any,
    threads: Any = 256,
    shared: Any = 0,
    require: Sequence[str] = (),
    replace: bool = False,
) -> Callable[[Any], BlockOp]:
    """Decorator: a raw CUDA kernel (shared memory, warps, atomics) becomes an op.

    Takes a ``@cuda.jit`` kernel or the plain function. Its parameters are the signature's names in any order; every
    tensor is handed over whole and C-contiguous, numbers as int64, float64 or boolean. Nothing is cast: float16 is an
    array of float16, bfloat16 an array of uint16 that holds the bits. ``moeops.numba.widen`` and ``narrow`` read and
    write elements of any float type. The launch goes to torch's current stream, without a copy or a synchronisation,
    and can be captured in a CUDA graph after a first call.

    Args:
        name: ``"namespace::name"`` of the op.
        signature: as in ``row_kernel``; outputs may have any sizes.
        grid: blocks: a number, a tuple, or a function of sizes by name, such as ``lambda T, E: (T, E)``.
        threads: threads per block, likewise.
        shared: bytes of dynamic shared memory, likewise.
        require: conditions on sizes and int parameters that a call must meet.
        replace: redefine an op of the same name that was made here.

    Raises:
        ValueError: the name is taken or a declaration does not fit.  TypeError: the kernel's parameters are others.
    Gradients: none until ``op.gradient`` or ``op.backward`` adds one.  On CPU: what ``op.cpu`` adds.

    Example:
        >>> @block_kernel("mylab::twice", "x[N] -> y[N]: x", grid=lambda N: (N + 255) // 256)
        ... def twice(x, y):
        ...     i = cuda.grid(1)
        ...     if i < x.shape[0]:
        ...         y[i] = narrow(2 * widen(x[i]), y)
        >>> _ = twice.cpu(lambda x: 2 * x)
        >>> twice(torch.ones(2)).tolist()
        [2.0, 2.0]
    """
    parsed = parse(name, signature, require=require, by_row=False)
    return partial(
        BlockOp,
        name,
        signature=parsed,
        grid=grid,
        threads=threads,
        shared=shared,
        replace=replace,
    )
