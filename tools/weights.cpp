#include "tools/weights.hpp"

#include <algorithm>
#include <charconv>
#include <set>
#include <vector>

#include "config/job_spec_yaml.hpp"
#include "config/limits.hpp"
#include "storage/checkpoint_store.hpp"

namespace stagecoach {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

std::string text_of(const json& j, const char* key) {
  const auto at = j.find(key);
  return at != j.end() && at->is_string() ? at->get<std::string>() : std::string();
}

/// The number between two texts of a name: ("h.11.ln_1.bias", "h.") -> 11; -1: none.
std::int64_t block_of(const std::string& name) {
  if (name.rfind("h.", 0) != 0) return -1;
  std::int64_t block = -1;
  std::from_chars(name.data() + 2, name.data() + name.size(), block);
  return block;
}

/// The newest step of the list that can be used. Fails: not_found.
result<std::int64_t> newest_usable(const json& list, const std::string& job) {
  for (const auto& c : list)
    if (text_of(c, "state") != "bad") return c.value("step", std::int64_t{0});
  return make_error(errc::not_found,
                    "job {} has no usable checkpoint ({} listed). next: stagecoach checkpoints {}",
                    job, list.size(), job);
}

}  // namespace

result<job_target> parse_target(const std::string& text) {
  job_target target;
  const auto at = text.rfind('@');
  target.job = text.substr(0, at);
  if (target.job.empty())
    return make_error(errc::usage, "\"{}\" names no job. fix: JOB or JOB@STEP", text);
  if (at == std::string::npos) return target;
  std::int64_t step = 0;
  const char *begin = text.data() + at + 1, *end = text.data() + text.size();
  const auto [stopped, code] = std::from_chars(begin, end, step);
  if (code != std::errc() || stopped != end || step < 0)
    return make_error(errc::usage, "\"{}\": \"{}\" is no step. fix: JOB@STEP, as {}@300", text,
                      std::string(begin, end), target.job);
  target.step = step;
  return target;
}

bool is_folder_target(const std::string& text) {
  if (text.find('/') != std::string::npos || text.find('.') != std::string::npos) return true;
  return is_there(fs::path(text) / "config.json");
}

result<weight_source> weight_source::of_job(const api_client& api, const job_target& target) {
  const std::string path = "/jobs/" + percent_encode(target.job);
  auto view = api.get(path);
  if (!view) return view.err();
  auto parsed = parse_job_spec(text_of(*view, "resolved_yaml"), "the coordinator's job file");
  if (!parsed.spec)
    return make_error(
        errc::bad_input,
        "the coordinator's form of job {} can't be read; is it of another version? {}", target.job,
        format_problems(parsed.problems));
  std::int64_t step = 0;
  if (target.step) {
    step = *target.step;
  } else {
    auto list = api.get(path + "/checkpoints");
    if (!list) return list.err();
    auto newest = newest_usable((*list)["checkpoints"], target.job);
    if (!newest) return newest.err();
    step = *newest;
  }
  auto manifest = api.get(fmt::format("{}/checkpoints/{}", path, step));
  if (!manifest) return manifest.err();
  weight_source source;
  source.model_ = parsed.spec->model;
  source.data_ = parsed.spec->data;
  source.sequence_tokens_ = parsed.spec->batch.sequence_tokens;
  source.origin_ = fmt::format("{}@{}", parsed.spec->name, step);
  source.step_ = step;
  source.recorded_hash_ = text_of(*manifest, "weights_hash");
  for (const auto& part : (*manifest)["parts"]) {
    const fs::path file = fs::path(text_of(part, "folder")) / text_of(part, "file");
    if (!is_there(file)) {
      const std::string host = text_of(part, "host");
      return make_error(errc::not_found,
                        "part {} of {} is not on this host{}. fix: run this command there, or give "
                        "the job a checkpoint.store that all hosts see",
                        file.string(), source.origin_,
                        host.empty() ? "" : fmt::format("; it lies on {}", host));
    }
    if (auto added = source.add_part(file, text_of(part, "root_hash")); !added) return added.err();
  }
  return source;
}

result<weight_source> weight_source::of_hf_folder(const fs::path& folder) {
  auto opened = hf_folder::open(folder);
  if (!opened) return opened.err();
  weight_source source;
  const hf_config& c = opened->config();
  source.model_.n_layer = c.n_layer;
  source.model_.d_model = c.n_embd;
  source.model_.n_head = c.n_head;
  source.model_.d_ff = c.n_inner == 0 ? 4 * c.n_embd : c.n_inner;
  source.model_.vocab_size = c.vocab_size;
  source.model_.context = c.n_positions;
  source.sequence_tokens_ = c.n_positions;
  source.origin_ = folder.string();
  source.folder_ = std::move(*opened);
  return source;
}

