#include "storage/hash.hpp"

#include <xxhash.h>

#include <vector>

#include "storage/file.hpp"

namespace stagecoach {
namespace {

std::string text_of(XXH128_hash_t h) { return fmt::format("{:016x}{:016x}", h.high64, h.low64); }

}  // namespace

struct content_hasher::state {
  XXH3_state_t* xxh = XXH3_createState();
  ~state() { XXH3_freeState(xxh); }
};

content_hasher::content_hasher() : state_(std::make_unique<state>()) {
  XXH3_128bits_reset(state_->xxh);
}
content_hasher::~content_hasher() = default;
content_hasher::content_hasher(content_hasher&&) noexcept = default;
content_hasher& content_hasher::operator=(content_hasher&&) noexcept = default;

void content_hasher::update(const void* data, std::size_t bytes) {
  XXH3_128bits_update(state_->xxh, data, bytes);
}

std::string content_hasher::text() const { return text_of(XXH3_128bits_digest(state_->xxh)); }

std::string content_hash(const void* data, std::size_t bytes) {
  return text_of(XXH3_128bits(data, bytes));
}

std::string content_hash(std::string_view bytes) {
  return content_hash(bytes.data(), bytes.size());
}

std::uint64_t chunk_hash(const void* data, std::size_t bytes) { return XXH3_64bits(data, bytes); }

std::string hex16(std::uint64_t value) { return fmt::format("{:016x}", value); }

result<file_digest> hash_file(const std::filesystem::path& path) {
  auto file = open_to_read(path);
  if (!file) return file.err();
  auto bytes = file_bytes(*file, path);
  if (!bytes) return bytes.err();
  content_hasher hasher;
  std::vector<char> block(std::min<std::uint64_t>(*bytes, 4u << 20));
  for (std::uint64_t at = 0; at < *bytes; at += block.size()) {
    const auto now = std::min<std::uint64_t>(block.size(), *bytes - at);
    if (auto r = read_exactly(*file, path, block.data(), now, at); !r) return r.err();
    hasher.update(block.data(), now);
  }
  return file_digest{*bytes, hasher.text()};
}

}  // namespace stagecoach
