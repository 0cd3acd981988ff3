#include "storage/dataset.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>

#include "storage/file.hpp"
#include "storage/hash.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
namespace {

constexpr std::uint64_t llmc_header_bytes = 1024;
constexpr std::int32_t llmc_magic_u16 = 20240520;
constexpr std::int32_t llmc_magic_u32 = 20240801;
constexpr std::int32_t llmc_magic_eval = 20240522;
// A multiple of every token width, so that no token crosses a block.
constexpr std::uint64_t block_bytes = 4u << 20;

std::uint32_t token_at(const std::uint8_t* bytes, std::int64_t index, int width) {
  if (width == 1) return bytes[index];
  if (width == 2) {
    std::uint16_t value = 0;
    std::memcpy(&value, bytes + index * 2, 2);
    return value;
  }
  std::uint32_t value = 0;
  std::memcpy(&value, bytes + index * 4, 4);
  return value;
}

error outside_vocabulary(std::string_view what, std::uint64_t token, std::int64_t position,
                         std::int64_t vocab_size) {
  return make_error(errc::bad_input,
                    "{}: token {} at position {}; the model's vocabulary has {}. fix: "
                    "model.vocab_size: {} or more, or the tokenizer and data that belong together",
                    what, token, position, vocab_size, token + 1);
}

/// The largest token seen, where it came first, and the first few.
struct token_facts {
  std::int64_t max_token = -1;
  std::int64_t max_position = 0;
  std::int64_t count = 0;
  std::vector<std::int32_t> first;

  void add(std::uint32_t token) {
    if (static_cast<std::int64_t>(token) > max_token) {
      max_token = token;
      max_position = count;
    }
    if (first.size() < 16) first.push_back(static_cast<std::int32_t>(token));
    ++count;
  }

  void add_all(const std::uint8_t* bytes, std::int64_t n, int width) {
    // In a hot loop only the maximum is looked for; its place is found when it has changed.
    while (first.size() < 16 && n > 0) {
      add(token_at(bytes, 0, width));
      bytes += width;
      --n;
    }
    std::uint32_t most = 0;
    for (std::int64_t i = 0; i < n; ++i) most = std::max(most, token_at(bytes, i, width));
    if (n > 0 && static_cast<std::int64_t>(most) > max_token)
      for (std::int64_t i = 0; i < n; ++i)
        if (token_at(bytes, i, width) == most) {
          max_token = most;
          max_position = count + i;
          break;
        }
    count += n;
  }
};

/// One pass over a file: its bytes to `see`, in blocks.
template <class See>
result<void> for_each_block(const file_handle& file, const fs::path& path, std::uint64_t bytes,
                            See see) {
  std::vector<std::uint8_t> block(std::min(bytes, block_bytes));
  for (std::uint64_t at = 0; at < bytes; at += block_bytes) {
    const auto now = std::min(block_bytes, bytes - at);
    if (auto r = read_exactly(file, path, block.data(), now, at); !r) return r;
    if (auto r = see(std::span<const std::uint8_t>(block.data(), now), at); !r) return r;
  }
  return ok();
}

/// Feeds a text to a tokenizer in pieces that end at a line's end, so that the pieces' tokens
/// together are those of the whole; `take` gets the tokens of each piece.
class text_encoder {
 public:
  explicit text_encoder(const tokenizer& with) : with_(with) {}

  template <class Take>
  result<void> add(std::span<const std::uint8_t> bytes, Take take) {
    rest_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    auto cut = rest_.rfind('\n');
    if (cut == std::string::npos) {
      if (rest_.size() < 2 * block_bytes) return ok();
      cut = rest_.size() - 1;  // no line end for 8 MiB: cut before a character's first byte
      while (cut > 0 && (static_cast<unsigned char>(rest_[cut]) & 0xc0) == 0x80) --cut;
      if (cut == 0) cut = rest_.size();
      --cut;
    }
    return encode(cut + 1, take);
  }

  template <class Take>
  result<void> finish(Take take) {
    return encode(rest_.size(), take);
  }

