"""What all passes over Inductor's graphs have in common, and how Inductor is handed several of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

# Before autograd: Dynamo's graph, in which composite ops such as ``moeops::ep_region`` are one node.
BEFORE_AUTOGRAD = "pre_grad_custom_pass"
# Behind autograd and all of Inductor's own passes: one graph for the forward, another one for the backward.
LAST = "post_grad_custom_post_pass"


class Pass(CustomGraphPass):
    """A pass over the graphs of a compiled model.

    A subclass is picklable and decides by what is in the graph and in ``settings``, and by nothing else: compiled code
    is cached by ``uuid``, and a rank that finds it in the cache must get what the others compile.

    Attributes:
        hook: the option of Inductor that takes the pass, ``BEFORE_AUTOGRAD`` or ``LAST``.
    """

    hook: ClassVar[str]

    @classmethod
    def of_model(cls, model: nn.Module) -> Pass:
        """Make the pass for a model, with what it reads of the model's layers."""
        return cls()

    def settings(self) -> tuple[Any, ...]:
        """What the pass decides by, beside the graph; it can be pickled and compared."""
        return ()

    def rewrite(self, graph: Graph) -> int:
        """Change a graph in place; return how many sites were rewritten."""
        raise NotImplementedError(
            f"{type(self).__name__}: rewrite must be written by the subclass, got none. Write it."
        )

    def __call__(self, graph: Graph) -> int:  # type: ignore[override]  # the count too
        """Rewrite a graph and check what came out; return how many sites were rewritten."""
        num_sites = self.rewrite(graph)
        if num_sites:
            graph.lint()
        return num_sites

    def uuid(self) -> Any:
        """What the cache knows the pass by: its source files, and ``settings``."""
        sources = (__file__, sys.modules[type(self).__module__].__file__)
        return type(self).__qualname__, get_hash_for_files(sources), self.settings()


class PassList(CustomGraphPass):
    """Several passes in the place of one, which is all that torch 2.11 takes.

    Args:
        passes: called in this order.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)
        # Torch 2.11 keys the passes before autograd by their pickle: what ``uuid`` says must be part of it.
        self._uuid = tuple(one.uuid() for one in self.passes)

    def __call__(self, graph: Graph) -> int:  # type: ignore[override]  # the count too
        """Call every pass; return how many sites they rewrote."""
        return sum(one(graph) for one in self.passes)

    def uuid(self) -> Any:
        """Of every pass."""
        return self._uuid


def check_hook(op: str, hook: str) -> None:
    """Raise RuntimeError where torch has no such option of Inductor."""
    if not hasattr(config, hook):
        raise RuntimeError(
            f"{op}: torch must have torch._inductor.config.{hook}, got torch {torch.__version__} without it. Install "
            "torch 2.11 or later."
        )


def set_value(node: Node, like: Node, make: Callable[[], Any]) -> None:
    """Give a new node behind autograd the fake value that passes and lowerings read.

    Args:
        node: the new node.
        like: one of the same graph that has a value.
        make: computes the value; it is called where tensors are fake.
    """
    with like.meta["val"].fake_mode:
        node.meta["val"] = make()
