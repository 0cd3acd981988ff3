// One link in shared memory: two segments, each written by one end and mapped for reading by the
// other.
//
// Promises what a link over TCP promises: frames whole, checksummed, in order by key, or the link
// fails. The peer's segment is bytes from outside: a number in it is read once, checked, and then
// used; its seals keep it from shrinking under us, and ours keeps the peer from writing to it. What
// a hostile peer can do is what it could over TCP: send wrong frames, or none. Knows no socket: who
// brings the descriptors together is link_upgrade_asio, and a peer's death is what others tell.
//
//   segment    words (published, bell, returned, who waits)   descriptors [slot_count]
//              returned slots [slot_count]   payloads
//
// A sender puts a frame's payload where its own list of free blocks says, and publishes its
// descriptor: the frame header of link_frame.hpp and where the payload lies. The receiver hands the
// slot back when it has done with the payload; that is the credit by which the sender uses block
// and slot again. Whoever waits sleeps on a word of the peer's (a futex) and says so in its own
// segment, so that nobody rings for a peer that is awake.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "config/result.hpp"
#include "worker/link.hpp"
#include "worker/link_frame.hpp"

namespace stagecoach {

/// An open file descriptor, closed when it dies.
class descriptor {
 public:
  descriptor() = default;
  explicit descriptor(int fd) : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor();
  int fd() const { return fd_; }

 private:
  int fd_ = -1;
};

/// Where things stand in a segment, in bytes. Words that one end writes often have cache lines of
/// their own.
namespace shm_layout {
inline constexpr std::uint32_t slot_count = 8192;  // frames under way; a step has hundreds
inline constexpr std::size_t magic = 0;
inline constexpr std::size_t published = 64;         // frames that the owner sent
inline constexpr std::size_t bell = 68;              // moves with published, and when it waits
inline constexpr std::size_t returned = 128;         // slots that the owner gave back
inline constexpr std::size_t waits_for_frame = 192;  // threads of the owner
inline constexpr std::size_t waits_for_room = 256;   // threads of the owner
inline constexpr std::size_t room_seen = 260;  // of these: returns that were read before waiting
inline constexpr std::size_t descriptors = 4096;
inline constexpr std::size_t descriptor_bytes = frame_header_bytes + 16;  // offset, slot, reserved
inline constexpr std::size_t returns = descriptors + slot_count * descriptor_bytes;
inline constexpr std::size_t payloads = returns + slot_count * sizeof(std::uint32_t);
}  // namespace shm_layout

/// A mapped segment. Memory is taken from the system as it is touched, not by its size.
class shm_segment {
 public:
  struct created;
  /// One of our own, to write; nobody can map it for writing after this, nor change its size.
  /// Fails: io (the system gives no such memory).
  static result<created> create(std::size_t payload_bytes);
  /// The peer's, to read. Fails: bad_input (not sealed, of no size that a segment has), io.
  static result<shm_segment> map(const descriptor& from);

  shm_segment(shm_segment&& other) noexcept;
  shm_segment& operator=(shm_segment&&) = delete;
  ~shm_segment();

  std::size_t payload_bytes() const { return size_ - shm_layout::payloads; }
  std::byte* at(std::size_t offset) const { return base_ + offset; }
  std::byte* payload(std::size_t offset) const { return base_ + shm_layout::payloads + offset; }

 private:
  shm_segment(std::byte* base, std::size_t size) : base_(base), size_(size) {}
  std::byte* base_ = nullptr;
  std::size_t size_ = 0;
};

struct shm_segment::created {
  shm_segment segment;
  descriptor to_pass;
};

/// Both directions of one link.
struct shm_pair {
  shm_segment own, peer;
};

/// What one rank holds of one link. Thread-safe.
class shm_link : public std::enable_shared_from_this<shm_link> {
 public:
  struct options {
    link_identity identity;
    std::size_t frame_bytes_max = 0;
    std::size_t queue_bytes_max = 0;  // unreturned payloads hold a sender back beyond this
    std::atomic<std::uint64_t>* stale_frames = nullptr;  // counts those of another identity
  };
  /// payload_bytes of a segment for such a link: room for its queue however it is cut up.
  static std::size_t payload_bytes(const options& o);

  shm_link(const options& o, shm_pair memory);
  ~shm_link();

  /// Fails: what end() said, too_large (over frame_bytes_max), broken (the peer broke the rules;
  /// the caller ends the link).
  result<void> send(link_key key, std::span<const std::byte> bytes);

  /// A frame where the peer wrote it; given back when it dies. Bytes may change under the reader,
  /// where the peer is hostile.
  struct frame {
    link_key key{link_tag::probe};
    std::span<const std::byte> bytes;
    std::uint64_t checksum = 0;
    std::shared_ptr<const void> held;
  };
  /// Waits for the frame. Fails: what end() said, once no frame of this key is left (at once, if
  /// cancelled); or as `broken` says.
  result<frame> take(link_key key);

  /// From any thread: all present and later calls return `why`. Frames that arrived can still be
  /// taken, unless it was cancelled.
  void end(const error& why);
  /// Why the link broke by itself: corrupt, bad_input, too_large. The first caller that meets it
  /// says so to whoever ends links.
  std::optional<error> broken() const;

 private:
  using key_order = std::tuple<link_tag, std::uint64_t, std::uint64_t>;
  struct arrived_frame {
    std::uint64_t offset = 0, length = 0, checksum = 0;
    std::uint32_t slot = 0;
  };
  /// Payload memory of our segment: free blocks by offset; the lowest that fits, so that few pages
  /// are ever touched.
  class block_list {
   public:
    explicit block_list(std::size_t bytes) { free_[0] = bytes; }
    std::optional<std::uint64_t> take(std::uint64_t bytes);
    void give(std::uint64_t offset, std::uint64_t bytes);

   private:
    std::map<std::uint64_t, std::uint64_t> free_;  // offset -> length
  };
  struct sent_frame {
    std::uint64_t offset = 0, reserved = 0;
    bool is_out = false;
  };

  // Under mutex_.
  result<void> collect_returns();
  result<void> read_descriptors();
  error fail(errc code, std::string why);

  void give_back(std::uint32_t slot);
  void ring();
  void sleep_on(std::size_t peer_word, std::uint32_t seen, std::size_t own_flag);

  options options_;
  shm_pair memory_;
  mutable std::mutex mutex_;
  std::optional<error> ended_, broken_;
  std::atomic<int> asleep_{0};

  // As sender.
  block_list blocks_;
  std::vector<std::uint32_t> free_slots_;
  std::vector<sent_frame> sent_;  // by slot
  std::uint64_t unreturned_bytes_ = 0;
  std::uint32_t published_ = 0;     // by us
  std::uint32_t returns_read_ = 0;  // of the peer's

  // As receiver.
  std::map<key_order, std::deque<arrived_frame>> inbox_;
  std::uint32_t read_ = 0;        // descriptors of the peer's
  std::uint32_t returned_ = 0;    // by us
  std::uint32_t unreturned_ = 0;  // by us: read, and not given back
};

/// Copies while it computes payload_checksum() of what was copied: one pass over memory, not two.
std::uint64_t copy_with_checksum(std::byte* to, const std::byte* from, std::size_t bytes);

}  // namespace stagecoach
