// Weight gradients, for float16.
#include "hopper/launch_weight_grad.cuh"

namespace moeops::cuda::hopper {
template void launch_weight_grad<__half>(const WeightGradLaunch&, const WeightGradChoice&);
}
