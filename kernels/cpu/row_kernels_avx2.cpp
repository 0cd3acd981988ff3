// The row kernels for CPUs with AVX2; flags in kernels/CMakeLists.txt.
#include "kernels/cpu/row_kernels_body.hpp"

namespace stagecoach {
const row_kernels row_kernels_avx2 = table;
}