 private:
  template <class Take>
  result<void> encode(std::size_t bytes, Take take) {
    auto tokens = with_.encode(std::string_view(rest_).substr(0, bytes));
    if (!tokens)
      return make_error(tokens.err().code, "(counted from byte {}) {}", done_,
                        tokens.err().message);
    rest_.erase(0, bytes);
    done_ += bytes;
    return take(*tokens);
  }

  const tokenizer& with_;
  std::string rest_;
  std::uint64_t done_ = 0;
};

/// Part of a source: tokens of a file, or tokens in memory.
struct segment {
  std::string what;  // the path, for errors
  fs::path path;
  file_handle file;
  int token_bytes = 4;
  std::uint64_t data_begin = 0;
  std::int64_t count = 0;
  std::vector<std::int32_t> tokens;  // when the file is text that a tokenizer turned into tokens
};

class file_source final : public token_source {
 public:
  file_source(std::vector<segment> segments, std::int64_t vocab_size)
      : segments_(std::move(segments)), vocab_size_(vocab_size) {
    for (const auto& s : segments_) count_ += s.count;
  }

  std::int64_t count() const override { return count_; }

  result<void> read(std::int64_t begin, std::int64_t n, std::int32_t* out) const override {
    if (begin < 0 || n < 0 || begin > count_ || n > count_ - begin)
      return make_error(errc::bad_input, "tokens [{}, +{}) lie outside a source of {}", begin, n,
                        count_);
    for (const auto& s : segments_) {
      if (n == 0) break;
      if (begin >= s.count) {
        begin -= s.count;
        continue;
      }
      const auto now = std::min(n, s.count - begin);
      if (auto r = read_segment(s, begin, now, out); !r) return r;
      out += now;
      n -= now;
      begin = 0;
    }
    return ok();
  }

 private:
  // pread and not mmap: a file that shrinks gives an error here and a SIGBUS there.
  result<void> read_segment(const segment& s, std::int64_t begin, std::int64_t n,
                            std::int32_t* out) const {
    if (!s.file.is_open()) {
      std::copy_n(s.tokens.begin() + begin, n, out);
      return ok();
    }
    std::uint8_t block[16 << 10];
    const std::int64_t block_tokens = static_cast<std::int64_t>(sizeof block) / s.token_bytes;
    for (std::int64_t done = 0; done < n;) {
      const auto now = std::min(block_tokens, n - done);
      const auto offset = s.data_begin + static_cast<std::uint64_t>(begin + done) * s.token_bytes;
      if (auto r = read_exactly(s.file, s.path, block,
                                static_cast<std::uint64_t>(now) * s.token_bytes, offset);
          !r)
        return r;
      for (std::int64_t i = 0; i < now; ++i) {
        const auto token = token_at(block, i, s.token_bytes);
        // Checked when it was opened; a file that changed since must not index past an embedding.
        if (token >= static_cast<std::uint64_t>(vocab_size_))
          return make_error(errc::corrupt, "{}: it changed while in use: token {} at position {}",
                            s.what, token, begin + done + i);
        out[done + i] = static_cast<std::int32_t>(token);
      }
      done += now;
    }
    return ok();
  }

  std::vector<segment> segments_;
  std::int64_t vocab_size_;
  std::int64_t count_ = 0;
};

class window_source final : public token_source {
 public:
  window_source(std::shared_ptr<const token_source> of, std::int64_t begin, std::int64_t count)
      : of_(std::move(of)), begin_(begin), count_(count) {}
  std::int64_t count() const override { return count_; }
  result<void> read(std::int64_t begin, std::int64_t n, std::int32_t* out) const override {
    if (begin < 0 || n < 0 || begin > count_ || n > count_ - begin)
      return make_error(errc::bad_input, "tokens [{}, +{}) lie outside a source of {}", begin, n,
                        count_);
    return of_->read(begin_ + begin, n, out);
  }

