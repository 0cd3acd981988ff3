// The line between workers: small control messages and the question "are you there?", beside the
// links.
//
// It lives as long as the worker, whatever generation runs: who asks for a vote after a loss, or
// whether a silent peer is dead, has no links to do it over. Same port and TLS rules as the links.
// A message arrives once and in its sender's order while both processes live, or on_unreachable
// says that it was given up. Questions are answered by the io thread: a process whose trainer is
// busy is alive, a stopped one is silent. Thread-safe; implemented in peer_line_asio.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "config/ids.hpp"

namespace stagecoach {

/// A worker process and where its link port is.
struct peer_address {
  std::string name;  // must be the one in its certificate, under TLS
  process_id process;
  std::string host;
  std::uint16_t port = 0;
};

/// gone: the host refuses the port, or another process answers there.  silent: no answer in time.
enum class peer_verdict { alive, gone, silent };

const char* to_string(peer_verdict verdict);  // "alive", "gone", "silent", as in `probed`

class peer_line {
 public:
  using verdict_sink =
      std::function<void(const peer_address& to, peer_verdict verdict, const std::string& why)>;

  virtual ~peer_line() = default;

  /// Queues a text of at most limits::control_message_bytes_max for a peer; never blocks.
  virtual void send(const peer_address& to, std::string text) = 0;

  /// Asks whether this process is there, over fresh connections (an old one may be dead at one end
  /// only). done is called once, from the io thread, after about `within` at the latest; it must
  /// not block.
  virtual void ask_alive(const peer_address& to, std::chrono::milliseconds within,
                         std::function<void(peer_verdict verdict, std::string why)> done) = 0;

  /// Sets both sinks, called from the io thread; they must not block. on_message names the sender
  /// (under TLS the name is the certificate's). on_unreachable: all that was queued for the peer is
  /// dropped: it is gone, or silent for seconds; alive where a text was over the limit.
  virtual void listen(
      std::function<void(const process_id& from, const std::string& name, std::string text)>
          on_message,
      verdict_sink on_unreachable) = 0;
};

}  // namespace stagecoach
