#include "storage/huggingface.hpp"

#include <cmath>
#include <set>
#include <system_error>

#include "config/limits.hpp"
#include "storage/file.hpp"
#include "storage/json_text.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view prefix = "transformer.";
constexpr std::int64_t config_bytes_max = 1 << 20;
constexpr std::int64_t index_bytes_max = 64 << 20;

error bad(std::string_view what, std::string_view why) {
  return make_error(errc::bad_input, "{}: {}", what, why);
}

/// Absent and null give `otherwise`.
template <class T>
result<T> field(const nlohmann::json& j, const char* key, T otherwise, std::string_view what) {
  const auto at = j.find(key);
  if (at == j.end() || at->is_null()) return otherwise;
  bool fits = false;
  if constexpr (std::is_same_v<T, bool>)
    fits = at->is_boolean();
  else if constexpr (std::is_same_v<T, std::string>)
    fits = at->is_string();
  else if constexpr (std::is_same_v<T, double>)
    fits = at->is_number();
  else
    fits = at->is_number_integer() &&
           !(at->is_number_unsigned() && at->template get<std::uint64_t>() > INT64_MAX);
  if (!fits) return bad(what, fmt::format("{} has the wrong kind of value", key));
  return at->template get<T>();
}

/// Collects the first error, so that a long list of fields reads as a list.
class field_reader {
 public:
  field_reader(const nlohmann::json& j, std::string_view what) : json_(j), what_(what) {}

  template <class T>
  T get(const char* key, T otherwise) {
    auto value = field<T>(json_, key, otherwise, what_);
    if (value) return *value;
    if (!problem_) problem_ = value.err();
    return otherwise;
  }
  std::int64_t whole(const char* key, std::int64_t otherwise, std::int64_t least,
                     std::int64_t most) {
    const auto value = get<std::int64_t>(key, otherwise);
    if (!problem_ && (value < least || value > most))
      refuse(fmt::format("{} is {}, expected {} to {}", key, value, least, most));
    return value;
  }
  void refuse(std::string_view why) {
    if (!problem_) problem_ = bad(what_, why);
  }
  const std::optional<error>& problem() const { return problem_; }

 private:
  const nlohmann::json& json_;
  std::string_view what_;
  std::optional<error> problem_;
};

bool is_mask_buffer(std::string_view name) {
  return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
}

std::string_view without_prefix(std::string_view name) {
  return name.starts_with(prefix) ? name.substr(prefix.size()) : name;
}

struct index_entry {
  std::string tensor, file;
};

result<std::vector<index_entry>> parse_index(std::string_view text, std::string_view what) {
  auto parsed = parse_json(text, what);
  if (!parsed) return parsed.err();
  if (!parsed->is_object() || !parsed->contains("weight_map") ||
      !(*parsed)["weight_map"].is_object())
    return bad(what, "it has no weight_map");
  std::vector<index_entry> entries;
  for (const auto& [tensor, file] : (*parsed)["weight_map"].items()) {
    if (!file.is_string() || !is_plain_name(file.get_ref<const std::string&>()))
      return bad(what, fmt::format("the file of tensor {} is no plain file name", tensor));
    entries.push_back({tensor, file.get<std::string>()});
  }
  if (entries.empty()) return bad(what, "its weight_map is empty");
  return entries;
}

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

}  // namespace

std::string format_hf_config(const hf_config& c) {
  nlohmann::ordered_json j;
  const auto id = [](std::int64_t token) {
    return token < 0 ? nlohmann::ordered_json() : nlohmann::ordered_json(token);
  };
  j["architectures"] = {"GPT2LMHeadModel"};
  j["model_type"] = "gpt2";
  j["vocab_size"] = c.vocab_size;
  j["n_positions"] = c.n_positions;
  j["n_ctx"] = c.n_positions;  // read by transformers before version 4
  j["n_embd"] = c.n_embd;
  j["n_layer"] = c.n_layer;
  j["n_head"] = c.n_head;
  j["n_inner"] = c.n_inner == 0 ? nlohmann::ordered_json() : nlohmann::ordered_json(c.n_inner);
  j["activation_function"] = "gelu_new";
  j["resid_pdrop"] = 0.0;
  j["embd_pdrop"] = 0.0;
  j["attn_pdrop"] = 0.0;
  j["layer_norm_epsilon"] = 1e-5;
  j["initializer_range"] = c.initializer_range;
  j["scale_attn_weights"] = true;
  j["scale_attn_by_inverse_layer_idx"] = false;
  j["reorder_and_upcast_attn"] = false;
  j["tie_word_embeddings"] = true;
  j["use_cache"] = true;
  j["bos_token_id"] = id(c.bos_token_id);
  j["eos_token_id"] = id(c.eos_token_id);
  j["torch_dtype"] = "float32";
  return j.dump(2) + "\n";
}

