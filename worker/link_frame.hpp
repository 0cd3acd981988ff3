// The bytes between workers: greetings, reply and frame headers of links and lines, encoded and
// checked.
//
// Promises that what decode accepts is within its bounds and whole (each carries an XXH3-64 of
// itself), and that decoding allocates nothing. Knows no socket. All numbers little-endian.
//
//   dialler   -> acceptor   greeting   64 bytes: prelude of 16 (magic, version, length), body of 48
//                       or for a line  152 bytes: the same prelude, body of 136
//   acceptor  -> dialler    reply      16 bytes: magic, version, verdict, flags
//                           offer      48 bytes, where both ends take shared memory
//   dialler   -> acceptor   reply      16 bytes, to an offer
//   link, both ways         frame      80 bytes of header, then `length` bytes of payload
//   line, dialler's         frame      40 bytes of header, then `length` bytes of text
//   line, acceptor's        frame      40 bytes: which number has arrived
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "config/ids.hpp"
#include "config/result.hpp"
#include "worker/link.hpp"

namespace stagecoach {

inline constexpr std::uint32_t link_protocol_version = 1;

/// Whose frames these are; frames of another identity are dropped.
struct link_identity {
  job_id job{};
  generation_id generation;
  bool is_beside() const { return value(job) >= beside_jobs; }
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
  std::uint32_t size = 0;     // ranks in the generation
  bool takes_memory = false;  // would rather have the link in shared memory
};

std::array<std::byte, greeting_bytes> encode(const link_greeting& greeting);

enum class greeting_kind { link, line };

/// Which greeting begins so.  Fails: bad_input (none), conflict (another protocol version),
/// too_large (announced length).
result<greeting_kind> check_greeting_prelude(
    std::span<const std::byte, greeting_prelude_bytes> bytes);
/// Fails: corrupt (checksum), bad_input (ranks that no generation has).
result<link_greeting> decode_greeting(std::span<const std::byte, greeting_bytes> bytes);

// ---- greeting of a line: which process dials which (worker/peer_line.hpp)

inline constexpr std::size_t line_greeting_body_bytes = 136;
inline constexpr std::size_t line_greeting_bytes =
    greeting_prelude_bytes + line_greeting_body_bytes;

struct line_greeting {
  process_id from, to;
  std::string name;  // the dialler's
};

/// What a greeting of a line can carry: 32 lower hex digits; a printable name within its limit.
bool is_process(const std::string& text);
bool is_worker_name(const std::string& text);

std::array<std::byte, line_greeting_bytes> encode(const line_greeting& greeting);
/// Fails: corrupt (checksum), bad_input (no process ids, no printable name).
result<line_greeting> decode_line_greeting(std::span<const std::byte, line_greeting_bytes> bytes);

// ---- reply: the acceptor's answer

enum class link_verdict : std::uint32_t {
  welcome = 0,
  busy,        // no room to wait; try again
  not_opened,  // waited, but this worker did not open the generation
  wrong_version,
  wrong_identity,  // this worker is in another generation or plan of the job
  wrong_rank,
  duplicate,      // that rank's link stands already
  wrong_name,     // certificate of another worker
  wrong_role,     // certificate of no worker
  wrong_process,  // another process than the one that is sought
};

/// For messages: "this worker is in another generation or plan of the job".
const char* explain(link_verdict verdict);

inline constexpr std::size_t reply_bytes = 16;

struct link_reply {
  std::uint32_t version = link_protocol_version;
  link_verdict verdict = link_verdict::welcome;
  // With welcome: an offer follows. As the answer to the offer: the link is in shared memory.
  bool is_memory = false;
};

std::array<std::byte, reply_bytes> encode(const link_reply& reply);
/// Fails: bad_input (not a reply, unknown verdict).
result<link_reply> decode_reply(std::span<const std::byte, reply_bytes> bytes);

// ---- offer: where the acceptor's end of a link in shared memory can be had, on its host

inline constexpr std::size_t offer_bytes = 48;

struct memory_offer {
  std::array<std::byte, 16> socket{};  // its abstract Unix socket; any user of the host can see it
  std::array<std::byte, 16> nonce{};   // to be said there: only who reads this link knows it
};

std::array<std::byte, offer_bytes> encode(const memory_offer& offer);
/// Fails: bad_input (not an offer), corrupt (checksum).
result<memory_offer> decode_offer(std::span<const std::byte, offer_bytes> bytes);

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

// ---- frame of a line

enum class line_kind : std::uint16_t { message = 1, arrived = 2 };

inline constexpr std::size_t line_frame_bytes = 40;

struct line_frame {
  line_kind kind = line_kind::message;
  std::uint64_t number = 0;    // of the message; arrived: the newest that came, with all before it
  std::uint64_t length = 0;    // bytes of text; 0 with arrived
  std::uint64_t checksum = 0;  // XXH3-64 of the text
};

std::array<std::byte, line_frame_bytes> encode(const line_frame& frame);
/// Fails: bad_input (not a frame of a line, unknown kind), corrupt (checksum), too_large (length).
result<line_frame> decode_line_frame(std::span<const std::byte, line_frame_bytes> bytes);

std::uint64_t payload_checksum(std::span<const std::byte> payload);

}  // namespace stagecoach
