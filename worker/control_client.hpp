// A worker's WebSocket to the coordinator: connects, keeps connecting, and ticks.
//
// Has its own io thread, so that beats leave in time while compute has every core it was given. A
// lost, refused or frozen coordinator is only ever a reason to try again: training never waits for
// this file. Knows no message; text in, text out.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "config/limits.hpp"
#include "config/result.hpp"
#include "config/tls.hpp"

namespace stagecoach {

class control_client {
 public:
  /// All called on the client's io thread; they must not block and may call any method but stop().
  struct callbacks {
    std::function<void()> on_open;
    std::function<void(std::string)> on_message;
    /// After each on_open that ended, and why. The client is already trying again.
    std::function<void(const std::string&)> on_close;
    /// The coordinator (or its certificate) said no: HTTP 401 or 403 to the upgrade, a certificate
    /// that does not fit. The client goes on trying at its slowest pace, since an operator may mend
    /// it; a caller that wants to end calls stop() from its own thread. Not repeated for the same
    /// reason in a row.
    std::function<void(const error&)> on_refused;
  };

  struct options {
    std::string host = "127.0.0.1";
    std::uint16_t port = 0;
    std::string path = "/control";
    tls_files tls{};         // empty: plain
    std::uint64_t seed = 0;  // of the back-off's jitter; use the process id's bits
    std::chrono::milliseconds back_off_min{100};
    std::chrono::milliseconds back_off_max{2000};
    std::chrono::milliseconds connect_within{5000};  // resolve, connect, TLS and upgrade together
    std::chrono::milliseconds idle{10'000};  // no frame and no pong: reconnects; pings at half
    std::size_t message_bytes_max = limits::control_message_bytes_max;
    std::size_t queue_bytes_max = std::size_t{64} << 20;  // further behind: reconnects
  };

  /// Starts the io thread and the first attempt; a coordinator that is not there is no error here.
  /// Fails: bad_input, not_found (TLS files).
  static result<std::unique_ptr<control_client>> start(const options& o, callbacks c);
  virtual ~control_client() = default;  // as stop()

  /// Queues one text frame; false (dropped) when no channel stands. Any thread.
  virtual bool send(std::string text) = 0;
  virtual bool is_open() const = 0;
  /// Calls `what` every period on the io thread, from one period from now, until stop(). Any
  /// thread.
  virtual void every(std::chrono::milliseconds period, std::function<void()> what) = 0;
  /// Drops the present channel, if any, and connects again at once.
  virtual void reconnect(const std::string& why) = 0;
  /// Sends what is queued (at most 1 s), closes, joins the io thread; no callback runs after it.
  /// Not from a callback.
  virtual void stop() = 0;
};

}  // namespace stagecoach
