// A window of a job's steps computed again in this process: one thread per worker of a layout, with
// links in memory, compared with what the run logged and saved.
//
// Any layout gives the same bits (DESIGN 4), so a large run can be audited on one machine of its
// device class. Reads data and checkpoint parts; writes nothing and knows no coordinator.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "coordinator/messages.hpp"
#include "model/parameters.hpp"
#include "model/plan.hpp"

namespace stagecoach {

struct window {
  job_spec spec;
  layout shape;                       // on which it is computed here
  std::uint64_t step = 0, chain = 0;  // the state that it starts from
  std::vector<part_record> parts;     // of that state; none: the job's initial state (step 0)
  std::uint64_t last = 0;             // newest step to compute
  std::map<std::uint64_t, step_report> log;  // of the run, by step; also last + 1 where it is known
  std::map<std::uint64_t, std::vector<part_record>> saved;  // checkpoints within, by step
  std::vector<layout_span> layouts;  // of the run, rising; to say which stage was wrong
  int threads = 1;                   // of each worker
  std::string isa;
};

struct window_verdict {
  bool is_identical = true;
  std::uint64_t step = 0;            // first whose result differs, or the newest that was compared
  std::string what;                  // of it: "weights", "loss", "checkpoint"
  std::vector<int> stages;           // of the run, that held other weights, where the log tells
  std::uint64_t saved_step = 0;      // the checkpoint that `tensors` are of
  std::vector<std::string> tensors;  // that differ there
  std::uint64_t compared = 0;        // hashes and chains
  std::string text;                  // all of it in words
};

/// Fails: cancelled, not_found and corrupt (data, parts), bad_spec.
/// on_step: after each step, on another thread. cancelled: looked at between steps and
/// microbatches.
result<window_verdict> run_window(const window& w, const std::atomic<bool>& cancelled,
                                  const std::function<void(std::uint64_t step)>& on_step = {});

/// Where a tensor's state lies, or null for moments that are kept elsewhere.
struct state_target {
  float *parameter = nullptr, *moment1 = nullptr, *moment2 = nullptr;
};
/// Reads parameters and moments of `tensors` from the parts that have them.
/// Fails: corrupt, not_found, io, cancelled (is_cancelled said so).
result<void> read_state(const std::vector<part_record>& parts,
                        const std::vector<tensor_info>& tensors,
                        const std::function<state_target(const std::string&)>& target_of,
                        const std::function<bool()>& is_cancelled);
/// The state before step 1: random or from a folder of Hugging Face, moments zero.
/// Fails: as that folder does.
result<void> read_initial_state(const model_spec& model, const std::vector<tensor_info>& tensors,
                                const std::function<state_target(const std::string&)>& target_of);

}  // namespace stagecoach
