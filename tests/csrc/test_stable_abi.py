"""The op libraries use torch through its stable ABI only, so that one build runs on every torch from 2.11 on."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from moeops import _extension

# A mangled C++ name that mentions at::, c10::, caffe2:: or torch:: anywhere.
TORCH_CXX = re.compile(r"^_Z.*N[VKRO]*(2at|3c10|6caffe2|5torch)\d")
STABLE_C = re.compile(r"^(aoti_torch_|torch_)\w+$")
# Shims that came after torch 2.11, the oldest torch that the libraries must load into.
TOO_NEW = {"torch_new_stable_ivalue", "torch_get_current_stream_native_handle"}


def refused(symbols: list[str]) -> list[str]:
    """The undefined symbols that tie a library to one build of torch."""
    bad = []
    for symbol in symbols:
        name = symbol.partition("@")[0]
        is_torch_c = name.startswith(("aoti_", "torch_", "c10_", "at_", "caffe2_", "THP"))
        if (
            TORCH_CXX.search(name)
            or name in TOO_NEW
            or name.startswith(("Py", "_Py"))
            or (is_torch_c and not STABLE_C.match(name))
        ):
            bad.append(symbol)
    return bad


def undefined_symbols(path) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    out = subprocess.run(
        [nm, "-D", "--undefined-only", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1] for line in out.splitlines() if line.strip()]


@pytest.mark.parametrize("library", [_extension.CPU_LIBRARY, _extension.CUDA_LIBRARY])
def test_only_stable_symbols(library):
    path = _extension.loaded_libraries().get(library)
    if path is None:
        assert library == _extension.CUDA_LIBRARY
        pytest.skip(f"{library} is {_extension.cuda_status()}")
    symbols = undefined_symbols(path)
    # An empty list would pass below, and mean that nm did not see the library.
    assert "torch_call_dispatcher" in {s.partition("@")[0] for s in symbols}
    assert refused(symbols) == []


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
    assert refused(["memcpy@GLIBC_2.14", symbol, "torch_call_dispatcher"]) == [symbol]


def test_stable_symbols_are_accepted():
    assert (
        refused(
            [
                "aoti_torch_get_data_ptr",
                "aoti_torch_get_current_cuda_stream",
                "torch_call_dispatcher",
                "torch_parallel_for",
                "memcpy@GLIBC_2.14",
                "_ZNSt6vectorIiSaIiEE17_M_default_appendEm",
                "_ZSt20__throw_length_errorPKc@GLIBCXX_3.4",
                "_ZTVSt13runtime_error@GLIBCXX_3.4",
                "__cxa_throw@CXXABI_1.3",
            ]
        )
        == []
    )


def test_libtorch_is_a_needed_entry():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    for path in _extension.loaded_libraries().values():
        out = subprocess.run(
            [readelf, "-d", str(path)], check=True, capture_output=True, text=True
        ).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", out)
        assert "libtorch.so" in needed, f"{path}: {needed}"
        assert not [n for n in needed if n.startswith(("libc10", "libtorch_", "libpython"))], needed
