// Any bytes as a safetensors file: refused or read, never more memory than its text, never out of
// bounds.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "storage/huggingface.hpp"
#include "storage/safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace stagecoach;
  const auto header = parse_safetensors({data, size}, "fuzz");
  if (header) {
    // What was accepted must hold the rule that readers rely on: tensors tile the data.
    std::uint64_t end = 0;
    for (const auto& t : header->tensors) {
      if (t.begin != end || t.end < t.begin || header->find(t.name) == nullptr) std::abort();
      end = t.end;
    }
    if (end != header->data_bytes || header->data_begin + end != size) std::abort();
  }
  // The length word is a high wall for a mutator: the same bytes as a header's text alone, too.
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  (void)parse_safetensors_header(text, size, "fuzz");
  (void)parse_hf_config(text, "fuzz");
  return 0;
}
