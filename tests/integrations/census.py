"""Tiny experts modules of every modeling file in the transformers that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import torch

NUM_EXPERTS, WIDTH, HIDDEN = 5, 12, 7
_LARGEST = 32  # integers up to here stay as the configuration's defaults have them


def installed() -> Path | None:
    """The folder of transformers, which is not imported."""
    spec = importlib.util.find_spec("transformers")
    return Path(spec.origin).parent if spec and spec.origin else None


def experts_names() -> list[str]:
    """``model.Class`` for every class that takes an experts implementation, read from the text of the files."""
    folder = installed()
    if folder is None:
        return []
    decorated = re.compile(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", re.MULTILINE)
    files = sorted((folder / "models").glob("*/modeling_*.py"))
    return [f"{f.parent.name}.{name}" for f in files for name in decorated.findall(f.read_text())]


class TinyConfig:
    """A model's default configuration in which every size is small, whatever the names of its sizes are."""

    def __init__(self, config, implementation: str):
        self._config = config
        self._experts_implementation = implementation

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._config, name)
        if isinstance(value, list):  # one per layer
            value = value[0]
        if type(value) is not int and value is not None:
            return value
        if "intermediate" in name:
            return HIDDEN
        if "expert" in name:
            return NUM_EXPERTS
        return value if value is None or value <= _LARGEST else WIDTH


def tiny_experts(name: str, implementation: str = "eager") -> torch.nn.Module:
    """An experts module in float64 with random weights; the first configuration of its model that suits it."""
    model, class_name = name.split(".")
    files = (installed() / "models" / model).glob("modeling_*.py")
    text = next(f for f in files if f"class {class_name}(" in f.read_text())
    folder = f"transformers.models.{model}"
    modeling = importlib.import_module(f"{folder}.{text.stem}")
    cls = getattr(modeling, class_name)
    configuration = importlib.import_module(
        f"{folder}.{text.stem.replace('modeling', 'configuration')}"
    )
    errors = []
    for config_class in _configurations(cls, configuration):
        try:
            layers = getattr(config := config_class(), "per_layer_config", None)
            config = layers[-1] if layers else config
            experts = cls(TinyConfig(config, implementation)).double()
        except AttributeError as error:  # the configuration of another part of the model
            errors.append(error)
            continue
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return experts
    raise LookupError(f"{name}: none of its model's configurations has what it reads: {errors}")


def _configurations(cls, module):
    """Configurations of a model's file, the one in the signature of the class first."""
    wanted = inspect.signature(cls.__init__).parameters["config"].annotation
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and hasattr(c, "model_type")
    ]
    return sorted(classes, key=lambda c: c.__name__ != getattr(wanted, "__name__", wanted))
