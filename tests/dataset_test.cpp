// Token sources and tokenizers. File bytes are written here by hand, after llm.c's and nanoGPT's
// writers.
#include "storage/dataset.hpp"

#include <doctest/doctest.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "storage/hash.hpp"
#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;
namespace fs = std::filesystem;

namespace {

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  std::string text(values.size() * sizeof(T), '\0');
  std::memcpy(text.data(), values.data(), text.size());
  return text;
}

std::string llmc_header(std::int32_t magic, std::int32_t version, std::int32_t count) {
  std::vector<std::int32_t> header(256);
  header[0] = magic;
  header[1] = version;
  header[2] = count;
  return bytes_of(header);
}

data_spec spec_of(const std::vector<fs::path>& files, const std::string& format,
                  const std::string& tokenizer = "none") {
  data_spec data;
  data.tokenizer = tokenizer;
  for (const auto& f : files) data.train.push_back({f.string(), format, 0, {}});
  return data;
}

std::vector<std::int32_t> all_of(const token_source& source) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(source.count()));
  REQUIRE(source.read(0, source.count(), tokens.data()));
  return tokens;
}

std::string mixed_text(int line_count) {
  const std::vector<std::string> words = {"the",  "river", "runs",  "마차가", "길을", "따라",
                                          "간다", "stage", "coach", "horses", "말",   "and"};
  std::mt19937 random(4);
  std::string text;
  for (int i = 0; i < line_count; ++i) {
    for (int k = 0; k < 6; ++k) text += words[random() % words.size()] + (k < 5 ? " " : "");
    text += '\n';
  }
  return text;
}

}  // namespace

TEST_CASE("llm.c u16 and u32, nanoGPT and text files give their tokens, whole and in ranges") {
  temp_folder folder;
  const std::vector<std::uint16_t> small = {1, 50256, 0, 7, 65535};
  const std::vector<std::uint32_t> large = {1, 128000, 70000};
  test::spill(folder / "a.bin", llmc_header(20240520, 1, 5) + bytes_of(small));
  test::spill(folder / "b.bin", llmc_header(20240801, 7, 3) + bytes_of(large));
  test::spill(folder / "c.bin", bytes_of(small));
  test::spill(folder / "d.txt", "h\xc3\xa9\n");

  const auto a = open_dataset(spec_of({folder / "a.bin"}, "llmc"), 65536);
  REQUIRE(a);
  CHECK(all_of(*a->train) == std::vector<std::int32_t>{1, 50256, 0, 7, 65535});
  CHECK(a->valid == nullptr);
  const auto b = open_dataset(spec_of({folder / "b.bin"}, "llmc"), 128001);
  REQUIRE(b);
  CHECK(all_of(*b->train) == std::vector<std::int32_t>{1, 128000, 70000});
  const auto c = open_dataset(spec_of({folder / "c.bin"}, "nanogpt"), 65536);
  REQUIRE(c);
  CHECK(all_of(*c->train) == all_of(*a->train));
  const auto d = open_dataset(spec_of({folder / "d.txt"}, "text", "bytes"), 256);
  REQUIRE(d);
  CHECK(all_of(*d->train) == std::vector<std::int32_t>{'h', 0xc3, 0xa9, '\n'});

  // Several files read as one.
  auto two = open_dataset(spec_of({folder / "a.bin", folder / "a.bin"}, "llmc"), 65536);
  REQUIRE(two);
  std::vector<std::int32_t> got(4);
  REQUIRE(two->train->read(3, 4, got.data()));
  CHECK(got == std::vector<std::int32_t>{7, 65535, 1, 50256});
  CHECK(two->train->read(7, 4, got.data()).err().code == errc::bad_input);
  CHECK(two->train->read(-1, 1, got.data()).err().code == errc::bad_input);
  CHECK(two->train->read(INT64_MAX, 1, got.data()).err().code == errc::bad_input);
  CHECK(two->train->read(10, 0, got.data()));
}

