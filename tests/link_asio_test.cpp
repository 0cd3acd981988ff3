#include "worker/link_asio.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <optional>
#include <random>
#include <thread>

#include "config/log.hpp"
#include "tests/link_test_support.hpp"
#include "worker/link_frame.hpp"
#include "worker/link_shm.hpp"

using namespace stagecoach;
using namespace std::chrono_literals;
using steady = std::chrono::steady_clock;

namespace {

// Bounds are generous: the box may be busy with other builds. What must be quick is measured and
// compared to these, not to the goal itself.
constexpr auto soon = 3s;

const bool quiet = [] {
  configure_log(level::error);  // refusals are expected here; their lines would drown doctest's
  return true;
}();

/// Collects events of one set, to wait for.
class event_list {
 public:
  auto sink() {
    return [this](int peer, peer_event what, std::string why) {
      const std::lock_guard lock(mutex_);
      seen_.push_back({peer, what, std::move(why), steady::now()});
      changed_.notify_all();
    };
  }
  struct entry {
    int peer;
    peer_event what;
    std::string why;
    steady::time_point at;
  };
  std::optional<entry> wait_for(int peer, peer_event what,
                                std::chrono::milliseconds within = 5000ms) {
    std::unique_lock lock(mutex_);
    std::optional<entry> found;
    changed_.wait_for(lock, within, [&] {
      for (const entry& e : seen_)
        if (e.peer == peer && e.what == what) found = e;
      return found.has_value();
    });
    return found;
  }
  std::size_t count(peer_event what) {
    const std::lock_guard lock(mutex_);
    return static_cast<std::size_t>(
        std::count_if(seen_.begin(), seen_.end(), [&](const entry& e) { return e.what == what; }));
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<entry> seen_;
};

constexpr std::size_t frame_max = std::size_t{64} << 20;

/// A test that asks for these runs over TCP, and once more in shared memory.
link_server::options each_link() {
  link_server::options o;
  SUBCASE("over TCP") { o.links = link_choice::tcp; }
  SUBCASE("in shared memory") { o.links = link_choice::shared_memory; }
  return o;
}

/// N servers of one process, as N workers.
struct workers {
  std::vector<std::unique_ptr<link_server>> servers;
  std::vector<link_peer> peers;
  std::vector<std::unique_ptr<event_list>> events;

  explicit workers(int count, link_server::options o = {}, const std::vector<tls_files>& tls = {}) {
    for (int i = 0; i < count; ++i) {
      if (!tls.empty()) o.tls = tls[static_cast<std::size_t>(i)];
      auto server = link_server::start(o);
      REQUIRE_MESSAGE(server.has_value(), (server ? "" : server.err().message));
      peers.push_back({"w" + std::to_string(i), "127.0.0.1", (*server)->port()});
      servers.push_back(*std::move(server));
      events.push_back(std::make_unique<event_list>());
    }
  }

  using opened = std::vector<result<std::unique_ptr<link_set>>>;
  opened try_open(job_id job, generation_id generation, std::size_t bytes_max = frame_max) {
    std::vector<std::future<result<std::unique_ptr<link_set>>>> pending;
    for (std::size_t i = 0; i < servers.size(); ++i)
      pending.push_back(std::async(std::launch::async, [=, this] {
        return servers[i]->open(job, generation, static_cast<int>(i), peers, bytes_max,
                                events[i]->sink());
      }));
    opened sets;
    for (auto& p : pending) sets.push_back(p.get());
    return sets;
  }
  std::vector<std::unique_ptr<link_set>> open(job_id job, generation_id generation,
                                              std::size_t bytes_max = frame_max) {
    std::vector<std::unique_ptr<link_set>> sets;
    for (auto& r : try_open(job, generation, bytes_max)) {
      REQUIRE_MESSAGE(r.has_value(), (r ? "" : r.err().message));
      sets.push_back(*std::move(r));
    }
    return sets;
  }
};

std::array<std::byte, frame_header_bytes> data_header(link_identity identity, link_key key,
                                                      std::span<const std::byte> payload) {
  return encode(
      frame_header{frame_kind::data, identity, key, payload.size(), payload_checksum(payload)});
}

/// Rank 1 of 2 is a real worker; rank 0 is a raw socket that has greeted.
struct half_raw {
  workers one;
  link_identity identity{job_id{5}, {1, 77}};
  std::unique_ptr<link_set> set;
  std::unique_ptr<raw_socket> raw;

