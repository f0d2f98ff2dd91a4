// Prints what the table of Hopper tiles, or MOEOPS_TILES, says of one product.
#include "hopper/tiles.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

using namespace moeops::cuda::hopper;

Unit unit_of(const char* name) {
  if (std::strcmp(name, "plain") == 0) return Unit::kPlain;
  return std::strcmp(name, "swiglu") == 0 ? Unit::kSwiglu : Unit::kWithOptions;
}

int main(int, char** arguments) {
  const char* product = arguments[1];
  const int64_t n = std::atoll(arguments[2]), k = std::atoll(arguments[3]);
  const int64_t rows = std::atoll(arguments[4]);
  try {
    if (std::strncmp(product, "dw", 2) == 0) {
      const bool up = std::strcmp(product, "dw_up") == 0;
      const WeightGradChoice choice = choose_weight_grad(n, k, rows, up);
      const char* names[] = {"p192", "p192x2", "c256"};
      std::printf("%s:%d\n", names[static_cast<int>(choice.tile)], choice.group);
      return 0;
    }
    const bool up = std::strcmp(product, "up") == 0, dh = std::strcmp(product, "dh") == 0;
    const bool down = std::strcmp(product, "down") == 0;
    const RowsChoice choice =
        up   ? choose_up({n, k, rows}, true, false)
        : dh ? choose_down_backward({n, k, rows}, unit_of(arguments[6]), std::atof(arguments[5]))
             : choose_store({n, k, rows}, !down);
    const char* names[] = {"p192", "p192x2", "p128", "c256", "c256x2"};
    std::printf("%s:%s:%s\n", names[static_cast<int>(choice.tile)],
                choice.large_groups ? "large" : "small", choice.whole_tiles ? "whole" : "skip");
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
