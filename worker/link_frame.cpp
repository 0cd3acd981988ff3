#include "worker/link_frame.hpp"

#include <xxhash.h>

#include <algorithm>

#include "config/limits.hpp"

namespace stagecoach {
namespace {

// As text: "SLG1", "SLL1", "SLR1", "SLO1", "SLF1", "SLM1". Not printable protocols' first letters
// (GET, SSH, 0x16 of TLS).
constexpr std::uint32_t greeting_magic = 0x31474c53;
constexpr std::uint32_t line_greeting_magic = 0x314c4c53;
constexpr std::uint32_t reply_magic = 0x31524c53;
constexpr std::uint32_t offer_magic = 0x314f4c53;
constexpr std::uint32_t frame_magic = 0x31464c53;
constexpr std::uint32_t line_frame_magic = 0x314d4c53;

// In a word that releases before it left zero, and did not read.
constexpr std::uint32_t memory_flag = 1;

constexpr std::size_t process_bytes = 32;
constexpr std::size_t name_field_bytes = 64;
static_assert(limits::name_bytes_max < static_cast<int>(name_field_bytes));

// Byte by byte, so that the wire's order does not depend on the host's.
class put {
 public:
  explicit put(std::byte* to) : to_(to) {}
  put& u16(std::uint16_t v) { return bytes(v, 2); }
  put& u32(std::uint32_t v) { return bytes(v, 4); }
  put& u64(std::uint64_t v) { return bytes(v, 8); }
  /// Filled up with zeros.
  put& text(const std::string& v, std::size_t field_bytes) {
    invariant(v.size() <= field_bytes, "a text fits its field of a greeting");
    for (std::size_t i = 0; i < field_bytes; ++i)
      *to_++ = i < v.size() ? static_cast<std::byte>(v[i]) : std::byte{0};
    return *this;
  }

 private:
  put& bytes(std::uint64_t v, int count) {
    for (int i = 0; i < count; ++i) *to_++ = static_cast<std::byte>(v >> (8 * i));
    return *this;
  }
  std::byte* to_;
};

class take {
 public:
  explicit take(const std::byte* from) : from_(from) {}
  std::uint16_t u16() { return static_cast<std::uint16_t>(bytes(2)); }
  std::uint32_t u32() { return static_cast<std::uint32_t>(bytes(4)); }
  std::uint64_t u64() { return bytes(8); }
  /// Up to the first zero.
  std::string text(std::size_t field_bytes) {
    std::string v(reinterpret_cast<const char*>(from_), field_bytes);
    from_ += field_bytes;
    return v.substr(0, v.find('\0'));
  }

 private:
  std::uint64_t bytes(int count) {
    std::uint64_t v = 0;
    for (int i = 0; i < count; ++i) v |= static_cast<std::uint64_t>(*from_++) << (8 * i);
    return v;
  }
  const std::byte* from_;
};

std::uint64_t hash(const std::byte* bytes, std::size_t count) { return XXH3_64bits(bytes, count); }

}  // namespace

std::array<std::byte, greeting_bytes> encode(const link_greeting& greeting) {
  std::array<std::byte, greeting_bytes> bytes{};
  put out(bytes.data());
  out.u32(greeting_magic).u32(link_protocol_version).u32(greeting_body_bytes).u32(0);
  out.u64(value(greeting.identity.job))
      .u64(greeting.identity.generation.number)
      .u64(greeting.identity.generation.plan_hash)
      .u32(greeting.from_rank)
      .u32(greeting.to_rank)
      .u32(greeting.size)
      .u32(greeting.takes_memory ? memory_flag : 0);
  out.u64(hash(bytes.data(), greeting_bytes - 8));
  return bytes;
}

result<greeting_kind> check_greeting_prelude(
    std::span<const std::byte, greeting_prelude_bytes> bytes) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto version = in.u32();
  const auto length = in.u32();
  if (magic != greeting_magic && magic != line_greeting_magic)
    return make_error(
        errc::bad_input,
        "first bytes {:08x} are no greeting ({:08x}, {:08x}). fix: only workers may use a "
        "worker's link port",
        magic, greeting_magic, line_greeting_magic);
  if (version != link_protocol_version)
    return make_error(
        errc::conflict,
        "link protocol version {}; this worker speaks {}. fix: run one release on all "
        "workers of a job",
        version, link_protocol_version);
  const std::size_t body = magic == greeting_magic ? greeting_body_bytes : line_greeting_body_bytes;
  if (length != body)
    return make_error(length > body ? errc::too_large : errc::bad_input,
                      "greeting announces {} bytes; version {} has {}", length, version, body);
  return magic == greeting_magic ? greeting_kind::link : greeting_kind::line;
}

