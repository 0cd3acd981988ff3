// Token sources: text and token files as one row of int32 ids.
//
//   text     UTF-8 file through a tokenizer (bytes, sentencepiece)
//   llmc     1,024-byte header of int32: [0] 20240520, [1] 1: u16 tokens; [0] 20240801, [1] 7: u32;
//   [2] count nanogpt  u16 tokens, no header
// Opening reads each file once: bytes and hash against the job's, every token against the
// vocabulary. No sample order here (that is a pure function of (seed, position), in model/).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "storage/tokenizer.hpp"

namespace stagecoach {

/// A row of tokens. Safe to read from several threads.
class token_source {
 public:
  virtual ~token_source() = default;
  virtual std::int64_t count() const = 0;
  /// Tokens [begin, begin + n) to out[0, n). Fails: bad_input (range outside), corrupt (file
  /// changed), io.
  virtual result<void> read(std::int64_t begin, std::int64_t n, std::int32_t* out) const = 0;
};

struct dataset {
  std::shared_ptr<const token_source> train;
  std::shared_ptr<const token_source> valid;  // null: the job has none
};

/// Files in the given order, as if concatenated. Without valid files the last floor(count *
/// valid_fraction) tokens are the validation set. Fails: not_found, corrupt (bytes or hash differ:
/// names path, expected and found), bad_input (header, length, a token >= vocab_size with file and
/// position), bad_spec (format or tokenizer).
result<dataset> open_dataset(const data_spec& data, std::int64_t vocab_size);

/// For submit: makes paths absolute, fills in bytes and hash of each file and of the tokenizer's
/// model; guesses the format where it is empty. Fails: not_found, bad_spec.
result<void> resolve_data_files(data_spec& data);

/// How a token file's bytes are laid out.
struct token_layout {
  std::string format;  // "llmc" | "nanogpt" | "text"
  int token_bytes = 2;
  std::uint64_t data_begin = 0;
  std::int64_t count = 0;
};
/// From the first bytes (1,024 are enough) and the file's length. format empty: guessed: llmc by
/// its magic number, text if the head is valid UTF-8 without control bytes, else nanogpt. Fails:
/// bad_input (truncated header, odd length, count that does not fit the length).
result<token_layout> parse_token_layout(std::span<const std::uint8_t> head,
                                        std::uint64_t file_bytes, std::string_view format,
                                        std::string_view what);

/// For `stagecoach data inspect`.
struct data_inspection {
  token_layout layout;
  std::uint64_t bytes = 0;
  std::string hash;
  std::int64_t max_token = -1;             // -1: no token
  std::int64_t max_position = 0;           // first token that has it
  std::vector<std::int32_t> first_tokens;  // at most 16
};
/// Counts a text in tokens of `text_tokenizer` (null: bytes). Fails: not_found, bad_input, io.
result<data_inspection> inspect_data(const std::filesystem::path& path,
                                     std::string_view format = {},
                                     const tokenizer* text_tokenizer = nullptr);
/// The same over bytes in memory (token files only; text counts as bytes).
result<data_inspection> inspect_data(std::span<const std::uint8_t> file, std::string_view format,
                                     std::string_view what);

/// Text file to an llm.c file: u16 up to 65,536 ids, else u32. Returns the token count. Durable,
/// whole or not at all. Fails: not_found, bad_input, too_large (2^31 tokens), disk_full, io.
result<std::int64_t> tokenize_file(const std::filesystem::path& text, const tokenizer& with,
                                   const std::filesystem::path& out);

/// One window of tokens as a file for other programs: u16 llm.c format.
result<void> write_llmc_file(const std::filesystem::path& out, std::span<const std::int32_t> tokens,
                             std::int64_t vocab_size);

}  // namespace stagecoach
