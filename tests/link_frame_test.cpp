#include "worker/link_frame.hpp"

#include <doctest/doctest.h>
#include <xxhash.h>

#include <cstring>

using namespace stagecoach;

namespace {

frame_header example() {
  frame_header h;
  h.identity = {job_id{12}, {3, 0x1122334455667788}};
  h.key = {link_tag::leaf_block, 7, (std::uint64_t{5} << 32) | 9};
  h.length = 4096;
  h.checksum = 0xabcdef;
  return h;
}

/// Changes a field and makes the header's own checksum fit again, as a hostile or newer sender
/// would.
template <std::size_t N>
std::array<std::byte, N> patched(std::array<std::byte, N> bytes, std::size_t at,
                                 std::uint32_t with) {
  std::memcpy(bytes.data() + at, &with, sizeof(with));
  const std::uint64_t sum = XXH3_64bits(bytes.data(), N - 8);
  std::memcpy(bytes.data() + N - 8, &sum, sizeof(sum));
  return bytes;
}

}  // namespace

TEST_CASE("link frame: a header decodes to what was encoded") {
  const auto h = example();
  auto back = decode_frame(encode(h), 4096);
  REQUIRE(back);
  CHECK(back->kind == frame_kind::data);
  CHECK(back->identity == h.identity);
  CHECK(back->key == h.key);
  CHECK(back->length == h.length);
  CHECK(back->checksum == h.checksum);
}

TEST_CASE("link frame: any changed bit of a header is found") {
  const auto good = encode(example());
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    auto bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    CHECK_FALSE(decode_frame(bad, 4096));
  }
}

TEST_CASE(
    "link frame: a header with fitting checksum but bad fields is refused, each with its code") {
  const auto good = encode(example());
  CHECK(decode_frame(good, 4095).err().code == errc::too_large);
  CHECK(decode_frame(patched(good, 52, 1), 4096).err().code == errc::too_large);  // length 2^32
  CHECK(decode_frame(patched(good, 64, 0), 4096).err().code == errc::bad_input);  // tag
  CHECK(decode_frame(patched(good, 64, 99), 4096).err().code == errc::bad_input);
  CHECK(decode_frame(patched(good, 4, 0x00010003), 4096).err().code == errc::bad_input);  // kind 3
  CHECK(decode_frame(patched(good, 4, 0x00020001), 4096).err().code ==
        errc::bad_input);  // version 2
  CHECK(decode_frame(patched(good, 4, 0x00010002), 4096).err().code ==
        errc::bad_input);  // big beat
}

TEST_CASE("link greeting: round trip, and what is refused") {
  const link_greeting g{{job_id{1}, {2, 3}}, 0, 3, 4};
  const auto good = encode(g);
  auto back = decode_greeting(good);
  REQUIRE(back);
  CHECK(back->identity == g.identity);
  CHECK(back->from_rank == 0);
  CHECK(back->to_rank == 3);
  CHECK(back->size == 4);
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    if (bit / 8 >= 12 && bit / 8 < 16) continue;  // reserved, yet under the checksum
    auto bad = good;
    bad[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    CHECK_FALSE(decode_greeting(bad));
  }
  CHECK(decode_greeting(patched(good, 4, 2)).err().code == errc::conflict);
  CHECK(decode_greeting(patched(good, 8, 1 << 30)).err().code == errc::too_large);
  CHECK(decode_greeting(patched(good, 40, 3)).err().code == errc::bad_input);  // from 3 to 3
  CHECK(decode_greeting(patched(good, 44, 4)).err().code == errc::bad_input);  // to 4 of 4
  CHECK(decode_greeting(patched(good, 48, 1 << 20)).err().code ==
        errc::bad_input);  // a million ranks
  CHECK(decode_greeting(encode(link_greeting{{}, 2, 1, 4})).err().code == errc::bad_input);
}

TEST_CASE("link reply: round trip; other bytes and unknown verdicts are refused") {
  auto back = decode_reply(encode(link_reply{1, link_verdict::wrong_role}));
  REQUIRE(back);
  CHECK(back->verdict == link_verdict::wrong_role);
  auto bad = encode(link_reply{});
  bad[0] = std::byte{'H'};
  CHECK(decode_reply(bad).err().code == errc::bad_input);
  auto unknown = encode(link_reply{});
  unknown[8] = std::byte{77};
  CHECK(decode_reply(unknown).err().code == errc::bad_input);
}

TEST_CASE("link frame: an offer and the wish for shared memory decode to what was encoded") {
  memory_offer offer;
  for (std::size_t i = 0; i < 16; ++i) {
    offer.socket[i] = static_cast<std::byte>(i);
    offer.nonce[i] = static_cast<std::byte>(200 + i);
  }
  auto bytes = encode(offer);
  auto back = decode_offer(bytes);
  REQUIRE(back);
  CHECK(back->socket == offer.socket);
  CHECK(back->nonce == offer.nonce);
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    auto bad = bytes;
    bad[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
    CHECK_FALSE(decode_offer(bad));
  }
  for (const bool wish : {false, true}) {
    auto greeting = decode_greeting(encode(link_greeting{{job_id{1}, {2, 3}}, 0, 1, 2, wish}));
    REQUIRE(greeting);
    CHECK(greeting->takes_memory == wish);
    auto reply =
        decode_reply(encode(link_reply{link_protocol_version, link_verdict::welcome, wish}));
    REQUIRE(reply);
    CHECK(reply->is_memory == wish);
  }
}