 private:
  std::shared_ptr<const token_source> of_;
  std::int64_t begin_;
  std::int64_t count_;
};

result<void> check_content(const data_file& expected, std::uint64_t bytes,
                           const std::string& hash) {
  if (expected.bytes != 0 && bytes != expected.bytes)
    return make_error(
        errc::corrupt,
        "{} is another file than the job's: {} bytes, expected {}. fix: put the job's "
        "file there",
        expected.path, bytes, expected.bytes);
  if (!expected.hash.empty() && !hash.empty() && hash != expected.hash)
    return make_error(errc::corrupt,
                      "{} is another file than the job's: hash {}, expected {}. fix: put the job's "
                      "file there",
                      expected.path, hash, expected.hash);
  return ok();
}

result<token_layout> layout_of(const file_handle& file, const fs::path& path, std::uint64_t bytes,
                               std::string_view format) {
  std::vector<std::uint8_t> head(std::min(bytes, llmc_header_bytes));
  if (auto r = read_exactly(file, path, head.data(), head.size(), 0); !r) return r.err();
  return parse_token_layout(head, bytes, format, path.string());
}

struct scanned {
  token_layout layout;
  std::uint64_t bytes = 0;
  std::string hash;
  token_facts facts;
  file_handle file;
};

/// Reads a file once: hash, layout, tokens. text tokens go to `keep` when it is given.
result<scanned> scan_file(const fs::path& path, std::string_view format, const tokenizer* with,
                          std::vector<std::int32_t>* keep) {
  scanned s;
  auto file = open_to_read(path);
  if (!file) return file.err();
  auto bytes = file_bytes(*file, path);
  if (!bytes) return bytes.err();
  s.bytes = *bytes;
  auto layout = layout_of(*file, path, s.bytes, format);
  if (!layout) return layout.err();
  s.layout = *layout;
  const bool is_encoded = s.layout.format == "text" && with != nullptr && with->name() != "bytes";
  content_hasher hasher;
  std::optional<text_encoder> encoder;
  if (is_encoded) encoder.emplace(*with);
  const auto take = [&](const std::vector<std::int32_t>& tokens) -> result<void> {
    for (const auto t : tokens) s.facts.add(static_cast<std::uint32_t>(t));
    if (keep != nullptr) keep->insert(keep->end(), tokens.begin(), tokens.end());
    return ok();
  };
  auto read = for_each_block(
      *file, path, s.bytes,
      [&](std::span<const std::uint8_t> block, std::uint64_t at) -> result<void> {
        hasher.update(block.data(), block.size());
        if (is_encoded) return encoder->add(block, take);
        const auto skip = at == 0 ? s.layout.data_begin : 0;
        const int width = s.layout.token_bytes;
        s.facts.add_all(block.data() + skip, static_cast<std::int64_t>(block.size() - skip) / width,
                        width);
        return ok();
      });
  if (read && is_encoded) read = encoder->finish(take);
  if (!read) {
    const auto& e = read.err();
    const bool names_path = e.message.find(path.string()) != std::string::npos;
    return names_path ? e : make_error(e.code, "{}: {}", path.string(), e.message);
  }
  s.layout.count = s.facts.count;
  s.hash = hasher.text();
  s.file = std::move(*file);
  return s;
}

result<segment> open_segment(const data_file& wanted, const tokenizer* with,
                             std::int64_t vocab_size) {
  // The length first: it is known without reading.
  {
    auto file = open_to_read(wanted.path);
    if (!file) return file.err();
    auto bytes = file_bytes(*file, wanted.path);
    if (!bytes) return bytes.err();
    if (auto r = check_content(wanted, *bytes, {}); !r) return r.err();
  }
  segment s;
  s.what = wanted.path;
  s.path = wanted.path;
  auto scan = scan_file(wanted.path, wanted.format, with, &s.tokens);
  if (!scan) return scan.err();
  if (auto r = check_content(wanted, scan->bytes, scan->hash); !r) return r.err();
  if (scan->layout.format == "text" && with == nullptr)
    return make_error(errc::bad_spec,
                      "{} is text and the job has no tokenizer. fix: bytes or "
                      "sentencepiece",
                      wanted.path);
  if (scan->facts.count == 0)
    return make_error(errc::bad_input, "{} has no tokens. fix: name a file with data", wanted.path);
  if (scan->facts.max_token >= vocab_size)
    return outside_vocabulary(wanted.path, static_cast<std::uint64_t>(scan->facts.max_token),
                              scan->facts.max_position, vocab_size);
  s.token_bytes = scan->layout.token_bytes;
  s.data_begin = scan->layout.data_begin;
  s.count = scan->facts.count;
  if (s.tokens.empty()) s.file = std::move(scan->file);
  return s;
}

result<std::shared_ptr<const token_source>> open_source(const std::vector<data_file>& files,
                                                        const tokenizer* with,
                                                        std::int64_t vocab_size) {
  std::vector<segment> segments;
  for (const auto& f : files) {
    auto s = open_segment(f, with, vocab_size);
    if (!s) return s.err();
    segments.push_back(std::move(*s));
  }
  return std::shared_ptr<const token_source>(
      std::make_shared<file_source>(std::move(segments), vocab_size));
}

bool looks_like_text(std::span<const std::uint8_t> head) {
  if (head.empty()) return false;
  std::size_t cut = 0;  // bytes of a character that the head's end may have cut
  for (std::size_t i = 0; i < head.size();) {
    const auto c = head[i];
    if (c < 0x20 && c != '\n' && c != '\r' && c != '\t' && c != '\f') return false;
    const std::size_t bytes = c < 0x80   ? 1
                              : c < 0xc2 ? 0
                              : c < 0xe0 ? 2
                              : c < 0xf0 ? 3
                              : c < 0xf5 ? 4
                                         : 0;
    if (bytes == 0) return false;
    for (std::size_t k = 1; k < bytes; ++k) {
      if (i + k >= head.size()) {
        cut = head.size() - i;
        break;
      }
      if ((head[i + k] & 0xc0) != 0x80) return false;
    }
    i += bytes;
  }
  return cut < 4;
}

/// Writes an llm.c file piece by piece; the header, with the count, comes last.
class llmc_writer {
 public:
  static result<llmc_writer> begin(const fs::path& out, std::int64_t vocab_size) {
    llmc_writer w;
    w.path_ = out;
    w.temp_ = temporary_name(out);
    w.width_ = vocab_size <= 65536 ? 2 : 4;
    auto file = create_file(w.temp_);
    if (!file) return file.err();
    w.file_ = std::move(*file);
    return w;
  }
  llmc_writer(llmc_writer&&) = default;
  ~llmc_writer() {
    std::error_code ignored;
    if (file_.is_open()) fs::remove(temp_, ignored);
  }

