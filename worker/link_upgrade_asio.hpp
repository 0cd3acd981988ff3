// How two ends of a standing TCP link bring their shared memory together, where they are on one
// host.
//
//   acceptor -> dialler    over the link: an offer, which names a Unix socket and a nonce
//   dialler  -> acceptor   over that socket: the nonce, and the dialler's segment as a descriptor
//   acceptor -> dialler    the nonce, and its own segment
//
// The socket's name is abstract: it is there for one kernel and one network namespace alone, so who
// reaches it is on this host, and it leaves no file behind. Both ends look at the other's user id;
// the nonce was said over the link, so whoever shows it is who was authenticated there. The link
// itself stays for beats, and closes when a peer dies. io thread only.
#pragma once

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>

#include "config/result.hpp"
#include "worker/link_frame.hpp"
#include "worker/link_shm.hpp"

namespace stagecoach {

/// The acceptor's side: one Unix socket per link server.
class memory_desk {
 public:
  using nonce = std::array<std::byte, 16>;

  explicit memory_desk(boost::asio::io_context& io) : io_(io), acceptor_(io) {}

  /// Fails: io.
  result<void> listen();
  bool is_open() const { return acceptor_.is_open(); }
  void shut_down();
  void tick(std::chrono::steady_clock::time_point now);

  /// From now on whoever shows the offer's nonce gets a segment of this size, once.
  memory_offer offer(std::size_t payload_bytes);
  /// What was brought together for an offer; nothing if nobody came. The offer ends.
  std::optional<shm_pair> take(const memory_offer& offer);

 private:
  using socket = boost::asio::local::stream_protocol::socket;
  struct visitor {
    explicit visitor(boost::asio::io_context& io) : s(io) {}
    socket s;
    std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();
  };
  struct pending {
    std::size_t payload_bytes = 0;
    std::optional<shm_pair> memory;
  };
  void accept();
  void serve(const std::shared_ptr<visitor>& v);

  boost::asio::io_context& io_;
  boost::asio::local::stream_protocol::acceptor acceptor_;
  std::array<std::byte, 16> name_{};
  std::map<nonce, pending> pending_;
  std::list<std::shared_ptr<visitor>> visitors_;  // oldest first
};

/// The dialler's side: done comes once, with the memory or why there is none (unreachable: no such
/// socket here, the ends are on two hosts).
void fetch_memory(boost::asio::io_context& io, const memory_offer& offer, std::size_t payload_bytes,
                  std::function<void(result<shm_pair>)> done);

}  // namespace stagecoach