  explicit half_raw(link_server::options o = {}, std::size_t bytes_max = 1 << 20) : one(1, o) {
    auto pending = std::async(std::launch::async, [&] {
      return one.servers[0]->open(identity.job, identity.generation, 1,
                                  {{"raw", "127.0.0.1", 1}, one.peers[0]}, bytes_max,
                                  one.events[0]->sink());
    });
    raw = std::make_unique<raw_socket>(one.peers[0].port);
    CHECK(raw->send(encode(link_greeting{identity, 0, 1, 2})));
    auto answer = raw->reply();
    REQUIRE(answer);
    REQUIRE(answer->verdict == link_verdict::welcome);
    auto opened = pending.get();
    REQUIRE(opened);
    set = *std::move(opened);
  }
};

bool still_works(workers& w, std::vector<std::unique_ptr<link_set>>& sets, std::uint64_t step) {
  (void)w;
  const auto bytes = pattern(1000, step);
  if (!sets[0]->send(1, {link_tag::probe, step}, bytes)) return false;
  auto got = sets[1]->receive_any(0, {link_tag::probe, step}, 1000);
  return got && *got == bytes;
}

}  // namespace

TEST_CASE("asio links: frames from 0 bytes to 64 MiB arrive whole, in order, both ways at once") {
  workers w(2, each_link());
  auto sets = w.open(job_id{1}, {1, 42});
  const std::size_t sizes[] = {1,     0,     2,     79,      80,        81,       4096,
                               65535, 65536, 65537, 1 << 20, 5'000'001, frame_max};
  std::thread other([&] {
    for (std::size_t i = 0; i < std::size(sizes); ++i)
      if (!sets[1]->send(0, {link_tag::gradient, i}, pattern(sizes[i], i + 100))) return;
  });
  for (std::size_t i = 0; i < std::size(sizes); ++i)
    REQUIRE(sets[0]->send(1, {link_tag::probe, 1, 0}, pattern(sizes[i], i)));
  for (std::size_t i = 0; i < std::size(sizes); ++i) {
    std::vector<std::byte> into(sizes[i]);
    REQUIRE(sets[1]->receive(0, {link_tag::probe, 1, 0}, into));
    CHECK(into == pattern(sizes[i], i));
  }
  for (std::size_t i = std::size(sizes); i-- > 0;) {  // other keys may be taken in any order
    auto got = sets[0]->receive_any(1, {link_tag::gradient, i}, frame_max);
    REQUIRE(got);
    CHECK(*got == pattern(sizes[i], i + 100));
  }
  other.join();
  CHECK(sets[0]->send(1, {link_tag::probe}, std::vector<std::byte>(frame_max + 1)).err().code ==
        errc::too_large);
  REQUIRE(sets[0]->send(1, {link_tag::probe, 9}, pattern(3, 1)));
  std::vector<std::byte> four(4);
  CHECK(sets[1]->receive(0, {link_tag::probe, 9}, four).err().code == errc::bad_input);
  CHECK(w.events[0]->count(peer_event::lost) == 0);
}

TEST_CASE("asio links: four ranks exchange all to all") {
  workers w(4, each_link());
  auto sets = w.open(job_id{1}, {1, 42});
  std::atomic<int> wrong{0};
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 4; ++rank)
    ranks.emplace_back([&, rank] {
      for (std::uint64_t step = 0; step < 50; ++step) {
        for (int to = 0; to < 4; ++to)
          if (to != rank &&
              !sets[static_cast<std::size_t>(rank)]->send(
                  to, {link_tag::leaf_block, step},
                  pattern(3000 + step, step * 16 + static_cast<std::uint64_t>(rank * 4 + to))))
            ++wrong;
        for (int from = 0; from < 4; ++from) {
          if (from == rank) continue;
          std::vector<std::byte> into(3000 + step);
          if (!sets[static_cast<std::size_t>(rank)]->receive(from, {link_tag::leaf_block, step},
                                                             into) ||
              into != pattern(into.size(), step * 16 + static_cast<std::uint64_t>(from * 4 + rank)))
            ++wrong;
        }
      }
    });
  for (auto& t : ranks) t.join();
  CHECK(wrong == 0);
}

TEST_CASE("asio links: two jobs share one server and do not mix") {
  workers w(2, each_link());
  auto first = w.open(job_id{1}, {1, 42});
  auto second = w.open(job_id{2}, {9, 43});
  const link_key key{link_tag::vote, 1};
  REQUIRE(first[0]->send(1, key, pattern(10, 1)));
  REQUIRE(second[0]->send(1, key, pattern(20, 2)));
  CHECK(*second[1]->receive_any(0, key, 100) == pattern(20, 2));
  CHECK(*first[1]->receive_any(0, key, 100) == pattern(10, 1));
  first[0]->cancel();
  CHECK(w.events[1]->wait_for(0, peer_event::lost));
  REQUIRE(second[1]->send(0, key, pattern(30, 3)));
  CHECK(*second[0]->receive_any(1, key, 100) == pattern(30, 3));
}

