// The bf16 products for CPUs with AVX-512 and its bf16 instructions; flags in
// kernels/CMakeLists.txt.
#include "kernels/cpu/bf16_kernels_body.hpp"

namespace stagecoach {
const bf16_kernels bf16_kernels_avx512_bf16 = table;
}
