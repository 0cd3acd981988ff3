// The bf16 products for CPUs with AVX-512 (F, BW, DQ, VL); flags in kernels/CMakeLists.txt.
#include "kernels/cpu/bf16_kernels_body.hpp"

namespace stagecoach {
const bf16_kernels bf16_kernels_avx512 = table;
}
