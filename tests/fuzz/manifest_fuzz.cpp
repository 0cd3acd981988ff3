// Any bytes as a manifest, and the same bytes sealed with a right hash, so that the fields are
// reached.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "storage/hash.hpp"
#include "storage/manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace stagecoach;
  const std::string text(reinterpret_cast<const char*>(data), size);
  (void)parse_manifest(text, "fuzz");
  const auto read = parse_manifest(text + "xxh3-128:" + content_hash(text) + "\n", "fuzz");
  if (!read) return 0;
  // What was accepted can be written, and is then read as the same.
  const auto again = format_manifest(*read);
  if (!again) std::abort();
  const auto twice = parse_manifest(*again, "fuzz");
  if (!twice || !(*twice == *read)) std::abort();
  return 0;
}
