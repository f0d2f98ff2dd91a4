// The backward of the down product with an activation of one variable, for float16.
#include "hopper/rows_activation.cuh"

namespace moeops::cuda::hopper {
template void launch_plain_backward<__half>(const RowsLaunch&, Activation, const RowsChoice&);
}
