#include "storage/safetensors.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "config/limits.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
static_assert(std::endian::native == std::endian::little,
              "the format and our files are little-endian");

namespace {

struct dtype_row {
  stored_dtype dtype;
  const char* name;
  int bits;
};
// Names and sizes of the reference (tensor.rs, Dtype::bitsize).
constexpr dtype_row dtypes[] = {
    {stored_dtype::boolean, "BOOL", 8},
    {stored_dtype::f4, "F4", 4},
    {stored_dtype::f6_e2m3, "F6_E2M3", 6},
    {stored_dtype::f6_e3m2, "F6_E3M2", 6},
    {stored_dtype::u8, "U8", 8},
    {stored_dtype::i8, "I8", 8},
    {stored_dtype::f8_e5m2, "F8_E5M2", 8},
    {stored_dtype::f8_e4m3, "F8_E4M3", 8},
    {stored_dtype::f8_e8m0, "F8_E8M0", 8},
    {stored_dtype::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {stored_dtype::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {stored_dtype::i16, "I16", 16},
    {stored_dtype::u16, "U16", 16},
    {stored_dtype::f16, "F16", 16},
    {stored_dtype::bf16, "BF16", 16},
    {stored_dtype::i32, "I32", 32},
    {stored_dtype::u32, "U32", 32},
    {stored_dtype::f32, "F32", 32},
    {stored_dtype::c64, "C64", 64},
    {stored_dtype::f64, "F64", 64},
    {stored_dtype::i64, "I64", 64},
    {stored_dtype::u64, "U64", 64},
};

constexpr std::size_t dimension_count_max = 64;

// Reads the header as it is parsed, so that a hostile one costs no more memory than its text: what
// does not fit the format's three levels stops the parse at once.
class header_reader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::map<std::string, std::string> metadata;
  std::vector<tensor_entry> tensors;
  std::string problem;

  bool null() override { return refuse("null"); }
  bool boolean(bool) override { return refuse("a boolean"); }
  bool number_integer(number_integer_t) override { return refuse("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return refuse("a fraction"); }
  bool binary(binary_t&) override { return refuse("binary"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (at_ == where::shape) {
      if (tensors.back().shape.size() == dimension_count_max)
        return stop(fmt::format("tensor {}: more than {} dimensions",
                                printable(tensors.back().name), dimension_count_max));
      if (value > (std::uint64_t{1} << 56)) return stop("a dimension is over 2^56");
      tensors.back().shape.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (at_ == where::offsets) {
      if (offset_count_ == 2) return stop("data_offsets has more than two numbers");
      (offset_count_++ == 0 ? tensors.back().begin : tensors.back().end) = value;
      return true;
    }
    return refuse("a number");
  }

  bool string(string_t& value) override {
    if (at_ == where::metadata) {
      metadata[key_] = std::move(value);
      return true;
    }
    if (at_ == where::entry && key_ == "dtype") {
      for (const auto& row : dtypes)
        if (value == row.name) {
          tensors.back().dtype = row.dtype;
          return true;
        }
      return stop(fmt::format("tensor {}: unknown dtype {}", printable(tensors.back().name),
                              printable(value)));
    }
    return refuse("a string");
  }

  bool start_object(std::size_t) override {
    if (at_ == where::outside) {
      at_ = where::top;
      return true;
    }
    if (at_ != where::top) return refuse("an object");
    if (key_ == "__metadata__") {
      at_ = where::metadata;
      return true;
    }
    at_ = where::entry;
    fields_.clear();
    tensors.emplace_back();
    tensors.back().name = key_;
    return true;
  }

  bool key(string_t& name) override {
    key_ = std::move(name);
    if (at_ == where::entry && key_ != "dtype" && key_ != "shape" && key_ != "data_offsets")
      return stop(fmt::format("tensor {}: unknown field {}", printable(tensors.back().name),
                              printable(key_)));
    auto& seen = at_ == where::top ? names_ : at_ == where::metadata ? metadata_keys_ : fields_;
    if (!seen.insert(key_).second)
      return stop(fmt::format("the key {} stands twice", printable(key_)));
    return true;
  }

  bool end_object() override {
    if (at_ == where::entry && fields_.size() != 3)
      return stop(fmt::format("tensor {}: needs dtype, shape and data_offsets",
                              printable(tensors.back().name)));
    at_ = at_ == where::top ? where::outside : where::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (at_ == where::entry && key_ == "shape") {
      at_ = where::shape;
      return true;
    }
    if (at_ == where::entry && key_ == "data_offsets") {
      at_ = where::offsets;
      offset_count_ = 0;
      return true;
    }
    return refuse("an array");
  }

  bool end_array() override {
    if (at_ == where::offsets && offset_count_ != 2)
      return stop(
          fmt::format("tensor {}: data_offsets needs two numbers", printable(tensors.back().name)));
    at_ = where::entry;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& e) override {
    return stop(e.what());
  }

  static std::string printable(const std::string& text) {
    return nlohmann::json(text.substr(0, 200))
        .dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  }

 private:
  enum class where { outside, top, metadata, entry, shape, offsets };

  bool stop(std::string reason) {
    if (problem.empty()) problem = std::move(reason);
    return false;
  }
  bool refuse(const char* what) {
    return stop(fmt::format("{} does not belong at the key {}", what, printable(key_)));
  }

  where at_ = where::outside;
  std::string key_;
  int offset_count_ = 0;
  std::set<std::string> names_, metadata_keys_, fields_;
};

result<void> check_tiling(std::vector<tensor_entry>& tensors, std::uint64_t data_bytes,
                          std::string_view what) {
  std::sort(tensors.begin(), tensors.end(), [](const tensor_entry& a, const tensor_entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t end = 0;
  for (const auto& t : tensors) {
    const auto name = header_reader::printable(t.name);
    if (t.begin != end || t.end < t.begin)
      return make_error(errc::bad_input,
                        "{}: tensor {} has data at [{}, {}), expected its start at {} (holes and "
                        "overlaps are not allowed)",
                        what, name, t.begin, t.end, end);
    const auto count = element_count(t.shape);
    const auto bits = count < 0 ? 1 : static_cast<std::uint64_t>(count) * bits_of(t.dtype);
    if (count < 0 || bits % 8 != 0 || bits / 8 != t.bytes())
      return make_error(errc::bad_input, "{}: tensor {} has {} bytes of data, its shape needs {}",
                        what, name, t.bytes(),
                        count < 0 ? std::string("over 2^56 values") : std::to_string(bits / 8));
    end = t.end;
  }
  if (end != data_bytes)
    return make_error(errc::bad_input, "{}: the tensors take {} bytes, the data has {}", what, end,
                      data_bytes);
  return ok();
}

result<std::uint64_t> check_header_bytes(std::uint64_t header_bytes, std::uint64_t file_bytes,
                                         std::string_view what) {
  if (header_bytes > static_cast<std::uint64_t>(limits::safetensors_header_bytes_max))
    return make_error(errc::too_large, "{}: a header of {} bytes; the format's limit is {}", what,
                      header_bytes, limits::safetensors_header_bytes_max);
  if (header_bytes < 2)
    return make_error(errc::bad_input,
                      "{}: a header of {} bytes (a file that was never finished, or no safetensors "
                      "file)",
                      what, header_bytes);
  if (8 + header_bytes > file_bytes)
    return make_error(errc::corrupt, "{}: {} bytes long, its header alone needs {}", what,
                      file_bytes, 8 + header_bytes);
  return header_bytes;
}

}  // namespace

const char* to_string(stored_dtype dtype) {
  for (const auto& row : dtypes)
    if (row.dtype == dtype) return row.name;
  return "?";
}

int bits_of(stored_dtype dtype) {
  for (const auto& row : dtypes)
    if (row.dtype == dtype) return row.bits;
  return 0;
}

std::int64_t element_count(const std::vector<std::int64_t>& shape) {
  constexpr std::int64_t most = std::int64_t{1} << 56;
  // A zero anywhere makes the tensor empty, whatever stands beside it.
  std::int64_t count = 1;
  bool is_empty = false;
  for (const auto n : shape) {
    if (n < 0) return -1;
    is_empty = is_empty || n == 0;
  }
  if (is_empty) return 0;
  for (const auto n : shape) {
    if (n > most / count) return -1;
    count *= n;
  }
  return count;
}

const tensor_entry* safetensors_header::find(std::string_view name) const {
  for (const auto& t : tensors)
    if (t.name == name) return &t;
  return nullptr;
}

result<safetensors_header> parse_safetensors_header(std::string_view text, std::uint64_t data_bytes,
                                                    std::string_view what) {
  if (text.empty() || text.front() != '{')
    return make_error(errc::bad_input, "{}: the header does not begin with '{{'", what);
  header_reader reader;
  const bool is_read = nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
  if (!is_read)
    return make_error(errc::bad_input, "{}: bad safetensors header: {}", what, reader.problem);
  safetensors_header header;
  header.metadata = std::move(reader.metadata);
  header.tensors = std::move(reader.tensors);
  header.data_begin = 8 + text.size();
  header.data_bytes = data_bytes;
  if (auto r = check_tiling(header.tensors, data_bytes, what); !r) return r.err();
  return header;
}

result<safetensors_header> parse_safetensors(std::span<const std::uint8_t> file,
                                             std::string_view what) {
  if (file.size() < 8)
    return make_error(errc::bad_input, "{}: {} bytes are no safetensors file", what, file.size());
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  auto bytes = check_header_bytes(length, file.size(), what);
  if (!bytes) return bytes.err();
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, *bytes);
  return parse_safetensors_header(text, file.size() - 8 - *bytes, what);
}

result<safetensors_file> safetensors_file::open(const fs::path& path) {
  const std::string what = path.string();
  auto file = open_to_read(path);
  if (!file) return file.err();
  auto total = file_bytes(*file, path);
  if (!total) return total.err();
  if (*total < 8)
    return make_error(errc::bad_input, "{}: {} bytes are no safetensors file", what, *total);
  std::uint64_t length = 0;
  if (auto r = read_exactly(*file, path, &length, 8, 0); !r) return r.err();
  auto bytes = check_header_bytes(length, *total, what);
  if (!bytes) return bytes.err();
  safetensors_file opened;
  opened.text_.resize(*bytes);
  if (auto r = read_exactly(*file, path, opened.text_.data(), *bytes, 8); !r) return r.err();
  auto header = parse_safetensors_header(opened.text_, *total - 8 - *bytes, what);
  if (!header) return header.err();
  opened.header_ = std::move(*header);
  opened.path_ = path;
  opened.file_ = std::move(*file);
  return opened;
}

result<void> safetensors_file::read_bytes(void* out, std::uint64_t offset,
                                          std::uint64_t bytes) const {
  if (offset > header_.data_bytes || bytes > header_.data_bytes - offset)
    return make_error(errc::bad_input, "{}: bytes [{}, +{}) lie outside its {} bytes of data",
                      path_.string(), offset, bytes, header_.data_bytes);
  return read_exactly(file_, path_, out, bytes, header_.data_begin + offset);
}

result<void> safetensors_file::read_floats(const tensor_entry& tensor, float* out,
                                           std::int64_t first, std::int64_t count) const {
  const auto total = element_count(tensor.shape);
  if (first < 0 || count < 0 || first > total || count > total - first)
    return make_error(errc::bad_input, "{}: values [{}, +{}) lie outside tensor {} of {}",
                      path_.string(), first, count, tensor.name, total);
  if (tensor.dtype == stored_dtype::f32)
    return read_bytes(out, tensor.begin + static_cast<std::uint64_t>(first) * 4,
                      static_cast<std::uint64_t>(count) * 4);
  if (tensor.dtype != stored_dtype::f16 && tensor.dtype != stored_dtype::bf16 &&
      tensor.dtype != stored_dtype::f64)
    return make_error(errc::bad_input,
                      "{}: tensor {} has dtype {}, expected F32, F16, BF16 or F64. fix: convert it",
                      path_.string(), tensor.name, to_string(tensor.dtype));
  const std::uint64_t width = static_cast<std::uint64_t>(bits_of(tensor.dtype)) / 8;
  std::vector<char> block(
      std::min<std::uint64_t>(1u << 20, static_cast<std::uint64_t>(count) * width));
  for (std::int64_t done = 0; done < count;) {
    const auto now =
        std::min<std::int64_t>(count - done, static_cast<std::int64_t>(block.size() / width));
    const auto offset = tensor.begin + static_cast<std::uint64_t>(first + done) * width;
    if (auto r = read_bytes(block.data(), offset, static_cast<std::uint64_t>(now) * width); !r)
      return r;
    for (std::int64_t i = 0; i < now; ++i) {
      const char* from = block.data() + static_cast<std::uint64_t>(i) * width;
      if (tensor.dtype == stored_dtype::f64) {
        double value = 0;
        std::memcpy(&value, from, 8);
        out[done + i] = static_cast<float>(value);
      } else {
        std::uint16_t bits = 0;
        std::memcpy(&bits, from, 2);
        out[done + i] =
            tensor.dtype == stored_dtype::f16 ? float_from_f16(bits) : float_from_bf16(bits);
      }
    }
    done += now;
  }
  return ok();
}

result<std::string> format_safetensors_header(const std::map<std::string, std::string>& metadata,
                                              const std::vector<tensor_view>& tensors,
                                              std::uint64_t align) {
  // By hand and not through a json value: the metadata stand first, the tensors in order of their
  // data.
  std::string text = "{";
  try {
    const auto quoted = [](const std::string& s) { return nlohmann::json(s).dump(); };
    if (!metadata.empty()) {
      text += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata)
        text += fmt::format("{}{}:{}", text.back() == '{' ? "" : ",", quoted(key), quoted(value));
      text += "}";
    }
    std::set<std::string_view> names;
    std::uint64_t at = 0;
    for (const auto& t : tensors) {
      const auto count = element_count(t.shape);
      if (count < 0 || t.shape.size() > dimension_count_max)
        return make_error(errc::bad_input, "tensor {} has an impossible shape", t.name);
      if (t.name == "__metadata__" || !names.insert(t.name).second)
        return make_error(errc::bad_input, "the tensor name {} is taken", t.name);
      const auto end = at + static_cast<std::uint64_t>(count) * 4;
      std::string shape;
      for (const auto n : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
      text += fmt::format("{}{}:{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                          text.size() == 1 ? "" : ",", quoted(t.name), shape, at, end);
      at = end;
    }
  } catch (const nlohmann::json::exception& e) {
    return make_error(errc::bad_input, "a name in the header is not UTF-8: {}", e.what());
  }
  text += "}";
  while ((8 + text.size()) % align != 0) text += ' ';
  if (text.size() > static_cast<std::size_t>(limits::safetensors_header_bytes_max))
    return make_error(errc::too_large, "a header of {} bytes; the format's limit is {}",
                      text.size(), limits::safetensors_header_bytes_max);
  const std::uint64_t length = text.size();
  std::string block(8, '\0');
  std::memcpy(block.data(), &length, 8);
  return block + text;
}

result<void> write_safetensors(const fs::path& path,
                               const std::map<std::string, std::string>& metadata,
                               const std::vector<tensor_view>& tensors) {
  auto header = format_safetensors_header(metadata, tensors, 8);
  if (!header) return header.err();
  const fs::path temp = temporary_name(path);
  const auto write = [&]() -> result<void> {
    auto file = create_file(temp);
    if (!file) return file.err();
    std::uint64_t at = header->size();
    for (const auto& t : tensors) {
      const auto bytes = static_cast<std::uint64_t>(element_count(t.shape)) * 4;
      if (auto r = write_exactly(*file, temp, t.data, bytes, at); !r) return r;
      at += bytes;
    }
    if (auto r = write_exactly(*file, temp, header->data(), header->size(), 0); !r) return r;
    if (auto r = sync_file(*file, temp); !r) return r;
    return rename_over(temp, path);
  };
  if (auto r = write(); !r) {
    std::error_code ignored;
    fs::remove(temp, ignored);
    return r;
  }
  return sync_folder(path.has_parent_path() ? path.parent_path() : fs::path("."));
}

float float_from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

float float_from_f16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  std::uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  // Subnormal: fraction x 2^-24, exact in float32.
  const float value = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -value : value;
}

}  // namespace stagecoach
