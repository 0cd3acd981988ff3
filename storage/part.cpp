#include "storage/part.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "storage/hash.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
namespace {

// Data starts on a page, so that reads and writes may go past the page cache.
constexpr std::uint64_t header_align = 4096;
constexpr std::string_view no_root = "00000000000000000000000000000000";
// A file from another worker: bounded by what a stage of the largest preset takes.
constexpr std::uint64_t part_bytes_max = std::uint64_t{1} << 42;

std::uint64_t chunk_count(std::uint64_t bytes) {
  return (bytes + part_chunk_bytes - 1) / part_chunk_bytes;
}

// The one place of `"key":"` in a header. It can't be inside a string: quotes are escaped there.
std::size_t value_place(std::string_view text, std::string_view key) {
  const auto mark = fmt::format("\"{}\":\"", key);
  const auto at = text.find(mark);
  return at == std::string_view::npos ? at : at + mark.size();
}

std::string root_of(std::string block) {
  const auto at = value_place(block, "root");
  invariant(at != std::string::npos && at + no_root.size() <= block.size(),
            "a part's header has a root");
  block.replace(at, no_root.size(), no_root);
  return content_hash(block);
}

// Streams tensors through one buffer of a chunk: hash, write, next. One copy at memory speed, and
// every write is whole, aligned and in order.
class chunk_writer {
 public:
  chunk_writer(const file_handle& file, const fs::path& path, std::uint64_t at)
      : file_(file), path_(path), at_(at), buffer_(part_chunk_bytes) {}

  result<void> add(const void* data, std::uint64_t bytes) {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const auto now = std::min(bytes, part_chunk_bytes - fill_);
      std::memcpy(buffer_.data() + fill_, from, now);
      fill_ += now;
      from += now;
      bytes -= now;
      if (fill_ == part_chunk_bytes)
        if (auto r = finish_chunk(); !r) return r;
    }
    return ok();
  }

  result<std::string> finish() {
    if (fill_ > 0)
      if (auto r = finish_chunk(); !r) return r.err();
    return std::move(hashes_);
  }

 private:
  result<void> finish_chunk() {
    hashes_ += hex16(chunk_hash(buffer_.data(), fill_));
    if (auto r = write_exactly(file_, path_, buffer_.data(), fill_, at_); !r) return r;
    // Starts the disk now, so that the fsync at the end has little left. Its failure shows there.
    ::sync_file_range(file_.fd(), static_cast<off_t>(at_), static_cast<off_t>(fill_),
                      SYNC_FILE_RANGE_WRITE);
    at_ += fill_;
    fill_ = 0;
    return ok();
  }

  const file_handle& file_;
  const fs::path& path_;
  std::uint64_t at_;
  std::vector<char> buffer_;
  std::uint64_t fill_ = 0;
  std::string hashes_;
};

void forget(const fs::path& path) {
  std::error_code ignored;
  fs::remove(path, ignored);
}

// The temporary file's last steps. An existing file of that name is never replaced while it is a
// good part.
result<void> make_visible(const fs::path& temp, const fs::path& path, std::string_view root) {
  auto renamed = rename_to_new(temp, path);
  if (!renamed && renamed.err().code != errc::conflict) return renamed;
  if (!renamed) {
    if (verify_part(path, check_depth::deep, root)) {
      forget(temp);
      return sync_folder(path.parent_path());
    }
    if (verify_part(path, check_depth::deep)) {
      return make_error(errc::conflict,
                        "{} is there with other content. fix: name parts by generation and seq",
                        path.string());
    }
    if (auto r = rename_over(temp, path); !r) return r;
  }
  auto synced = sync_folder(path.parent_path());
  // Whether the new name is durable is unknown, so it must not count as written.
  if (!synced) forget(path);
  return synced;
}

error as_corrupt(const error& e) {
  if (e.code == errc::bad_input || e.code == errc::too_large) return {errc::corrupt, e.message};
  return e;
}

}  // namespace

