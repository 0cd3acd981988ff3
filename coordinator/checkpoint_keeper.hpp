// The disk work of a job's checkpoints: find the newest good one, write manifests, retire old ones.
//
// Blocking; called from a storage thread, the coordinator's or a deputy's. What to do and when is
// the machines' decision; each answer is one of their events.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "coordinator/job_machine.hpp"
#include "coordinator/records.hpp"
#include "storage/checkpoint_store.hpp"

namespace stagecoach {

/// Whose checkpoints: as of when the action was taken.
struct job_place {
  job_id id{};
  job_spec spec;
  std::uint64_t incarnation = 0;  // of this coordinator
  std::uint64_t plan_hash = 0;
  std::string layout;  // for people: "stages=2 replicas=1"
  std::int64_t unix_ms = 0;
  std::int64_t submitted_unix_ms = 0;
  std::filesystem::path folder;  // its checkpoint folder
  std::filesystem::path copies;  // of second copies of its manifests; empty (a deputy): none
};

class checkpoint_keeper {
 public:
  /// Reads every byte of the parts: a damaged part must not be met by the workers that load it.
  /// Parts that only other hosts see are taken on the manifest's word; loading checks them.
  checkpoint_found find(const job_place& job, const actions::find_checkpoint& wanted) const;
  /// In the checkpoint folder and, as a second copy, in the state folder. Written again after a
  /// restart with the same parts it is a success.
  manifest_written write(const job_place& job, const actions::write_manifest& wanted) const;
  /// Also removes what earlier generations left behind unfinished. problems: for the log.
  checkpoints_retired retire(const job_place& job, const actions::retire_checkpoints& wanted,
                             std::vector<std::string>& problems) const;

  result<std::vector<checkpoint_entry>> list(const job_place& job, check_depth depth) const;
  result<checkpoint_entry> verify(const job_place& job, std::uint64_t step,
                                  check_depth depth) const;
  /// Absolute folder in which part i of an entry lies.
  std::string folder_of(const job_place& job, const checkpoint_entry& entry,
                        std::size_t part) const;

 private:
  checkpoint_store store_of(const job_place& job) const;
};

/// Hash of the resolved spec: the job's identity in its manifests.
std::string job_identity(const job_spec& spec);

}  // namespace stagecoach
