// The forward kernels of topk_route_balance in float32.
#include "balance_forward.cuh"

namespace moeops::cuda {

template void launch_balance_forward<float, true>(const BalanceForward<float>&);
template void launch_balance_forward<float, false>(const BalanceForward<float>&);

}  // namespace moeops::cuda