  result<void> add(std::span<const std::int32_t> tokens) {
    if (static_cast<std::int64_t>(tokens.size()) >
        std::numeric_limits<std::int32_t>::max() - count_)
      return make_error(
          errc::too_large,
          "{}: more than 2^31 - 1 tokens, which the format can't count. fix: split the "
          "text",
          path_.string());
    std::vector<std::uint8_t> bytes(tokens.size() * width_);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto token = static_cast<std::uint32_t>(tokens[i]);
      if (width_ == 2 && token > 65535)
        return make_error(errc::bad_input, "token {} at position {} does not fit 16 bits", token,
                          count_ + static_cast<std::int64_t>(i));
      std::memcpy(bytes.data() + i * width_, &token, width_);
    }
    const auto at = llmc_header_bytes + static_cast<std::uint64_t>(count_) * width_;
    if (auto r = write_exactly(file_, temp_, bytes.data(), bytes.size(), at); !r) return r;
    count_ += static_cast<std::int64_t>(tokens.size());
    return ok();
  }

  result<std::int64_t> finish() {
    std::int32_t header[256] = {};
    header[0] = width_ == 2 ? llmc_magic_u16 : llmc_magic_u32;
    header[1] = width_ == 2 ? 1 : 7;
    header[2] = static_cast<std::int32_t>(count_);
    if (auto r = write_exactly(file_, temp_, header, sizeof header, 0); !r) return r.err();
    if (auto r = sync_file(file_, temp_); !r) return r.err();
    if (auto r = rename_over(temp_, path_); !r) return r.err();
    file_ = file_handle();
    if (auto r = sync_folder(path_.has_parent_path() ? path_.parent_path() : fs::path(".")); !r)
      return r.err();
    return count_;
  }

 private:
  llmc_writer() = default;
  fs::path path_, temp_;
  file_handle file_;
  std::size_t width_ = 2;
  std::int64_t count_ = 0;
};

}  // namespace

