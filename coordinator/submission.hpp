// A job file on its way in: parsed, its data files found and hashed, its plan worked out.
//
// Blocking (it reads every data file once); runs on the coordinator's submission thread.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "config/job_spec_yaml.hpp"
#include "coordinator/cluster_machine.hpp"
#include "coordinator/state_folder.hpp"

namespace stagecoach {

struct submission_request {
  std::string yaml;
  std::string file;              // its name, for messages
  std::string folder;            // where relative paths start; empty: the coordinator's own
  std::vector<std::string> set;  // overrides, "batch.micro=8"
};

struct submission {
  std::optional<job_spec> spec;  // set exactly if there are no problems
  std::vector<spec_problem> problems;
  std::vector<std::string> warnings;  // little disk space, ...
};

submission prepare_submission(const submission_request& request, const state_paths& paths);

/// The answer to POST /plan as JSON text; pure.
std::string plan_answer(const submission& checked, const std::vector<worker_view>& workers);

/// "embed, h.0-2", "h.3-5, head": units [begin, end) for people.
std::string describe_units(const model_spec& m, int begin, int end);

}  // namespace stagecoach
