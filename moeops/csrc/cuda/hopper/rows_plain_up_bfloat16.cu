// The up product with an activation of one variable, for bfloat16.
#include "hopper/rows_activation.cuh"

namespace moeops::cuda::hopper {
template void launch_plain_up<__nv_bfloat16>(const RowsLaunch&, Activation, const RowsChoice&);
}
