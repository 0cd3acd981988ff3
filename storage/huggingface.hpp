// Folders of Hugging Face transformers for GPT2LMHeadModel: write one, read one.
//
// Tensor layouts are theirs and ours alike: Conv1D weights [in, out], tied head. Names in this
// file's interface are without the prefix "transformer." ("h.0.attn.c_attn.weight", "wte.weight").
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "config/result.hpp"
#include "storage/safetensors.hpp"

namespace stagecoach {

struct hf_config {
  std::int64_t vocab_size = 50257;
  std::int64_t n_positions = 1024;
  std::int64_t n_embd = 768;
  std::int64_t n_layer = 12;
  std::int64_t n_head = 12;
  std::int64_t n_inner = 0;        // 0: null in the file, 4 * n_embd
  std::int64_t bos_token_id = -1;  // -1: null in the file
  std::int64_t eos_token_id = -1;
  double initializer_range = 0.02;
  bool operator==(const hf_config&) const = default;
};

/// config.json and generation_config.json as texts.
std::string format_hf_config(const hf_config& config);
std::string format_hf_generation_config(const hf_config& config);

struct parsed_hf_config {
  hf_config config;
  std::vector<std::string>
      notes;  // differences that do not stop us (dropout: Stagecoach trains with 0)
};
/// Fails: bad_input (not JSON, not gpt2, an activation or scaling that we do not compute, sizes
/// over limits).
result<parsed_hf_config> parse_hf_config(std::string_view text, std::string_view what);

/// model.safetensors (metadata format=pt), config.json, generation_config.json. Names get the
/// prefix.
result<void> write_hf_folder(const std::filesystem::path& folder, const hf_config& config,
                             const std::vector<tensor_view>& tensors);

/// A folder opened for reading, whole or in shards. Values are read on demand.
class hf_folder {
 public:
  /// Fails: not_found (with a hint for pytorch_model.bin), bad_input, corrupt.
  static result<hf_folder> open(const std::filesystem::path& folder);

  const hf_config& config() const { return config_; }
  const std::vector<std::string>& notes() const { return notes_; }
  /// Names without prefix, sorted; attention mask buffers and the tied lm_head are not listed.
  std::vector<std::string> names() const;
  /// Null if there is none.
  const tensor_entry* find(std::string_view name) const;
  /// All values as float32 (F32, F16, BF16). Fails: not_found, bad_input, corrupt.
  result<void> read(std::string_view name, float* out) const;
  /// `count` values from `first` on.
  result<void> read(std::string_view name, float* out, std::int64_t first,
                    std::int64_t count) const;
  /// The files that decide the weights (config.json and the tensors), for the job's identity.
  const std::vector<std::filesystem::path>& files() const { return files_; }

 private:
  struct place {
    std::size_t file = 0;
    tensor_entry entry;
  };
  hf_config config_;
  std::vector<std::string> notes_;
  std::vector<std::filesystem::path> files_;
  std::vector<safetensors_file> shards_;
  std::map<std::string, place, std::less<>> tensors_;
};

struct hf_content {
  hf_config config;
  std::vector<loaded_tensor> tensors;  // by name
  std::vector<std::string> notes;
};
/// All of a folder in memory.
result<hf_content> read_hf_folder(const std::filesystem::path& folder);

}  // namespace stagecoach
