// Fuzz target of the bytes at a worker's link port: greetings, reply and frame headers of links and
// lines, from anybody who reaches it.
//
// libFuzzer: clang++ -fsanitize=fuzzer,address -DSTAGECOACH_LIBFUZZER. Without it, main() below
// runs a fixed number of seeded mutations of valid bytes, so that it runs under any compiler and in
// CTest.
#include <xxhash.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "config/limits.hpp"
#include "worker/link_frame.hpp"

using namespace stagecoach;

namespace {

/// What decode accepts, encode must give back: no field lost, none out of bounds.
template <std::size_t N, class Decode>
void try_decode(const std::uint8_t* data, std::size_t size, Decode decode) {
  if (size < N) return;
  std::array<std::byte, N> bytes;
  std::memcpy(bytes.data(), data, N);
  if (auto decoded = decode(bytes)) {
    const auto again = encode(*decoded);
    // Reserved words may hold anything under a fitting checksum; decoded values must agree.
    if (auto twice = decode(again); !twice || encode(*twice) != again) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr auto length_max = static_cast<std::uint64_t>(limits::link_frame_bytes_max);
  try_decode<greeting_bytes>(data, size, [](const auto& b) {
    auto g = decode_greeting(b);
    if (g && (g->from_rank >= g->to_rank || g->to_rank >= g->size)) std::abort();
    return g;
  });
  try_decode<reply_bytes>(data, size, [](const auto& b) { return decode_reply(b); });
  try_decode<offer_bytes>(data, size, [](const auto& b) { return decode_offer(b); });
  try_decode<frame_header_bytes>(data, size, [&](const auto& b) {
    auto h = decode_frame(b, length_max);
    if (h && h->length > length_max) std::abort();
    return h;
  });
  try_decode<line_greeting_bytes>(data, size, [](const auto& b) {
    auto g = decode_line_greeting(b);
    if (g && (!is_process(g->from) || !is_process(g->to) || !is_worker_name(g->name))) std::abort();
    return g;
  });
  try_decode<line_frame_bytes>(data, size, [](const auto& b) {
    auto f = decode_line_frame(b);
    if (f && f->length > static_cast<std::uint64_t>(limits::control_message_bytes_max))
      std::abort();
    return f;
  });
  return 0;
}

#ifndef STAGECOACH_LIBFUZZER
int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 300'000;
  std::mt19937_64 random(20240607);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const auto vector_of = [](const auto& bytes) {
    return std::vector<std::uint8_t>(
        reinterpret_cast<const std::uint8_t*>(bytes.data()),
        reinterpret_cast<const std::uint8_t*>(bytes.data()) + bytes.size());
  };
  const std::vector<std::vector<std::uint8_t>> seeds{
      vector_of(encode(link_greeting{{job_id{1}, {2, 3}}, 0, 1, 2})),
      vector_of(encode(link_reply{})),
      vector_of(encode(memory_offer{{std::byte{7}}, {std::byte{9}}})),
      vector_of(encode(frame_header{})),
      vector_of(encode(frame_header{frame_kind::beat, {job_id{1}, {2, 3}}})),
      vector_of(encode(line_greeting{process_id(32, 'a'), process_id(32, '7'), "worker-3"})),
      vector_of(encode(line_frame{line_kind::message, 7, 1000, 5})),
      vector_of(encode(line_frame{line_kind::arrived, 7})),
  };
  for (long i = 0; i < count; ++i) {
    auto bytes = seeds[below(seeds.size())];
    for (std::size_t n = below(4); n > 0; --n) {
      switch (below(3)) {
        case 0:
          bytes[below(bytes.size())] ^= static_cast<std::uint8_t>(1u << below(8));
          break;
        case 1:
          bytes[below(bytes.size())] = static_cast<std::uint8_t>(random());
          break;
        case 2:
          bytes.resize(below(bytes.size()) + 1);
          break;
      }
    }
    // Half of them with a fitting checksum: otherwise nothing behind it would ever be reached.
    if (bytes.size() > 16 && below(2) == 0) {
      const std::uint64_t sum = XXH3_64bits(bytes.data(), bytes.size() - 8);
      std::memcpy(bytes.data() + bytes.size() - 8, &sum, 8);
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%ld inputs\n", count);
}
#endif
