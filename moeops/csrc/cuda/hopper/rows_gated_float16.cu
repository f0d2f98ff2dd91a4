// The up product and the backward of the down product with a gated activation, for float16.
#include "hopper/rows_activation.cuh"

namespace moeops::cuda::hopper {
template void launch_gated_up<__half>(const RowsLaunch&, const RowsChoice&);
template void launch_gated_backward<__half>(const RowsLaunch&, const RowsChoice&);
}  // namespace moeops::cuda::hopper
