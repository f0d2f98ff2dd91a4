// The up product with a gated unit that has options, for float16.
#include "hopper/rows_activation.cuh"

namespace moeops::cuda::hopper {
template void launch_glu_up<__half>(const RowsLaunch&, bool, const RowsChoice&);
}
