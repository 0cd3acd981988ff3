// Format rules from huggingface/safetensors (README, tensor.rs); expected bytes written by hand.
#include "storage/safetensors.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;

namespace {

std::string file_of(std::string_view header, std::size_t data_bytes) {
  std::string file(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(file.data(), &length, 8);
  file += header;
  return file + std::string(data_bytes, '\1');
}

result<safetensors_header> parse(const std::string& file) {
  return parse_safetensors({reinterpret_cast<const std::uint8_t*>(file.data()), file.size()},
                           "test");
}

}  // namespace

TEST_CASE("a header by hand is read: dtypes, shapes, offsets, metadata, trailing spaces") {
  const auto h = parse(file_of(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},)"
      R"("a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0,7],"data_offsets":[20,20]}}   )",
      20));
  REQUIRE(h);
  CHECK(h->metadata.at("format") == "pt");
  REQUIRE(h->tensors.size() == 3);
  CHECK(h->tensors[0].name == "a");
  CHECK(h->find("b")->shape == std::vector<std::int64_t>{2, 3});
  CHECK(h->find("e")->bytes() == 0);
  CHECK(h->find("zz") == nullptr);
  CHECK(parse(file_of("{}", 0)));
  // Three 4-bit values are no whole number of bytes; four are two.
  CHECK_FALSE(parse(file_of(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", 2)));
  CHECK(parse(file_of(R"({"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}})", 2)));
}

TEST_CASE("every broken rule of the format is refused") {
  const char* t = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  REQUIRE(parse(file_of(t, 8)));
  struct broken {
    const char* why;
    std::string file;
  };
  std::string deep = R"({"a":)";
  for (int i = 0; i < 100'000; ++i) deep += '[';
  const std::vector<broken> cases = {
      {"tail bytes", file_of(t, 9)},
      {"short data", file_of(t, 7)},
      {"empty", ""},
      {"seven bytes", "1234567"},
      {"never finished: zero length", std::string(4096, '\0')},
      {"length beyond the file", file_of(t, 8).substr(0, 20)},
      {"does not begin with a brace", file_of(" " + std::string(t), 8)},
      {"byte order mark", file_of("\xef\xbb\xbf" + std::string(t), 8)},
      {"garbage after", file_of(std::string(t) + "x", 8)},
      {"torn text", file_of(std::string(t).substr(0, 30), 8)},
      {"hole", file_of(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2)},
      {"overlap",
       file_of(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
           3)},
      {"end before begin", file_of(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[1,0]}})", 0)},
      {"size and shape differ",
       file_of(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8)},
      {"shape overflows",
       file_of(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}})", 8)},
      {"negative shape", file_of(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8)},
      {"fraction", file_of(R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", 8)},
      {"number over 64 bits",
       file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999999999999]}})",
               8)},
      {"duplicate tensor",
       file_of(
           R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
           2)},
      {"duplicate field",
       file_of(R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8)},
      {"missing field", file_of(R"({"a":{"dtype":"F32","shape":[2]}})", 8)},
      {"unknown field",
       file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", 8)},
      {"unknown dtype", file_of(R"({"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}})", 8)},
      {"three offsets", file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}})", 8)},
      {"one offset", file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", 8)},
      {"metadata not text", file_of(R"({"__metadata__":{"a":1}})", 0)},
      {"metadata nested", file_of(R"({"__metadata__":{"a":{}}})", 0)},
      {"duplicate metadata", file_of(R"({"__metadata__":{},"__metadata__":{}})", 0)},
      {"an array at the top", file_of("[]", 0)},
      {"nested tensor", file_of(R"({"a":{"dtype":{"a":1},"shape":[2],"data_offsets":[0,8]}})", 8)},
      {"depth bomb", file_of(deep, 0)},
      {"name that is not UTF-8",
       file_of("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1)},
      {"comment", file_of("{/* */}", 0)},
  };
  for (const auto& c : cases) {
    CAPTURE(c.why);
    const auto r = parse(c.file);
    CHECK_FALSE(r);
  }
  std::string huge(8, '\0');
  const std::uint64_t length = 100'000'001;
  std::memcpy(huge.data(), &length, 8);
  CHECK(parse(huge).err().code == errc::too_large);
}

TEST_CASE(
    "what is written is read back bit for bit, whole and in ranges, and replaces an older file") {
  temp_folder folder;
  const std::vector<float> w = {1.5f, -0.0f, std::numeric_limits<float>::denorm_min(), 1e38f, 5, 6};
  const float one = 42;
  const std::vector<tensor_view> tensors = {{"w \"quoted\" \xed\x95\x9c", {2, 3}, w.data()},
                                            {"empty", {0, 5}, nullptr},
                                            {"scalar", {}, &one}};
  test::spill(folder / "x.safetensors", "older");
  REQUIRE(write_safetensors(folder / "x.safetensors", {{"format", "pt"}}, tensors));
  CHECK(test::names_in(folder.path()).size() == 1);
  auto file = safetensors_file::open(folder / "x.safetensors");
  REQUIRE(file);
  CHECK(file->header().metadata.at("format") == "pt");
  CHECK(file->header().data_begin % 8 == 0);
  const auto* entry = file->header().find("w \"quoted\" \xed\x95\x9c");
  REQUIRE(entry != nullptr);
  std::vector<float> got(6);
  REQUIRE(file->read_floats(*entry, got.data(), 0, 6));
  CHECK(std::memcmp(got.data(), w.data(), 24) == 0);
  REQUIRE(file->read_floats(*entry, got.data(), 4, 2));
  CHECK(got[1] == 6);
  CHECK_FALSE(file->read_floats(*entry, got.data(), 4, 3));
  CHECK_FALSE(file->read_floats(*entry, got.data(), -1, 1));
  CHECK(safetensors_file::open(folder / "none").err().code == errc::not_found);
  CHECK(safetensors_file::open(folder.path()).err().code == errc::bad_input);
}

TEST_CASE("names that are taken, not UTF-8 or reserved are refused when writing") {
  const float v = 0;
  CHECK_FALSE(format_safetensors_header({}, {{"a", {}, &v}, {"a", {}, &v}}, 8));
  CHECK_FALSE(format_safetensors_header({}, {{"\xff", {}, &v}}, 8));
  CHECK_FALSE(format_safetensors_header({}, {{"__metadata__", {}, &v}}, 8));
  CHECK_FALSE(format_safetensors_header({}, {{"a", {-1}, &v}}, 8));
}

TEST_CASE("F16 and BF16 widen exactly") {
  CHECK(float_from_bf16(0x3f80) == 1.0f);
  CHECK(float_from_bf16(0xc2f7) == -123.5f);
  CHECK(float_from_f16(0x3c00) == 1.0f);
  CHECK(float_from_f16(0xc000) == -2.0f);
  CHECK(float_from_f16(0x7bff) == 65504.0f);
  CHECK(float_from_f16(0x0001) == 0x1p-24f);
  CHECK(float_from_f16(0x03ff) == 1023 * 0x1p-24f);
  CHECK(float_from_f16(0x0400) == 0x1p-14f);
  CHECK(std::signbit(float_from_f16(0x8000)));
  CHECK(std::isinf(float_from_f16(0x7c00)));
  CHECK(std::isnan(float_from_f16(0x7e00)));
}
