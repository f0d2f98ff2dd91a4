// The kernels of topk_route where scores are compared, with a bias or groups; float64 has a file of
// its own.
#include "routing_forward.cuh"

namespace moeops::cuda {

template void launch_topk_route<float, false>(const TopkRoute<float>&);
template void launch_topk_route<__half, false>(const TopkRoute<__half>&);
template void launch_topk_route<__nv_bfloat16, false>(const TopkRoute<__nv_bfloat16>&);

}  // namespace moeops::cuda
