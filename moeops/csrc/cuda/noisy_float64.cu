// The kernels of noisy_topk_route in float64.
#include "noisy.cuh"

namespace moeops::cuda {

template void run_noisy_forward<double>(const Tensor&, const Tensor&, const Tensor&,
                                        const NoisyShape&, int32_t*, cudaStream_t, Tensor&, Tensor&,
                                        Tensor&, Tensor&, Tensor&, Tensor&);

}  // namespace moeops::cuda
