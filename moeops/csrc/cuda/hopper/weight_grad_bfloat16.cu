// Weight gradients, for bfloat16.
#include "hopper/launch_weight_grad.cuh"

namespace moeops::cuda::hopper {
template void launch_weight_grad<__nv_bfloat16>(const WeightGradLaunch&, const WeightGradChoice&);
}
