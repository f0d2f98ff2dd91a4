"""The op libraries use torch through its stable ABI only, so that one build runs on every torch from 2.11 on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from moeops import _extension

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_libraries.py"
_spec = importlib.util.spec_from_file_location("check_libraries", SCRIPT)
check_libraries = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_libraries)


@pytest.mark.parametrize("library", [_extension.CPU_LIBRARY, _extension.CUDA_LIBRARY])
def test_only_stable_symbols(library):
    path = _extension.loaded_libraries().get(library)
    if path is None:
        assert library == _extension.CUDA_LIBRARY
        pytest.skip(f"{library} is {_extension.cuda_status()}")
    for tool in ("nm", "readelf", "c++filt"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} (binutils) is not installed")
    problems, num_symbols = check_libraries.check_symbols(path)
    assert problems == []
    assert num_symbols > 20  # none would mean that nm did not see the library


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN2at4_ops2mm4callERKNS_6TensorES4_",
        "_ZNK2at10TensorBase6deviceEv",
        "_ZN3c106detail14torchCheckFailEPKcS2_jRKSs",
        "_ZNK3c1010TensorImpl5sizesEv",
        "_ZTVN3c105ErrorE",
        "_ZTIN5torch8autograd4NodeE",
        "_ZN5torch7Library4_defEON3c1014FunctionSchemaE",
        "_ZNR5torch7Library4_defEON3c1014FunctionSchemaE",
        "_ZGVN2at6detail5stateE",
        "_ZStlsIN3c106DeviceEERSoS2_RKT_",
        "_ZN6caffe28TypeMeta4nameEv",
        "c10_cuda_check",
        "THPVariable_Wrap",
        "PyObject_Call",
        "torch_new_stable_ivalue",
        "_ZN2at4_ops2mm4callERKNS_6TensorES4_@VERS_1",
    ],
)
def test_unstable_symbols_are_refused(symbol):
    assert check_libraries.not_allowed(["memcpy@GLIBC_2.14", symbol, "torch_call_dispatcher"]) == [
        symbol
    ]


def test_stable_symbols_are_accepted():
    stable = [
        "aoti_torch_get_data_ptr",
        "aoti_torch_get_current_cuda_stream",
        "torch_call_dispatcher",
        "torch_parallel_for",
        "memcpy@GLIBC_2.14",
        "_ZSt20__throw_length_errorPKc@GLIBCXX_3.4",
        "_ZTVSt13runtime_error@GLIBCXX_3.4",
        "__cxa_throw@CXXABI_1.3",
    ]
    assert check_libraries.not_allowed(stable) == []