result<link_greeting> decode_greeting(std::span<const std::byte, greeting_bytes> bytes) {
  const auto prelude = check_greeting_prelude(bytes.first<greeting_prelude_bytes>());
  if (!prelude) return prelude.err();
  if (*prelude != greeting_kind::link)
    return make_error(errc::bad_input, "greeting of a line where a link's is expected");
  take in(bytes.data() + greeting_prelude_bytes);
  link_greeting greeting;
  greeting.identity.job = job_id{in.u64()};
  greeting.identity.generation.number = in.u64();
  greeting.identity.generation.plan_hash = in.u64();
  greeting.from_rank = in.u32();
  greeting.to_rank = in.u32();
  greeting.size = in.u32();
  greeting.takes_memory = (in.u32() & memory_flag) != 0;
  if (in.u64() != hash(bytes.data(), greeting_bytes - 8))
    return make_error(errc::corrupt, "checksum of the greeting differs from its bytes");
  if (greeting.size > static_cast<std::uint32_t>(limits::worker_count_max) ||
      greeting.to_rank >= greeting.size || greeting.from_rank >= greeting.to_rank)
    return make_error(
        errc::bad_input,
        "greeting from rank {} to rank {} of {}; the lower rank dials the higher, and "
        "at most {} ranks exist",
        greeting.from_rank, greeting.to_rank, greeting.size, limits::worker_count_max);
  return greeting;
}

