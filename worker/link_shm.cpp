#include "worker/link_shm.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY  // the streaming state, on the stack
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <thread>
#include <utility>

namespace stagecoach {
namespace {

namespace layout = shm_layout;
using layout::slot_count;

constexpr std::size_t page_bytes = 4096;
static_assert(layout::descriptor_bytes % 8 == 0 && layout::payloads % page_bytes == 0);

constexpr std::uint64_t segment_magic = 0x31304d4853434753;  // "SGCSHM01"
constexpr std::size_t payload_bytes_max = std::size_t{1} << 40;
constexpr std::uint64_t block_bytes = 64;           // blocks begin on cache lines
constexpr std::size_t copy_chunk_bytes = 16 << 10;  // copied, then hashed while in the first cache

std::atomic_ref<std::uint32_t> word(const shm_segment& s, std::size_t at) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(s.at(at)));
}

/// Of the peer: its mapping is read-only, and so is every use of the reference.
std::uint32_t peek(const shm_segment& s, std::size_t at) { return word(s, at).load(); }

long futex(std::byte* at, int operation, std::uint32_t value) {
  return ::syscall(SYS_futex, at, operation, value, nullptr, nullptr, 0);
}
void wake(std::byte* at) { futex(at, FUTEX_WAKE, INT_MAX); }

std::size_t rounded(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

error io_error(const char* what) {
  return make_error(errc::io, "shared memory for a link: {}: {}", what, std::strerror(errno));
}

}  // namespace

descriptor::~descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

// ---------------------------------------------------------------------------------------------------------
// Segments

result<shm_segment::created> shm_segment::create(std::size_t payload_bytes) {
  const std::size_t size = layout::payloads + rounded(payload_bytes, page_bytes);
  descriptor fd(::memfd_create("stagecoach-link", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.fd() < 0) return io_error("memfd_create");
  if (::ftruncate(fd.fd(), static_cast<off_t>(size)) != 0) return io_error("ftruncate");
  void* base =
      ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd.fd(), 0);
  if (base == MAP_FAILED) return io_error("mmap");
  shm_segment own(static_cast<std::byte*>(base), size);
  // After our own mapping: from here the peer can map it, but not for writing.
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
  if (::fcntl(fd.fd(), F_ADD_SEALS, seals) != 0) return io_error("F_ADD_SEALS");
  std::memcpy(own.at(layout::magic), &segment_magic, sizeof(segment_magic));
  return created{std::move(own), std::move(fd)};
}

result<shm_segment> shm_segment::map(const descriptor& from) {
  // A file of another kind could shrink, or have pages that the system can't supply: a read would
  // then be a signal.
  const int seals = ::fcntl(from.fd(), F_GET_SEALS);
  constexpr int needed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  struct statfs system {};
  if (seals < 0 || (seals & needed) != needed || ::fstatfs(from.fd(), &system) != 0 ||
      system.f_type != TMPFS_MAGIC)
    return make_error(errc::bad_input,
                      "the peer's descriptor is no sealed memory (seals {:x}, file system {:x})",
                      seals, system.f_type);
  struct stat facts {};
  if (::fstat(from.fd(), &facts) != 0) return io_error("fstat");
  const auto size = static_cast<std::uint64_t>(facts.st_size);
  if (size < layout::payloads + page_bytes || size > layout::payloads + payload_bytes_max ||
      size % page_bytes != 0)
    return make_error(errc::bad_input, "the peer's memory has {} bytes; expected {} to {}", size,
                      layout::payloads + page_bytes, layout::payloads + payload_bytes_max);
  void* base = ::mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_NORESERVE, from.fd(), 0);
  if (base == MAP_FAILED) return io_error("mmap");
  shm_segment peer(static_cast<std::byte*>(base), size);
  if (std::memcmp(peer.at(layout::magic), &segment_magic, sizeof(segment_magic)) != 0)
    return make_error(errc::bad_input, "the peer's memory is laid out in another way");
  return peer;
}

shm_segment::shm_segment(shm_segment&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), size_(other.size_) {}

shm_segment::~shm_segment() {
  if (base_ != nullptr) ::munmap(base_, size_);
}

// ---------------------------------------------------------------------------------------------------------
// Blocks

std::optional<std::uint64_t> shm_link::block_list::take(std::uint64_t bytes) {
  for (auto at = free_.begin(); at != free_.end(); ++at) {
    const auto [offset, length] = *at;
    if (length < bytes) continue;
    free_.erase(at);
    if (length > bytes) free_[offset + bytes] = length - bytes;
    return offset;
  }
  return {};
}

void shm_link::block_list::give(std::uint64_t offset, std::uint64_t bytes) {
  auto after = free_.lower_bound(offset);
  if (after != free_.end() && after->first == offset + bytes) {
    bytes += after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      before->second += bytes;
      return;
    }
  }
  free_[offset] = bytes;
}

// ---------------------------------------------------------------------------------------------------------
// A link