TEST_CASE("random ranges over files larger than a block equal the tokens that were written") {
  temp_folder folder;
  std::mt19937 random(2);
  std::vector<std::uint16_t> tokens(3'000'000);
  for (auto& t : tokens) t = static_cast<std::uint16_t>(random() % 50257);
  test::spill(folder / "a.bin", bytes_of(tokens));
  const auto set = open_dataset(spec_of({folder / "a.bin", folder / "a.bin"}, "nanogpt"), 50257);
  REQUIRE(set);
  REQUIRE(set->train->count() == 6'000'000);
  for (int trial = 0; trial < 100; ++trial) {
    const auto begin = static_cast<std::int64_t>(random() % 5'900'000);
    std::vector<std::int32_t> got(random() % 100'000);
    REQUIRE(set->train->read(begin, static_cast<std::int64_t>(got.size()), got.data()));
    bool is_equal = true;
    for (std::size_t i = 0; i < got.size(); ++i)
      is_equal = is_equal && got[i] == tokens[(begin + i) % tokens.size()];
    CHECK(is_equal);
  }
}

TEST_CASE("the validation set is the tail, cut at the floor, or files of its own") {
  temp_folder folder;
  std::vector<std::uint16_t> tokens(101);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint16_t>(i);
  test::spill(folder / "a.bin", bytes_of(tokens));
  auto spec = spec_of({folder / "a.bin"}, "nanogpt");
  spec.valid_fraction = 0.1;  // 10.1 tokens
  auto set = open_dataset(spec, 200);
  REQUIRE(set);
  CHECK(set->train->count() == 91);
  REQUIRE(set->valid->count() == 10);
  CHECK(all_of(*set->valid).front() == 91);
  CHECK(all_of(*set->valid).back() == 100);
  std::int32_t one = 0;
  CHECK_FALSE(set->train->read(91, 1, &one));
  CHECK_FALSE(set->valid->read(10, 1, &one));
  test::spill(folder / "v.bin", bytes_of(std::vector<std::uint16_t>{5, 6}));
  spec.valid = {{(folder / "v.bin").string(), "nanogpt", 0, {}}};
  set = open_dataset(spec, 200);
  REQUIRE(set);
  CHECK(set->train->count() == 101);
  CHECK(all_of(*set->valid) == std::vector<std::int32_t>{5, 6});
  spec.valid.clear();
  for (const double f : {-0.1, 1.0, std::nan("")}) {
    spec.valid_fraction = f;
    CHECK(open_dataset(spec, 200).err().code == errc::bad_spec);
  }
}

TEST_CASE("bad data files are refused with path, position and what was expected") {
  temp_folder folder;
  const std::vector<std::uint16_t> tokens = {1, 2, 300, 4};
  const auto refuse = [&](const std::string& bytes, const std::string& format, errc code,
                          const std::string& says) {
    CAPTURE(says);
    test::spill(folder / "x", bytes);
    const auto r = open_dataset(spec_of({folder / "x"}, format), 300);
    REQUIRE_FALSE(r);
    CHECK(r.err().code == code);
    CHECK(r.err().message.find((folder / "x").string()) != std::string::npos);
    CHECK(r.err().message.find(says) != std::string::npos);
  };
  refuse(bytes_of(tokens), "nanogpt", errc::bad_input, "token 300 at position 2");
  refuse(llmc_header(20240520, 1, 4) + bytes_of(tokens), "llmc", errc::bad_input,
         "token 300 at position 2");
  refuse(bytes_of(tokens) + "x", "nanogpt", errc::bad_input, "9 bytes");
  refuse("", "nanogpt", errc::bad_input, "no tokens");
  refuse("", "llmc", errc::bad_input, "header");
  refuse(llmc_header(20240520, 1, 4).substr(0, 500), "llmc", errc::bad_input, "header");
  refuse(llmc_header(20240520, 1, 5) + bytes_of(tokens), "llmc", errc::bad_input, "says 5 tokens");
  refuse(llmc_header(20240520, 1, 3) + bytes_of(tokens), "llmc", errc::bad_input, "says 3 tokens");
  refuse(llmc_header(20240520, 1, -4) + bytes_of(tokens), "llmc", errc::bad_input, "says -4");
  refuse(llmc_header(20240520, 2, 4) + bytes_of(tokens), "llmc", errc::bad_input, "version 2");
  refuse(llmc_header(20240522, 1, 4) + bytes_of(tokens), "llmc", errc::bad_input, "evaluation");
  refuse(bytes_of(tokens) + std::string(2000, '\1'), "llmc", errc::bad_input, "begins with");
  refuse("abc", "parquet", errc::bad_spec, "parquet");
  CHECK(open_dataset(spec_of({folder / "none"}, "nanogpt"), 300).err().code == errc::not_found);
  CHECK(open_dataset(spec_of({folder.path()}, "nanogpt"), 300).err().code == errc::bad_input);
  CHECK(open_dataset(spec_of({}, "nanogpt"), 300).err().code == errc::bad_spec);
  test::spill(folder / "t", "text");
  CHECK(open_dataset(spec_of({folder / "t"}, "text"), 300).err().code == errc::bad_spec);
  CHECK(open_dataset(spec_of({folder / "t"}, "text", "bytes"), 100)
            .err()
            .message.find("token 120 at position 2") != std::string::npos);
}

TEST_CASE("a file with other bytes than the job's is refused with path, expected and found") {
  temp_folder folder;
  test::spill(folder / "a.txt", "some training text\n");
  auto spec = spec_of({folder / "a.txt"}, "", "bytes");
  REQUIRE(resolve_data_files(spec));
  CHECK(spec.train[0].format == "text");
  CHECK(spec.train[0].bytes == 19);
  CHECK(spec.train[0].hash == content_hash("some training text\n"));
  CHECK(open_dataset(spec, 256));
  test::spill(folder / "a.txt", "some training texT\n");
  auto r = open_dataset(spec, 256);
  REQUIRE_FALSE(r);
  CHECK(r.err().code == errc::corrupt);
  CHECK(r.err().message.find(spec.train[0].hash) != std::string::npos);
  CHECK(r.err().message.find(content_hash("some training texT\n")) != std::string::npos);
  test::spill(folder / "a.txt", "short");
  r = open_dataset(spec, 256);
  REQUIRE_FALSE(r);
  CHECK(r.err().message.find("5 bytes, expected 19") != std::string::npos);
}

TEST_CASE("a file that changes while in use gives an error and no foreign token") {
  temp_folder folder;
  test::spill(folder / "a.bin", bytes_of(std::vector<std::uint16_t>{1, 2, 3, 4}));
  const auto set = open_dataset(spec_of({folder / "a.bin"}, "nanogpt"), 10);
  REQUIRE(set);
  std::int32_t got[4];
  test::spill(folder / "a.bin", bytes_of(std::vector<std::uint16_t>{1, 2, 300, 4}));
  CHECK(set->train->read(0, 4, got).err().code == errc::corrupt);
  test::spill(folder / "a.bin", "x");
  CHECK(set->train->read(0, 4, got).err().code == errc::corrupt);
}

TEST_CASE("inspect guesses the format and tells count, largest token and the first ones") {
  temp_folder folder;
  test::spill(folder / "a.bin",
              llmc_header(20240520, 1, 3) + bytes_of(std::vector<std::uint16_t>{9, 400, 400}));
  auto seen = inspect_data(folder / "a.bin");
  REQUIRE(seen);
  CHECK(seen->layout.format == "llmc");
  CHECK(seen->layout.count == 3);
  CHECK(seen->max_token == 400);
  CHECK(seen->max_position == 1);
  CHECK(seen->first_tokens == std::vector<std::int32_t>{9, 400, 400});
  test::spill(folder / "b.bin", bytes_of(std::vector<std::uint16_t>(100, 5)));
  CHECK(inspect_data(folder / "b.bin")->layout.format == "nanogpt");
  test::spill(folder / "c.txt", mixed_text(100));
  CHECK(inspect_data(folder / "c.txt")->layout.format == "text");
  test::spill(folder / "d.txt",
              std::string(1023, 'a') + "한");  // a character cut by the head's end
  CHECK(inspect_data(folder / "d.txt")->layout.format == "text");
  std::vector<std::uint16_t> late(100, 3);
  late[77] = 60000;
  const auto bytes = bytes_of(late);
  const auto in_memory = inspect_data(
      {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}, "nanogpt", "m");
  REQUIRE(in_memory);
  CHECK(in_memory->max_position == 77);
}

TEST_CASE("bytes: every byte goes there and back; ids outside are refused with their position") {
  const auto bytes = make_byte_tokenizer();
  std::string text;
  for (int i = 0; i < 256; ++i) text += static_cast<char>(i);
  CHECK(*bytes->decode(*bytes->encode(text)) == text);
  CHECK(bytes->vocab_size() == 256);
  const std::vector<std::int32_t> bad = {1, 2, 256};
  CHECK(bytes->decode(bad).err().message.find("position 2") != std::string::npos);
}

TEST_CASE("a tokenized file holds the tokens of its text, as u16, and opens as a dataset") {
  temp_folder folder;
  const auto text = mixed_text(2000);
  test::spill(folder / "a.txt", text);
  const auto bytes = make_byte_tokenizer();
  const auto count = tokenize_file(folder / "a.txt", *bytes, folder / "a.bin");
  REQUIRE(count);
  CHECK(*count == static_cast<std::int64_t>(text.size()));
  const auto set = open_dataset(spec_of({folder / "a.bin"}, "llmc"), 256);
  REQUIRE(set);
  CHECK(*bytes->decode(all_of(*set->train)) == text);
  CHECK(test::names_in(folder.path()).size() == 2);
  const std::vector<std::int32_t> large = {70000, 1};
  REQUIRE(write_llmc_file(folder / "b.bin", large, 100'000));
  CHECK(all_of(*open_dataset(spec_of({folder / "b.bin"}, "llmc"), 100'000)->train) == large);
  CHECK_FALSE(write_llmc_file(folder / "c.bin", large, 1000));
  CHECK_FALSE(fs::exists(folder / "c.bin"));
}

TEST_CASE(
    "SentencePiece: a model trained here encodes a file by pieces as in one go, and decodes it "
    "back") {
  temp_folder folder;
  const auto text = mixed_text(3000);
  test::spill(folder / "a.txt", text);
  const auto trained = sentencepiece::SentencePieceTrainer::Train(
      fmt::format("--input={} --model_prefix={} --vocab_size=80 --model_type=bpe --minloglevel=2",
                  (folder / "a.txt").string(), (folder / "m").string()));
  REQUIRE_MESSAGE(trained.ok(), trained.ToString());
  auto spec = spec_of({folder / "a.txt"}, "text", "sentencepiece");
  spec.tokenizer_path = (folder / "m.model").string();
  REQUIRE(resolve_data_files(spec));
  const auto model = open_tokenizer(spec);
  REQUIRE(model);
  CHECK((*model)->vocab_size() == 80);
  const auto tokens = (*model)->encode(text);
  REQUIRE(tokens);
  CHECK(tokens->size() < text.size() / 2);
  CHECK(*(*model)->decode(*tokens) == text);
  const auto set = open_dataset(spec, 80);
  REQUIRE(set);
  CHECK(all_of(*set->train) == *tokens);
  REQUIRE(tokenize_file(folder / "a.txt", **model, folder / "a.bin"));
  CHECK(all_of(*open_dataset(spec_of({folder / "a.bin"}, "llmc"), 80)->train) == *tokens);
  CHECK(inspect_data(folder / "a.txt", "text", model->get())->layout.count ==
        static_cast<std::int64_t>(tokens->size()));

  const auto most = *std::max_element(tokens->begin(), tokens->end());
  REQUIRE_FALSE(open_dataset(spec, most));
  CHECK(open_dataset(spec, most).err().code == errc::bad_input);
  CHECK((*model)->encode("ok \xff").err().code == errc::bad_input);
  const std::vector<std::int32_t> outside = {1, 80};
  CHECK((*model)->decode(outside).err().message.find("position 1") != std::string::npos);
  test::spill(folder / "bad.txt", "line\nline \xed\xa0\x80\n");
  auto bad = tokenize_file(folder / "bad.txt", **model, folder / "bad.bin");
  REQUIRE_FALSE(bad);
  CHECK(bad.err().message.find("bad.txt") != std::string::npos);
  CHECK_FALSE(fs::exists(folder / "bad.bin"));
  test::spill(folder / "m.model", test::slurp(folder / "m.model") + "x");
  CHECK(open_dataset(spec, 80).err().code == errc::corrupt);
  test::spill(folder / "m.model", "no model");
  spec.tokenizer_hash.clear();
  CHECK(open_tokenizer(spec).err().code == errc::bad_input);
  CHECK(load_sentencepiece("", "empty").err().code == errc::bad_input);
}

TEST_CASE("a line without an end is cut between characters and never inside one") {
  temp_folder folder;
  std::string text;
  while (text.size() < (9u << 20)) text += "한글 마차 stage coach";
  const auto trained = sentencepiece::SentencePieceTrainer::Train(fmt::format(
      "--input={} --model_prefix={} --vocab_size=40 --model_type=char --minloglevel=2 "
      "--hard_vocab_limit=false",
      [&] {
        test::spill(folder / "t.txt", "한글 마차 stage coach\n");
        return (folder / "t.txt").string();
      }(),
      (folder / "m").string()));
  REQUIRE_MESSAGE(trained.ok(), trained.ToString());
  const auto model = open_sentencepiece(folder / "m.model");
  REQUIRE(model);
  test::spill(folder / "long.txt", text);
  const auto count = tokenize_file(folder / "long.txt", **model, folder / "long.bin");
  REQUIRE(count);
  const auto set = open_dataset(spec_of({folder / "long.bin"}, "llmc"), (*model)->vocab_size());
  REQUIRE(set);
  const auto tokens = all_of(*set->train);
  CHECK(tokens.size() > 4'000'000);
  CHECK(std::count(tokens.begin(), tokens.end(), 0) ==
        0);  // 0 is "unknown": a character cut in two
}
