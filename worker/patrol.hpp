// A worker without work computes steps of a job again, on a thread of its own that yields to
// others.
//
// One window at a time; a newer one, or stop(), drops it. Answers with `audited` through say().
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "coordinator/messages.hpp"

namespace stagecoach {

class patrol {
 public:
  struct options {
    int threads = 1;
    std::string isa;
    std::string host;                         // for messages
    std::function<void(to_coordinator)> say;  // from the patrol's thread
  };
  explicit patrol(options o);
  ~patrol();  // waits for one instruction of a step at most

  // Neither waits; any thread.
  void begin(const audit& order);
  void stop();

 private:
  void loop();
  void run(const audit& order);

  options options_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;  // guards the lines below
  std::condition_variable wake_;
  std::optional<audit> next_;
  bool is_ending_ = false;
  std::thread thread_;  // last: it starts when everything stands
};

}  // namespace stagecoach
