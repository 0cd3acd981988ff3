// Hugging Face folders. Field names and defaults from transformers' configuration_gpt2.py.
#include "storage/huggingface.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;
namespace fs = std::filesystem;

namespace {

const hf_config tiny = {.vocab_size = 5,
                        .n_positions = 4,
                        .n_embd = 2,
                        .n_layer = 1,
                        .n_head = 1,
                        .n_inner = 0,
                        .bos_token_id = -1,
                        .eos_token_id = 3,
                        .initializer_range = 0.02};

struct tiny_tensors {
  std::vector<float> wte = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, wpe = std::vector<float>(8, 0.5f),
                     attn = std::vector<float>(12, -1.0f), bias = std::vector<float>(6, 2.0f);
  std::vector<tensor_view> views() const {
    return {{"wte.weight", {5, 2}, wte.data()},
            {"wpe.weight", {4, 2}, wpe.data()},
            {"h.0.attn.c_attn.weight", {2, 6}, attn.data()},
            {"h.0.attn.c_attn.bias", {6}, bias.data()}};
  }
};

/// A safetensors file by hand, with raw data.
std::string file_of(const nlohmann::ordered_json& header, const std::string& data) {
  const auto text = header.dump();
  std::string file(8, '\0');
  const std::uint64_t length = text.size();
  std::memcpy(file.data(), &length, 8);
  return file + text + data;
}

}  // namespace

TEST_CASE("a folder that was written is read back, and its files are what transformers reads") {
  temp_folder folder;
  const tiny_tensors t;
  REQUIRE(write_hf_folder(folder / "hf", tiny, t.views()));
  const auto content = read_hf_folder(folder / "hf");
  REQUIRE(content);
  CHECK(content->config == tiny);
  CHECK(content->notes.empty());
  REQUIRE(content->tensors.size() == 4);
  CHECK(content->tensors[0].name == "h.0.attn.c_attn.bias");
  CHECK(content->tensors[3].name == "wte.weight");
  CHECK(content->tensors[3].data == t.wte);
  CHECK(content->tensors[1].shape == std::vector<std::int64_t>{2, 6});

  const auto opened = hf_folder::open(folder / "hf");
  REQUIRE(opened);
  CHECK(opened->files().size() == 2);
  std::vector<float> some(3);
  REQUIRE(opened->read("transformer.wte.weight", some.data(), 4, 3));
  CHECK(some == std::vector<float>{4, 5, 6});
  CHECK(opened->read("h.7", some.data()).err().code == errc::not_found);

  const auto file = safetensors_file::open(folder.path() / "hf" / "model.safetensors");
  REQUIRE(file);
  CHECK(file->header().metadata.at("format") == "pt");
  CHECK(file->header().find("transformer.wte.weight") != nullptr);
  const auto config = nlohmann::json::parse(test::slurp(folder.path() / "hf" / "config.json"));
  CHECK(config["architectures"] == nlohmann::json::array({"GPT2LMHeadModel"}));
  CHECK(config["model_type"] == "gpt2");
  CHECK(config["activation_function"] == "gelu_new");
  CHECK(config["n_inner"].is_null());
  CHECK(config["bos_token_id"].is_null());
  CHECK(config["eos_token_id"] == 3);
  CHECK(config["layer_norm_epsilon"] == 1e-5);
  CHECK(nlohmann::json::parse(
            test::slurp(folder.path() / "hf" / "generation_config.json"))["eos_token_id"] == 3);
}