result<token_layout> parse_token_layout(std::span<const std::uint8_t> head,
                                        std::uint64_t file_bytes, std::string_view format,
                                        std::string_view what) {
  std::int32_t start[3] = {};
  if (!head.empty()) std::memcpy(start, head.data(), std::min(head.size(), sizeof start));
  const bool is_llmc =
      head.size() >= 4 && (start[0] == llmc_magic_u16 || start[0] == llmc_magic_u32);
  token_layout layout;
  layout.format = !format.empty()         ? std::string(format)
                  : is_llmc               ? "llmc"
                  : looks_like_text(head) ? "text"
                                          : "nanogpt";
  if (layout.format == "text") {
    layout.token_bytes = 1;
    layout.count = static_cast<std::int64_t>(file_bytes);
    return layout;
  }
  if (layout.format == "nanogpt") {
    if (file_bytes % 2 != 0)
      return make_error(errc::bad_input,
                        "{}: {} bytes; a nanogpt file is a row of 2-byte tokens. fix: check the "
                        "format, or whether the file is whole",
                        what, file_bytes);
    layout.count = static_cast<std::int64_t>(file_bytes / 2);
    return layout;
  }
  if (layout.format != "llmc")
    return make_error(errc::bad_spec, "{}: unknown data format '{}'. fix: text, llmc or nanogpt",
                      what, layout.format);
  if (file_bytes < llmc_header_bytes || head.size() < sizeof start)
    return make_error(errc::bad_input, "{}: {} bytes; an llm.c header alone has {}", what,
                      file_bytes, llmc_header_bytes);
  if (!is_llmc)
    return make_error(
        errc::bad_input, "{}: begins with {}, expected {} (u16) or {} (u32){}", what, start[0],
        llmc_magic_u16, llmc_magic_u32,
        start[0] == llmc_magic_eval ? "; this is an evaluation file" : ". fix: check the format");
  const int version = start[0] == llmc_magic_u16 ? 1 : 7;
  if (start[1] != version)
    return make_error(errc::bad_input, "{}: llm.c version {}, expected {}", what, start[1],
                      version);
  layout.token_bytes = start[0] == llmc_magic_u16 ? 2 : 4;
  layout.data_begin = llmc_header_bytes;
  layout.count = start[2];
  const auto data = file_bytes - llmc_header_bytes;
  if (start[2] < 0 || static_cast<std::uint64_t>(start[2]) * layout.token_bytes != data)
    return make_error(errc::bad_input,
                      "{}: its header says {} tokens of {} bytes, its data has {} bytes. fix: get "
                      "the whole file",
                      what, start[2], layout.token_bytes, data);
  return layout;
}

result<dataset> open_dataset(const data_spec& data, std::int64_t vocab_size) {
  if (data.train.empty())
    return make_error(errc::bad_spec, "data.train names no file. fix: name one or more");
  if (!(data.valid_fraction >= 0.0 && data.valid_fraction < 1.0))
    return make_error(errc::bad_spec, "data.valid_fraction is {}, expected 0 or more and under 1",
                      data.valid_fraction);
  std::unique_ptr<tokenizer> with;
  const bool has_tokenizer = data.tokenizer == "bytes" || data.tokenizer == "sentencepiece";
  const auto is_text = [&](const data_file& f) {
    return f.format == "text" || (f.format.empty() && has_tokenizer);
  };
  if (std::any_of(data.train.begin(), data.train.end(), is_text) ||
      std::any_of(data.valid.begin(), data.valid.end(), is_text)) {
    auto opened = open_tokenizer(data);
    if (!opened) return opened.err();
    with = std::move(*opened);
  }
  auto all = open_source(data.train, with.get(), vocab_size);
  if (!all) return all.err();
  dataset set;
  set.train = *all;
  if (!data.valid.empty()) {
    auto valid = open_source(data.valid, with.get(), vocab_size);
    if (!valid) return valid.err();
    set.valid = *valid;
  } else if (data.valid_fraction > 0.0) {
    const auto count = (*all)->count();
    const auto valid_count =
        static_cast<std::int64_t>(std::floor(static_cast<double>(count) * data.valid_fraction));
    set.train = std::make_shared<window_source>(*all, 0, count - valid_count);
    set.valid = std::make_shared<window_source>(*all, count - valid_count, valid_count);
  }
  return set;
}

