// The up product with a gated unit that has options, for bfloat16.
#include "hopper/rows_activation.cuh"

namespace moeops::cuda::hopper {
template void launch_glu_up<__nv_bfloat16>(const RowsLaunch&, bool, const RowsChoice&);
}
