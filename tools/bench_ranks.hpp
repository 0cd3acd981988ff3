// All ranks of a layout in this process, one thread each: what steps cost where the cores of the
// machine are too few for wall time to tell.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "config/job_spec.hpp"
#include "model/virtual_time.hpp"
#include "worker/step_runner.hpp"

namespace stagecoach {

class bench_ranks {
 public:
  /// Random tokens and weights. The layout must be one of the job's.
  bench_ranks(job_spec spec, layout shape);
  /// One stage, so many replicas.
  bench_ranks(job_spec spec, int replicas);
  ~bench_ranks();

  /// One more step; CPU seconds of all threads of this process, NaN if a rank failed.
  double step_cpu_seconds();
  const step_times& times(int rank) const;                     // of the newest step
  const std::vector<instruction_span>& spans(int rank) const;  // of the newest step

 private:
  struct rank;
  job_spec spec_;
  plan shape_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::unique_ptr<link_set>> links_;
  std::vector<std::unique_ptr<rank>> ranks_;
  std::uint64_t step_ = 0;
};

/// Pieces of a step by one worker, one thread, nothing else of ours running: median of `rounds`.
/// A block's time is what is left when a model without the other blocks is taken off.
unit_times measured_pieces(const job_spec& spec, int rounds);

}  // namespace stagecoach
