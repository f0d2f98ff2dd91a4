// Stands in for the Hopper kernels in a build without compute capability 9.0a, where refusal()
// keeps every caller away.
#include "expert_block.h"
#include "hopper/hopper.h"

namespace moeops::cuda::hopper {

namespace {

[[noreturn]] void absent() {
  STD_TORCH_CHECK(false,
                  "moeops: this build has no Hopper kernels. This is an error in moeops: "
                  "please report it.");
  std::abort();
}

}  // namespace

Tensor matmul(const char*, const Tensor&, const Tensor&, const RowPlan&,
              const std::optional<Tensor>&, cudaStream_t) {
  absent();
}
void up(const Tensor&, const Gather&, const Tensor&, const std::optional<Tensor>&, Activation,
        const GluConstants<double>&, const RowPlan&, Tensor&, Tensor&, cudaStream_t) {
  absent();
}
int64_t down_backward_tiles(const Tensor&, Activation, const RowPlan&, int64_t) { absent(); }
void down_backward(DownBackward&, const Gather&, Activation, const GluConstants<double>&,
                   const RowPlan&, cudaStream_t) {
  absent();
}
void weight_grad(const char*, const Tensor&, const Tensor&, Operand, const Gather*, const RowPlan&,
                 Tensor&, cudaStream_t) {
  absent();
}

}  // namespace moeops::cuda::hopper