std::string format_hf_generation_config(const hf_config& c) {
  nlohmann::ordered_json j;
  j["_from_model_config"] = true;
  if (c.bos_token_id >= 0) j["bos_token_id"] = c.bos_token_id;
  if (c.eos_token_id >= 0) j["eos_token_id"] = c.eos_token_id;
  return j.dump(2) + "\n";
}

result<parsed_hf_config> parse_hf_config(std::string_view text, std::string_view what) {
  auto parsed = parse_json(text, what);
  if (!parsed) return parsed.err();
  if (!parsed->is_object()) return bad(what, "it is no JSON object");
  field_reader read(*parsed, what);
  parsed_hf_config out;
  auto& c = out.config;

  const auto type = read.get<std::string>("model_type", "gpt2");
  if (type != "gpt2")
    read.refuse(
        fmt::format("model_type is '{}', expected gpt2. fix: a folder of a GPT2LMHeadModel", type));
  c.vocab_size = read.whole("vocab_size", 50257, 1, limits::vocab_size_max);
  c.n_positions = read.whole("n_positions", 1024, 1, limits::context_max);
  c.n_embd = read.whole("n_embd", 768, 1, limits::d_model_max);
  c.n_layer = read.whole("n_layer", 12, 1, limits::layer_count_max);
  c.n_head = read.whole("n_head", 12, 1, limits::d_model_max);
  c.n_inner = read.whole("n_inner", 0, 0, 64 * limits::d_model_max);
  c.bos_token_id = read.whole("bos_token_id", -1, -1, limits::vocab_size_max);
  c.eos_token_id = read.whole("eos_token_id", -1, -1, limits::vocab_size_max);
  c.initializer_range = read.get<double>("initializer_range", 0.02);
  if (!(c.initializer_range >= 0.0 && c.initializer_range < 1e3))
    read.refuse("initializer_range is no standard deviation");
  if (c.n_embd % c.n_head != 0)
    read.refuse(fmt::format("n_embd {} is not a multiple of n_head {}", c.n_embd, c.n_head));
  const auto activation = read.get<std::string>("activation_function", "gelu_new");
  if (activation != "gelu_new" && activation != "gelu_pytorch_tanh")
    read.refuse(fmt::format("activation_function is '{}'; Stagecoach computes gelu_new (tanh)",
                            activation));
  const auto epsilon = read.get<double>("layer_norm_epsilon", 1e-5);
  if (std::abs(epsilon - 1e-5) > 1e-12)
    read.refuse(fmt::format("layer_norm_epsilon is {}; Stagecoach computes with 1e-5", epsilon));
  if (!read.get<bool>("scale_attn_weights", true))
    read.refuse("scale_attn_weights is false; Stagecoach scales attention by 1/sqrt(head size)");
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"})
    if (read.get<bool>(key, false))
      read.refuse(fmt::format("{} is true, which Stagecoach does not compute", key));
  if (!read.get<bool>("tie_word_embeddings", true))
    read.refuse("tie_word_embeddings is false; Stagecoach ties the head to the embedding");
  for (const char* key : {"resid_pdrop", "embd_pdrop", "attn_pdrop"})
    if (const auto p = read.get<double>(key, 0.0); p != 0.0)
      out.notes.push_back(
          fmt::format("{}: {} is {}; Stagecoach trains with dropout 0", what, key, p));
  if (read.get<bool>("reorder_and_upcast_attn", false))
    out.notes.push_back(fmt::format(
        "{}: reorder_and_upcast_attn is ignored: attention is computed in float32", what));
  if (read.problem()) return *read.problem();
  return out;
}

result<void> write_hf_folder(const fs::path& folder, const hf_config& config,
                             const std::vector<tensor_view>& tensors) {
  if (auto r = make_folders(folder); !r) return r;
  auto named = tensors;
  for (auto& t : named)
    if (!t.name.starts_with(prefix)) t.name = std::string(prefix) + t.name;
  if (auto r = write_safetensors(folder / "model.safetensors", {{"format", "pt"}}, named); !r)
    return r;
  if (auto r = write_file_durably(folder / "generation_config.json",
                                  format_hf_generation_config(config));
      !r)
    return r;
  return write_file_durably(folder / "config.json", format_hf_config(config));
}