bool is_process(const std::string& text) {
  return text.size() == process_bytes &&
         text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

bool is_worker_name(const std::string& text) {
  return !text.empty() && text.size() <= static_cast<std::size_t>(limits::name_bytes_max) &&
         std::none_of(text.begin(), text.end(), [](char c) {
           const auto byte = static_cast<unsigned char>(c);
           return byte < 0x20 || byte == 0x7f;
         });
}

std::array<std::byte, line_greeting_bytes> encode(const line_greeting& greeting) {
  std::array<std::byte, line_greeting_bytes> bytes{};
  put out(bytes.data());
  out.u32(line_greeting_magic).u32(link_protocol_version).u32(line_greeting_body_bytes).u32(0);
  out.text(greeting.from, process_bytes)
      .text(greeting.to, process_bytes)
      .text(greeting.name, name_field_bytes);
  out.u64(hash(bytes.data(), line_greeting_bytes - 8));
  return bytes;
}

result<line_greeting> decode_line_greeting(std::span<const std::byte, line_greeting_bytes> bytes) {
  const auto prelude = check_greeting_prelude(bytes.first<greeting_prelude_bytes>());
  if (!prelude) return prelude.err();
  if (*prelude != greeting_kind::line)
    return make_error(errc::bad_input, "greeting of a link where a line's is expected");
  take in(bytes.data() + greeting_prelude_bytes);
  line_greeting greeting;
  greeting.from = in.text(process_bytes);
  greeting.to = in.text(process_bytes);
  greeting.name = in.text(name_field_bytes);
  if (in.u64() != hash(bytes.data(), line_greeting_bytes - 8))
    return make_error(errc::corrupt, "checksum of the greeting differs from its bytes");
  if (!is_process(greeting.from) || !is_process(greeting.to) || !is_worker_name(greeting.name))
    return make_error(errc::bad_input,
                      "greeting of a line without two process ids of {} hex digits and a name of "
                      "1 to {} bytes",
                      process_bytes, limits::name_bytes_max);
  return greeting;
}

const char* explain(link_verdict verdict) {
  switch (verdict) {
    case link_verdict::welcome:
      return "welcome";
    case link_verdict::busy:
      return "it has no room for more waiting connections";
    case link_verdict::not_opened:
      return "it did not open this generation in time";
    case link_verdict::wrong_version:
      return "it speaks another link protocol version";
    case link_verdict::wrong_identity:
      return "it is in another generation or plan of this job";
    case link_verdict::wrong_rank:
      return "it has another rank or another number of ranks";
    case link_verdict::duplicate:
      return "it has a link with this rank already";
    case link_verdict::wrong_name:
      return "this worker's certificate carries another worker's name";
    case link_verdict::wrong_role:
      return "this worker's certificate has another role than 'worker'";
    case link_verdict::wrong_process:
      return "another process answers there";
  }
  return "unknown verdict";
}

std::array<std::byte, reply_bytes> encode(const link_reply& reply) {
  std::array<std::byte, reply_bytes> bytes{};
  put(bytes.data())
      .u32(reply_magic)
      .u32(reply.version)
      .u32(static_cast<std::uint32_t>(reply.verdict))
      .u32(reply.is_memory ? memory_flag : 0);
  return bytes;
}

result<link_reply> decode_reply(std::span<const std::byte, reply_bytes> bytes) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto version = in.u32();
  const auto verdict = in.u32();
  const auto flags = in.u32();
  if (magic != reply_magic)
    return make_error(
        errc::bad_input,
        "answer {:08x} is no link reply ({:08x}). fix: check that host and port are a "
        "worker's link port, and that both ends use TLS or neither",
        magic, reply_magic);
  if (verdict > static_cast<std::uint32_t>(link_verdict::wrong_process))
    return make_error(errc::bad_input, "reply of version {} with unknown verdict {}", version,
                      verdict);
  return link_reply{version, static_cast<link_verdict>(verdict), (flags & memory_flag) != 0};
}

std::array<std::byte, offer_bytes> encode(const memory_offer& offer) {
  std::array<std::byte, offer_bytes> bytes{};
  put(bytes.data()).u32(offer_magic).u32(link_protocol_version);
  std::copy(offer.socket.begin(), offer.socket.end(), bytes.begin() + 8);
  std::copy(offer.nonce.begin(), offer.nonce.end(), bytes.begin() + 24);
  put(bytes.data() + offer_bytes - 8).u64(hash(bytes.data(), offer_bytes - 8));
  return bytes;
}

result<memory_offer> decode_offer(std::span<const std::byte, offer_bytes> bytes) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto version = in.u32();
  if (magic != offer_magic || version != link_protocol_version)
    return make_error(errc::bad_input, "bytes {:08x} of version {} where an offer should begin",
                      magic, version);
  if (take(bytes.data() + offer_bytes - 8).u64() != hash(bytes.data(), offer_bytes - 8))
    return make_error(errc::corrupt, "checksum of the offer differs from its bytes");
  memory_offer offer;
  std::copy_n(bytes.begin() + 8, offer.socket.size(), offer.socket.begin());
  std::copy_n(bytes.begin() + 24, offer.nonce.size(), offer.nonce.begin());
  return offer;
}

std::array<std::byte, frame_header_bytes> encode(const frame_header& header) {
  std::array<std::byte, frame_header_bytes> bytes{};
  put out(bytes.data());
  out.u32(frame_magic).u16(static_cast<std::uint16_t>(header.kind)).u16(link_protocol_version);
  out.u64(value(header.identity.job))
      .u64(header.identity.generation.number)
      .u64(header.identity.generation.plan_hash)
      .u64(header.key.step)
      .u64(header.key.number)
      .u64(header.length)
      .u64(header.checksum)
      .u32(static_cast<std::uint32_t>(header.key.tag))
      .u32(0);
  out.u64(hash(bytes.data(), frame_header_bytes - 8));
  return bytes;
}

