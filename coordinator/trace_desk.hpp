// What workers did in a few steps, instruction by instruction, gathered for `stagecoach trace`.
//
// Pure, and apart from the machines: nothing is decided by it, nothing stored. The shell gives it
// what workers send and the coordinator's clock. One trace a job; a new one replaces the old.
//
// Clocks: a worker's steady clock is laid on the coordinator's by question and answer, a few times;
// the answer that came back soonest tells most, and half its way is the error that it may have.
//
// How to use it:
//   auto order = desk.begin(job, {.first = 100, .last = 102}, members, step_now);
//   for (const auto& [worker, message] : *order) send(worker, message);
//   for (const auto& [worker, message] : desk.take(worker, answer, now_ns)) send(worker, message);
//   desk.take(worker, a_traced_step);
//   if (const trace* t = desk.find(job); t != nullptr && t->missing().empty()) show(*t);
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "config/result.hpp"
#include "coordinator/job_machine.hpp"
#include "coordinator/messages.hpp"

namespace stagecoach {

struct trace {
  struct member {
    std::string name, host;
    int rank = 0, stage = 0, replica = 0;
    std::int64_t offset_ns = 0, error_ns = -1;  // its clock less ours, and by how much at most; -1:
                                                // not known
    std::map<std::uint64_t, traced> steps;      // the newest of each
  };
  std::uint64_t request = 0, first = 0, last = 0;
  std::map<worker_id, member> members;
  /// "w2: steps 101, 102": what has not come yet; empty: it is whole.
  std::vector<std::string> missing() const;
};

class trace_desk {
 public:
  using messages = std::vector<std::pair<worker_id, to_worker>>;
  static constexpr std::uint64_t steps_max = 64;
  static constexpr std::size_t parts_max = 4096;       // steps times workers
  static constexpr std::size_t spans_max = 1'000'000;  // 32 MB here, about as much as text
  static constexpr int questions = 8;

  /// members: of the job's generation that runs, in the order of their ranks. Fails: usage (steps
  /// that have passed, too many of them), conflict (nobody runs).
  result<messages> begin(job_id job, std::uint64_t first, std::uint64_t last,
                         const std::vector<member_view>& members, int stages,
                         std::uint64_t step_now);
  /// now_ns: the coordinator's steady clock, when the answer came in.
  messages take(worker_id from, const clock_answer& x, std::int64_t now_ns);
  /// Of a worker that was not asked, or of another request: dropped.
  void take(worker_id from, const traced& x);
  const trace* find(job_id job) const;

 private:
  std::map<job_id, trace> traces_;
  std::uint64_t next_request_ = 1;
};

}  // namespace stagecoach