TEST_CASE("asio links: cancel from another thread frees a blocked receive at once") {
  workers w(2, each_link());
  auto sets = w.open(job_id{1}, {1, 42});
  std::atomic<steady::rep> called{0};
  std::thread canceller([&] {
    std::this_thread::sleep_for(50ms);
    called = steady::now().time_since_epoch().count();
    sets[0]->cancel();
    sets[0]->cancel();
  });
  auto got = sets[0]->receive_any(1, {link_tag::probe}, 10);
  const auto took = steady::now() - steady::time_point(steady::duration(called.load()));
  canceller.join();
  CHECK(got.err().code == errc::cancelled);
  MESSAGE("freed after us: ", std::chrono::duration_cast<std::chrono::microseconds>(took).count());
  CHECK(took < 1s);
  CHECK(sets[0]->send(1, {link_tag::probe}, pattern(1, 1)).err().code == errc::cancelled);
  CHECK(sets[0]->receive_any(1, {link_tag::probe}, 10).err().code == errc::cancelled);
  CHECK(w.events[0]->count(peer_event::lost) == 0);  // no news of what we left ourselves
}

TEST_CASE(
    "asio links: a worker that dies is lost to the others in milliseconds, after its frames") {
  workers w(3, each_link());
  auto sets = w.open(job_id{1}, {1, 42});
  REQUIRE(sets[2]->send(0, {link_tag::probe, 1}, pattern(100, 1)));
  CHECK(sets[0]->receive_any(2, {link_tag::probe, 1}, 100).has_value());
  auto waiting = std::async(std::launch::async, [&] {
    return sets[0]->receive_any(2, {link_tag::probe, 2}, 100);
  });
  std::this_thread::sleep_for(20ms);
  const auto died = steady::now();
  w.servers[2].reset();
  for (int rank : {0, 1}) {
    auto lost = w.events[static_cast<std::size_t>(rank)]->wait_for(2, peer_event::lost);
    REQUIRE(lost);
    MESSAGE("lost after us: ",
            std::chrono::duration_cast<std::chrono::microseconds>(lost->at - died).count(), " ",
            lost->why);
    CHECK(lost->at - died < 1s);
  }
  auto got = waiting.get();
  CHECK(got.err().code == errc::unreachable);
  CHECK(got.err().message.find("rank 2 (w2 at 127.0.0.1") != std::string::npos);
  CHECK(sets[1]->send(2, {link_tag::probe, 1}, pattern(1, 1)).err().code == errc::unreachable);
  CHECK(sets[2]->receive_any(0, {link_tag::probe}, 1).err().code == errc::cancelled);
  REQUIRE(sets[0]->send(1, {link_tag::probe, 3}, pattern(5, 5)));  // the others' link stands
  CHECK(sets[1]->receive_any(0, {link_tag::probe, 3}, 5).has_value());
}

TEST_CASE(
    "asio links: a peer that falls silent is suspected after 1 s, and recovers with its next "
    "byte") {
  const auto began = steady::now();
  half_raw h;
  auto suspected = h.one.events[0]->wait_for(0, peer_event::suspected);
  REQUIRE(suspected);
  CHECK(suspected->at - began >= 900ms);
  CHECK(suspected->at - began < 1s + soon);
  CHECK(h.one.events[0]->count(peer_event::lost) == 0);
  CHECK(h.raw->send(encode(frame_header{frame_kind::beat, h.identity})));
  CHECK(h.one.events[0]->wait_for(0, peer_event::recovered));
}

TEST_CASE("asio links: idle workers beat, so nobody is suspected") {
  link_server::options o = each_link();
  o.beat = 20ms;
  o.suspect_after = 1000ms;
  workers w(2, o);
  auto sets = w.open(job_id{1}, {1, 42});
  std::this_thread::sleep_for(1500ms);
  CHECK(w.events[0]->count(peer_event::suspected) == 0);
  CHECK(w.events[1]->count(peer_event::suspected) == 0);
}

TEST_CASE("asio links: a payload that differs from its checksum fails the link as corrupt") {
  half_raw h;
  auto bytes = pattern(100, 1);
  CHECK(h.raw->send(data_header(h.identity, {link_tag::probe, 1}, bytes)));
  CHECK(h.raw->send(bytes));
  CHECK(h.raw->send(data_header(h.identity, {link_tag::probe, 2}, bytes)));
  bytes[50] ^= std::byte{1};
  CHECK(h.raw->send(bytes));
  CHECK(h.set->receive_any(0, {link_tag::probe, 2}, 100).err().code == errc::corrupt);
  CHECK(h.set->receive_any(0, {link_tag::probe, 1}, 100).has_value());
  auto lost = h.one.events[0]->wait_for(0, peer_event::lost);
  REQUIRE(lost);
  CHECK(lost->why.find("checksum") != std::string::npos);
  CHECK(h.raw->closes());
}

