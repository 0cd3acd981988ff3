#include "coordinator/run_history.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "coordinator/wire.hpp"
#include "storage/json_text.hpp"

namespace stagecoach {

void duration_histogram::add(double seconds) {
  ++count;
  sum += seconds;
  for (std::size_t i = 0; i < bounds.size(); ++i)
    if (seconds <= bounds[i]) {
      ++counts[i];
      return;
    }
}

void run_history::add(const event_record& event) {
  auto& job = jobs_[event.job];
  job.events.push_back(event);
  if (job.events.size() > bounds_.events_per_job) job.events.pop_front();
  all_.emplace_back(next_of_all_++, event);
  if (all_.size() > bounds_.events_of_all) all_.pop_front();
  if (event.kind.find("lost") != std::string::npos ||
      event.kind.find("failed") != std::string::npos)
    ++job.failures[event.kind];
}

void run_history::add_step(job_id id, const step_report& report) {
  auto& job = jobs_[id];
  const bool is_new = job.steps.empty() || report.step > job.steps.rbegin()->first;
  job.steps[report.step] = report;
  if (is_new && report.step_us > 0) {
    ++job.step_count;
    job.step_us_total += report.step_us;
    job.step_seconds.add(static_cast<double>(report.step_us) * 1e-6);
  }
  if (job.steps.size() <= bounds_.steps_per_job) return;
  std::size_t half = job.steps.size() / 2;
  auto at = job.steps.begin();
  // Odd places go, so that the first step, the beginning of every curve, stays.
  for (std::size_t i = 0; i < half && at != job.steps.end(); ++i)
    at = i % 2 == 1 ? job.steps.erase(at) : std::next(at);
}

std::vector<std::uint64_t> run_history::forget_steps_after(job_id id, std::uint64_t step) {
  std::vector<std::uint64_t> gone;
  auto& steps = jobs_[id].steps;
  for (auto at = steps.upper_bound(step); at != steps.end(); at = steps.erase(at))
    gone.push_back(at->first);
  return gone;
}

void run_history::add_evaluation(job_id id, std::uint64_t step, exact_double loss) {
  auto& evaluations = jobs_[id].evaluations;
  evaluations[step] = loss;
  if (evaluations.size() > bounds_.evaluations_per_job) evaluations.erase(evaluations.begin());
}

const logged_line& run_history::add_line(job_id id, logged_line line) {
  auto& job = jobs_[id];
  if (line.n == 0) line.n = job.next_line;
  job.next_line = std::max(job.next_line, line.n) + 1;
  if (line.text.size() > bounds_.line_bytes) {
    line.text.resize(bounds_.line_bytes);
    // Not in the middle of a character: a cut one would make the row unreadable.
    while (!line.text.empty() && (static_cast<unsigned char>(line.text.back()) & 0xC0) == 0x80)
      line.text.pop_back();
    if (!line.text.empty() && static_cast<unsigned char>(line.text.back()) >= 0xC0)
      line.text.pop_back();
  }
  job.lines.push_back(std::move(line));
  if (job.lines.size() > bounds_.lines_per_job) job.lines.pop_front();
  return job.lines.back();
}

void run_history::add_recovery(job_id id, double seconds) {
  jobs_[id].recovery_seconds.add(seconds);
}

const run_history::job_history* run_history::of(job_id job) const {
  const auto found = jobs_.find(job);
  return found == jobs_.end() ? nullptr : &found->second;
}

std::int64_t run_history::step_us(job_id id) const {
  const auto* job = of(id);
  if (!job) return 0;
  std::vector<std::int64_t> newest;
  for (auto at = job->steps.rbegin(); at != job->steps.rend() && newest.size() < 100; ++at)
    if (at->second.step_us > 0) newest.push_back(at->second.step_us);
  if (newest.empty()) return 0;
  const auto middle = newest.begin() + static_cast<std::ptrdiff_t>(newest.size() / 2);
  std::nth_element(newest.begin(), middle, newest.end());
  return *middle;
}

namespace keys {
std::string series_prefix() { return "series/"; }
std::string series(job_id id, std::uint64_t step) {
  return fmt::format("series/{:016x}/{:016x}", value(id), step);
}
std::string evaluation_prefix() { return "valid/"; }
std::string evaluation(job_id id, std::uint64_t step) {
  return fmt::format("valid/{:016x}/{:016x}", value(id), step);
}
std::string line_prefix() { return "log/"; }
std::string line(job_id id, std::uint64_t n) {
  return fmt::format("log/{:016x}/{:016x}", value(id), n);
}
}  // namespace keys

namespace {

std::optional<std::uint64_t> hex_number(std::string_view text) {
  if (text.size() != 16) return std::nullopt;
  std::uint64_t number = 0;
  for (const char c : text) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return std::nullopt;
    number = number << 4 | static_cast<std::uint64_t>(digit);
  }
  return number;
}

/// "<area>/<16 hex>/<16 hex>"
struct row_place {
  job_id job{};
  std::uint64_t number = 0;
};
std::optional<row_place> place_of(std::string_view key) {
  const auto slash = key.find('/');
  if (slash == std::string_view::npos || key.size() != slash + 34) return std::nullopt;
  const auto job = hex_number(key.substr(slash + 1, 16));
  const auto number = hex_number(key.substr(slash + 18, 16));
  if (!job || !number) return std::nullopt;
  return row_place{job_id{*job}, *number};
}

}  // namespace

std::string format_evaluation_row(exact_double loss) { return fmt::format("{:016x}", loss.bits); }

std::string format_line_row(const logged_line& line) {
  return nlohmann::json{{"unix_ms", line.unix_ms},
                        {"level", line.level},
                        {"worker", line.worker},
                        {"text", line.text}}
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

bool restore_row(run_history& to, const std::string& key, const std::string& value) {
  const bool is_series = key.starts_with(keys::series_prefix());
  const bool is_evaluation = key.starts_with(keys::evaluation_prefix());
  const bool is_line = key.starts_with(keys::line_prefix());
  if (key.starts_with("event/")) {
    auto event = from_json_text<event_record>(value);
    if (!event) return false;
    to.add(*event);
    return true;
  }
  if (!is_series && !is_evaluation && !is_line) return true;
  const auto place = place_of(key);
  if (!place) return false;
  if (is_series) {
    auto report = from_json_text<step_report>(value);
    if (!report || report->step != place->number) return false;
    to.add_step(place->job, *report);
  } else if (is_evaluation) {
    const auto bits = hex_number(value);
    if (!bits) return false;
    to.add_evaluation(place->job, place->number, exact_double{*bits});
  } else {
    auto json = parse_json(value, "log line");
    if (!json || !json->is_object()) return false;
    logged_line line;
    line.n = place->number;
    const auto text = [&](const char* name) {
      const auto found = json->find(name);
      return found != json->end() && found->is_string() ? found->get<std::string>() : std::string();
    };
    line.level = text("level");
    line.worker = text("worker");
    line.text = text("text");
    const auto at = json->find("unix_ms");
    if (at != json->end() && at->is_number_integer()) line.unix_ms = at->get<std::int64_t>();
    to.add_line(place->job, std::move(line));
  }
  return true;
}

}  // namespace stagecoach
