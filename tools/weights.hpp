// A model's weights, whole, wherever they lie: a job's checkpoint, a checkpoint folder, a folder in
// Hugging Face's form.
//
// Reads tensor by tensor on demand, each byte against its checksum; holds no tensor itself. Writes
// nothing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "model/parameters.hpp"
#include "storage/huggingface.hpp"
#include "storage/part.hpp"
#include "tools/api_client.hpp"

namespace stagecoach {

/// "JOB" or "JOB@STEP".
struct job_target {
  std::string job;
  std::optional<std::int64_t> step;
};
/// Fails: usage (STEP is no step number).
result<job_target> parse_target(const std::string& text);

/// Is this target a folder, not a job? Job names have no '/' and no '.'.
bool is_folder_target(const std::string& text);

class weight_source {
 public:
  /// A checkpoint of a job; the newest usable one where no step is named. Its parts must lie in
  /// folders that this host sees. Fails: not_found, corrupt, and as the API does.
  static result<weight_source> of_job(const api_client& api, const job_target& target);
  /// config.json and safetensors. Fails: not_found, bad_input, corrupt.
  static result<weight_source> of_hf_folder(const std::filesystem::path& folder);
  /// The newest good checkpoint of a store's folder, or that of a step. The shape is taken from the
  /// tensors, so the head count is not known (model().n_head is 0). Fails: not_found, corrupt.
  static result<weight_source> of_checkpoint_folder(const std::filesystem::path& folder,
                                                    std::optional<std::int64_t> step);

  const model_spec& model() const { return model_; }
  /// Of the job; without one its tokenizer is "".
  const data_spec& data() const { return data_; }
  std::int64_t sequence_tokens() const { return sequence_tokens_; }  // what it was trained on
  const std::string& origin() const { return origin_; }              // "my-job@300"
  std::int64_t step() const { return step_; }                        // -1: none
  /// What the manifest says; empty for a folder of Hugging Face.
  const std::string& recorded_hash() const { return recorded_hash_; }

  /// All values of one tensor as float32. Fails: not_found, corrupt, io.
  result<void> read(const tensor_info& tensor, float* to);
  /// Reads everything once. Fails: as read, and corrupt if it is not the recorded hash.
  result<std::string> compute_hash();

 private:
  struct place {
    std::filesystem::path file;
    std::string root_hash;
  };
  result<void> add_part(const std::filesystem::path& file, const std::string& root_hash);
  result<void> take_shape_from_tensors();

  model_spec model_;
  data_spec data_;
  std::int64_t sequence_tokens_ = 0;
  std::string origin_, recorded_hash_;
  std::int64_t step_ = -1;
  std::map<std::string, part_file> parts_;      // by file
  std::map<std::string, std::string> part_of_;  // tensor name -> file
  std::optional<hf_folder> folder_;
};

}  // namespace stagecoach
