#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "worker/link.hpp"
#include "worker/pulse_counter.hpp"

using namespace stagecoach;
using namespace std::chrono_literals;

namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}
std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

TEST_CASE("memory links: frames of one key arrive in order, other keys in any order") {
  auto links = make_memory_links(2);
  const link_key first{link_tag::probe, 1, 0}, second{link_tag::probe, 2, 0};
  REQUIRE(links[0]->send(1, first, bytes_of("a")));
  REQUIRE(links[0]->send(1, first, bytes_of("b")));
  REQUIRE(links[0]->send(1, second, bytes_of("")));
  CHECK(text_of(*links[1]->receive_any(0, second, 10)) == "");
  CHECK(text_of(*links[1]->receive_any(0, first, 10)) == "a");
  CHECK(text_of(*links[1]->receive_any(0, first, 10)) == "b");
  CHECK(links[0]->bytes_sent() == 2);
  CHECK(links[1]->bytes_received() == 2);
}

TEST_CASE("memory links: a frame of another size is bad input") {
  auto links = make_memory_links(2);
  const link_key key{link_tag::probe};
  REQUIRE(links[0]->send(1, key, bytes_of("abc")));
  REQUIRE(links[0]->send(1, key, bytes_of("abc")));
  std::vector<std::byte> four(4);
  CHECK(links[1]->receive(0, key, four).err().code == errc::bad_input);
  CHECK(links[1]->receive_any(0, key, 2).err().code == errc::bad_input);
}

TEST_CASE(
    "memory links: cancel frees a waiting receive, and makes a peer unreachable after its frames") {
  auto links = make_memory_links(2);
  const link_key key{link_tag::probe};
  REQUIRE(links[0]->send(1, key, bytes_of("last words")));
  std::thread canceller([&] {
    std::this_thread::sleep_for(20ms);
    links[0]->cancel();
  });
  CHECK(links[0]->receive_any(1, key, 10).err().code == errc::cancelled);
  canceller.join();
  CHECK(links[0]->send(1, key, bytes_of("x")).err().code == errc::cancelled);
  CHECK(text_of(*links[1]->receive_any(0, key, 10)) == "last words");
  CHECK(links[1]->receive_any(0, key, 10).err().code == errc::unreachable);
  CHECK(links[1]->send(0, key, bytes_of("x")).err().code == errc::unreachable);
}

TEST_CASE("memory links: four ranks exchange all to all") {
  auto links = make_memory_links(4);
  std::vector<std::thread> ranks;
  std::atomic<int> wrong{0};
  for (int rank = 0; rank < 4; ++rank)
    ranks.emplace_back([&, rank] {
      for (std::uint64_t step = 0; step < 50; ++step) {
        for (int to = 0; to < 4; ++to)
          if (to != rank &&
              !links[rank]->send(to, {link_tag::probe, step}, bytes_of(std::to_string(rank))))
            ++wrong;
        for (int from = 0; from < 4; ++from) {
          if (from == rank) continue;
          auto got = links[rank]->receive_any(from, {link_tag::probe, step}, 10);
          if (!got || text_of(*got) != std::to_string(from)) ++wrong;
        }
      }
    });
  for (auto& t : ranks) t.join();
  CHECK(wrong == 0);
}

TEST_CASE("watched links say for whom their thread waits, and count") {
  auto sets = make_memory_links(2);
  pulse_counter pulse;
  watched_links watched(std::move(sets[0]), {41, 42}, pulse);
  const auto before = pulse.now();
  CHECK(before.activity == trainer_activity::idle);
  const std::vector<std::byte> bytes(8);
  std::thread peer([&] {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (pulse.now().waits_for != 42 && std::chrono::steady_clock::now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(pulse.now().activity == trainer_activity::wait);
    CHECK(sets[1]->send(0, {link_tag::probe, 1}, bytes));
  });
  {
    const pulse_counter::scope computing(pulse, trainer_activity::compute);
    CHECK(watched.receive_any(1, {link_tag::probe, 1}, 8));
    CHECK(pulse.now().activity == trainer_activity::compute);
    CHECK(pulse.now().waits_for == 0);
  }
  peer.join();
  CHECK(pulse.now().activity == trainer_activity::idle);
  CHECK(pulse.now().op > before.op);
}
