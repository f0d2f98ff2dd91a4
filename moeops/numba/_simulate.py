"""Run calls of one op under Numba's CUDA simulator: ``python -m moeops.numba._simulate JOB RESULT``.

Started by ``moeops.numba.check`` with ``NUMBA_ENABLE_CUDASIM=1``, which holds for a whole process.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from moeops.numba._ops import registered


def main(job_file: str, result_file: str) -> None:
    """Import the op's module, run the calls, save the outputs."""
    job = torch.load(job_file, weights_only=True)
    _import(job["module"], job["file"])
    op = registered(job["op"])
    op.poison = True
    results = []
    for call in job["calls"]:
        outputs: Any = op.simulate(**call)
        results.append((outputs,) if isinstance(outputs, Tensor) else tuple(outputs))
    torch.save(results, result_file)


def _import(module: str, file: str) -> None:
    """Import by name; a script by its file, under a name that does not start its main part."""
    if module != "__main__":
        importlib.import_module(module)
        return
    spec = importlib.util.spec_from_file_location("moeops_simulated_script", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)


if __name__ == "__main__":
    main(*sys.argv[1:])
