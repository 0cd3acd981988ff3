#include "coordinator/records.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "coordinator/wire.hpp"

namespace stagecoach {

const char* to_string(job_state state) {
  switch (state) {
    case job_state::pending:
      return "PENDING";
    case job_state::planning:
      return "PLANNING";
    case job_state::running:
      return "RUNNING";
    case job_state::recovering:
      return "RECOVERING";
    case job_state::paused:
      return "PAUSED";
    case job_state::checkpointing:
      return "CHECKPOINTING";
    case job_state::completed:
      return "COMPLETED";
    case job_state::failed:
      return "FAILED";
    case job_state::cancelled:
      return "CANCELLED";
  }
  return "UNKNOWN";
}

namespace keys {
std::string meta() { return "meta/coordinator"; }
std::string worker(worker_id id) { return fmt::format("worker/{:016x}", value(id)); }
std::string job(job_id id) { return fmt::format("job/{:016x}/record", value(id)); }
std::string generation(job_id id, std::uint64_t number) {
  return fmt::format("job/{:016x}/generation/{:016x}", value(id), number);
}
std::string checkpoint(job_id id, std::uint64_t step) {
  return fmt::format("ckpt/{:016x}/{:016x}", value(id), step);
}
std::string event(job_id id, std::uint64_t number) {
  return events_prefix(id) + fmt::format("{:016x}", number);
}
std::string events_prefix(job_id id) { return fmt::format("event/{:016x}/", value(id)); }
}  // namespace keys

namespace {

/// Reads a row's value, or names it among the problems.
template <class T>
std::optional<T> read_row(const store_row& row, std::vector<std::string>& problems) {
  result<T> record = from_json_text<T>(row.second);
  if (record) return std::move(*record);
  problems.push_back(fmt::format("store row {}: {}; skipped", row.first, record.err().message));
  return std::nullopt;
}

std::uint64_t last_number(std::string_view key) {
  std::uint64_t number = 0;
  for (const char c : key.substr(key.rfind('/') + 1)) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 0;
    number = number << 4 | static_cast<std::uint64_t>(digit);
  }
  return number;
}

std::uint64_t middle_number(std::string_view key) {
  const std::size_t begin = key.find('/') + 1;
  return last_number(key.substr(0, key.find('/', begin)));
}

}  // namespace

restored_records restore_records(const std::vector<store_row>& rows) {
  restored_records all;
  std::map<job_id, restored_job> found;
  std::map<job_id, bool> has_record;
  for (const store_row& row : rows) {
    const std::string_view key = row.first;
    if (key == keys::meta()) {
      if (auto m = read_row<meta_record>(row, all.problems)) all.meta = *m;
    } else if (key.starts_with("worker/")) {
      if (auto w = read_row<worker_record>(row, all.problems)) all.workers[w->id] = *w;
    } else if (key.starts_with("job/") && key.ends_with("/record")) {
      if (auto j = read_row<job_record>(row, all.problems)) {
        found[j->id].record = *j;
        has_record[j->id] = true;
      }
    } else if (key.starts_with("job/")) {
      auto g = read_row<generation_record>(row, all.problems);
      if (!g) continue;
      auto& all_of_job = found[g->shape.job].generations;
      all_of_job[g->shape.generation] = *g;
      if (all_of_job.size() > generation_count_max) all_of_job.erase(all_of_job.begin());
      auto& newest = found[g->shape.job].generation;
      if (!newest || newest->shape.generation < g->shape.generation) newest = std::move(g);
    } else if (key.starts_with("ckpt/")) {
      if (auto c = read_row<checkpoint_record>(row, all.problems)) {
        found[c->job].checkpoints[c->step] = *c;
      }
    } else if (key.starts_with("event/")) {
      const auto job = static_cast<job_id>(middle_number(key));
      std::uint64_t& next = job == job_id{} ? all.next_cluster_event : found[job].next_event;
      next = std::max(next, last_number(key) + 1);
    }
  }
  for (auto& [id, job] : found) {
    if (has_record[id]) {
      all.jobs.emplace(id, std::move(job));
    } else {
      all.problems.push_back(
          fmt::format("store: rows of job {} without its record; ignored", value(id)));
    }
    all.meta.next_job = std::max(all.meta.next_job, value(id) + 1);
  }
  for (const auto& [id, worker] : all.workers) {
    all.meta.next_worker = std::max(all.meta.next_worker, value(id) + 1);
  }
  return all;
}

}  // namespace stagecoach
