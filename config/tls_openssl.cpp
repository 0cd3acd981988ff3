#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>

#include "config/tls.hpp"

namespace stagecoach {
namespace {

std::string openssl_reason() {
  const unsigned long code = ERR_peek_error();
  const char* reason = code != 0 ? ERR_reason_error_string(code) : nullptr;
  std::string text = reason != nullptr ? reason : "unknown reason";
  ERR_clear_error();
  return text;
}

result<void> check_readable(const std::string& file, const char* what) {
  std::error_code ec;
  if (!std::filesystem::exists(file, ec))
    return make_error(
        errc::not_found,
        "{} {} is not there. fix: check the path, or make one with `stagecoach certs`", what, file);
  std::unique_ptr<BIO, decltype(&BIO_free)> bio(BIO_new_file(file.c_str(), "r"), BIO_free);
  if (!bio) {
    ERR_clear_error();
    return make_error(errc::io, "{} {} can't be read: {}", what, file, std::strerror(errno));
  }
  return ok();
}

std::string name_entry(const X509_NAME* name, int nid) {
  const int at = X509_NAME_get_index_by_NID(name, nid, -1);
  if (at < 0) return {};
  const ASN1_STRING* data = X509_NAME_ENTRY_get_data(X509_NAME_get_entry(name, at));
  unsigned char* utf8 = nullptr;
  const int length = ASN1_STRING_to_UTF8(&utf8, data);
  if (length < 0) {
    ERR_clear_error();
    return {};
  }
  std::string text(reinterpret_cast<char*>(utf8), static_cast<std::size_t>(length));
  OPENSSL_free(utf8);
  // A name goes into logs and comparisons, where a hidden character would deceive.
  const bool plain =
      std::all_of(text.begin(), text.end(), [](unsigned char c) { return c >= 0x20 && c < 0x7f; });
  return plain ? text : std::string();
}

// A failed verification throws the certificate away, so its name is kept here for the log line.
void free_refused_name(void*, void* name, CRYPTO_EX_DATA*, int, long, void*) {
  delete static_cast<std::string*>(name);
}

int refused_name_slot() {
  static const int slot = SSL_get_ex_new_index(0, nullptr, nullptr, nullptr, free_refused_name);
  return slot;
}

int remember_refused(int is_verified, X509_STORE_CTX* store) {
  if (is_verified == 1) return 1;
  auto* connection =
      static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
  const X509* leaf = X509_STORE_CTX_get0_cert(store);
  if (connection != nullptr && leaf != nullptr &&
      SSL_get_ex_data(connection, refused_name_slot()) == nullptr) {
    const std::string name = name_entry(X509_get_subject_name(leaf), NID_commonName);
    SSL_set_ex_data(connection, refused_name_slot(), new std::string(name));
  }
  return 0;
}

std::string verify_reason(long code) {
  switch (code) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return "certificate expired";
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return "certificate not valid yet (check the clocks)";
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
      return "certificate of another CA";
    case X509_V_ERR_INVALID_PURPOSE:
      return "certificate not made for this side of a connection";
    default:
      return X509_verify_cert_error_string(code);
  }
}

}  // namespace

const char* to_string(tls_role r) {
  switch (r) {
    case tls_role::none:
      return "";
    case tls_role::coordinator:
      return "coordinator";
    case tls_role::worker:
      return "worker";
    case tls_role::operator_:
      return "operator";
    case tls_role::reader:
      return "reader";
  }
  return "";
}

tls_role role_from_string(const std::string& text) {
  for (const tls_role r :
       {tls_role::coordinator, tls_role::worker, tls_role::operator_, tls_role::reader})
    if (text == to_string(r)) return r;
  return tls_role::none;
}

