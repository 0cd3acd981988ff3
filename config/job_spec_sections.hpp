// The sections of a job file, read and resolved one after the other. Inside of
// config/job_spec_yaml.hpp; other rooms have no use for it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "config/job_spec.hpp"
#include "config/job_spec_values.hpp"

namespace stagecoach {

class spec_reader : public value_reader {
 public:
  using value_reader::value_reader;

  /// The resolved spec; good only if take_problems() is empty afterwards.
  job_spec read();

 private:
  void read_head(section& top);
  void read_model(section& top);
  void read_init(section& model);
  void read_data(section& top);
  void read_data_files(section& data, const char* key, std::vector<data_file>& out);
  void read_data_file(const yaml_node& n, const std::string& path, std::vector<data_file>& out);
  void read_elasticity(section& top);
  void read_batch(section& top);
  void read_optimizer(section& top);
  void read_stop_and_schedule(section& top);
  void read_precision(section& top);
  void read_eval(section& top);
  void read_parallelism(section& top);
  void read_checkpoint(section& top);
  void read_resources(section& top);
  void read_observe(section& top);
  void check_model();
  void resolve_batch(const std::optional<quantity>& global);
  void check_layout();

  job_spec spec_;
};

}  // namespace stagecoach
