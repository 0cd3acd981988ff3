// The threads of the CPU backend: the caller and threads-1 of our own run numbered tasks.
//
// Which thread runs which task is left to the moment; tasks must therefore be cut by shape alone,
// and write apart. Waiting spins briefly and then sleeps, because cores may be shared with other
// work and an endless spin would take them away from it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace stagecoach {

class thread_pool {
 public:
  /// thread_count includes the caller; at least 1.
  explicit thread_pool(int thread_count);
  ~thread_pool();
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  int thread_count() const { return static_cast<int>(threads_.size()) + 1; }

  /// Calls task(index, lane) once for each index in [0, count), on all threads, and returns when
  /// all have returned. lane in [0, thread_count) is the running thread's own number (for scratch).
  /// Indices are handed out in rising order. Not to be called from inside a task, nor by two
  /// threads at once.
  template <class Task>
  void run(std::int64_t count, const Task& task) {
    run_erased(
        count,
        [](const void* t, std::int64_t index, int lane) {
          (*static_cast<const Task*>(t))(index, lane);
        },
        &task);
  }

 private:
  using erased_task = void (*)(const void* task, std::int64_t index, int lane);
  void run_erased(std::int64_t count, erased_task call, const void* task);
  void take_tasks(int lane);
  void thread_main(int lane);

  // The job in progress. Written by the caller under mutex_ while no thread is inside.
  erased_task call_ = nullptr;
  const void* task_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_{0};

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::atomic<std::uint64_t> job_number_{0};  // grows with each job; changes under mutex_
  std::atomic<int> inside_{0};                // threads in the current job; changes under mutex_
  bool is_open_ = false;                      // a thread that comes late to a closed job stays out
  bool is_stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace stagecoach
