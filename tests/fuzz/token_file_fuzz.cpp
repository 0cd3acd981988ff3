// Any bytes as a token file, in each format and guessed.
#include <cstdint>
#include <cstdlib>

#include "storage/dataset.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace stagecoach;
  for (const char* format : {"", "llmc", "nanogpt", "text", "other"}) {
    const auto seen = inspect_data({data, size}, format, "fuzz");
    if (!seen) continue;
    const auto& l = seen->layout;
    const auto tokens =
        static_cast<std::uint64_t>(l.count) * static_cast<std::uint64_t>(l.token_bytes);
    if (l.data_begin + tokens != size) std::abort();
    if (l.count > 0 && (seen->max_token < 0 || seen->max_position >= l.count)) std::abort();
  }
  return 0;
}
