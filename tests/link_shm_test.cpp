#include "worker/link_shm.hpp"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <future>
#include <random>
#include <thread>

#include "tests/link_test_support.hpp"

using namespace stagecoach;
using namespace std::chrono_literals;

namespace {

const link_identity identity{job_id{1}, {2, 3}};

shm_link::options options_of(std::size_t queue_bytes_max = 1 << 20) {
  return {identity, 1 << 18, queue_bytes_max, nullptr};
}

/// Both ends of a link in one process.
struct both {
  std::shared_ptr<shm_link> a, b;
  explicit both(const shm_link::options& o = options_of()) {
    auto first = shm_segment::create(shm_link::payload_bytes(o));
    auto second = shm_segment::create(shm_link::payload_bytes(o));
    REQUIRE(first);
    REQUIRE(second);
    auto seen_by_a = shm_segment::map(second->to_pass);
    auto seen_by_b = shm_segment::map(first->to_pass);
    REQUIRE(seen_by_a);
    REQUIRE(seen_by_b);
    a = std::make_shared<shm_link>(o, shm_pair{std::move(first->segment), *std::move(seen_by_a)});
    b = std::make_shared<shm_link>(o, shm_pair{std::move(second->segment), *std::move(seen_by_b)});
  }
  ~both() {
    const error gone{errc::cancelled, "the test is over"};
    a->end(gone);
    b->end(gone);
  }
};

/// One end is ours; at the other somebody writes into its segment whatever the test says.
struct half_hostile {
  std::shared_ptr<shm_link> link;
  std::unique_ptr<shm_segment> hostile;
  descriptor ours;  // as the hostile peer got it

  half_hostile() {
    const auto o = options_of();
    auto first = shm_segment::create(shm_link::payload_bytes(o));
    auto second = shm_segment::create(shm_link::payload_bytes(o));
    REQUIRE(first);
    REQUIRE(second);
    auto seen = shm_segment::map(second->to_pass);
    REQUIRE(seen);
    link = std::make_shared<shm_link>(o, shm_pair{std::move(first->segment), *std::move(seen)});
    hostile = std::make_unique<shm_segment>(std::move(second->segment));
    std::swap(ours, first->to_pass);
  }
  ~half_hostile() { link->end({errc::cancelled, "the test is over"}); }

  void put(std::size_t at, std::uint32_t value) {
    std::atomic_ref(*reinterpret_cast<std::uint32_t*>(hostile->at(at))).store(value);
  }
  /// A frame as a peer would write it, with a payload of zeros somewhere.
  void publish(std::uint32_t number, frame_header header, std::uint64_t offset) {
    const auto bytes = encode(header);
    std::byte* to = hostile->at(shm_layout::descriptors + (number - 1) % shm_layout::slot_count *
                                                              shm_layout::descriptor_bytes);
    std::memcpy(to, bytes.data(), bytes.size());
    std::memcpy(to + bytes.size(), &offset, sizeof(offset));
    put(shm_layout::published, number);
  }
  frame_header header(std::uint64_t length) {
    const std::vector<std::byte> zeros(std::min<std::uint64_t>(length, 1 << 18));
    return {frame_kind::data, identity, {link_tag::probe}, length, payload_checksum(zeros)};
  }
};

bool arrives(const both& pair, std::uint64_t step, std::size_t bytes) {
  const auto sent = pattern(bytes, step);
  if (!pair.a->send({link_tag::probe, step}, sent)) return false;
  auto got = pair.b->take({link_tag::probe, step});
  return got && std::equal(sent.begin(), sent.end(), got->bytes.begin(), got->bytes.end()) &&
         got->checksum == payload_checksum(sent);
}

}  // namespace

TEST_CASE("shared memory: slots and blocks are used again, many times over") {
  both pair;
  bool good = true;
  for (std::uint64_t i = 0; i < 3 * shm_layout::slot_count && good; ++i)
    good = arrives(pair, i, i * 7919 % 5000);
  CHECK(good);
  for (std::uint64_t i = 0; i < 100 && good; ++i) good = arrives(pair, i, 1 << 18);
  CHECK(good);
}

