// Runs an AOTInductor package with layers of moeops, without Python.
//
//   deploy <libmoeops_cpu.so[:libmoeops_cuda.so]> <package.pt2> <tokens> <d_model> [cpu|cuda]
//
// The libraries register the ops with torch when they are opened; the program links torch only.
// Prints the output for tokens 0, 1, 2, ... / (tokens * d_model), one row per line.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>

namespace {

// Before the package is loaded: it looks its ops up by name.
void open_libraries(const std::string& paths) {
  std::istringstream list(paths);
  for (std::string path; std::getline(list, path, ':');) {
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      std::cerr << "cannot open " << path << ": " << dlerror() << "\n";
      std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: deploy <libraries> <package.pt2> <tokens> <d_model> [cpu|cuda]\n";
    return 2;
  }
  open_libraries(argv[1]);
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const int64_t tokens = std::atoll(argv[3]), d_model = std::atoll(argv[4]);
  const int64_t size = tokens * d_model;
  const at::Device device(argc > 5 ? argv[5] : "cpu");
  const at::Tensor x = at::arange(size, at::kFloat).div(size).view({tokens, d_model}).to(device);
  const at::Tensor y = model.run({x})[0].to(at::kCPU).contiguous();
  std::cout.precision(9);
  for (int64_t row = 0; row < y.size(0); ++row) {
    for (int64_t column = 0; column < y.size(1); ++column) {
      std::cout << y.const_data_ptr<float>()[row * y.size(1) + column]
                << (column + 1 < y.size(1) ? ' ' : '\n');
    }
  }
}
