// The vote log of a job as the store keeps it, whole: one row per step, and who computed it when.
//
// The history in memory thins out (coordinator/run_history.hpp); this reads the rows. Blocking: for
// the threads that look at disks.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "config/ids.hpp"
#include "config/result.hpp"
#include "coordinator/checkpoint_keeper.hpp"
#include "coordinator/records.hpp"
#include "storage/kv.hpp"

namespace stagecoach {

struct vote_log {
  std::vector<step_report> rows;                              // by step
  std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps;  // first and last missing, inclusive
  bool is_cut = false;  // rows_max was reached; there may be more
};

/// Steps from..to, at most rows_max of them. A range beyond the newest row is not a gap.
/// Fails: corrupt (a row can't be read), io.
result<vote_log> read_vote_log(const kv& store, job_id job, std::uint64_t from, std::uint64_t to,
                               std::size_t rows_max);

/// All generations of a job, by number. Fails: io. Rows that can't be read are left out.
result<std::vector<generation_record>> read_generations(const kv& store, job_id job);

/// For a worker that computes steps from + 1 .. to again: the log with the row after it where it is
/// there, the parts of both checkpoints (from 0: none, the initial state), the layouts.
/// Fails: not_found (rows or a checkpoint are missing), corrupt, io.
result<audit> gather_window(const kv& store, const checkpoint_keeper& keeper, const job_place& job,
                            std::uint64_t from, std::uint64_t to);

}  // namespace stagecoach
