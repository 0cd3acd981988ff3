#include "storage/tokenizer.hpp"

#include <sentencepiece_processor.h>

#include <algorithm>

#include "storage/file.hpp"
#include "storage/hash.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
namespace {

// Real models are under 10 MB.
constexpr std::int64_t model_bytes_max = 256 << 20;
// SentencePiece keeps a lattice of a line; a file without line ends must not become one line of
// gigabytes.
constexpr std::size_t line_bytes_max = 1 << 20;

class byte_tokenizer final : public tokenizer {
 public:
  std::string name() const override { return "bytes"; }
  std::int64_t vocab_size() const override { return 256; }

  result<std::vector<std::int32_t>> encode(std::string_view text) const override {
    std::vector<std::int32_t> tokens;
    tokens.reserve(text.size());
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  }

  result<std::string> decode(std::span<const std::int32_t> tokens) const override {
    std::string text;
    text.reserve(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < 0 || tokens[i] > 255)
        return make_error(errc::bad_input, "token {} at position {} is no byte (0 to 255)",
                          tokens[i], i);
      text += static_cast<char>(tokens[i]);
    }
    return text;
  }
};

/// Bytes of the character that starts at `at`; 0 if it is not UTF-8 (overlong, surrogate, cut, over
/// U+10FFFF).
std::size_t character_bytes(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const auto left = text.size() - at;
  const auto follows = [&](std::size_t i) { return i < left && (byte(i) & 0xc0) == 0x80; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    if (!follows(1) || !follows(2)) return 0;
    if (first == 0xe0 && byte(1) < 0xa0) return 0;
    if (first == 0xed && byte(1) > 0x9f) return 0;
    return 3;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    if (!follows(1) || !follows(2) || !follows(3)) return 0;
    if (first == 0xf0 && byte(1) < 0x90) return 0;
    if (first == 0xf4 && byte(1) > 0x8f) return 0;
    return 4;
  }
  return 0;
}

class sentencepiece_tokenizer final : public tokenizer {
 public:
  std::string name() const override { return "sentencepiece"; }
  std::int64_t vocab_size() const override { return model_.GetPieceSize(); }

  result<void> load(std::string_view bytes, std::string_view what) {
    const auto status = model_.LoadFromSerializedProto(bytes);
    if (!status.ok())
      return make_error(errc::bad_input, "{} is no SentencePiece model: {}", what,
                        status.ToString());
    line_end_ = model_.eos_id();
    return ok();
  }

  result<std::vector<std::int32_t>> encode(std::string_view text) const override {
    std::vector<std::int32_t> tokens;
    std::vector<int> ids;
    std::size_t begin = 0, at = 0;
    const auto add_line = [&](std::size_t end) -> result<void> {
      if (end == begin) return ok();
      const auto status = model_.Encode(text.substr(begin, end - begin), &ids);
      if (!status.ok())
        return make_error(errc::bad_input, "SentencePiece can't encode: {}", status.ToString());
      tokens.insert(tokens.end(), ids.begin(), ids.end());
      return ok();
    };
    while (at < text.size()) {
      if (text[at] == '\n') {
        if (auto r = add_line(at); !r) return r.err();
        if (line_end_ >= 0) tokens.push_back(line_end_);
        begin = ++at;
        continue;
      }
      const auto bytes = character_bytes(text, at);
      if (bytes == 0)
        return make_error(errc::bad_input,
                          "byte {} (0x{:02x}) is not UTF-8. fix: convert the text (iconv -t UTF-8)",
                          at, static_cast<unsigned char>(text[at]));
      at += bytes;
      if (at - begin >= line_bytes_max) {
        if (auto r = add_line(at); !r) return r.err();
        begin = at;
      }
    }
    if (auto r = add_line(text.size()); !r) return r.err();
    return tokens;
  }

  result<std::string> decode(std::span<const std::int32_t> tokens) const override {
    std::string text, line;
    std::vector<int> ids;
    const auto add_line = [&]() -> result<void> {
      const auto status = model_.Decode(ids, &line);
      if (!status.ok())
        return make_error(errc::bad_input, "SentencePiece can't decode: {}", status.ToString());
      text += line;
      ids.clear();
      return ok();
    };
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < 0 || tokens[i] >= vocab_size())
        return make_error(errc::bad_input,
                          "token {} at position {} is outside the vocabulary of {}", tokens[i], i,
                          vocab_size());
      if (tokens[i] != line_end_) {
        ids.push_back(tokens[i]);
        continue;
      }
      if (auto r = add_line(); !r) return r.err();
      text += '\n';
    }
    if (auto r = add_line(); !r) return r.err();
    return text;
  }

 private:
  sentencepiece::SentencePieceProcessor model_;
  int line_end_ = -1;
};

}  // namespace

std::unique_ptr<tokenizer> make_byte_tokenizer() { return std::make_unique<byte_tokenizer>(); }

result<std::unique_ptr<tokenizer>> load_sentencepiece(std::string_view model,
                                                      std::string_view what) {
  auto loaded = std::make_unique<sentencepiece_tokenizer>();
  if (auto r = loaded->load(model, what); !r) return r.err();
  return std::unique_ptr<tokenizer>(std::move(loaded));
}

result<std::unique_ptr<tokenizer>> open_sentencepiece(const fs::path& model,
                                                      std::string_view hash) {
  auto bytes = read_whole_file(model, model_bytes_max);
  if (!bytes) return bytes.err();
  if (const auto found = content_hash(*bytes); !hash.empty() && found != hash)
    return make_error(errc::corrupt,
                      "{} is another tokenizer than the job's: hash {}, expected {}. fix: put the "
                      "job's file there",
                      model.string(), found, hash);
  return load_sentencepiece(*bytes, model.string());
}

result<std::unique_ptr<tokenizer>> open_tokenizer(const data_spec& data) {
  if (data.tokenizer == "bytes") return make_byte_tokenizer();
  if (data.tokenizer == "sentencepiece")
    return open_sentencepiece(data.tokenizer_path, data.tokenizer_hash);
  return make_error(errc::bad_spec,
                    "data.tokenizer is '{}', which has no text. fix: bytes or sentencepiece",
                    data.tokenizer);
}

}  // namespace stagecoach