TEST_CASE(
    "asio links: a header that announces more than the plan's largest frame fails the link, "
    "without memory") {
  half_raw h;
  rusage before{};
  ::getrusage(RUSAGE_SELF, &before);
  frame_header huge{frame_kind::data, h.identity, {link_tag::probe, 1}, std::uint64_t{1} << 40, 0};
  CHECK(h.raw->send(encode(huge)));
  CHECK(h.set->receive_any(0, {link_tag::probe, 1}, 100).err().code == errc::too_large);
  CHECK(h.raw->closes());
  rusage after{};
  ::getrusage(RUSAGE_SELF, &after);
  CHECK(after.ru_maxrss - before.ru_maxrss < 64 * 1024);  // KiB
}

TEST_CASE("asio links: garbage where a frame should begin fails the link") {
  half_raw h;
  CHECK(h.raw->send(std::string(200, 'x')));
  CHECK(h.set->receive_any(0, {link_tag::probe, 1}, 100).err().code == errc::bad_input);
}

TEST_CASE("asio links: frames of another identity are dropped and counted, the link lives on") {
  half_raw h;
  auto bytes = pattern(100'000, 1);
  for (const generation_id wrong :
       {generation_id{2, 77}, generation_id{0, 77}, generation_id{1, 78}}) {
    CHECK(h.raw->send(data_header({h.identity.job, wrong}, {link_tag::probe, 1}, bytes)));
    CHECK(h.raw->send(bytes));
  }
  CHECK(h.raw->send(data_header({job_id{6}, h.identity.generation}, {link_tag::probe, 1}, bytes)));
  CHECK(h.raw->send(bytes));
  const auto right = pattern(100, 2);
  CHECK(h.raw->send(data_header(h.identity, {link_tag::probe, 1}, right)));
  CHECK(h.raw->send(right));
  auto got = h.set->receive_any(0, {link_tag::probe, 1}, 1000);
  REQUIRE(got);
  CHECK(*got == right);
  CHECK(h.one.servers[0]->stale_frames() == 4);
  CHECK(h.one.events[0]->count(peer_event::lost) == 0);
}

TEST_CASE("asio links: two that may choose take shared memory; one that wants TCP gets it") {
  link_server::options o;
  link_server::options tcp;
  tcp.links = link_choice::tcp;
  for (const bool first_is_tcp : {false, true})
    for (const bool second_is_tcp : {false, true}) {
      workers w(1, first_is_tcp ? tcp : o);
      workers second(1, second_is_tcp ? tcp : o);
      w.servers.push_back(std::move(second.servers[0]));
      w.peers.push_back(second.peers[0]);
      w.events.push_back(std::move(second.events[0]));
      auto sets = w.open(job_id{1}, {1, 42});
      const auto kind = first_is_tcp || second_is_tcp ? link_kind::tcp : link_kind::shared_memory;
      CHECK(sets[0]->kind(1) == kind);
      CHECK(sets[1]->kind(0) == kind);
      CHECK(still_works(w, sets, 1));
    }
}

TEST_CASE(
    "asio links: where one end wants nothing but shared memory and the other TCP, none opens") {
  link_server::options memory, tcp;
  memory.links = link_choice::shared_memory;
  memory.connect_within = tcp.connect_within = 400ms;
  tcp.links = link_choice::tcp;
  for (const bool first_is_tcp : {false, true}) {
    workers w(1, first_is_tcp ? tcp : memory);
    workers second(1, first_is_tcp ? memory : tcp);
    w.servers.push_back(std::move(second.servers[0]));
    w.peers.push_back(second.peers[0]);
    w.events.push_back(std::move(second.events[0]));
    auto opened = w.try_open(job_id{1}, {1, 42});
    CHECK(opened[first_is_tcp ? 1 : 0].err().code == errc::unreachable);
  }
}

TEST_CASE("asio links: an offer of shared memory goes to who shows its nonce, once") {
  link_server::options o;
  workers w(1, o);
  const link_identity identity{job_id{5}, {1, 77}};
  auto pending = std::async(std::launch::async, [&] {
    return w.servers[0]->open(identity.job, identity.generation, 1,
                              {{"raw", "127.0.0.1", 1}, w.peers[0]}, 1 << 20, w.events[0]->sink());
  });
  raw_socket raw(w.peers[0].port);
  CHECK(raw.send(encode(link_greeting{identity, 0, 1, 2, true})));
  auto welcome = raw.reply();
  REQUIRE(welcome);
  CHECK(welcome->verdict == link_verdict::welcome);
  REQUIRE(welcome->is_memory);
  const auto offer = raw.offer();
  REQUIRE(offer);
  auto own = shm_segment::create(1 << 20);
  REQUIRE(own);

  SUBCASE("the dialler can't reach it: the link is TCP") {
    CHECK(raw.send(encode(link_reply{})));
    auto opened = pending.get();
    REQUIRE(opened);
    CHECK((*opened)->kind(0) == link_kind::tcp);
    const auto bytes = pattern(100, 1);
    CHECK(raw.send(data_header(identity, {link_tag::probe, 1}, bytes)));
    CHECK(raw.send(bytes));
    CHECK((*opened)->receive_any(0, {link_tag::probe, 1}, 100).has_value());
  }
  SUBCASE("the dialler says that it has it, and never came: refused") {
    CHECK(raw.send(encode(link_reply{link_protocol_version, link_verdict::welcome, true})));
    CHECK(raw.closes());
    w.servers[0]->abandon(identity.job);
    CHECK_FALSE(pending.get());
  }
  SUBCASE("others come first, with a wrong nonce, without a descriptor, with an unsealed one") {
    auto wrong = offer->nonce;
    wrong[0] ^= std::byte{1};
    CHECK_FALSE(unix_visit(offer->socket, wrong, own->to_pass.fd()));
    CHECK_FALSE(unix_visit(offer->socket, offer->nonce, -1));
    const descriptor unsealed(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    CHECK_FALSE(unix_visit(offer->socket, offer->nonce, unsealed.fd()));
    CHECK(unix_visit(offer->socket, offer->nonce, own->to_pass.fd()));
    CHECK_FALSE(unix_visit(offer->socket, offer->nonce, own->to_pass.fd()));  // it is given
    CHECK(raw.send(encode(link_reply{link_protocol_version, link_verdict::welcome, true})));
    auto opened = pending.get();
    REQUIRE(opened);
    CHECK((*opened)->kind(0) == link_kind::shared_memory);
    // What its end never wrote by the rules is a broken link.
    std::atomic_ref(*reinterpret_cast<std::uint32_t*>(own->segment.at(shm_layout::published)))
        .store(1);
    CHECK((*opened)->receive_any(0, {link_tag::probe, 1}, 100).err().code == errc::bad_input);
    CHECK(w.events[0]->wait_for(0, peer_event::lost));
    CHECK(raw.closes());
    (*opened)->cancel();
    CHECK((*opened)->receive_any(0, {link_tag::probe, 1}, 100).err().code == errc::cancelled);
  }
}

TEST_CASE("asio links: what is no worker's greeting is refused and disturbs nobody") {
  link_server::options o;
  o.connect_within = 1500ms;
  workers w(2, o);
  auto sets = w.open(job_id{1}, {5, 42});
  const auto port = w.peers[1].port;
  std::uint64_t refused = 0;
  std::vector<std::unique_ptr<link_set>> more;  // outlives the count of lost peers below
  SUBCASE("HTTP") {
    raw_socket s(port);
    CHECK(s.send(std::string("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")));
    CHECK(s.closes());
    refused = 1;
  }
  SUBCASE("random bytes") {
    for (std::uint64_t seed = 0; seed < 50; ++seed) {
      raw_socket s(port);
      s.send(pattern(16 + seed * 40, seed));
      CHECK(s.closes());
    }
    refused = 50;
  }
  SUBCASE("a greeting that announces 1 GiB") {
    auto g = encode(link_greeting{{job_id{1}, {5, 42}}, 0, 1, 2});
    const std::uint32_t huge = 1 << 30;
    std::memcpy(g.data() + 8, &huge, 4);
    raw_socket s(port);
    s.send(g);
    CHECK(s.closes());
    refused = 1;
  }
  SUBCASE("another protocol version, with a word why") {
    auto g = encode(link_greeting{{job_id{1}, {5, 42}}, 0, 1, 2});
    g[4] = std::byte{9};
    raw_socket s(port);
    s.send(g);
    auto r = s.reply();
    REQUIRE(r);
    CHECK(r->verdict == link_verdict::wrong_version);
    CHECK(r->version == link_protocol_version);
    refused = 1;
  }
  SUBCASE("older generation, other plan, other rank, other size, linked already") {
    const struct {
      link_greeting greeting;
      link_verdict verdict;
    } cases[] = {
        {{{job_id{1}, {4, 42}}, 0, 1, 2}, link_verdict::wrong_identity},
        {{{job_id{1}, {5, 41}}, 0, 1, 2}, link_verdict::wrong_identity},
        {{{job_id{1}, {5, 42}}, 0, 2, 3}, link_verdict::wrong_rank},
        {{{job_id{1}, {5, 42}}, 0, 1, 3}, link_verdict::wrong_rank},
        {{{job_id{1}, {5, 42}}, 0, 1, 2}, link_verdict::duplicate},
    };
    for (const auto& c : cases) {
      raw_socket s(port);
      CHECK(s.send(encode(c.greeting)));
      auto r = s.reply();
      REQUIRE(r);
      CHECK(r->verdict == c.verdict);
      CHECK(s.closes());
    }
    refused = 5;
  }
  SUBCASE("silence, until its time is up") {
    raw_socket s(port);
    CHECK(s.closes());
    refused = 1;
  }
  SUBCASE("a flood of silent connections, among which an honest pair opens") {
    std::vector<std::unique_ptr<raw_socket>> idle;
    for (int i = 0; i < 200; ++i) idle.push_back(std::make_unique<raw_socket>(port));
    more = w.open(job_id{2}, {1, 1});
    CHECK(still_works(w, more, 1));
    refused = 200 - 64;
  }
  SUBCASE("a generation that is never opened") {
    raw_socket s(port);
    CHECK(s.send(encode(link_greeting{{job_id{8}, {1, 1}}, 0, 1, 2})));
    auto r = s.reply();
    REQUIRE(r);
    CHECK(r->verdict == link_verdict::not_opened);
    refused = 1;
  }
  CHECK(w.servers[1]->refused_connections() >= refused);
  CHECK(still_works(w, sets, 2));
  CHECK(w.events[0]->count(peer_event::lost) + w.events[1]->count(peer_event::lost) == 0);
}

TEST_CASE("asio links: a greeting waits until its generation is opened") {
  workers w(2, each_link());
  auto early = std::async(std::launch::async, [&] {
    return w.servers[0]->open(job_id{1}, {1, 42}, 0, w.peers, 1000, w.events[0]->sink());
  });
  std::this_thread::sleep_for(300ms);
  auto late = w.servers[1]->open(job_id{1}, {1, 42}, 1, w.peers, 1000, w.events[1]->sink());
  REQUIRE(late);
  auto first = early.get();
  REQUIRE(first);
  std::vector<std::unique_ptr<link_set>> sets;
  sets.push_back(*std::move(first));
  sets.push_back(*std::move(late));
  CHECK(still_works(w, sets, 1));
}

TEST_CASE("asio links: dialling goes on until a later worker listens") {
  std::uint16_t port = 0;
  { port = workers(1).peers[0].port; }  // free again
  workers w(1);
  const std::vector<link_peer> peers{w.peers[0], {"late", "127.0.0.1", port}};
  auto early = std::async(std::launch::async, [&] {
    return w.servers[0]->open(job_id{1}, {1, 42}, 0, peers, 1000, w.events[0]->sink());
  });
  std::this_thread::sleep_for(200ms);
  link_server::options o;
  o.port = port;
  auto late = link_server::start(o);
  REQUIRE(late);
  auto second =
      (*late)->open(job_id{1}, {1, 42}, 1, peers, 1000, [](int, peer_event, std::string) {});
  CHECK(second.has_value());
  CHECK(early.get().has_value());
}

TEST_CASE("asio links: a peer that never comes is named, with the cause") {
  link_server::options o;
  o.connect_within = 300ms;
  workers w(1, o);
  std::uint16_t port = 0;
  { port = workers(1).peers[0].port; }
  auto r = w.servers[0]->open(job_id{1}, {1, 42}, 0, {w.peers[0], {"ghost", "127.0.0.1", port}},
                              1000, w.events[0]->sink());
  REQUIRE_FALSE(r);
  CHECK(r.err().code == errc::unreachable);
  CHECK(r.err().message.find("rank 1 (ghost at 127.0.0.1") != std::string::npos);
  CHECK(r.err().message.find("refused") != std::string::npos);
}

TEST_CASE("asio links: abandon ends an open in progress, of that job only") {
  workers w(2, each_link());
  auto waiting = std::async(std::launch::async, [&] {
    return w.servers[0]->open(job_id{1}, {1, 42}, 0, w.peers, 1000, w.events[0]->sink());
  });
  auto other = std::async(std::launch::async, [&] {
    return w.servers[0]->open(job_id{2}, {1, 42}, 0, w.peers, 1000, w.events[0]->sink());
  });
  std::this_thread::sleep_for(100ms);
  const auto called = steady::now();
  w.servers[0]->abandon(job_id{1});
  CHECK(waiting.get().err().code == errc::cancelled);
  CHECK(steady::now() - called < 1s);
  CHECK(w.servers[1]->open(job_id{2}, {1, 42}, 1, w.peers, 1000, w.events[1]->sink()).has_value());
  CHECK(other.get().has_value());
}

TEST_CASE("asio links: generation n+1 opens right after the cancel of n, many times") {
  workers w(3, each_link());
  for (std::uint64_t g = 1; g <= 20; ++g) {
    auto sets = w.open(job_id{1}, {g, 42 + g});
    REQUIRE(still_works(w, sets, g));
    for (auto& set : sets) set->cancel();
  }
}

TEST_CASE(
    "asio links: opening n+1 over a living n cancels n; an older or other plan beside it is a "
    "conflict") {
  workers w(2, each_link());
  auto old = w.open(job_id{1}, {1, 42});
  auto sets = w.open(job_id{1}, {2, 43});
  CHECK(old[0]->receive_any(1, {link_tag::probe}, 1).err().code == errc::cancelled);
  CHECK(still_works(w, sets, 1));
  for (const generation_id g : {generation_id{1, 42}, generation_id{2, 44}, generation_id{2, 43}})
    for (auto& r : w.try_open(job_id{1}, g)) CHECK(r.err().code == errc::conflict);
  CHECK(still_works(w, sets, 2));
}

TEST_CASE("asio links: a full inbox holds the sender back, and drains") {
  link_server::options o = each_link();
  o.queue_bytes_max = 1 << 20;
  workers w(2, o);
  auto sets = w.open(job_id{1}, {1, 42}, 1 << 18);
  const std::size_t count = 400, size = 1 << 18;  // 100 MiB: more than queues and sockets hold
  std::atomic<std::size_t> sent{0};
  auto sender = std::async(std::launch::async, [&] {
    for (std::size_t i = 0; i < count; ++i) {
      if (!sets[0]->send(1, {link_tag::state, 0, i}, pattern(size, i))) return;
      ++sent;
    }
  });
  std::this_thread::sleep_for(1300ms);  // over suspect_after: a paused link is not a silent one
  CHECK(sent < count);
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<std::byte> into(size);
    REQUIRE(sets[1]->receive(0, {link_tag::state, 0, i}, into));
    REQUIRE(into == pattern(size, i));
  }
  sender.get();
  CHECK(w.events[0]->count(peer_event::suspected) + w.events[1]->count(peer_event::suspected) == 0);
}

TEST_CASE(
    "asio links: a receiver that waits for a frame behind a full inbox gets it, up to a hard "
    "bound") {
  link_server::options o = each_link();
  o.queue_bytes_max = 1 << 20;
  workers w(2, o);
  auto sets = w.open(job_id{1}, {1, 42}, 1 << 18);
  const auto flood = [&](std::size_t count) {
    return std::async(std::launch::async, [&, count] {
      for (std::size_t i = 0; i < count; ++i)
        if (!sets[0]->send(1, {link_tag::state, count, i}, pattern(1 << 18, i))) return;
      (void)sets[0]->send(1, {link_tag::vote, count}, pattern(8, 8));
    });
  };
  auto some = flood(6);  // 1.5 of the bound
  CHECK(sets[1]->receive_any(0, {link_tag::vote, 6}, 8).has_value());
  some.get();
  auto many = flood(40);
  CHECK(sets[1]->receive_any(0, {link_tag::vote, 40}, 8).err().code == errc::too_large);
  CHECK(w.events[1]->wait_for(0, peer_event::lost));
  sets[0]->cancel();
  many.get();
}

TEST_CASE("asio links: cancel frees a send that waits for room") {
  link_server::options o = each_link();
  o.queue_bytes_max = 1 << 20;
  workers w(2, o);
  auto sets = w.open(job_id{1}, {1, 42}, 1 << 20);
  std::thread canceller([&] {
    std::this_thread::sleep_for(300ms);
    sets[0]->cancel();
  });
  result<void> last = ok();
  for (std::uint64_t i = 0; i < 200 && last; ++i)
    last = sets[0]->send(1, {link_tag::state, 0, i}, pattern(1 << 20, i));
  CHECK(last.err().code == errc::cancelled);
  canceller.join();
}

TEST_CASE("asio links: a generation of one rank opens at once, and sets outlive their server") {
  std::unique_ptr<link_set> set;
  {
    workers w(1);
    auto sets = w.open(job_id{1}, {1, 42});
    set = std::move(sets[0]);
    CHECK(set->size() == 1);
  }
  set->cancel();
}

// ---------------------------------------------------------------------------------------------------------
// TLS

TEST_CASE(
    "asio links over TLS: frames of all sizes arrive; plain bytes at the port disturb nobody") {
  certificate_maker maker;
  auto ca = maker.make_authority("house");
  workers w(3, each_link(),
            {maker.issue(*ca, "w0", "worker"), maker.issue(*ca, "w1", "worker"),
             maker.issue(*ca, "w2", "worker")});
  auto sets = w.open(job_id{1}, {1, 42});
  for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{16384}, std::size_t{100'001},
                           std::size_t{16} << 20}) {
    const auto bytes = pattern(size, size);
    REQUIRE(sets[0]->send(2, {link_tag::probe, size}, bytes));
    REQUIRE(sets[2]->send(0, {link_tag::probe, size}, bytes));
    std::vector<std::byte> into(size);
    REQUIRE(sets[2]->receive(0, {link_tag::probe, size}, into));
    CHECK(into == bytes);
    REQUIRE(sets[0]->receive(2, {link_tag::probe, size}, into));
    CHECK(into == bytes);
  }
  for (int i = 0; i < 10; ++i) {
    raw_socket s(w.peers[1].port);
    s.send(encode(link_greeting{{job_id{1}, {1, 42}}, 0, 1, 3}));
    CHECK(s.closes());
    CHECK(still_works(w, sets, static_cast<std::uint64_t>(i)));
  }
  CHECK(w.servers[1]->refused_connections() == 10);
  const auto died = steady::now();
  w.servers[2].reset();
  auto lost = w.events[0]->wait_for(2, peer_event::lost);
  REQUIRE(lost);
  CHECK(lost->at - died < 1s);
}

