// Which instruction set this process computes with: one per process, because oneDNN takes its cap
// once.
#pragma once

#include <string>

namespace stagecoach {

enum class instruction_set { avx2, avx512 };

/// Settles the set at the first call: `wanted` ("", "avx2", "avx512"; "" is the best of this CPU),
/// capped by STAGECOACH_MAX_ISA. Later calls must want the same or "". Stops the process with a
/// message if the CPU has no AVX2 or not the wanted set, the name is unknown, or another set was
/// settled before.
instruction_set settle_instruction_set(const std::string& wanted);

const char* to_string(instruction_set set);

}  // namespace stagecoach
