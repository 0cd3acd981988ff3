// The coordinator as a whole: state folder, machines, storage threads and the port, in one object.
//
// start() opens everything and answers from then on; workers attach by themselves. stop() (or the
// destructor) closes the port and the store; workers go on training and attach to the next
// coordinator on this state folder.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "config/result.hpp"
#include "config/tls.hpp"
#include "coordinator/cluster_machine.hpp"

namespace stagecoach {

struct coordinator_options {
  std::filesystem::path state;  // made if missing
  std::string host = "127.0.0.1";
  std::uint16_t port = 0;  // 0: any free one
  tls_files tls;           // empty: plain, loopback only
  std::string token;       // read-only bearer token; only over TLS
  bool insecure = false;   // allows a plain port on other than loopback
  bool fsync = true;       // false: nothing is synced; for tests only
  detection rules;
  fairness shares;
};

class coordinator {
 public:
  using options = coordinator_options;

  /// When it returns, the new incarnation is durable and the port is open.
  /// Fails: conflict (another process holds the state folder, or the port is taken), io (read-only
  /// folder), disk_full, usage, bad_input, not_found (TLS files), corrupt (store-id file).
  static result<std::unique_ptr<coordinator>> start(const options& o);
  virtual ~coordinator() = default;

  virtual std::uint16_t port() const = 0;
  virtual std::uint64_t incarnation() const = 0;
  /// What was found and done while the store was opened; empty when all was well.
  virtual const std::vector<std::string>& store_notes() const = 0;
  virtual void stop() = 0;
};

}  // namespace stagecoach
