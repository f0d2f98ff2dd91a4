// The forward kernels of topk_route_balance in float64 where scores are compared, with a bias or
// groups.
#include "balance_forward.cuh"

namespace moeops::cuda {

template void launch_balance_forward<double, false>(const BalanceForward<double>&);

}  // namespace moeops::cuda
