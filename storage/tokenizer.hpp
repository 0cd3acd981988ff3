// Text to token ids and back.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"

namespace stagecoach {

class tokenizer {
 public:
  virtual ~tokenizer() = default;
  virtual std::string name() const = 0;  // "bytes" | "sentencepiece"
  virtual std::int64_t vocab_size() const = 0;
  /// Fails: bad_input (text that is not UTF-8, for tokenizers that need it).
  virtual result<std::vector<std::int32_t>> encode(std::string_view text) const = 0;
  /// Fails: bad_input (an id outside the vocabulary, with its position).
  virtual result<std::string> decode(std::span<const std::int32_t> tokens) const = 0;
};

/// Token = byte, vocabulary 256; decode is exact for any text.
std::unique_ptr<tokenizer> make_byte_tokenizer();

/// A trained SentencePiece model. Text is cut at '\n'; each '\n' becomes the model's
/// end-of-sentence token if it has one (SentencePiece itself would swallow line ends), and that
/// token decodes to '\n'. Fails: not_found, corrupt (bytes differ from `hash`), bad_input (not a
/// model).
result<std::unique_ptr<tokenizer>> open_sentencepiece(const std::filesystem::path& model,
                                                      std::string_view hash = {});
/// From memory; `what` names it in errors.
result<std::unique_ptr<tokenizer>> load_sentencepiece(std::string_view model,
                                                      std::string_view what);

/// The tokenizer that a job names. Fails: bad_spec for "none" or an unknown one.
result<std::unique_ptr<tokenizer>> open_tokenizer(const data_spec& data);

}  // namespace stagecoach