result<hf_folder> hf_folder::open(const fs::path& folder) {
  hf_folder opened;
  const fs::path config_path = folder / "config.json";
  auto text = read_whole_file(config_path, config_bytes_max);
  if (!text) return text.err();
  auto config = parse_hf_config(*text, config_path.string());
  if (!config) return config.err();
  opened.config_ = config->config;
  opened.notes_ = std::move(config->notes);
  opened.files_.push_back(config_path);

  std::vector<index_entry> index;
  std::set<std::string> names;
  const fs::path index_path = folder / "model.safetensors.index.json";
  if (is_there(folder / "model.safetensors")) {
    names.insert("model.safetensors");
  } else if (is_there(index_path)) {
    auto index_text = read_whole_file(index_path, index_bytes_max);
    if (!index_text) return index_text.err();
    auto entries = parse_index(*index_text, index_path.string());
    if (!entries) return entries.err();
    index = std::move(*entries);
    for (const auto& e : index) names.insert(e.file);
  } else if (is_there(folder / "pytorch_model.bin") ||
             is_there(folder / "pytorch_model.bin.index.json")) {
    return make_error(
        errc::bad_input,
        "{} has only pytorch_model.bin, a pickle, which can run code when it is read; it is "
        "not opened. fix: in Python, GPT2LMHeadModel.from_pretrained(DIR)"
        ".save_pretrained(DIR, safe_serialization=True)",
        folder.string());
  } else {
    return make_error(errc::not_found,
                      "{} has no model.safetensors. fix: name a folder that save_pretrained wrote",
                      folder.string());
  }

  for (const auto& name : names) {
    const fs::path path = folder / name;
    auto shard = safetensors_file::open(path);
    if (!shard) return shard.err();
    const auto& header = shard->header();
    if (const auto at = header.metadata.find("format");
        at != header.metadata.end() && at->second != "pt")
      opened.notes_.push_back(
          fmt::format("{}: its format is '{}', not 'pt'", path.string(), at->second));
    for (const auto& entry : header.tensors) {
      const auto plain = without_prefix(entry.name);
      if (is_mask_buffer(plain) || plain == "lm_head.weight") continue;
      if (entry.dtype != stored_dtype::f32 && entry.dtype != stored_dtype::f16 &&
          entry.dtype != stored_dtype::bf16)
        return bad(path.string(), fmt::format("tensor {} has dtype {}, expected F32, F16 or BF16",
                                              entry.name, to_string(entry.dtype)));
      if (!opened.tensors_.emplace(std::string(plain), place{opened.shards_.size(), entry}).second)
        return bad(path.string(), fmt::format("tensor {} is there twice", plain));
    }
    opened.files_.push_back(path);
    opened.shards_.push_back(std::move(*shard));
  }
  for (const auto& e : index) {
    const auto plain = without_prefix(e.tensor);
    if (is_mask_buffer(plain) || plain == "lm_head.weight") continue;
    const auto at = opened.tensors_.find(plain);
    if (at == opened.tensors_.end() || opened.shards_[at->second.file].path() != folder / e.file)
      return make_error(errc::corrupt, "{}: tensor {} is not in {}", index_path.string(), e.tensor,
                        e.file);
  }

  const auto check = [&](const char* name, std::int64_t rows) -> result<void> {
    const auto* entry = opened.find(name);
    const std::vector<std::int64_t> expected = {rows, opened.config_.n_embd};
    if (entry == nullptr)
      return make_error(errc::not_found, "{} has no tensor {}. fix: a folder of a GPT2LMHeadModel",
                        folder.string(), name);
    if (entry->shape != expected)
      return bad(folder.string(),
                 fmt::format("tensor {} does not have the shape [{}, {}] of config.json", name,
                             expected[0], expected[1]));
    return ok();
  };
  if (auto r = check("wte.weight", opened.config_.vocab_size); !r) return r.err();
  if (auto r = check("wpe.weight", opened.config_.n_positions); !r) return r.err();
  return opened;
}

std::vector<std::string> hf_folder::names() const {
  std::vector<std::string> names;
  for (const auto& [name, where] : tensors_) names.push_back(name);
  return names;
}

const tensor_entry* hf_folder::find(std::string_view name) const {
  const auto at = tensors_.find(without_prefix(name));
  return at == tensors_.end() ? nullptr : &at->second.entry;
}

result<void> hf_folder::read(std::string_view name, float* out) const {
  const auto* entry = find(name);
  return read(name, out, 0, entry == nullptr ? 0 : element_count(entry->shape));
}

result<void> hf_folder::read(std::string_view name, float* out, std::int64_t first,
                             std::int64_t count) const {
  const auto at = tensors_.find(without_prefix(name));
  if (at == tensors_.end())
    return make_error(errc::not_found, "{} has no tensor {}", files_.front().parent_path().string(),
                      name);
  return shards_[at->second.file].read_floats(at->second.entry, out, first, count);
}

result<hf_content> read_hf_folder(const fs::path& folder) {
  auto opened = hf_folder::open(folder);
  if (!opened) return opened.err();
  hf_content content{opened->config(), {}, opened->notes()};
  for (const auto& name : opened->names()) {
    const auto& shape = opened->find(name)->shape;
    loaded_tensor t{name, shape,
                    std::vector<float>(static_cast<std::size_t>(element_count(shape)))};
    if (auto r = opened->read(name, t.data.data()); !r) return r.err();
    content.tensors.push_back(std::move(t));
  }
  return content;
}

}  // namespace stagecoach
