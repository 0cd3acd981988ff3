// Content hashes: XXH3-128 names a whole, XXH3-64 guards a chunk.
//
// Finds damage, not malice: XXH3 is not cryptographic. Texts are lower-case hex, big-endian, as
// xxhsum prints them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "config/result.hpp"

namespace stagecoach {

/// XXH3-128 of the bytes, 32 hex digits.
std::string content_hash(const void* data, std::size_t bytes);
std::string content_hash(std::string_view bytes);

/// XXH3-64 of the bytes.
std::uint64_t chunk_hash(const void* data, std::size_t bytes);

/// 16 lower-case hex digits.
std::string hex16(std::uint64_t value);

/// XXH3-128 over pieces that arrive one after another.
class content_hasher {
 public:
  content_hasher();
  ~content_hasher();
  content_hasher(content_hasher&&) noexcept;
  content_hasher& operator=(content_hasher&&) noexcept;
  void update(const void* data, std::size_t bytes);
  std::string text() const;  // of all that came so far

 private:
  struct state;
  std::unique_ptr<state> state_;
};

struct file_digest {
  std::uint64_t bytes = 0;
  std::string hash;  // XXH3-128, 32 hex digits
};

/// Streams the file once. Fails: not_found, io.
result<file_digest> hash_file(const std::filesystem::path& path);

}  // namespace stagecoach