TEST_CASE("shared memory: frames given back in any order leave the whole memory free") {
  both pair;
  std::mt19937_64 random(7);
  for (int round = 0; round < 20; ++round) {
    std::vector<shm_link::frame> held;
    for (std::uint64_t i = 0; i < 40; ++i)
      REQUIRE(pair.a->send({link_tag::probe, i}, pattern(random() % 20'000, i)));
    for (std::uint64_t i = 0; i < 40; ++i) {
      auto got = pair.b->take({link_tag::probe, i});
      REQUIRE(got);
      held.push_back(*std::move(got));
    }
    std::shuffle(held.begin(), held.end(), random);
  }
  // As large as the queue: four frames, which would not fit between blocks that were lost.
  for (std::uint64_t i = 0; i < 4; ++i)
    REQUIRE(pair.a->send({link_tag::probe, i}, pattern(1 << 18, i)));
  for (std::uint64_t i = 0; i < 4; ++i) CHECK(pair.b->take({link_tag::probe, i}).has_value());
}

TEST_CASE("shared memory: a sender out of slots or room waits, and goes on when frames go back") {
  both pair;
  const std::size_t count = 3 * shm_layout::slot_count;
  std::atomic<std::size_t> sent{0};
  auto sender = std::async(std::launch::async, [&] {
    for (std::uint64_t i = 0; i < count; ++i) {
      if (!pair.a->send({link_tag::probe, i}, pattern(8, i))) return;
      ++sent;
    }
  });
  std::this_thread::sleep_for(100ms);
  CHECK(sent <= shm_layout::slot_count);
  bool good = true;
  for (std::uint64_t i = 0; i < count && good; ++i)
    good = pair.b->take({link_tag::probe, i}).has_value();
  CHECK(good);
  sender.get();
  CHECK(sent == count);
}

TEST_CASE("shared memory: two threads wait for two frames, and end() frees both at once") {
  both pair;
  auto first = std::async(std::launch::async, [&] { return pair.b->take({link_tag::probe, 1}); });
  auto second = std::async(std::launch::async, [&] { return pair.b->take({link_tag::probe, 2}); });
  std::this_thread::sleep_for(50ms);
  REQUIRE(pair.a->send({link_tag::probe, 2}, pattern(5, 5)));
  CHECK(second.get().has_value());
  pair.b->end({errc::unreachable, "the peer died"});
  CHECK(first.get().err().code == errc::unreachable);
}

TEST_CASE("shared memory: what arrived before the peer died can be taken, unless it is cancelled") {
  both pair;
  REQUIRE(pair.a->send({link_tag::probe, 1}, pattern(5, 5)));
  REQUIRE(pair.a->send({link_tag::probe, 2}, pattern(5, 5)));
  pair.b->end({errc::unreachable, "the peer died"});
  CHECK(pair.b->take({link_tag::probe, 1}).has_value());
  CHECK(pair.b->take({link_tag::probe, 3}).err().code == errc::unreachable);
  CHECK(pair.b->send({link_tag::probe, 1}, pattern(1, 1)).err().code == errc::unreachable);
  pair.b->end({errc::cancelled, "we leave"});
  CHECK(pair.b->take({link_tag::probe, 2}).err().code == errc::cancelled);
}

TEST_CASE("shared memory: a peer can neither write to our segment nor change its size") {
  half_hostile h;
  const std::size_t size = shm_layout::payloads + 4096;
  CHECK(::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, h.ours.fd(), 0) == MAP_FAILED);
  CHECK(::ftruncate(h.ours.fd(), 0) != 0);
  CHECK(::ftruncate(h.ours.fd(), off_t{1} << 32) != 0);
  const char byte = 1;
  CHECK(::pwrite(h.ours.fd(), &byte, 1, shm_layout::published) != 1);
  void* read_only = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, h.ours.fd(), 0);
  REQUIRE(read_only != MAP_FAILED);
  CHECK(::mprotect(read_only, size, PROT_READ | PROT_WRITE) != 0);
  ::munmap(read_only, size);
}

TEST_CASE(
    "shared memory: a descriptor of anything but sealed memory of a fitting size is refused") {
  const std::size_t size = shm_layout::payloads + (1 << 20);
  constexpr int all = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  const auto memory = [](std::size_t bytes, int seals) {
    descriptor fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    REQUIRE(::ftruncate(fd.fd(), static_cast<off_t>(bytes)) == 0);
    REQUIRE(::fcntl(fd.fd(), F_ADD_SEALS, seals) == 0);
    return fd;
  };
  SUBCASE("not sealed") { CHECK_FALSE(shm_segment::map(memory(size, 0))); }
  SUBCASE("it could shrink") { CHECK_FALSE(shm_segment::map(memory(size, F_SEAL_GROW))); }
  SUBCASE("without payloads") { CHECK_FALSE(shm_segment::map(memory(4096, all))); }
  SUBCASE("of a broken page") { CHECK_FALSE(shm_segment::map(memory(size + 1, all))); }
  SUBCASE("larger than any") { CHECK_FALSE(shm_segment::map(memory(std::size_t{1} << 42, all))); }
  SUBCASE("of zeros") { CHECK_FALSE(shm_segment::map(memory(size, all))); }
  SUBCASE("a file") {
    std::FILE* file = std::tmpfile();
    REQUIRE(file != nullptr);
    CHECK(::ftruncate(::fileno(file), static_cast<off_t>(size)) == 0);
    CHECK_FALSE(shm_segment::map(descriptor(::dup(::fileno(file)))));
    std::fclose(file);
  }
  SUBCASE("none") { CHECK_FALSE(shm_segment::map(descriptor())); }
}

TEST_CASE("shared memory: what a peer may not write breaks the link, with its code") {
  half_hostile h;
  errc expected = errc::bad_input;
  SUBCASE("more frames than there are slots") { h.put(shm_layout::published, 8193); }
  SUBCASE("a count that goes back") { h.put(shm_layout::published, 0xffffffff); }
  SUBCASE("no header") { h.put(shm_layout::published, 1); }
  SUBCASE("a frame above the plan's largest") {
    h.publish(1, h.header((1 << 18) + 1), 0);
    expected = errc::too_large;
  }
  SUBCASE("a payload that ends behind the segment") {
    h.publish(1, h.header(100), h.hostile->payload_bytes() - 99);
  }
  SUBCASE("a payload that begins behind the segment") {
    h.publish(1, h.header(100), ~std::uint64_t{0} - 50);
  }
  SUBCASE("a beat") { h.publish(1, {frame_kind::beat, identity}, 0); }
  auto got = h.link->take({link_tag::probe});
  REQUIRE_FALSE(got);
  CHECK(got.err().code == expected);
  REQUIRE(h.link->broken());
  CHECK(h.link->broken()->code == expected);
}

TEST_CASE("shared memory: a peer that gives back what it does not have breaks the link") {
  half_hostile h;
  REQUIRE(h.link->send({link_tag::probe}, pattern(100, 1)));  // in slot 0
  SUBCASE("more than it got") { h.put(shm_layout::returned, 2); }
  SUBCASE("a slot beyond all") {
    h.put(shm_layout::returns, 8192);
    h.put(shm_layout::returned, 1);
  }
  SUBCASE("another frame's slot") {
    h.put(shm_layout::returns, 1);
    h.put(shm_layout::returned, 1);
  }
  SUBCASE("one slot twice") {
    h.put(shm_layout::returned, 1);
    REQUIRE(h.link->send({link_tag::probe}, pattern(100, 1)));
    REQUIRE(h.link->send({link_tag::probe}, pattern(100, 1)));
    h.put(shm_layout::returns + 4, 0);
    h.put(shm_layout::returns + 8, 0);
    h.put(shm_layout::returned, 3);
  }
  CHECK(h.link->send({link_tag::probe}, pattern(100, 1)).err().code == errc::bad_input);
  CHECK(h.link->broken());
}

TEST_CASE("shared memory: frames of another identity go back unread, and are counted") {
  std::atomic<std::uint64_t> stale{0};
  auto o = options_of();
  auto first = shm_segment::create(1 << 20);
  auto second = shm_segment::create(1 << 20);
  REQUIRE(first);
  REQUIRE(second);
  auto seen_by_a = shm_segment::map(second->to_pass);
  auto seen_by_b = shm_segment::map(first->to_pass);
  auto older = o;
  older.identity.generation.number = 1;
  o.stale_frames = &stale;
  auto a =
      std::make_shared<shm_link>(older, shm_pair{std::move(first->segment), *std::move(seen_by_a)});
  auto b =
      std::make_shared<shm_link>(o, shm_pair{std::move(second->segment), *std::move(seen_by_b)});
  for (std::uint64_t i = 0; i < 3; ++i) REQUIRE(a->send({link_tag::probe}, pattern(10, i)));
  b->end({errc::unreachable, "the peer died"});
  CHECK(b->take({link_tag::probe}).err().code == errc::unreachable);
  CHECK(stale == 3);
}

TEST_CASE("shared memory: a peer that scribbles into its segment harms nobody but the link") {
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    CAPTURE(seed);
    half_hostile h;
    std::atomic<bool> stop{false};
    std::thread scribbler([&] {
      std::mt19937_64 random(seed);
      std::uint32_t number = 0;
      while (!stop) {
        switch (random() % 5) {
          case 0:
            h.put(shm_layout::published + random() % 60 * 4,
                  static_cast<std::uint32_t>(random()) % 9);
            break;
          case 1:
            h.put(shm_layout::descriptors + random() % 4096 * 4,
                  static_cast<std::uint32_t>(random()));
            break;
          case 2:
            h.put(shm_layout::returns + random() % 16 * 4,
                  static_cast<std::uint32_t>(random() % 12));
            break;
          default:
            h.publish(++number, h.header(random() % 1000), random() % (1 << 20));
        }
      }
    });
    // Ends when the link breaks, as its owner would.
    const auto until = std::chrono::steady_clock::now() + 200ms;
    std::thread owner([&] {
      while (!h.link->broken() && std::chrono::steady_clock::now() < until)
        std::this_thread::sleep_for(1ms);
      h.link->end({errc::unreachable, "lost"});
    });
    std::vector<std::byte> copy(1000);
    for (;;) {
      auto got = h.link->take({link_tag::probe});
      if (!got) break;
      REQUIRE(got->bytes.size() <= 1000);
      copy_with_checksum(copy.data(), got->bytes.data(), got->bytes.size());
      if (!h.link->send({link_tag::probe}, pattern(100, 1))) break;
    }
    owner.join();
    stop = true;
    scribbler.join();
  }
}

TEST_CASE("shared memory: the checksum that comes with a copy is that of the whole") {
  for (const int bytes : {0, 1, 240, 241, 16383, 16384, 16385, 100'000}) {
    const auto from = pattern(static_cast<std::size_t>(bytes), 3);
    std::vector<std::byte> to(from.size());
    CHECK(copy_with_checksum(to.data(), from.data(), from.size()) == payload_checksum(from));
    CHECK(to == from);
  }
}
