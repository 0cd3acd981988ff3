// The safetensors format: header, ranged reads, writer.
//
//   u64 little-endian N | N bytes of JSON, starting with '{', spaces allowed at its end | data
//   "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}    "__metadata__": text ->
//   text
// The reader holds every rule of the reference (huggingface/safetensors, tensor.rs): tensors tile
// the data with no hole, overlap or tail; sizes equal shape x dtype; no duplicate names; header at
// most 100,000,000 bytes. Knows nothing of checkpoints (storage/part.hpp) or Hugging Face folders
// (storage/huggingface.hpp).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/result.hpp"
#include "storage/file.hpp"

namespace stagecoach {

enum class stored_dtype : std::uint8_t {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

const char* to_string(stored_dtype dtype);  // "F32"
int bits_of(stored_dtype dtype);

/// Float32 values that someone else owns, for writing. Row-major.
struct tensor_view {
  std::string name;
  std::vector<std::int64_t> shape;  // empty: a scalar
  const float* data = nullptr;
};

/// Float32 values read from disk. Row-major.
struct loaded_tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> data;
};

/// Product of the shape; -1 if it is negative anywhere or the product is over 2^56.
std::int64_t element_count(const std::vector<std::int64_t>& shape);

struct tensor_entry {
  std::string name;
  stored_dtype dtype = stored_dtype::f32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // bytes, from the start of the data
  std::uint64_t end = 0;
  std::uint64_t bytes() const { return end - begin; }
  bool operator==(const tensor_entry&) const = default;
};

struct safetensors_header {
  std::map<std::string, std::string> metadata;
  std::vector<tensor_entry> tensors;  // in order of their data
  std::uint64_t data_begin = 0;       // byte of the file where the data starts
  std::uint64_t data_bytes = 0;
  /// Null if there is none of that name.
  const tensor_entry* find(std::string_view name) const;
};

/// Parses the JSON text of a header whose data section has `data_bytes` bytes.
/// Fails: bad_input, too_large; `what` names the file in errors.
result<safetensors_header> parse_safetensors_header(std::string_view text, std::uint64_t data_bytes,
                                                    std::string_view what);
/// A whole file in memory.
result<safetensors_header> parse_safetensors(std::span<const std::uint8_t> file,
                                             std::string_view what);

/// An open safetensors file. Only the header is in memory.
class safetensors_file {
 public:
  /// Fails: not_found, bad_input (breaks a rule), corrupt (shorter than its header says),
  /// too_large, io.
  static result<safetensors_file> open(const std::filesystem::path& path);

  const safetensors_header& header() const { return header_; }
  const std::string& header_text() const { return text_; }  // the JSON as it stands in the file
  const std::filesystem::path& path() const { return path_; }

  /// Raw bytes [offset, offset + bytes) of the data section.
  result<void> read_bytes(void* out, std::uint64_t offset, std::uint64_t bytes) const;
  /// `count` elements from `first` on, as float32; dtype F32, F16, BF16 or F64.
  /// Fails: bad_input for another dtype.
  result<void> read_floats(const tensor_entry& tensor, float* out, std::int64_t first,
                           std::int64_t count) const;

 private:
  std::filesystem::path path_;
  file_handle file_;
  std::string text_;
  safetensors_header header_;
};

/// Header block of a file: the length, the JSON, spaces up to a multiple of `align` bytes. Tensors
/// in the given order, all F32. Fails: bad_input (a name twice or not UTF-8, a shape that is no
/// shape), too_large.
result<std::string> format_safetensors_header(const std::map<std::string, std::string>& metadata,
                                              const std::vector<tensor_view>& tensors,
                                              std::uint64_t align);

/// Writes a file whole (temp, fsync, rename, fsync of the folder); an older one of that name is
/// replaced.
result<void> write_safetensors(const std::filesystem::path& path,
                               const std::map<std::string, std::string>& metadata,
                               const std::vector<tensor_view>& tensors);

/// Exact widening of one value.
float float_from_f16(std::uint16_t bits);
float float_from_bf16(std::uint16_t bits);

}  // namespace stagecoach