std::size_t shm_link::payload_bytes(const options& o) {
  return std::min(2 * std::max(o.queue_bytes_max, o.frame_bytes_max), payload_bytes_max);
}

shm_link::shm_link(const options& o, shm_pair memory)
    : options_(o),
      memory_(std::move(memory)),
      blocks_(memory_.own.payload_bytes()),
      sent_(slot_count) {
  for (std::uint32_t slot = slot_count; slot-- > 0;) free_slots_.push_back(slot);
}

shm_link::~shm_link() { invariant(asleep_ == 0, "nobody waits on a link that dies"); }

error shm_link::fail(errc code, std::string why) {
  broken_ = error{code, std::move(why)};
  return *broken_;
}

std::optional<error> shm_link::broken() const {
  const std::lock_guard lock(mutex_);
  return broken_;
}

/// Sleeps while the peer's word is as it was seen. Our flag tells the peer to wake us; the kernel
/// compares once more after the flag could be seen, so no wake-up is lost. Without mutex_, under
/// which this thread was counted into asleep_.
void shm_link::sleep_on(std::size_t peer_word, std::uint32_t seen, std::size_t own_flag) {
  word(memory_.own, own_flag).fetch_add(1);
  // Who waits for a frame that we have no room for learns that it can't come.
  if (own_flag == layout::waits_for_room) ring();
  futex(memory_.peer.at(peer_word), FUTEX_WAIT, seen);
  word(memory_.own, own_flag).fetch_sub(1);
  --asleep_;
}

result<void> shm_link::send(link_key key, std::span<const std::byte> bytes) {
  const std::uint64_t reserved = rounded(bytes.size(), block_bytes);
  std::uint32_t slot = 0;
  std::uint64_t offset = 0;
  for (;;) {
    std::unique_lock lock(mutex_);
    if (ended_) return *ended_;
    if (auto read = collect_returns(); !read) return read;
    // One frame goes in, whatever its size; the segment has room for it when it is empty.
    const bool fits =
        unreturned_bytes_ == 0 || unreturned_bytes_ + reserved <= options_.queue_bytes_max;
    std::optional<std::uint64_t> block;
    if (fits && !free_slots_.empty()) block = reserved == 0 ? 0 : blocks_.take(reserved);
    if (block) {
      slot = free_slots_.back();
      free_slots_.pop_back();
      offset = *block;
      sent_[slot] = {offset, reserved, true};
      unreturned_bytes_ += reserved;
      break;
    }
    if (unreturned_bytes_ == 0 && free_slots_.size() == slot_count)
      return make_error(errc::too_large, "frame of {} bytes; the link's memory has {}",
                        bytes.size(), memory_.own.payload_bytes());
    const std::uint32_t seen = returns_read_;
    word(memory_.own, layout::room_seen).store(seen);
    ++asleep_;
    lock.unlock();
    sleep_on(layout::returned, seen, layout::waits_for_room);
  }

  const std::uint64_t sum =
      copy_with_checksum(memory_.own.payload(offset), bytes.data(), bytes.size());
  const auto header =
      encode(frame_header{frame_kind::data, options_.identity, key, bytes.size(), sum});
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return *ended_;
    std::byte* to =
        memory_.own.at(layout::descriptors + published_ % slot_count * layout::descriptor_bytes);
    std::memcpy(to, header.data(), header.size());
    std::memcpy(to + frame_header_bytes, &offset, sizeof(offset));
    std::memcpy(to + frame_header_bytes + 8, &slot, sizeof(slot));
    word(memory_.own, layout::published).store(++published_);
  }
  ring();
  return ok();
}

/// Tells the peer's receivers to look again.
void shm_link::ring() {
  word(memory_.own, layout::bell).fetch_add(1);
  if (peek(memory_.peer, layout::waits_for_frame) != 0) wake(memory_.own.at(layout::bell));
}

/// Makes room of what the peer gave back.
result<void> shm_link::collect_returns() {
  const std::uint32_t now = peek(memory_.peer, layout::returned);
  if (now - returns_read_ > slot_count - free_slots_.size())
    return fail(errc::bad_input, "the peer gave back more frames than it got");
  for (; returns_read_ != now; ++returns_read_) {
    const std::uint32_t slot =
        peek(memory_.peer, layout::returns + returns_read_ % slot_count * sizeof(std::uint32_t));
    if (slot >= slot_count || !sent_[slot].is_out)
      return fail(errc::bad_input,
                  fmt::format("the peer gave back slot {}, which it does not have", slot));
    sent_frame& f = sent_[slot];
    if (f.reserved > 0) blocks_.give(f.offset, f.reserved);
    unreturned_bytes_ -= f.reserved;
    f.is_out = false;
    free_slots_.push_back(slot);
  }
  return ok();
}