result<void> resolve_data_files(data_spec& data) {
  const auto absolute = [](std::string& text) -> result<void> {
    std::error_code code;
    const auto path = fs::absolute(text, code).lexically_normal();
    if (code) return errno_error(code.value(), "can't find", text);
    text = path.string();
    return ok();
  };
  bool has_text = false;
  for (auto* files : {&data.train, &data.valid})
    for (auto& f : *files) {
      if (auto r = absolute(f.path); !r) return r;
      {
        auto file = open_to_read(f.path);
        if (!file) return file.err();
        auto bytes = file_bytes(*file, f.path);
        if (!bytes) return bytes.err();
        auto layout = layout_of(*file, f.path, *bytes, f.format);
        if (!layout) return layout.err();
        f.format = layout->format;
      }
      has_text = has_text || f.format == "text";
      auto digest = hash_file(f.path);
      if (!digest) return digest.err();
      f.bytes = digest->bytes;
      f.hash = digest->hash;
    }
  if (has_text && data.tokenizer != "bytes" && data.tokenizer != "sentencepiece")
    return make_error(
        errc::bad_spec,
        "data.tokenizer is '{}', but there is a text file. fix: bytes or sentencepiece",
        data.tokenizer);
  if (data.tokenizer == "sentencepiece") {
    if (auto r = absolute(data.tokenizer_path); !r) return r;
    auto digest = hash_file(data.tokenizer_path);
    if (!digest) return digest.err();
    data.tokenizer_hash = digest->hash;
    // Opened once now, so that a file that is no model is refused at submit and not on every
    // worker.
    if (auto opened = open_tokenizer(data); !opened) return opened.err();
  }
  return ok();
}

result<data_inspection> inspect_data(const fs::path& path, std::string_view format,
                                     const tokenizer* text_tokenizer) {
  auto scan = scan_file(path, format, text_tokenizer, nullptr);
  if (!scan) return scan.err();
  return data_inspection{scan->layout,
                         scan->bytes,
                         scan->hash,
                         scan->facts.max_token,
                         scan->facts.max_position,
                         std::move(scan->facts.first)};
}

result<data_inspection> inspect_data(std::span<const std::uint8_t> file, std::string_view format,
                                     std::string_view what) {
  const auto head = file.first(std::min<std::size_t>(file.size(), llmc_header_bytes));
  auto layout = parse_token_layout(head, file.size(), format, what);
  if (!layout) return layout.err();
  token_facts facts;
  facts.add_all(file.data() + layout->data_begin, layout->count, layout->token_bytes);
  return data_inspection{
      *layout,         file.size(),        content_hash(file.data(), file.size()),
      facts.max_token, facts.max_position, std::move(facts.first)};
}

result<std::int64_t> tokenize_file(const fs::path& text, const tokenizer& with,
                                   const fs::path& out) {
  auto file = open_to_read(text);
  if (!file) return file.err();
  auto bytes = file_bytes(*file, text);
  if (!bytes) return bytes.err();
  auto writer = llmc_writer::begin(out, with.vocab_size());
  if (!writer) return writer.err();
  text_encoder encoder(with);
  const auto take = [&](const std::vector<std::int32_t>& tokens) { return writer->add(tokens); };
  auto done = for_each_block(
      *file, text, *bytes,
      [&](std::span<const std::uint8_t> block, std::uint64_t) { return encoder.add(block, take); });
  if (done) done = encoder.finish(take);
  if (!done) return make_error(done.err().code, "{}: {}", text.string(), done.err().message);
  return writer->finish();
}

result<void> write_llmc_file(const fs::path& out, std::span<const std::int32_t> tokens,
                             std::int64_t vocab_size) {
  auto writer = llmc_writer::begin(out, vocab_size);
  if (!writer) return writer.err();
  if (auto r = writer->add(tokens); !r) return r;
  if (auto r = writer->finish(); !r) return r.err();
  return ok();
}

}  // namespace stagecoach
