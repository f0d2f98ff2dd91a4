// out = A W, for float16.
#include "hopper/rows_store.cuh"

namespace moeops::cuda::hopper {
template void launch_store<__half>(const RowsLaunch&, const RowsChoice&);
}
