"""Run something when a module of torch is imported that few programs need and that takes its time."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


_finders: dict[str, _Finder] = {}


def when_imported(name: str, function: Callable[[ModuleType], object]) -> None:
    """Call ``function(module)`` now if the module is there, otherwise as soon as somebody has imported it."""
    if name in _finders:
        _finders[name].functions.append(function)
    elif name in sys.modules:
        function(sys.modules[name])
    else:
        _finders[name] = _Finder(name, function)
        sys.meta_path.insert(0, _finders[name])


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.assume_constant_result`` without its import of torch's compiler, which takes a second."""
    when_imported("torch._dynamo", lambda _: torch.compiler.assume_constant_result(function))
    return function


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls functions when its code has run."""

    def __init__(self, name: str, function: Callable[[ModuleType], object]) -> None:
        self.name = name
        self.functions = [function]

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                return self._calling(spec)
        return None

    def _calling(self, spec: ModuleSpec) -> ModuleSpec:
        loader = spec.loader
        assert loader is not None
        run = loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            del _finders[self.name]
            for function in self.functions:
                function(module)

        loader.exec_module = run_and_call  # type: ignore[method-assign]  # once
        return spec
