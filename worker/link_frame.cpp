#include "worker/link_frame.hpp"

#include <xxhash.h>

#include "config/limits.hpp"

namespace stagecoach {
namespace {

// As text: "SLG1", "SLR1", "SLF1". Not printable protocols' first letters (GET, SSH, 0x16 of TLS).
constexpr std::uint32_t greeting_magic = 0x31474c53;
constexpr std::uint32_t reply_magic = 0x31524c53;
constexpr std::uint32_t frame_magic = 0x31464c53;

// Byte by byte, so that the wire's order does not depend on the host's.
class put {
 public:
  explicit put(std::byte* to) : to_(to) {}
  put& u16(std::uint16_t v) { return bytes(v, 2); }
  put& u32(std::uint32_t v) { return bytes(v, 4); }
  put& u64(std::uint64_t v) { return bytes(v, 8); }

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
      .u32(0);
  out.u64(hash(bytes.data(), greeting_bytes - 8));
  return bytes;
}

result<void> check_greeting_prelude(std::span<const std::byte, greeting_prelude_bytes> bytes) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto version = in.u32();
  const auto length = in.u32();
  if (magic != greeting_magic)
    return make_error(
        errc::bad_input,
        "first bytes {:08x} are no link greeting ({:08x}). fix: only workers may use a "
        "worker's link port",
        magic, greeting_magic);
  if (version != link_protocol_version)
    return make_error(
        errc::conflict,
        "link protocol version {}; this worker speaks {}. fix: run one release on all "
        "workers of a job",
        version, link_protocol_version);
  if (length != greeting_body_bytes)
    return make_error(length > greeting_body_bytes ? errc::too_large : errc::bad_input,
                      "greeting announces {} bytes; version {} has {}", length, version,
                      greeting_body_bytes);
  return ok();
}

result<link_greeting> decode_greeting(std::span<const std::byte, greeting_bytes> bytes) {
  if (auto prelude = check_greeting_prelude(bytes.first<greeting_prelude_bytes>()); !prelude)
    return prelude.err();
  take in(bytes.data() + greeting_prelude_bytes);
  link_greeting greeting;
  greeting.identity.job = job_id{in.u64()};
  greeting.identity.generation.number = in.u64();
  greeting.identity.generation.plan_hash = in.u64();
  greeting.from_rank = in.u32();
  greeting.to_rank = in.u32();
  greeting.size = in.u32();
  in.u32();
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
  }
  return "unknown verdict";
}

std::array<std::byte, reply_bytes> encode(const link_reply& reply) {
  std::array<std::byte, reply_bytes> bytes{};
  put(bytes.data())
      .u32(reply_magic)
      .u32(reply.version)
      .u32(static_cast<std::uint32_t>(reply.verdict))
      .u32(0);
  return bytes;
}

result<link_reply> decode_reply(std::span<const std::byte, reply_bytes> bytes) {
  take in(bytes.data());
  const auto magic = in.u32();
  const auto version = in.u32();
  const auto verdict = in.u32();
  if (magic != reply_magic)
    return make_error(
        errc::bad_input,
        "answer {:08x} is no link reply ({:08x}). fix: check that host and port are a "
        "worker's link port, and that both ends use TLS or neither",
        magic, reply_magic);
  if (verdict > static_cast<std::uint32_t>(link_verdict::wrong_role))
    return make_error(errc::bad_input, "reply of version {} with unknown verdict {}", version,
                      verdict);
  return link_reply{version, static_cast<link_verdict>(verdict)};
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
      tag > static_cast<std::uint32_t>(link_tag::probe))
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

std::uint64_t payload_checksum(std::span<const std::byte> payload) {
  return hash(payload.data(), payload.size());
}

}  // namespace stagecoach
