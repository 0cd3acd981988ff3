// TLS: the files of one identity, the roles a certificate may carry, and how both ends check them.
//
// One implementation (config/tls_openssl.cpp) serves the gateway, the control client, the HTTP
// client and the links, so that a peer is judged by the same rules on every port. Owns no socket.
// A certificate says O=stagecoach, OU=<role>, CN=<name>; hosts are in its subject alternative
// names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config/result.hpp"

// OpenSSL's own forward declarations: its headers stay out of ours.
typedef struct ssl_st SSL;
typedef struct ssl_ctx_st SSL_CTX;

namespace stagecoach {

/// Files of one identity (PEM); empty = no TLS. A client with a bearer token needs only `ca`.
struct tls_files {
  std::string ca, certificate, key;
  bool empty() const { return ca.empty(); }
};

/// What a certificate of our CA allows; `none`: no certificate, or an organisational unit we don't
/// know.
enum class tls_role { none, coordinator, worker, operator_, reader };

/// "coordinator", "worker", "operator", "reader", "" for none.
const char* to_string(tls_role r);
/// The role of that name; none where there is no such role.
tls_role role_from_string(const std::string& text);

enum class tls_side { server, client };

/// A context for one side: TLS 1.2 or newer, the CA file as the only trust anchor, own certificate
/// and key loaded (both may be empty on a client), peer verification on. A server asks for a
/// certificate and takes a peer without one only if `certificate_required` is false. The caller
/// owns the context (SSL_CTX_free, or hand it to asio::ssl::context's constructor). Fails:
/// not_found (a file is missing), io (not readable), bad_input (not PEM, key does not belong to the
/// certificate), usage (certificate without key); names file, reason and fix. Whether the
/// certificate has expired is the peer's to judge: a wrong clock here must not stop a restart.
result<SSL_CTX*> make_tls_context(const tls_files& files, tls_side side,
                                  bool certificate_required = true);

/// Who is at the other end of a finished handshake; role none and an empty name if it showed
/// nothing.
struct peer_identity {
  tls_role what = tls_role::none;
  std::string name;  // CN
};
peer_identity peer_of(const SSL* connection);

/// True if the peer's certificate names this host name or IP address in its subject alternative
/// names.
bool peer_has_host(const SSL* connection, const std::string& host);

/// Why the handshake of this connection failed, in plain words with the peer's CN: "certificate
/// expired (CN worker-3)", "certificate of another CA", "no certificate shown". `said` is the
/// library's own message, used where the verification has nothing to say. Empties this thread's
/// OpenSSL error queue, whose rest would be taken for an error of the next connection.
std::string tls_failure(const SSL* connection, const std::string& said);

/// True for 127.0.0.0/8, ::1 (with or without brackets) and "localhost".
bool is_loopback_host(const std::string& host);

}  // namespace stagecoach
