// Links over TCP (and TLS), with their own io thread: listener, dialling, beats, suspicion.
//
// One link_server per worker process, one listening port for all jobs. open() makes the link_set of
// one generation: the lower rank dials the higher, both greet with (protocol, job, generation, plan
// hash, from rank, to rank); a greeting for a generation this worker does not know yet waits a
// bounded time. Each frame: magic, job, generation, plan hash, step, tag, number, length, XXH3-64
// of the payload. Sizes are checked against limits and the set's frame_bytes_max before any
// allocation. Beats every 100 ms from the io thread; a peer silent for 1 s is suspected, a closed
// socket is lost. Between processes of one host frames travel through shared memory (link_shm), to
// which both ends agree over the link that stands; beats and its close stay as they are.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "config/ids.hpp"
#include "config/result.hpp"
#include "config/tls.hpp"
#include "worker/link.hpp"
#include "worker/peer_line.hpp"

namespace stagecoach {

struct link_peer {
  std::string name;  // worker's name, for messages
  std::string host;
  std::uint16_t port = 0;
};

enum class peer_event { lost, suspected, recovered };

class link_server {
 public:
  struct options {
    std::string host = "127.0.0.1";
    std::uint16_t port = 0;  // 0: any free one
    tls_files tls;           // mutual: both ends must show role `worker`
    std::string name;        // of this worker, for its line
    process_id process;      // of this worker; empty: nobody reaches it by a line
    link_choice links = link_choice::automatic;
    std::chrono::milliseconds beat{100};
    std::chrono::milliseconds suspect_after{1000};
    std::chrono::milliseconds connect_within{5000};
    std::size_t queue_bytes_max = 0;  // per peer and way; 0: max(256 MiB, 64 frames)
  };
  static result<std::unique_ptr<link_server>> start(const options& o);
  virtual ~link_server() = default;
  virtual std::uint16_t port() const = 0;

  /// Connects all pairs of the generation; returns when every link stands. The peers' names must be
  /// those in their certificates, under TLS.
  /// Fails: unreachable (names the peer and the last cause), unauthorised (a certificate does not
  /// fit), conflict (a newer generation of the job is open here), cancelled (by abandon). Opening a
  /// generation cancels the set of an older one of that job. on_event is called from the io thread
  /// with the peer's rank and why ("connection reset by peer"); it must not wait for a thread that
  /// destroys the set, since that one waits for a call in progress.
  virtual result<std::unique_ptr<link_set>> open(
      job_id job, generation_id generation, int rank, const std::vector<link_peer>& peers,
      std::size_t frame_bytes_max,
      std::function<void(int peer, peer_event what, std::string why)> on_event) = 0;
  /// Makes an open() in progress for this job return cancelled; a set that stands is left alone.
  virtual void abandon(job_id job) = 0;

  /// Of this worker to all others; lives as long as the server.
  virtual peer_line& line() = 0;

  virtual std::uint64_t stale_frames() const = 0;  // dropped: other identity
  virtual std::uint64_t refused_connections() const = 0;
};

}  // namespace stagecoach
