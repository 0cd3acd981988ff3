// The trainer: one thread that loads a generation's state, runs steps, saves and evaluates.
//
// Told by commands (any thread, never blocking), answers with control messages through `emit`
// (called from the trainer's, the writer's or the links' thread). Decides nothing about membership:
// the worker_machine does. A dropped step leaves the state at the newest applied step; an apply is
// never interrupted.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/messages.hpp"
#include "worker/fault_injection.hpp"
#include "worker/link_asio.hpp"
#include "worker/trainer_pulse.hpp"

namespace stagecoach {

struct trainer_options {
  int threads = 1;     // compute threads of this worker
  std::string isa;     // "" = best
  std::string host;    // for messages
  std::string name;    // the worker's name, for messages
  process_id process;  // by which a plan names this worker
  std::function<void(to_coordinator)> emit;
  std::vector<injected_fault> faults;  // for tests
};

class trainer {
 public:
  /// links must outlive the trainer.
  trainer(trainer_options options, link_server& links);
  ~trainer();  // drops what runs and joins

  /// Cancels the open step or load and answers `prepared{job, number}` with what is held.
  void drop(const prepare& p);
  /// Loads state and links for a committed plan; answers `ready` or `failed`.
  void load(const commit& c);
  /// Runs steps until held, finished, dropped or broken.
  void run(const run_stage& r);
  /// Rank 0 only; others ignore it.
  void order(const give_order& o);
  /// From the next step on: emits `traced` after each of these steps.
  void trace(const trace_steps& t);
  void resume(const resume_stage& r);
  void durable(const checkpoint_durable& d);
  /// Begins a part in a background copy, beside what runs; ends the former one.
  void begin_feed(const feed& f);
  void end_feed(const stop_feed& f);
  /// Forgets the job and frees its memory.
  void stop(const stop_stage& s);

  /// For hello and beat.
  struct status {
    std::uint64_t job = 0, generation = 0, plan_hash = 0, step = 0;
    worker_phase phase = worker_phase::idle;
    trainer_pulse pulse{};
    std::int64_t leaf_us = 0;   // computing one leaf on this stage, mean of the newest steps
    std::int64_t layer_us = 0;  // of it, one layer; 0: the stage has none
  };
  status now() const;

 private:
  struct implementation;
  std::unique_ptr<implementation> self_;
};

}  // namespace stagecoach
