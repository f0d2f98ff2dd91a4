// The kernels of noisy_topk_route_backward in float64.
#include "noisy.cuh"

namespace moeops::cuda {

template void run_noisy_backward<double>(const std::optional<Tensor>&, const std::optional<Tensor>&,
                                         const std::optional<Tensor>&, const std::optional<Tensor>&,
                                         const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&,
                                         const NoisyShape&, cudaStream_t, Tensor&, Tensor&);

}  // namespace moeops::cuda
