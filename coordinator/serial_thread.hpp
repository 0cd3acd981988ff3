// One thread that runs what it is given, in order. For work that touches the disk and must not hold
// up an actor; a piece of work posts its answer back itself.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace stagecoach {

class serial_thread {
 public:
  serial_thread() : thread_([this] { run(); }) {}
  ~serial_thread() { stop(); }
  serial_thread(const serial_thread&) = delete;
  serial_thread& operator=(const serial_thread&) = delete;

  void post(std::function<void()> work) {
    {
      const std::lock_guard guard(lock_);
      if (is_stopping_) return;
      queue_.push_back(std::move(work));
    }
    changed_.notify_one();
  }
  /// Finishes what it is at, drops the rest, joins.
  void stop() {
    {
      const std::lock_guard guard(lock_);
      is_stopping_ = true;
      queue_.clear();
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock guard(lock_);
        changed_.wait(guard, [this] { return is_stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
    }
  }

  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace stagecoach
