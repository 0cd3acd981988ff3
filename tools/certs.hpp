// The cluster's certificates: one CA, and a certificate with a role for each party.
//
// Writes DIR/ca.crt + ca.key and DIR/<name>.crt + <name>.key (PEM, EC P-256, SHA-256). Keys have
// mode 0600 and appear whole or not at all; nothing is overwritten unless told. How a certificate
// is judged is config/tls.hpp.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "config/result.hpp"
#include "config/tls.hpp"

namespace stagecoach {

/// Makes DIR (mode 0700 if new) and the CA in it, /O=stagecoach/CN=stagecoach CA.
/// Fails: conflict (it is there already and overwrite is false), io, disk_full.
result<void> make_ca(const std::filesystem::path& dir, int days = 3650, bool overwrite = false);

struct certificate_request {
  tls_role what = tls_role::worker;
  std::string name{};  // CN and file name: letters, digits, '.', '_', '-'; at most 63 bytes
  std::vector<std::string> hosts{};  // DNS names or IP addresses; coordinator and worker always
                                     // also get localhost, 127.0.0.1 and ::1
  int days = 365;                    // may be negative in tests: expired
  bool overwrite = false;
};

/// Makes <name>.crt and <name>.key, signed by the CA in dir; returns the files as TLS options.
/// Fails: not_found (no CA in dir), usage (name, role), conflict (exists), io, disk_full.
result<tls_files> make_certificate(const std::filesystem::path& dir,
                                   const certificate_request& request);

struct certificate_facts {
  tls_role what = tls_role::none;
  std::string name{};  // CN
  std::string issuer;  // CN of the issuer
  std::vector<std::string> hosts{};
  std::int64_t not_after = 0;  // seconds since 1970, UTC
  bool is_ca = false;
  bool is_expired = false;
};

/// Fails: not_found, bad_input (not a PEM certificate).
result<certificate_facts> read_certificate(const std::filesystem::path& file);

}  // namespace stagecoach
