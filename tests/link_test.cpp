// What every kind of link promises, over each of them: threads of one process, TCP, shared memory.
#include "worker/link.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "worker/link_asio.hpp"
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

/// Ranks that are linked in each way, one subcase after the other.
struct ranks {
  std::vector<std::unique_ptr<link_server>> servers;
  std::vector<std::unique_ptr<link_set>> sets;

  explicit ranks(int count) {
    SUBCASE("in one process") { sets = make_memory_links(count); }
    SUBCASE("over TCP") { connect(count, link_choice::tcp); }
    SUBCASE("in shared memory") { connect(count, link_choice::shared_memory); }
  }
  link_set* operator[](int rank) { return sets[static_cast<std::size_t>(rank)].get(); }

 private:
  void connect(int count, link_choice links) {
    std::vector<link_peer> peers;
    for (int rank = 0; rank < count; ++rank) {
      link_server::options o;
      o.links = links;
      servers.push_back(*link_server::start(o));
      peers.push_back({"w" + std::to_string(rank), "127.0.0.1", servers.back()->port()});
    }
    std::vector<std::future<result<std::unique_ptr<link_set>>>> pending;
    for (int rank = 0; rank < count; ++rank)
      pending.push_back(std::async(std::launch::async, [&, rank] {
        return servers[static_cast<std::size_t>(rank)]->open(
            job_id{1}, {1, 42}, rank, peers, 1 << 20, [](int, peer_event, std::string) {});
      }));
    for (auto& p : pending) {
      auto opened = p.get();
      REQUIRE_MESSAGE(opened.has_value(), (opened ? "" : opened.err().message));
      sets.push_back(*std::move(opened));
    }
  }
};

}  // namespace

TEST_CASE("links: frames of one key arrive in order, other keys in any order") {
  ranks links(2);
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

TEST_CASE("links: a frame of another size is bad input") {
  ranks links(2);
  const link_key key{link_tag::probe};
  REQUIRE(links[0]->send(1, key, bytes_of("abc")));
  REQUIRE(links[0]->send(1, key, bytes_of("abc")));
  std::vector<std::byte> four(4);
  CHECK(links[1]->receive(0, key, four).err().code == errc::bad_input);
  CHECK(links[1]->receive_any(0, key, 2).err().code == errc::bad_input);
}

TEST_CASE("links: cancel frees a waiting receive, and makes a peer unreachable after its frames") {
  ranks links(2);
  const link_key key{link_tag::probe};
  REQUIRE(links[0]->send(1, key, bytes_of("last words")));
  REQUIRE(links[0]->send(1, {link_tag::probe, 9}, bytes_of("")));
  REQUIRE(links[1]->receive_any(0, {link_tag::probe, 9}, 0));  // so the words before are there
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

TEST_CASE("links: a held frame keeps its bytes, whatever comes after it") {
  ranks links(2);
  const link_key key{link_tag::probe};
  REQUIRE(links[0]->send(1, key, bytes_of("first")));
  auto first = links[1]->receive_held(0, key, 5);
  REQUIRE(first);
  for (int i = 0; i < 100; ++i) {
    REQUIRE(links[0]->send(1, key, bytes_of("other")));
    auto other = links[1]->receive_held(0, key, 5);
    REQUIRE(other);
    CHECK(text_of({other->bytes.begin(), other->bytes.end()}) == "other");
  }
  REQUIRE(links[0]->send(1, key, bytes_of("longer")));
  CHECK(links[1]->receive_held(0, key, 5).err().code == errc::bad_input);
  links.sets.clear();
  CHECK(text_of({first->bytes.begin(), first->bytes.end()}) == "first");
}

TEST_CASE("links: four ranks exchange all to all") {
  ranks links(4);
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
