// The one thread that writes the store: batches in order, grouped into one synced write.
//
// Nothing is dropped and nothing is overtaken: while the disk is full, batches wait and are tried
// again, and the coordinator goes on answering. Knows no record; `copy` may keep a second copy of
// what was written (coordinator/state_folder.hpp) before the batch counts as durable.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "config/result.hpp"
#include "storage/kv.hpp"

namespace stagecoach {

class store_writer {
 public:
  using ticket = std::uint64_t;

  struct options {
    bool is_synced = true;  // false: no batch is synced; for tests only
    std::chrono::milliseconds retry{1'000};
    std::size_t group_rows_max = 10'000;  // rows that one write takes from the queue
  };
  /// Called on the writer's thread.
  struct callbacks {
    std::function<void(ticket)> on_durable;  // this and all earlier ones; for synced batches only
    std::function<void(const error&)> on_problem;  // a write failed; it is tried again
    std::function<void()> on_recovered;
    /// Second copy of synced rows. Its failure is a problem, but the rows are durable in the store.
    std::function<result<void>(const std::vector<kv_write>&)> copy;
  };

  store_writer(kv& store, options o, callbacks c);
  /// Writes what is queued (trying once more if the disk refuses) and joins.
  ~store_writer();
  store_writer(const store_writer&) = delete;
  store_writer& operator=(const store_writer&) = delete;

  /// Any thread. Tickets grow from 1 in the order of the calls.
  ticket write(std::vector<kv_write> rows, bool is_synced);
  void stop();

  std::size_t queued_batches() const;
  std::uint64_t written_groups() const;

 private:
  struct batch {
    std::vector<kv_write> rows;
    bool is_synced = false;
    ticket number = 0;
  };
  void run();

  kv& store_;
  options options_;
  callbacks callbacks_;
  mutable std::mutex lock_;
  std::condition_variable changed_;
  std::deque<batch> queue_;
  ticket last_ = 0;
  std::uint64_t groups_ = 0;
  bool is_stopping_ = false;
  std::thread thread_;  // last: it starts when everything stands
};

}  // namespace stagecoach