result<SSL_CTX*> make_tls_context(const tls_files& files, tls_side side,
                                  bool certificate_required) {
  const bool has_own = !files.certificate.empty() || !files.key.empty();
  if (files.certificate.empty() != files.key.empty())
    return make_error(errc::usage,
                      "a certificate and its key go together; found only the {}. fix: give both",
                      files.key.empty() ? "certificate" : "key");
  if (side == tls_side::server && !has_own)
    return make_error(errc::usage,
                      "a TLS port needs its own certificate and key. fix: make them with "
                      "`stagecoach certs`");
  if (auto r = check_readable(files.ca, "CA file"); !r) return r.err();
  if (has_own) {
    if (auto r = check_readable(files.certificate, "certificate"); !r) return r.err();
    if (auto r = check_readable(files.key, "key file"); !r) return r.err();
  }
  ERR_clear_error();
  std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> made(
      SSL_CTX_new(side == tls_side::server ? TLS_server_method() : TLS_client_method()),
      SSL_CTX_free);
  if (!made) return make_error(errc::unexpected, "SSL_CTX_new: {}", openssl_reason());
  SSL_CTX* context = made.get();
  SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
  // No resumption: every connection shows its certificate, so an expired one ends with its
  // connection.
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_num_tickets(context, 0);
  if (SSL_CTX_load_verify_locations(context, files.ca.c_str(), nullptr) != 1)
    return make_error(errc::bad_input, "CA file {}: {}; expected a PEM certificate", files.ca,
                      openssl_reason());
  if (side == tls_side::server) {
    if (STACK_OF(X509_NAME)* names = SSL_load_client_CA_file(files.ca.c_str()))
      SSL_CTX_set_client_CA_list(context, names);
  }
  if (has_own) {
    if (SSL_CTX_use_certificate_chain_file(context, files.certificate.c_str()) != 1)
      return make_error(errc::bad_input, "certificate {}: {}; expected PEM", files.certificate,
                        openssl_reason());
    if (SSL_CTX_use_PrivateKey_file(context, files.key.c_str(), SSL_FILETYPE_PEM) != 1)
      return make_error(
          errc::bad_input,
          "key {} does not fit certificate {}: {}; expected its PEM key without a password",
          files.key, files.certificate, openssl_reason());
  }
  int mode = SSL_VERIFY_PEER;
  if (side == tls_side::server && certificate_required) mode |= SSL_VERIFY_FAIL_IF_NO_PEER_CERT;
  SSL_CTX_set_verify(context, mode, remember_refused);
  ERR_clear_error();
  return made.release();
}

peer_identity peer_of(const SSL* connection) {
  const X509* leaf = SSL_get0_peer_certificate(connection);
  if (leaf == nullptr || SSL_get_verify_result(connection) != X509_V_OK) return {};
  const X509_NAME* subject = X509_get_subject_name(leaf);
  peer_identity who;
  who.name = name_entry(subject, NID_commonName);
  if (!who.name.empty() && name_entry(subject, NID_organizationName) == "stagecoach")
    who.what = role_from_string(name_entry(subject, NID_organizationalUnitName));
  return who;
}

bool peer_has_host(const SSL* connection, const std::string& host) {
  X509* leaf = SSL_get0_peer_certificate(connection);
  if (leaf == nullptr || host.empty()) return false;
  std::string bare = host;
  if (bare.front() == '[' && bare.back() == ']') bare = bare.substr(1, bare.size() - 2);
  unsigned char bytes[16];
  const bool is_address =
      inet_pton(AF_INET, bare.c_str(), bytes) == 1 || inet_pton(AF_INET6, bare.c_str(), bytes) == 1;
  const int found = is_address ? X509_check_ip_asc(leaf, bare.c_str(), 0)
                               : X509_check_host(leaf, bare.data(), bare.size(),
                                                 X509_CHECK_FLAG_NEVER_CHECK_SUBJECT |
                                                     X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS,
                                                 nullptr);
  ERR_clear_error();
  return found == 1;
}

std::string tls_failure(const SSL* connection, const std::string& said) {
  ERR_clear_error();
  const long verified = connection != nullptr ? SSL_get_verify_result(connection) : X509_V_OK;
  if (verified != X509_V_OK) {
    std::string reason = verify_reason(verified);
    const auto* name =
        static_cast<const std::string*>(SSL_get_ex_data(connection, refused_name_slot()));
    if (name != nullptr && !name->empty()) reason += " (CN " + *name + ")";
    return reason;
  }
  struct word {
    const char* theirs;
    const char* ours;
  };
  // In OpenSSL's words an alert that the other side sent is "... alert ...".
  static constexpr word words[] = {
      {"peer did not return a certificate", "no certificate shown"},
      {"alert certificate required", "the peer wants a certificate and got none"},
      {"alert certificate expired", "the peer says that our certificate expired"},
      {"alert unknown ca", "the peer says that our certificate is of another CA"},
      {"alert bad certificate", "the peer refused our certificate"},
      {"alert handshake failure", "the peer refused the handshake"},
      {"http request", "plain HTTP on a TLS port"},
      {"wrong version number", "the peer does not speak TLS"},
      {"stream truncated", "connection closed during the handshake"},
      {"End of file", "connection closed during the handshake"},
  };
  for (const word& w : words)
    if (said.find(w.theirs) != std::string::npos) return w.ours;
  return said;
}

bool is_loopback_host(const std::string& host) {
  std::string bare = host;
  if (bare.size() > 2 && bare.front() == '[' && bare.back() == ']')
    bare = bare.substr(1, bare.size() - 2);
  std::string small = bare;
  for (char& c : small)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  if (small == "localhost") return true;
  unsigned char bytes[16];
  if (inet_pton(AF_INET, bare.c_str(), bytes) == 1) return bytes[0] == 127;
  if (inet_pton(AF_INET6, bare.c_str(), bytes) == 1) {
    const in6_addr loopback = IN6ADDR_LOOPBACK_INIT;
    return std::memcmp(bytes, &loopback, sizeof(bytes)) == 0;
  }
  return false;
}

}  // namespace stagecoach