TEST_CASE(
    "names with and without prefix, mask buffers, a tied head, BF16 and F16, shards with an "
    "index") {
  temp_folder folder;
  test::spill(folder / "config.json", format_hf_config(tiny));
  const std::vector<std::uint16_t> bf16 = {0x3f80, 0x4000, 0, 0, 0, 0, 0, 0, 0, 0xc000};
  const std::vector<std::uint16_t> f16 = {0x3c00, 0, 0, 0, 0, 0, 0, 0x4000};
  std::string wte(20, '\0'), wpe(16, '\0');
  std::memcpy(wte.data(), bf16.data(), 20);
  std::memcpy(wpe.data(), f16.data(), 16);
  test::spill(
      folder / "model-00001-of-00002.safetensors",
      file_of(
          {{"wte.weight", {{"dtype", "BF16"}, {"shape", {5, 2}}, {"data_offsets", {0, 20}}}},
           {"h.0.attn.bias", {{"dtype", "U8"}, {"shape", {4}}, {"data_offsets", {20, 24}}}},
           {"lm_head.weight", {{"dtype", "BF16"}, {"shape", {5, 2}}, {"data_offsets", {24, 44}}}}},
          wte + std::string(4, '\1') + wte));
  test::spill(
      folder / "model-00002-of-00002.safetensors",
      file_of(
          {{"transformer.wpe.weight",
            {{"dtype", "F16"}, {"shape", {4, 2}}, {"data_offsets", {0, 16}}}},
           {"transformer.h.0.attn.masked_bias",
            {{"dtype", "F32"}, {"shape", nlohmann::json::array()}, {"data_offsets", {16, 20}}}}},
          wpe + std::string(4, '\0')));
  nlohmann::json index = {{"metadata", {{"total_size", 64}}},
                          {"weight_map",
                           {{"wte.weight", "model-00001-of-00002.safetensors"},
                            {"h.0.attn.bias", "model-00001-of-00002.safetensors"},
                            {"lm_head.weight", "model-00001-of-00002.safetensors"},
                            {"transformer.wpe.weight", "model-00002-of-00002.safetensors"}}}};
  test::spill(folder / "model.safetensors.index.json", index.dump());
  const auto content = read_hf_folder(folder.path());
  REQUIRE(content);
  REQUIRE(content->tensors.size() == 2);
  CHECK(content->tensors[0].data == std::vector<float>{1, 0, 0, 0, 0, 0, 0, 2});
  CHECK(content->tensors[1].data == std::vector<float>{1, 2, 0, 0, 0, 0, 0, 0, 0, -2});

  index["weight_map"]["wte.weight"] = "model-00002-of-00002.safetensors";
  test::spill(folder / "model.safetensors.index.json", index.dump());
  CHECK(hf_folder::open(folder.path()).err().code == errc::corrupt);
  index["weight_map"]["wte.weight"] = "../../model.safetensors";
  test::spill(folder / "model.safetensors.index.json", index.dump());
  CHECK(hf_folder::open(folder.path()).err().code == errc::bad_input);
  index["weight_map"]["wte.weight"] = "model-00003-of-00002.safetensors";
  test::spill(folder / "model.safetensors.index.json", index.dump());
  CHECK(hf_folder::open(folder.path()).err().code == errc::not_found);
}

TEST_CASE("folders that can't be used are refused with the reason, pickles with the way out") {
  temp_folder folder;
  CHECK(hf_folder::open(folder / "none").err().code == errc::not_found);
  test::spill(folder / "config.json", format_hf_config(tiny));
  CHECK(hf_folder::open(folder.path()).err().code == errc::not_found);
  test::spill(folder / "pytorch_model.bin", "pickle");
  const auto pickle = hf_folder::open(folder.path());
  CHECK(pickle.err().code == errc::bad_input);
  CHECK(pickle.err().message.find("safe_serialization") != std::string::npos);
  const tiny_tensors t;
  auto larger = tiny;
  larger.vocab_size = 6;
  REQUIRE(write_hf_folder(folder.path(), larger, t.views()));
  CHECK(hf_folder::open(folder.path()).err().message.find("[6, 2]") != std::string::npos);
  REQUIRE(write_hf_folder(folder.path(), tiny, {t.views()[0]}));
  CHECK(hf_folder::open(folder.path()).err().message.find("wpe.weight") != std::string::npos);
}

TEST_CASE(
    "a config is read with transformers' defaults; dropout becomes a note; what differs is "
    "refused") {
  const auto gpt2 = parse_hf_config("{}", "c");
  REQUIRE(gpt2);
  CHECK(gpt2->config == hf_config{});
  const auto dropout =
      parse_hf_config(R"({"resid_pdrop":0.1,"attn_pdrop":0.1,"embd_pdrop":0,"n_inner":null})", "c");
  REQUIRE(dropout);
  CHECK(dropout->notes.size() == 2);
  CHECK(dropout->notes[0].find("dropout 0") != std::string::npos);
  for (const char* text :
       {"", "[]", "{", R"({"model_type":"llama"})", R"({"n_embd":0})", R"({"n_embd":770})",
        R"({"n_layer":-1})", R"({"n_layer":1.5})", R"({"vocab_size":9223372036854775808})",
        R"({"vocab_size":"50257"})", R"({"activation_function":"relu"})",
        R"({"layer_norm_epsilon":1e-6})", R"({"scale_attn_weights":false})",
        R"({"scale_attn_by_inverse_layer_idx":true})", R"({"tie_word_embeddings":false})",
        R"({"n_layer":12,"n_layer":13})", R"({"n_layer":100000})"}) {
    CAPTURE(text);
    const auto r = parse_hf_config(text, "c");
    REQUIRE_FALSE(r);
    CHECK(r.err().code == errc::bad_input);
  }
}
