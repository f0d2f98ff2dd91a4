// pybind11 module _C: what this build is. Tensor ops live in libmoeops_cpu.so and
// libmoeops_cuda.so.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = MOEOPS_TORCH_VERSION;
  info["with_cuda"] = static_cast<bool>(MOEOPS_WITH_CUDA);
  info["quick_cuda"] = static_cast<bool>(MOEOPS_QUICK_CUDA);
  info["cuda_architectures"] = MOEOPS_CUDA_ARCHITECTURES;
  info["cuda_compiler"] = MOEOPS_CUDA_COMPILER_VERSION;
  info["cxx_compiler"] = MOEOPS_CXX_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of moeops.";
  m.def("build_info", &build_info, "Versions and options this build was compiled with.");
}