std::string part_file_name(const part_name& name) {
  const std::string plan = name.plan == 0 ? "" : fmt::format("-p{:016x}", name.plan);
  return fmt::format("g{:06}-q{:012}-s{:03}-r{:03}{}.safetensors", name.generation, name.seq,
                     name.stage, name.slice, plan);
}

std::optional<part_name> parse_part_file_name(std::string_view file) {
  const std::string text(file);
  part_name name;
  unsigned long long generation = 0, seq = 0, plan = 0;
  // What follows the numbers is held against the whole name below.
  if (std::sscanf(text.c_str(), "g%20llu-q%20llu-s%9d-r%9d-p%16llx", &generation, &seq, &name.stage,
                  &name.slice, &plan) < 4)
    return std::nullopt;
  name.generation = generation;
  name.seq = seq;
  name.plan = plan;
  const auto whole = part_file_name(name);
  const std::string_view rest = file.substr(std::min(whole.size(), file.size()));
  if (!file.starts_with(whole)) return std::nullopt;
  if (!rest.empty() && !(rest.starts_with('.') && rest.ends_with(".tmp"))) return std::nullopt;
  return name;
}

result<part_info> write_part(const fs::path& folder, const std::string& file_name,
                             const std::map<std::string, std::string>& metadata,
                             const std::vector<tensor_view>& tensors) {
  if (!is_plain_name(file_name) || file_name.ends_with(".tmp"))
    return make_error(errc::bad_input, "'{}' is no name for a part. fix: a plain file name",
                      file_name);
  if (auto r = make_folders(folder); !r) return r.err();
  std::uint64_t data_bytes = 0;
  for (const auto& t : tensors) {
    const auto count = element_count(t.shape);
    if (count < 0) return make_error(errc::bad_input, "tensor {} has an impossible shape", t.name);
    data_bytes += static_cast<std::uint64_t>(count) * 4;
  }
  auto all = metadata;
  all["format"] = "stagecoach-part-1";
  all["chunk_bytes"] = std::to_string(part_chunk_bytes);
  // Fixed width: the header's length is known before the data are hashed.
  all["chunks"] = std::string(16 * chunk_count(data_bytes), '0');
  all["root"] = std::string(no_root);
  auto block = format_safetensors_header(all, tensors, header_align);
  if (!block) return block.err();

  part_info info{file_name, block->size() + data_bytes, {}, {}};
  for (const auto& t : tensors) info.tensors.push_back(t.name);
  const fs::path path = folder / file_name;
  const fs::path temp = temporary_name(path);
  const auto write = [&]() -> result<void> {
    auto file = create_file(temp);
    if (!file) return file.err();
    if (auto r = reserve_bytes(*file, temp, info.bytes); !r) return r;
    chunk_writer chunks(*file, temp, block->size());
    for (const auto& t : tensors)
      if (auto r = chunks.add(t.data, static_cast<std::uint64_t>(element_count(t.shape)) * 4); !r)
        return r;
    auto hashes = chunks.finish();
    if (!hashes) return hashes.err();
    block->replace(value_place(*block, "chunks"), hashes->size(), *hashes);
    info.root_hash = root_of(*block);
    block->replace(value_place(*block, "root"), info.root_hash.size(), info.root_hash);
    // Last: until now the first 8 bytes are zero, which no reader takes for a file.
    if (auto r = write_exactly(*file, temp, block->data(), block->size(), 0); !r) return r;
    if (auto r = sync_file(*file, temp); !r) return r;
    return make_visible(temp, path, info.root_hash);
  };
  if (auto r = write(); !r) {
    forget(temp);
    return r.err();
  }
  return info;
}

