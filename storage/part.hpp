// Checkpoint parts on disk: write, verify, read.
//
// A part is a valid safetensors file whose metadata carries an XXH3-64 of each 4 MiB of data and
// one root hash over the whole header, so any flipped bit is found and a range can be checked
// without the rest. It is visible only under its final name, and only whole: temp file, header
// last, fsync, rename, fsync of the folder. Knows no job and no network; which checkpoint exists is
// the manifest's word (storage/manifest.hpp).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/result.hpp"
#include "storage/safetensors.hpp"

namespace stagecoach {

/// Small enough that a reader of a row range reads little besides, large enough that hashes are 4
/// ppm of data.
inline constexpr std::uint64_t part_chunk_bytes = 4u << 20;

struct part_info {
  std::string file;         // name in its folder
  std::uint64_t bytes = 0;  // of the whole file
  std::string root_hash;    // XXH3-128 over the header block, 32 hex digits; covers all data
  std::vector<std::string> tensors;  // in order of their data
  bool operator==(const part_info&) const = default;
};

/// Where a part stands in its save: the name that sorts, and from which a sweep reads the
/// generation.
struct part_name {
  std::uint64_t generation = 0;
  std::uint64_t seq = 0;
  int stage = 0;
  int slice = 0;
  std::uint64_t plan =
      0;  // its hash: both sides of a cut may use one number in one folder; 0: none
  bool operator==(const part_name&) const = default;
};
/// "g000003-q000000000012-s002-r001-p0123456789abcdef.safetensors"; without a plan no "-p..."
std::string part_file_name(const part_name& name);
/// Also from a temporary name of such a file. Empty: not one of ours.
std::optional<part_name> parse_part_file_name(std::string_view file);

/// Writes one part into `folder` (made if missing). metadata: the caller's own keys ("job", "step",
/// ...); the keys "chunk_bytes", "chunks", "format", "root" are the part's. Writing the same
/// content under the same name again is a success. Fails: conflict (another part has the name),
/// disk_full, io, bad_input; then no part is visible.
result<part_info> write_part(const std::filesystem::path& folder, const std::string& file_name,
                             const std::map<std::string, std::string>& metadata,
                             const std::vector<tensor_view>& tensors);

/// An open part; its header has been checked. For one thread at a time (it keeps the last chunk).
class part_file {
 public:
  /// root_hash: from the manifest; empty = any.
  /// Fails: not_found, corrupt (header, size or root differs; the file is left alone), io.
  static result<part_file> open(const std::filesystem::path& path, std::string_view root_hash = {});

  const safetensors_header& header() const { return file_.header(); }
  part_info info() const;

  /// Elements [first, first + count) of a tensor, after checking each chunk that they touch.
  /// Fails: not_found (no such tensor), bad_input (range outside it), corrupt (names the chunk),
  /// io.
  result<void> read(std::string_view tensor, float* out, std::int64_t first,
                    std::int64_t count) const;
  /// Reads and checks every chunk.
  result<void> verify_all() const;

 private:
  std::uint64_t bytes_of_chunk(std::uint64_t chunk) const;
  result<void> check_chunk(std::uint64_t chunk, const char* data, std::uint64_t bytes) const;
  result<void> load_chunk(std::uint64_t chunk) const;

  safetensors_file file_;
  std::string chunk_hashes_;  // 16 hex digits per chunk
  std::string root_;
  // The last chunk that was read in part: a stage has some hundred small tensors in one chunk.
  mutable std::vector<char> cache_;
  mutable std::optional<std::uint64_t> cached_;
};

struct part_content {
  part_info info;
  std::map<std::string, std::string> metadata;
  std::vector<loaded_tensor> tensors;
};

/// Reads the wanted tensors (empty: all), checking the chunks that they touch.
/// Fails: not_found (file or tensor), corrupt, io.
result<part_content> read_part(const std::filesystem::path& path,
                               const std::vector<std::string>& wanted = {},
                               std::string_view root_hash = {});

enum class check_depth {
  quick,  // header, length, root hash: milliseconds
  deep,   // and every chunk of data
};

/// Fails as part_file::open and verify_all do.
result<part_info> verify_part(const std::filesystem::path& path, check_depth depth,
                              std::string_view root_hash = {});

/// Receives the bytes of a part that another worker wrote, checks them, and makes them visible.
class part_copy_writer {
 public:
  /// Reserves `bytes`. Fails: disk_full, io, too_large.
  static result<part_copy_writer> begin(const std::filesystem::path& folder,
                                        const std::string& file_name, std::uint64_t bytes);
  part_copy_writer(part_copy_writer&&) noexcept = default;
  part_copy_writer& operator=(part_copy_writer&&) = delete;
  ~part_copy_writer();  // unfinished: nothing stays
  /// Next bytes of the file, in order. Fails: bad_input (more than announced), disk_full, io.
  result<void> append(const void* data, std::uint64_t bytes);
  /// Deep check against the root hash, fsync, rename. Fails: corrupt, conflict, disk_full, io.
  result<part_info> finish(std::string_view root_hash);

 private:
  part_copy_writer() = default;
  std::filesystem::path folder_, temp_;
  std::string file_name_;
  std::uint64_t bytes_ = 0, done_ = 0;
  file_handle file_;
};

}  // namespace stagecoach
