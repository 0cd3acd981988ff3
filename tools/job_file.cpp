#include "tools/job_file.hpp"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include "config/job_spec_yaml.hpp"
#include "config/limits.hpp"

namespace stagecoach {

namespace fs = std::filesystem;

namespace {

std::string absolute(const std::string& path, const fs::path& folder) {
  if (path.empty() || fs::path(path).is_absolute()) return path;
  return (folder / path).lexically_normal().string();
}

void make_absolute(job_spec& spec, const fs::path& folder) {
  for (data_file& f : spec.data.train) f.path = absolute(f.path, folder);
  for (data_file& f : spec.data.valid) f.path = absolute(f.path, folder);
  spec.data.tokenizer_path = absolute(spec.data.tokenizer_path, folder);
  spec.checkpoint.store = absolute(spec.checkpoint.store, folder);
  if (spec.model.init.rfind("hf:", 0) == 0)
    spec.model.init = "hf:" + absolute(spec.model.init.substr(3), folder);
}

result<std::string> read_text(const std::string& path) {
  std::stringstream text;
  if (path == "-") {
    text << std::cin.rdbuf();
  } else {
    std::error_code failed;
    if (fs::is_directory(path, failed))
      return make_error(errc::bad_spec, "{} is a folder; expected a job file", path);
    std::ifstream file(path, std::ios::binary);
    if (!file)
      return make_error(
          errc::bad_spec,
          "can't read {}: {}. fix: stagecoach init > job.yaml makes one to start with", path,
          std::strerror(errno));
    // One byte over the limit is enough for the parser to refuse it.
    std::string bytes(static_cast<std::size_t>(limits::spec_bytes_max) + 1, '\0');
    file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    bytes.resize(static_cast<std::size_t>(file.gcount()));
    return bytes;
  }
  return text.str();
}

}  // namespace

nlohmann::json problems_json(const std::vector<spec_problem>& problems) {
  auto out = nlohmann::json::array();
  for (const spec_problem& p : problems)
    out.push_back({{"file", p.file},
                   {"line", p.line},
                   {"column", p.column},
                   {"code", p.code},
                   {"path", p.path},
                   {"message", p.message},
                   {"fix", p.fix},
                   {"source_line", p.source_line}});
  return out;
}

std::optional<job_file> load_job_file(const global_flags& flags, const std::string& path,
                                      const std::vector<std::string>& overrides, exit_code& code) {
  auto text = read_text(path);
  if (!text) {
    code = complain(flags, text.err());
    return std::nullopt;
  }
  auto parsed = parse_job_spec(*text, path == "-" ? "stdin" : path, overrides);
  if (!parsed.spec) {
    code = complain(flags, format_problems(parsed.problems), problems_json(parsed.problems));
    return std::nullopt;
  }
  job_file job;
  job.spec = std::move(*parsed.spec);
  const fs::path folder = path == "-" ? fs::current_path() : fs::absolute(path).parent_path();
  make_absolute(job.spec, folder);
  job.resolved_yaml = write_job_spec_yaml(job.spec);
  return job;
}

job_file with_workers(job_file job, int workers_min, int workers_max) {
  job.spec.elasticity.workers_min = workers_min;
  job.spec.elasticity.workers_max = workers_max;
  auto& layout = job.spec.parallelism;
  if (layout.is_explicit && layout.stages * layout.replicas > workers_max) layout = {};
  job.resolved_yaml = write_job_spec_yaml(job.spec);
  return job;
}

std::optional<std::string> submit_job_file(const global_flags& flags, const api_client& api,
                                           const job_file& job, exit_code& code) {
  nlohmann::json problems;
  auto reply = api.post("/jobs", {{"yaml", job.resolved_yaml}, {"file", job.spec.name + ".yaml"}},
                        &problems);
  if (reply) return reply->value("id", "");
  if (!problems.is_array()) {
    code = complain(flags, reply.err());
    return std::nullopt;
  }
  std::string text;
  for (const auto& p : problems) {
    text += fmt::format("{}: error[{}]: {}\n", p.value("path", job.spec.name),
                        p.value("code", "E000"), p.value("message", ""));
    if (!p.value("fix", "").empty()) text += fmt::format("  fix: {}\n", p.value("fix", ""));
  }
  code = complain(flags, text, problems);
  return std::nullopt;
}

}  // namespace stagecoach