result<part_file> part_file::open(const fs::path& path, std::string_view root_hash) {
  auto file = safetensors_file::open(path);
  if (!file) return as_corrupt(file.err());
  part_file part;
  part.file_ = std::move(*file);
  const auto& metadata = part.file_.header().metadata;
  const auto value = [&](const char* key) {
    const auto at = metadata.find(key);
    return at == metadata.end() ? std::string() : at->second;
  };
  part.chunk_hashes_ = value("chunks");
  part.root_ = value("root");
  const auto bad = [&](std::string_view why) {
    return make_error(errc::corrupt, "{}: {}", path.string(), why);
  };
  if (value("format") != "stagecoach-part-1")
    return bad(
        fmt::format("not a part of a checkpoint: its format is '{}', expected "
                    "'stagecoach-part-1'",
                    value("format")));
  if (value("chunk_bytes") != std::to_string(part_chunk_bytes))
    return bad("its chunk size is not the one of this version");
  if (part.chunk_hashes_.size() != 16 * chunk_count(part.file_.header().data_bytes))
    return bad("its chunk hashes do not fit its data");
  if (part.root_.size() != no_root.size()) return bad("its root hash is not 32 hex digits");
  std::string block(8, '\0');
  const std::uint64_t length = part.file_.header_text().size();
  std::memcpy(block.data(), &length, 8);
  block += part.file_.header_text();
  const auto place = value_place(block, "root");
  if (place == std::string::npos || block.compare(place, part.root_.size(), part.root_) != 0)
    return bad("its header was not written by this program");
  const auto found = root_of(std::move(block));
  if (found != part.root_)
    return bad(fmt::format("its header is damaged: root hash {}, expected {}", found, part.root_));
  if (!root_hash.empty() && root_hash != part.root_)
    return bad(fmt::format("it is another file than the manifest names: root hash {}, expected {}",
                           part.root_, root_hash));
  for (const auto& t : part.file_.header().tensors)
    if (t.dtype != stored_dtype::f32) return bad(fmt::format("tensor {} is not F32", t.name));
  return part;
}

part_info part_file::info() const {
  const auto& h = file_.header();
  part_info info{file_.path().filename().string(), h.data_begin + h.data_bytes, root_, {}};
  for (const auto& t : h.tensors) info.tensors.push_back(t.name);
  return info;
}

result<void> part_file::check_chunk(std::uint64_t chunk, const char* data,
                                    std::uint64_t bytes) const {
  const auto found = hex16(chunk_hash(data, bytes));
  const std::string_view expected = std::string_view(chunk_hashes_).substr(16 * chunk, 16);
  if (found == expected) return ok();
  return make_error(errc::corrupt,
                    "{}: chunk {} (data bytes [{}, {})) is damaged: hash {}, expected {}",
                    file_.path().string(), chunk, chunk * part_chunk_bytes,
                    chunk * part_chunk_bytes + bytes, found, expected);
}

std::uint64_t part_file::bytes_of_chunk(std::uint64_t chunk) const {
  return std::min(part_chunk_bytes, file_.header().data_bytes - chunk * part_chunk_bytes);
}

result<void> part_file::load_chunk(std::uint64_t chunk) const {
  if (cached_ == chunk) return ok();
  cached_ = std::nullopt;
  cache_.resize(bytes_of_chunk(chunk));
  if (auto r = file_.read_bytes(cache_.data(), chunk * part_chunk_bytes, cache_.size()); !r)
    return r;
  if (auto r = check_chunk(chunk, cache_.data(), cache_.size()); !r) return r;
  cached_ = chunk;
  return ok();
}

result<void> part_file::read(std::string_view tensor, float* out, std::int64_t first,
                             std::int64_t count) const {
  const auto* entry = file_.header().find(tensor);
  if (entry == nullptr)
    return make_error(errc::not_found, "{} has no tensor {}", file_.path().string(), tensor);
  const auto total = element_count(entry->shape);
  if (first < 0 || count < 0 || first > total || count > total - first)
    return make_error(errc::bad_input, "{}: values [{}, +{}) lie outside tensor {} of {}",
                      file_.path().string(), first, count, tensor, total);
  auto* to = reinterpret_cast<char*>(out);
  std::uint64_t at = entry->begin + static_cast<std::uint64_t>(first) * 4;
  const std::uint64_t end = at + static_cast<std::uint64_t>(count) * 4;
  while (at < end) {
    const std::uint64_t chunk = at / part_chunk_bytes;
    const std::uint64_t inside = at - chunk * part_chunk_bytes;
    const std::uint64_t now = std::min(end - at, bytes_of_chunk(chunk) - inside);
    if (now == bytes_of_chunk(chunk)) {
      // Wanted whole: read where it belongs, without a copy.
      if (auto r = file_.read_bytes(to, at, now); !r) return r;
      if (auto r = check_chunk(chunk, to, now); !r) return r;
    } else {
      if (auto r = load_chunk(chunk); !r) return r;
      std::memcpy(to, cache_.data() + inside, now);
    }
    to += now;
    at += now;
  }
  return ok();
}

