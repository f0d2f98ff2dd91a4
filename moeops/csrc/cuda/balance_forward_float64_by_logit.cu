// The forward kernels of topk_route_balance in float64 where the choice follows the logits.
#include "balance_forward.cuh"

namespace moeops::cuda {

template void launch_balance_forward<double, true>(const BalanceForward<double>&);

}  // namespace moeops::cuda