/// Takes in what the peer published; payloads stay where they are.
result<void> shm_link::read_descriptors() {
  const std::uint32_t now = peek(memory_.peer, layout::published);
  if (now - read_ > slot_count - unreturned_)
    return fail(errc::bad_input, "the peer sent more frames than it has slots");
  while (read_ != now) {
    // Once, word by word: what is checked is what is used.
    std::array<std::uint64_t, layout::descriptor_bytes / 8> once;
    std::byte* from =
        memory_.peer.at(layout::descriptors + read_ % slot_count * layout::descriptor_bytes);
    for (std::size_t i = 0; i < once.size(); ++i)
      once[i] = std::atomic_ref(*reinterpret_cast<std::uint64_t*>(from + 8 * i))
                    .load(std::memory_order_relaxed);
    const auto bytes = std::as_bytes(std::span(once));
    auto header = decode_frame(bytes.first<frame_header_bytes>(), options_.frame_bytes_max);
    if (!header) return fail(header.err().code, header.err().message);
    arrived_frame f;
    f.length = header->length;
    f.checksum = header->checksum;
    std::memcpy(&f.offset, bytes.data() + frame_header_bytes, sizeof(f.offset));
    std::memcpy(&f.slot, bytes.data() + frame_header_bytes + 8, sizeof(f.slot));
    const std::size_t payloads = memory_.peer.payload_bytes();
    if (header->kind != frame_kind::data || f.offset > payloads || f.length > payloads - f.offset)
      return fail(errc::bad_input, fmt::format("a frame of {} bytes at {} of the peer's {}",
                                               f.length, f.offset, payloads));
    ++read_;
    ++unreturned_;
    if (header->identity != options_.identity) {
      if (options_.stale_frames != nullptr) ++*options_.stale_frames;
      give_back(f.slot);
      continue;
    }
    inbox_[{header->key.tag, header->key.step, header->key.number}].push_back(f);
  }
  return ok();
}

/// Under mutex_.
void shm_link::give_back(std::uint32_t slot) {
  const std::size_t at = layout::returns + returned_ % slot_count * sizeof(std::uint32_t);
  word(memory_.own, at).store(slot, std::memory_order_relaxed);
  word(memory_.own, layout::returned).store(++returned_);
  --unreturned_;
  if (peek(memory_.peer, layout::waits_for_room) != 0) wake(memory_.own.at(layout::returned));
}

result<shm_link::frame> shm_link::take(link_key key) {
  for (;;) {
    std::unique_lock lock(mutex_);
    if (ended_ && ended_->code == errc::cancelled) return *ended_;
    if (broken_ && inbox_.empty()) return *broken_;
    const std::uint32_t seen = peek(memory_.peer, layout::bell);
    const auto read = broken_ ? result<void>(*broken_) : read_descriptors();
    const auto found = inbox_.find({key.tag, key.step, key.number});
    if (found != inbox_.end()) {
      const arrived_frame f = found->second.front();
      found->second.pop_front();
      if (found->second.empty()) inbox_.erase(found);
      auto release = [self = shared_from_this(), slot = f.slot](const void*) {
        const std::lock_guard lock(self->mutex_);
        self->give_back(slot);
      };
      const std::byte* bytes = memory_.peer.payload(f.offset);
      return frame{key,
                   {bytes, static_cast<std::size_t>(f.length)},
                   f.checksum,
                   std::shared_ptr<const void>(bytes, std::move(release))};
    }
    if (!read) return read.err();
    if (ended_) return *ended_;
    // The peer waits for room and has seen all that we gave back; the frame can't come.
    if (peek(memory_.peer, layout::waits_for_room) != 0 &&
        peek(memory_.peer, layout::room_seen) == returned_ &&
        peek(memory_.peer, layout::published) == read_ && unreturned_ > 0)
      return fail(errc::too_large,
                  fmt::format("over {} bytes or {} frames arrived that nobody asked for. fix: "
                              "both ranks must run one plan",
                              options_.queue_bytes_max, slot_count));
    ++asleep_;
    lock.unlock();
    sleep_on(layout::bell, seen, layout::waits_for_frame);
  }
}

void shm_link::end(const error& why) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_ && (ended_->code == errc::cancelled || why.code != errc::cancelled)) return;
    ended_ = why;
    if (why.code == errc::cancelled) inbox_.clear();
  }
  // Between its last look at ended_ and its sleep a thread would miss one call.
  while (asleep_ > 0) {
    wake(memory_.peer.at(layout::bell));
    wake(memory_.peer.at(layout::returned));
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

std::uint64_t copy_with_checksum(std::byte* to, const std::byte* from, std::size_t bytes) {
  if (bytes <= copy_chunk_bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return payload_checksum({to, bytes});
  }
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_64bits_reset(&state);
  for (std::size_t done = 0; done < bytes; done += copy_chunk_bytes) {
    const std::size_t part = std::min(copy_chunk_bytes, bytes - done);
    std::memcpy(to + done, from + done, part);
    XXH3_64bits_update(&state, to + done, part);
  }
  return XXH3_64bits_digest(&state);
}

}  // namespace stagecoach