result<void> part_file::verify_all() const {
  for (std::uint64_t chunk = 0; chunk < chunk_count(file_.header().data_bytes); ++chunk) {
    cached_ = std::nullopt;  // the disk's bytes are asked for, not ours
    if (auto r = load_chunk(chunk); !r) return r;
  }
  return ok();
}

result<part_content> read_part(const fs::path& path, const std::vector<std::string>& wanted,
                               std::string_view root_hash) {
  auto part = part_file::open(path, root_hash);
  if (!part) return part.err();
  part_content content{part->info(), part->header().metadata, {}};
  for (const auto& name : wanted.empty() ? content.info.tensors : wanted) {
    const auto* entry = part->header().find(name);
    if (entry == nullptr)
      return make_error(errc::not_found, "{} has no tensor {}", path.string(), name);
    loaded_tensor t{name, entry->shape, {}};
    t.data.resize(static_cast<std::size_t>(element_count(entry->shape)));
    if (auto r = part->read(name, t.data.data(), 0, static_cast<std::int64_t>(t.data.size())); !r)
      return r.err();
    content.tensors.push_back(std::move(t));
  }
  return content;
}

result<part_info> verify_part(const fs::path& path, check_depth depth, std::string_view root_hash) {
  auto part = part_file::open(path, root_hash);
  if (!part) return part.err();
  if (depth == check_depth::deep)
    if (auto r = part->verify_all(); !r) return r.err();
  return part->info();
}

result<part_copy_writer> part_copy_writer::begin(const fs::path& folder,
                                                 const std::string& file_name,
                                                 std::uint64_t bytes) {
  if (!is_plain_name(file_name) || file_name.ends_with(".tmp"))
    return make_error(errc::bad_input, "'{}' is no name for a part. fix: a plain file name",
                      file_name);
  if (bytes > part_bytes_max)
    return make_error(errc::too_large, "a part of {} bytes was announced; the limit is {}", bytes,
                      part_bytes_max);
  if (auto r = make_folders(folder); !r) return r.err();
  part_copy_writer writer;
  writer.folder_ = folder;
  writer.file_name_ = file_name;
  writer.bytes_ = bytes;
  const fs::path temp = temporary_name(folder / file_name);
  auto file = create_file(temp);
  if (!file) return file.err();
  writer.temp_ = temp;
  writer.file_ = std::move(*file);
  if (auto r = reserve_bytes(writer.file_, temp, bytes); !r) return r.err();
  return writer;
}

part_copy_writer::~part_copy_writer() {
  if (!temp_.empty() && file_.is_open()) forget(temp_);
}

result<void> part_copy_writer::append(const void* data, std::uint64_t bytes) {
  if (bytes > bytes_ - done_)
    return make_error(errc::bad_input, "{}: more than the announced {} bytes came", file_name_,
                      bytes_);
  if (auto r = write_exactly(file_, temp_, data, bytes, done_); !r) return r;
  done_ += bytes;
  return ok();
}

result<part_info> part_copy_writer::finish(std::string_view root_hash) {
  if (done_ != bytes_)
    return make_error(errc::corrupt, "{}: {} of {} bytes came", file_name_, done_, bytes_);
  auto info = verify_part(temp_, check_depth::deep, root_hash);
  if (!info) return info.err();
  if (auto r = sync_file(file_, temp_); !r) return r.err();
  if (auto r = make_visible(temp_, folder_ / file_name_, info->root_hash); !r) return r.err();
  temp_.clear();
  info->file = file_name_;
  return info;
}

}  // namespace stagecoach
