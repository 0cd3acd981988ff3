// A deputy's hands on the checkpoint folder: manifests, retention, the tie-break file.
//
// One thread, in order, beside the worker's others: a slow disk must not hold up a member's
// messages.
#pragma once

#include <functional>

#include "coordinator/checkpoint_keeper.hpp"
#include "coordinator/serial_thread.hpp"
#include "worker/worker_machine.hpp"

namespace stagecoach {

class deputy_disk {
 public:
  /// answer: called on the disk's thread, with the event that answers.
  explicit deputy_disk(std::function<void(worker_event)> answer) : answer_(std::move(answer)) {}

  void carry_out(const worker_actions::store& x);
  void carry_out(const worker_actions::make_tie_break& x);

 private:
  std::function<void(worker_event)> answer_;
  checkpoint_keeper keeper_;
  serial_thread thread_;  // last: it uses the others until it is joined
};

/// Makes the file with this content unless it is there; true: the file holds this content. Whoever
/// made it first has it, on every host that shares the folder (O_EXCL).
bool take_tie_break(const std::filesystem::path& folder, const std::string& file,
                    const std::string& content);

}  // namespace stagecoach