TEST_CASE(
    "asio links over TLS: a certificate that does not fit is refused by both ends, and the others "
    "go on") {
  certificate_maker maker;
  auto ca = maker.make_authority("house");
  auto stranger = maker.make_authority("stranger");
  link_server::options quick;
  quick.connect_within = 800ms;
  workers w(2, quick, {maker.issue(*ca, "w0", "worker"), maker.issue(*ca, "w1", "worker")});
  auto sets = w.open(job_id{1}, {1, 42});

  link_server::options o = quick;
  bool is_tls = true;
  SUBCASE("of another CA") {
    o.tls = maker.issue(*stranger, "w2", "worker");
    o.tls.ca = ca->file;
  }
  SUBCASE("expired") { o.tls = maker.issue(*ca, "w2", "worker", -3600); }
  SUBCASE("of another role") { o.tls = maker.issue(*ca, "w2", "operator"); }
  SUBCASE("of another name") { o.tls = maker.issue(*ca, "w7", "worker"); }
  SUBCASE("none: a worker without TLS") { is_tls = false; }
  auto bad = link_server::start(o);
  if (!bad) {
    // Own certificate judged at the start already.
    CHECK(bad.err().code != errc::unexpected);
    return;
  }
  const link_peer me{"w2", "127.0.0.1", (*bad)->port()};
  const auto silent = [](int, peer_event, std::string) {};
  {  // it dials a good one
    auto good = std::async(std::launch::async, [&] {
      return w.servers[1]->open(job_id{3}, {1, 1}, 1, {me, w.peers[1]}, 1000, silent);
    });
    auto r = (*bad)->open(job_id{3}, {1, 1}, 0, {me, w.peers[1]}, 1000, silent);
    REQUIRE_FALSE(r);
    MESSAGE(r.err().message);
    CHECK(r.err().code == (is_tls ? errc::unauthorised : errc::unreachable));
    w.servers[1]->abandon(job_id{3});
    CHECK_FALSE(good.get());
    const auto until = steady::now() + soon;  // its io thread may be behind ours
    while (w.servers[1]->refused_connections() == 0 && steady::now() < until)
      std::this_thread::sleep_for(5ms);
    CHECK(w.servers[1]->refused_connections() >= 1);
  }
  {  // a good one dials it
    auto theirs = std::async(std::launch::async, [&] {
      return (*bad)->open(job_id{4}, {1, 1}, 1, {w.peers[0], me}, 1000, silent);
    });
    auto r = w.servers[0]->open(job_id{4}, {1, 1}, 0, {w.peers[0], me}, 1000, silent);
    REQUIRE_FALSE(r);
    MESSAGE(r.err().message);
    CHECK(r.err().code == (is_tls ? errc::unauthorised : errc::unreachable));
    (*bad)->abandon(job_id{4});
    CHECK_FALSE(theirs.get());
  }
  CHECK(still_works(w, sets, 1));
  CHECK(w.events[0]->count(peer_event::lost) + w.events[1]->count(peer_event::lost) == 0);
}

TEST_CASE("asio links over TLS: missing and unfitting files are named at the start") {
  certificate_maker maker;
  auto ca = maker.make_authority("house");
  link_server::options o;
  o.tls = maker.issue(*ca, "w0", "worker");
  const auto other = maker.issue(*ca, "w1", "worker");
  o.tls.key = other.key;
  CHECK_FALSE(link_server::start(o));
  o.tls.key = "no-such-file.key";
  auto r = link_server::start(o);
  REQUIRE_FALSE(r);
  CHECK(r.err().message.find("no-such-file.key") != std::string::npos);
}
