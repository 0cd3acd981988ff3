// The row kernels for CPUs with AVX-512 (F, BW, DQ, VL); flags in kernels/CMakeLists.txt.
#include "kernels/cpu/row_kernels_body.hpp"

namespace stagecoach {
const row_kernels row_kernels_avx512 = table;
}
