#include "kernels/cpu/thread_pool.hpp"

#include <immintrin.h>
#include <omp.h>

#include "config/result.hpp"

namespace stagecoach {
namespace {

// About 20 us: longer than the gap between two operations of a step, shorter than anyone else would
// notice.
constexpr int spin_count = 600;

}  // namespace

thread_pool::thread_pool(int thread_count) {
  invariant(thread_count >= 1, "the pool counts its caller");
  for (int lane = 1; lane < thread_count; ++lane)
    threads_.emplace_back([this, lane] { thread_main(lane); });
}

thread_pool::~thread_pool() {
  {
    std::lock_guard lock(mutex_);
    is_stopping_ = true;
    job_number_.fetch_add(1);
  }
  start_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void thread_pool::take_tasks(int lane) {
  for (std::int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1))
    call_(task_, i, lane);
}

void thread_pool::run_erased(std::int64_t count, erased_task call, const void* task) {
  // oneDNN would start an OpenMP team of its own under us; its setting is per calling thread.
  omp_set_num_threads(1);
  if (threads_.empty() || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) call(task, i, 0);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    call_ = call;
    task_ = task;
    count_ = count;
    next_.store(0);
    is_open_ = true;
    job_number_.fetch_add(1);
  }
  start_.notify_all();
  take_tasks(0);
  std::unique_lock lock(mutex_);
  is_open_ = false;
  if (inside_.load() == 0) return;
  lock.unlock();
  for (int i = 0; i < spin_count && inside_.load() != 0; ++i) _mm_pause();
  lock.lock();
  done_.wait(lock, [this] { return inside_.load() == 0; });
}

void thread_pool::thread_main(int lane) {
  omp_set_num_threads(1);
  std::uint64_t seen = 0;
  while (true) {
    for (int i = 0; i < spin_count && job_number_.load() == seen; ++i) _mm_pause();
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return job_number_.load() != seen; });
      if (is_stopping_) return;
      seen = job_number_.load();
      if (!is_open_) continue;
      inside_.fetch_add(1);
    }
    take_tasks(lane);
    bool is_last;
    {
      std::lock_guard lock(mutex_);
      is_last = inside_.fetch_sub(1) == 1;
    }
    if (is_last) done_.notify_one();
  }
}

}  // namespace stagecoach
