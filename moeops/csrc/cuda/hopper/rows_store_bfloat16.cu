// out = A W, for bfloat16.
#include "hopper/rows_store.cuh"

namespace moeops::cuda::hopper {
template void launch_store<__nv_bfloat16>(const RowsLaunch&, const RowsChoice&);
}
