#include "kernels/cpu/thread_pool.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

using namespace stagecoach;

TEST_CASE("each index runs once, whatever the number of threads and tasks") {
  for (int threads : {1, 2, 3, 8}) {
    thread_pool pool(threads);
    CHECK(pool.thread_count() == threads);
    for (std::int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(count);
      pool.run(count, [&](std::int64_t i, int lane) {
        REQUIRE(lane >= 0);
        REQUIRE(lane < threads);
        runs[i].fetch_add(1);
      });
      for (const auto& r : runs) CHECK(r.load() == 1);
    }
  }
}

TEST_CASE("what a task wrote is seen after run, over many short jobs") {
  thread_pool pool(3);
  std::vector<std::int64_t> values(16);
  for (int round = 0; round < 5000; ++round)
    pool.run(16, [&](std::int64_t i, int) { values[i] += i; });
  for (std::int64_t i = 0; i < 16; ++i) CHECK(values[i] == 5000 * i);
}

TEST_CASE("a lane is never used by two threads at once") {
  thread_pool pool(4);
  std::vector<std::atomic<int>> users(4);
  std::atomic<bool> is_shared{false};
  pool.run(2000, [&](std::int64_t, int lane) {
    if (users[lane].fetch_add(1) != 0) is_shared = true;
    users[lane].fetch_sub(1);
  });
  CHECK_FALSE(is_shared.load());
}

TEST_CASE("threads that fell asleep wake for the next job, and the pool ends while they sleep") {
  thread_pool pool(2);
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int> inside{0};
    // Both tasks wait for each other, so this returns only if the second thread came.
    pool.run(2, [&](std::int64_t, int) {
      inside.fetch_add(1);
      while (inside.load() < 2) std::this_thread::yield();
    });
    CHECK(inside.load() == 2);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}
