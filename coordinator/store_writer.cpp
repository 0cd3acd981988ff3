#include "coordinator/store_writer.hpp"

#include <iterator>
#include <utility>

namespace stagecoach {

store_writer::store_writer(kv& store, options o, callbacks c)
    : store_(store), options_(o), callbacks_(std::move(c)), thread_([this] { run(); }) {}

store_writer::~store_writer() { stop(); }

store_writer::ticket store_writer::write(std::vector<kv_write> rows, bool is_synced) {
  ticket number = 0;
  {
    const std::lock_guard guard(lock_);
    number = ++last_;
    queue_.push_back({std::move(rows), is_synced, number});
  }
  changed_.notify_one();
  return number;
}

void store_writer::stop() {
  {
    const std::lock_guard guard(lock_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::size_t store_writer::queued_batches() const {
  const std::lock_guard guard(lock_);
  return queue_.size();
}

std::uint64_t store_writer::written_groups() const {
  const std::lock_guard guard(lock_);
  return groups_;
}

void store_writer::run() {
  bool is_failing = false;
  bool is_copy_behind = false;  // rows are in the store, and not in their second copies
  const auto copy = [&](const std::vector<kv_write>& rows) {
    auto copied = callbacks_.copy(rows);
    is_copy_behind = !copied;
    if (copied) return;
    is_failing = true;  // until a later copy succeeds
    if (callbacks_.on_problem) callbacks_.on_problem(copied.err());
  };
  for (;;) {
    std::vector<kv_write> rows;
    std::vector<kv_write> synced_rows;
    std::size_t taken = 0;
    ticket newest_synced = 0;
    bool is_last_try = false;
    {
      std::unique_lock guard(lock_);
      const auto is_due = [this] { return is_stopping_ || !queue_.empty(); };
      // A problem keeps new work out, so nobody may come whose write would show that it is over.
      if (is_copy_behind && !changed_.wait_for(guard, options_.retry, is_due)) {
        guard.unlock();
        copy({});
        if (!is_copy_behind && std::exchange(is_failing, false) && callbacks_.on_recovered)
          callbacks_.on_recovered();
        continue;
      }
      changed_.wait(guard, is_due);
      if (queue_.empty()) return;
      is_last_try = is_stopping_;
      // Copied and not moved: a write that fails is tried again, with what has come since.
      for (const batch& b : queue_) {
        if (taken > 0 && rows.size() + b.rows.size() > options_.group_rows_max) break;
        rows.insert(rows.end(), b.rows.begin(), b.rows.end());
        if (b.is_synced) {
          synced_rows.insert(synced_rows.end(), b.rows.begin(), b.rows.end());
          newest_synced = b.number;
        }
        ++taken;
      }
    }
    const bool is_synced = newest_synced != 0 && options_.is_synced;
    auto written = store_.write(rows, is_synced ? durability::synced : durability::buffered);
    if (!written) {
      is_failing = true;
      if (callbacks_.on_problem) callbacks_.on_problem(written.err());
      if (is_last_try) return;
      std::unique_lock guard(lock_);
      changed_.wait_for(guard, options_.retry, [this] { return is_stopping_; });
      continue;
    }
    if (callbacks_.copy && !synced_rows.empty()) copy(synced_rows);
    if (!is_copy_behind && std::exchange(is_failing, false) && callbacks_.on_recovered)
      callbacks_.on_recovered();
    {
      const std::lock_guard guard(lock_);
      queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(taken));
      ++groups_;
    }
    if (newest_synced != 0 && callbacks_.on_durable) callbacks_.on_durable(newest_synced);
  }
}

}  // namespace stagecoach
