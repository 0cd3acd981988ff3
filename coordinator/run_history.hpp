// What was reported of the jobs, in memory and bounded: events, loss per step, evaluations, log
// lines.
//
// The store keeps all of it (rows below); this keeps what the API answers with. Old steps thin out,
// the newest stay exact. Pure: no store, clock or thread.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "config/ids.hpp"
#include "coordinator/messages.hpp"
#include "coordinator/records.hpp"

namespace stagecoach {

struct history_bounds {
  std::size_t events_per_job = 10'000;
  std::size_t events_of_all = 50'000;
  std::size_t steps_per_job =
      50'000;  // 56 B each; beyond it every other one of the older half goes
  std::size_t evaluations_per_job = 10'000;
  std::size_t lines_per_job = 10'000;
  std::size_t line_bytes = 4'096;  // a longer one is cut
};

struct logged_line {
  std::uint64_t n = 0;  // per job, from 1
  std::int64_t unix_ms = 0;
  std::string level, worker, text;
};

/// Durations in seconds, cumulative counts as Prometheus wants them.
struct duration_histogram {
  std::vector<double> bounds;
  std::vector<std::uint64_t> counts =
      std::vector<std::uint64_t>(bounds.size(), 0);  // of one bucket
  std::uint64_t count = 0;
  double sum = 0.0;
  void add(double seconds);
};

class run_history {
 public:
  struct job_history {
    std::deque<event_record> events;
    std::map<std::uint64_t, step_report> steps;  // a step that is reported again replaces
    std::map<std::uint64_t, exact_double> evaluations;
    std::deque<logged_line> lines;
    std::uint64_t next_line = 1;
    std::uint64_t tokens_per_step = 0;
    std::uint64_t step_count = 0;    // reported, each once
    std::int64_t step_us_total = 0;  // of these
    duration_histogram step_seconds{
        {.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}};
    duration_histogram recovery_seconds{{.1, .25, .5, 1, 2, 3, 5, 10, 30, 60, 300}};
    std::map<std::string, std::uint64_t> failures;  // by cause
  };

  explicit run_history(history_bounds bounds = {}) : bounds_(bounds) {}

  void add(const event_record& event);
  void add_step(job_id job, const step_report& report);
  /// They are done again with other bits. Returns those that were known.
  std::vector<std::uint64_t> forget_steps_after(job_id job, std::uint64_t step);
  void add_evaluation(job_id job, std::uint64_t step, exact_double loss);
  /// line.n of 0: the next number. Returns the line as kept.
  const logged_line& add_line(job_id job, logged_line line);
  void add_recovery(job_id job, double seconds);

  /// Null if nothing was reported.
  const job_history* of(job_id job) const;
  /// Events of all jobs in the order they came, with their number in that order (from 1, anew with
  /// each start of the coordinator).
  const std::deque<std::pair<std::uint64_t, event_record>>& all_events() const { return all_; }

  /// Median of the newest 100 steps' durations; 0: none known.
  std::int64_t step_us(job_id job) const;

 private:
  history_bounds bounds_;
  std::map<job_id, job_history> jobs_;
  std::deque<std::pair<std::uint64_t, event_record>> all_;
  std::uint64_t next_of_all_ = 1;
};

// ---- rows in the store (written unsynced: at most the last second is lost with the host)
// ---------------
namespace keys {
std::string series_prefix();                            // "series/"
std::string series(job_id id, std::uint64_t step);      // "series/<16 hex>/<16 hex>"
std::string evaluation_prefix();                        // "valid/"
std::string evaluation(job_id id, std::uint64_t step);  // "valid/<16 hex>/<16 hex>"
std::string line_prefix();                              // "log/"
std::string line(job_id id, std::uint64_t n);           // "log/<16 hex>/<16 hex>"
}  // namespace keys

std::string format_evaluation_row(exact_double loss);
std::string format_line_row(const logged_line& line);

/// Takes a row of the areas above or an event; others are ignored. False: it can't be read.
bool restore_row(run_history& to, const std::string& key, const std::string& value);

}  // namespace stagecoach