result<weight_source> weight_source::of_checkpoint_folder(const fs::path& folder,
                                                          std::optional<std::int64_t> step) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored))
    return make_error(errc::not_found, "{} is no folder", folder.string());
  const checkpoint_store store({folder});
  checkpoint_entry entry;
  if (step) {
    auto found = store.verify(*step, check_depth::quick);
    if (!found) return found.err();
    if (found->state != checkpoint_state::verified)
      return make_error(errc::corrupt, "checkpoint of step {} in {}: {}", *step, folder.string(),
                        found->reason);
    entry = std::move(*found);
  } else {
    auto found = store.newest_good(check_depth::quick);
    if (!found) return found.err();
    entry = std::move(found->entry);
  }
  weight_source source;
  source.step_ = entry.content.step;
  source.origin_ = fmt::format("{}@{}", folder.string(), source.step_);
  source.recorded_hash_ = entry.content.weights_hash;
  for (std::size_t i = 0; i < entry.parts.size(); ++i) {
    if (entry.parts[i].empty())
      return make_error(errc::not_found, "part {} of {} is not on this host",
                        entry.content.parts[i].file, source.origin_);
    if (auto added = source.add_part(entry.parts[i], entry.content.parts[i].root_hash); !added)
      return added.err();
  }
  if (auto shaped = source.take_shape_from_tensors(); !shaped) return shaped.err();
  return source;
}

result<void> weight_source::add_part(const fs::path& file, const std::string& root_hash) {
  auto opened = part_file::open(file, root_hash);
  if (!opened) return opened.err();
  for (const tensor_entry& t : opened->header().tensors) part_of_.emplace(t.name, file.string());
  parts_.emplace(file.string(), std::move(*opened));
  return ok();
}

result<void> weight_source::take_shape_from_tensors() {
  const auto shape = [this](const std::string& name) -> std::vector<std::int64_t> {
    const auto at = part_of_.find(name);
    if (at == part_of_.end()) return {};
    return parts_.at(at->second).header().find(name)->shape;
  };
  const auto wte = shape("wte.weight"), wpe = shape("wpe.weight"),
             fc = shape("h.0.mlp.c_fc.weight");
  if (wte.size() != 2 || wpe.size() != 2 || fc.size() != 2)
    return make_error(errc::corrupt, "{} has not the tensors of a GPT-2 model", origin_);
  model_.vocab_size = wte[0];
  model_.d_model = wte[1];
  model_.context = wpe[0];
  model_.d_ff = fc[1];
  for (const auto& [name, file] : part_of_)
    model_.n_layer = std::max(model_.n_layer, block_of(name) + 1);
  if (model_.n_layer > limits::layer_count_max)
    return make_error(errc::too_large, "{} has {} layers, at most {} are supported", origin_,
                      model_.n_layer, limits::layer_count_max);
  return ok();
}

result<void> weight_source::read(const tensor_info& tensor, float* to) {
  if (folder_) {
    const tensor_entry* found = folder_->find(tensor.name);
    if (found == nullptr)
      return make_error(errc::not_found, "{} has no tensor {}", origin_, tensor.name);
    if (found->shape != tensor.shape)
      return make_error(errc::bad_input, "{}: tensor {} has not the shape that config.json says",
                        origin_, tensor.name);
    return folder_->read(tensor.name, to);
  }
  const auto at = part_of_.find(tensor.name);
  if (at == part_of_.end())
    return make_error(errc::corrupt, "{} has no tensor {}", origin_, tensor.name);
  const part_file& part = parts_.at(at->second);
  if (part.header().find(tensor.name)->shape != tensor.shape)
    return make_error(errc::corrupt, "{}: tensor {} in {} has not the shape of the job's model",
                      origin_, tensor.name, at->second);
  return part.read(tensor.name, to, 0, tensor.count());
}

result<std::string> weight_source::compute_hash() {
  tensor_hash sum;
  std::vector<float> values;
  for (const tensor_info& t : all_tensors(model_)) {
    values.resize(static_cast<std::size_t>(t.count()));
    if (auto got = read(t, values.data()); !got) return got.err();
    sum += hash_tensor(t.name, values.data(), t.count());
  }
  const std::string text = to_string(sum);
  if (!recorded_hash_.empty() && recorded_hash_ != text)
    return make_error(errc::corrupt, "{}: the weights have hash {}, the manifest says {}", origin_,
                      text, recorded_hash_);
  return text;
}

}  // namespace stagecoach
