// Links: the direct pipes between the workers of one generation, seen from one rank.
//
// A link_set belongs to one generation of one job; frames of any other identity are dropped and
// counted. Frames between two ranks arrive in order, whole and checksummed, or the link fails.
// send() never blocks on the peer's progress (it queues; the queue is bounded by what a schedule
// may have in flight). cancel() makes every present and later call return `cancelled` at once.
// Thread-safe. Twins: link_memory (threads of one process; tests), link_asio (TCP, TLS; between
// processes of one host shared memory, link_shm).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "config/ids.hpp"
#include "config/result.hpp"

namespace stagecoach {

/// Ids from here on name no job: sets beside those of jobs (a feed's, by its request). Whoever
/// opened one says in its log what a lost link means there.
inline constexpr std::uint64_t beside_jobs = 1ull << 63;

/// What a frame is for. With (step, number) it names one message between two ranks.
enum class link_tag : std::uint32_t {
  activation = 1,  // number = microbatch
  gradient,        // number = microbatch
  leaf_block,      // number = range << 32 | block position
  reduced_range,   // number = range
  tied_gradient,   // number = 0: embed's part, 1: head's part
  vote,            // rank -> 0
  vote_result,     // 0 -> rank
  state,           // number = tensor index * 4 + {0 parameter, 1 moment1, 2 moment2}
  part_copy,       // checkpoint part to a second worker; number = sequence within the file
  probe,           // test use
  weights,         // sharded optimizer: an updated parameter; number = tensor index
  feed,            // a round of a feed (worker/feeder.hpp); step = round
  copy_gradient,   // a stage's reduced gradient to who keeps a copy of it; number = 0
};

struct link_key {
  link_tag tag;
  std::uint64_t step = 0;
  std::uint64_t number = 0;
  bool operator==(const link_key&) const = default;
};

/// What carries a link. It changes no bits.
enum class link_kind { in_process, shared_memory, tcp };
/// For logs, status and JSON: "shared_memory".
const char* to_string(link_kind kind);

/// A frame that was received, where it lies. It stands as long as this does; the link may count it
/// as under way until then.
struct held_frame {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> held;
};

/// automatic: shared memory where both ends are on one host and want it. shared_memory: no link
/// stands without.
enum class link_choice { automatic, tcp, shared_memory };

class link_set {
 public:
  virtual ~link_set() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// Queues a copy of the bytes to a peer.  Fails: cancelled, unreachable (names the peer and the
  /// cause).
  virtual result<void> send(int to, link_key key, std::span<const std::byte> bytes) = 0;

  /// Waits for the frame with this key from a peer and copies it into `into`, whose size must
  /// match. Fails: cancelled, unreachable, bad_input (size differs), corrupt (checksum).
  virtual result<void> receive(int from, link_key key, std::span<std::byte> into) = 0;
  /// The same where the size is the sender's choice; at most bytes_max.
  virtual result<std::vector<std::byte>> receive_any(int from, link_key key,
                                                     std::size_t bytes_max) = 0;

  /// The same without a copy of our own, for a reader that looks at each byte once.
  virtual result<held_frame> receive_held(int from, link_key key, std::size_t bytes) = 0;

  virtual link_kind kind(int peer) const = 0;

  /// Idempotent; from any thread.
  virtual void cancel() = 0;

  /// Bytes moved since creation, for metrics.
  virtual std::uint64_t bytes_sent() const = 0;
  virtual std::uint64_t bytes_received() const = 0;
};

/// N connected sets in one process, by rank.
std::vector<std::unique_ptr<link_set>> make_memory_links(int size);

}  // namespace stagecoach
