// One worker process: control channel, links, trainer, and the actor that joins them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "config/result.hpp"
#include "config/tls.hpp"
#include "worker/fault_injection.hpp"
#include "worker/link.hpp"

namespace stagecoach {

struct worker_options {
  std::string coordinator_host = "127.0.0.1";
  std::uint16_t coordinator_port = 7070;
  std::string name;  // empty: host name and process number
  std::map<std::string, std::string> labels;
  int threads = 1;
  std::string isa;                      // "" = best of this CPU
  std::string link_host = "127.0.0.1";  // address that other workers dial
  std::uint16_t link_port = 0;          // 0: any free one
  link_choice links = link_choice::automatic;
  tls_files tls;
  bool insecure = false;               // allows a plain link port on other than loopback
  std::vector<injected_fault> faults;  // for tests
};

class worker {
 public:
  /// Starts everything; the coordinator may come later.
  /// Fails: usage (a wide link port without TLS), conflict (port in use), bad_input (TLS files).
  static result<std::unique_ptr<worker>> start(const worker_options& options);
  virtual ~worker() = default;

  /// Blocks until stop() or until the coordinator refused this worker for good; then why.
  virtual result<void> wait() = 0;
  /// From any thread or a signal thread: says goodbye and ends wait().
  virtual void stop(const std::string& reason) = 0;
  virtual const std::string& name() const = 0;
};

}  // namespace stagecoach