result<frame_header> decode_frame(std::span<const std::byte, frame_header_bytes> bytes,
                                  std::uint64_t length_max) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto kind = in.u16();
  const auto version = in.u16();
  frame_header header;
  header.identity.job = job_id{in.u64()};
  header.identity.generation.number = in.u64();
  header.identity.generation.plan_hash = in.u64();
  header.key.step = in.u64();
  header.key.number = in.u64();
  header.length = in.u64();
  header.checksum = in.u64();
  const auto tag = in.u32();
  in.u32();
  const auto header_checksum = in.u64();
  if (magic != frame_magic)
    return make_error(errc::bad_input, "bytes {:08x} where a frame should begin ({:08x})", magic,
                      frame_magic);
  if (header_checksum != hash(bytes.data(), frame_header_bytes - 8))
    return make_error(errc::corrupt, "checksum of the frame header differs from its bytes");
  if (version != link_protocol_version)
    return make_error(errc::bad_input, "frame of link protocol version {}; this worker speaks {}",
                      version, link_protocol_version);
  if (kind != static_cast<std::uint16_t>(frame_kind::data) &&
      kind != static_cast<std::uint16_t>(frame_kind::beat))
    return make_error(errc::bad_input, "frame of unknown kind {}", kind);
  if (tag < static_cast<std::uint32_t>(link_tag::activation) ||
      tag > static_cast<std::uint32_t>(link_tag::copy_gradient))
    return make_error(errc::bad_input, "frame with unknown tag {}", tag);
  header.kind = static_cast<frame_kind>(kind);
  header.key.tag = static_cast<link_tag>(tag);
  if (header.kind == frame_kind::beat && header.length != 0)
    return make_error(errc::bad_input, "beat with {} bytes of payload; beats have none",
                      header.length);
  if (header.length > length_max)
    return make_error(errc::too_large, "frame announces {} bytes; the largest of this plan is {}",
                      header.length, length_max);
  return header;
}

std::array<std::byte, line_frame_bytes> encode(const line_frame& frame) {
  std::array<std::byte, line_frame_bytes> bytes{};
  put out(bytes.data());
  out.u32(line_frame_magic).u16(static_cast<std::uint16_t>(frame.kind)).u16(link_protocol_version);
  out.u64(frame.number).u64(frame.length).u64(frame.checksum);
  out.u64(hash(bytes.data(), line_frame_bytes - 8));
  return bytes;
}

result<line_frame> decode_line_frame(std::span<const std::byte, line_frame_bytes> bytes) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto kind = in.u16();
  const auto version = in.u16();
  line_frame frame;
  frame.number = in.u64();
  frame.length = in.u64();
  frame.checksum = in.u64();
  const auto header_checksum = in.u64();
  if (magic != line_frame_magic)
    return make_error(errc::bad_input, "bytes {:08x} where a frame of a line should begin ({:08x})",
                      magic, line_frame_magic);
  if (header_checksum != hash(bytes.data(), line_frame_bytes - 8))
    return make_error(errc::corrupt, "checksum of the frame header differs from its bytes");
  if (version != link_protocol_version)
    return make_error(errc::bad_input, "frame of link protocol version {}; this worker speaks {}",
                      version, link_protocol_version);
  if (kind != static_cast<std::uint16_t>(line_kind::message) &&
      kind != static_cast<std::uint16_t>(line_kind::arrived))
    return make_error(errc::bad_input, "frame of a line with unknown kind {}", kind);
  frame.kind = static_cast<line_kind>(kind);
  if (frame.kind == line_kind::arrived && frame.length != 0)
    return make_error(errc::bad_input, "receipt with {} bytes of text; receipts have none",
                      frame.length);
  if (frame.length > static_cast<std::uint64_t>(limits::control_message_bytes_max))
    return make_error(errc::too_large,
                      "message announces {} bytes; the limit is {} (config/limits.hpp)",
                      frame.length, limits::control_message_bytes_max);
  return frame;
}

std::uint64_t payload_checksum(std::span<const std::byte> payload) {
  return hash(payload.data(), payload.size());
}

}  // namespace stagecoach
