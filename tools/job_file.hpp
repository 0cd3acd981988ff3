// A job file as the commands take it: read, checked, resolved, its paths made absolute.
//
// Resolution happens here, from the file and --set alone, so that a later change of the worker
// range (train --workers N) can't change what decides the bits: the resolved text is what is
// submitted.
#pragma once

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "tools/command.hpp"

namespace stagecoach {

struct job_file {
  job_spec spec;
  std::string resolved_yaml;
};

/// Reads `path` ("-": stdin); relative data paths are taken from the file's folder (stdin: from the
/// current one). nullopt: complained already, with the exit code in `code`.
std::optional<job_file> load_job_file(const global_flags& flags, const std::string& path,
                                      const std::vector<std::string>& overrides, exit_code& code);

/// The same job for another range of workers; nothing that decides the bits changes.
job_file with_workers(job_file job, int workers_min, int workers_max);

/// POST /jobs; returns the job's id. Problems are printed.
std::optional<std::string> submit_job_file(const global_flags& flags, const api_client& api,
                                           const job_file& job, exit_code& code);

nlohmann::json problems_json(const std::vector<struct spec_problem>& problems);

}  // namespace stagecoach
