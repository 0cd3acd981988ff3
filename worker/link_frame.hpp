// The bytes of a link: greeting, reply and frame header, encoded and checked.
//
// Promises that what decode accepts is within its bounds and whole (each carries an XXH3-64 of
// itself), and that decoding allocates nothing. Knows no socket. All numbers little-endian.
//
//   dialler   -> acceptor   greeting   64 bytes: prelude of 16 (magic, version, length), body of 48
//   acceptor  -> dialler    reply      16 bytes: magic, version, verdict
//   both ways               frame      80 bytes of header, then `length` bytes of payload
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "config/ids.hpp"
#include "config/result.hpp"
#include "worker/link.hpp"

namespace stagecoach {

inline constexpr std::uint32_t link_protocol_version = 1;

/// Whose frames these are; frames of another identity are dropped.
struct link_identity {
  job_id job{};
  generation_id generation;
  bool operator==(const link_identity&) const = default;
};

// ---- greeting: who dials whom, for what

inline constexpr std::size_t greeting_prelude_bytes = 16;
inline constexpr std::size_t greeting_body_bytes = 48;
inline constexpr std::size_t greeting_bytes = greeting_prelude_bytes + greeting_body_bytes;

struct link_greeting {
  link_identity identity;
  std::uint32_t from_rank = 0;
  std::uint32_t to_rank = 0;
  std::uint32_t size = 0;  // ranks in the generation
};

std::array<std::byte, greeting_bytes> encode(const link_greeting& greeting);

/// Fails: bad_input (not a greeting), conflict (another protocol version), too_large (announced
/// length).
result<void> check_greeting_prelude(std::span<const std::byte, greeting_prelude_bytes> bytes);
/// Fails: corrupt (checksum), bad_input (ranks that no generation has).
result<link_greeting> decode_greeting(std::span<const std::byte, greeting_bytes> bytes);

// ---- reply: the acceptor's answer

enum class link_verdict : std::uint32_t {
  welcome = 0,
  busy,        // no room to wait; try again
  not_opened,  // waited, but this worker did not open the generation
  wrong_version,
  wrong_identity,  // this worker is in another generation or plan of the job
  wrong_rank,
  duplicate,   // that rank's link stands already
  wrong_name,  // certificate of another worker
  wrong_role,  // certificate of no worker
};

/// For messages: "this worker is in another generation or plan of the job".
const char* explain(link_verdict verdict);

inline constexpr std::size_t reply_bytes = 16;

struct link_reply {
  std::uint32_t version = link_protocol_version;
  link_verdict verdict = link_verdict::welcome;
};

std::array<std::byte, reply_bytes> encode(const link_reply& reply);
/// Fails: bad_input (not a reply, unknown verdict).
result<link_reply> decode_reply(std::span<const std::byte, reply_bytes> bytes);

// ---- frame

enum class frame_kind : std::uint16_t { data = 1, beat = 2 };

inline constexpr std::size_t frame_header_bytes = 80;

struct frame_header {
  frame_kind kind = frame_kind::data;
  link_identity identity;
  link_key key{link_tag::probe, 0, 0};
  std::uint64_t length = 0;    // bytes of payload
  std::uint64_t checksum = 0;  // XXH3-64 of the payload
};

std::array<std::byte, frame_header_bytes> encode(const frame_header& header);

/// Fails: bad_input (not a frame, unknown kind or tag), corrupt (header checksum), too_large
/// (length).
result<frame_header> decode_frame(std::span<const std::byte, frame_header_bytes> bytes,
                                  std::uint64_t length_max);

std::uint64_t payload_checksum(std::span<const std::byte> payload);

}  // namespace stagecoach
