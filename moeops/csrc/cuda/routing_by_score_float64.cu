// The kernels of topk_route in float64 where scores are compared, with a bias or groups.
#include "routing_forward.cuh"

namespace moeops::cuda {

template void launch_topk_route<double, false>(const TopkRoute<double>&);

}  // namespace moeops::cuda
