// A whole training run in one process: one thread per worker of a layout, memory links between
// them.
//
// What tests compare: the weights' hash after the last step, whatever the layout, schedule and
// threads.
#pragma once

#include <string>
#include <vector>

#include "config/job_spec.hpp"
#include "model/plan.hpp"

namespace stagecoach::testing {

struct run_outcome {
  std::string weights_hash;  // of the whole model, after the last step
  std::string state_hash;
  std::vector<double> losses;  // per step
  std::uint64_t chain = 0;
  /// Of each copy that a rank keeps of a stage: who, of whom, and is its state what the owner has?
  struct copy {
    int holder = 0, owner = 0;
    bool is_same = false;
  };
  std::vector<copy> copies;
};

/// A small job on a synthetic text that needs no file: 4 blocks of 64 channels unless changed.
job_spec small_job();

/// Runs spec.stop_steps steps. threads: of each worker's backend; backend_name: "cpu" or
/// "reference". drop_at: a step that every rank first begins with links that break in its middle,
/// as when a worker is lost, and then runs again with the same stage (0: none).
run_outcome run_in_process(const job_spec& spec, const layout& shape, int threads,
                           const std::string& backend_name = "cpu", std::int64_t drop_at = 0);

/// Bytes that a stage of this layout takes: parameters, moments, activation slots.
std::int64_t allocated_by_stage(const job_spec& spec, const layout& shape, int stage_index);

/// A layout with the partition functions of model/plan.hpp.
layout make_layout(const job_spec& spec, int stages, int replicas, const std::string& schedule);

}  // namespace stagecoach::testing
