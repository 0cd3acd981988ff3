// For tests of what comes in at a worker's link port: bytes, a peer without our code, certificates.
#pragma once

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "config/tls.hpp"
#include "worker/link_frame.hpp"

namespace stagecoach {

inline std::vector<std::byte> pattern(std::size_t count, std::uint64_t seed) {
  std::vector<std::byte> bytes(count);
  std::uint64_t state = seed * 0x9e3779b97f4a7c15 + 1;
  for (std::size_t i = 0; i < count; i += 8) {
    state = state * 6364136223846793005 + 1442695040888963407;
    std::memcpy(bytes.data() + i, &state, std::min<std::size_t>(8, count - i));
  }
  return bytes;
}

/// A peer without any of our code but the frame bytes.
class raw_socket {
 public:
  explicit raw_socket(std::uint16_t port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(::connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0);
    timeval limit{10, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  }
  ~raw_socket() { ::close(fd_); }
  raw_socket(const raw_socket&) = delete;

  template <class Bytes>
  bool send(const Bytes& bytes) {
    return ::send(fd_, std::data(bytes), std::size(bytes), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(std::size(bytes));
  }
  std::optional<link_reply> reply() {
    std::array<std::byte, reply_bytes> bytes;
    if (::recv(fd_, bytes.data(), bytes.size(), MSG_WAITALL) != reply_bytes) return {};
    auto r = decode_reply(bytes);
    if (!r) return {};
    return *r;
  }
  std::optional<memory_offer> offer() {
    std::array<std::byte, offer_bytes> bytes;
    if (::recv(fd_, bytes.data(), bytes.size(), MSG_WAITALL) != offer_bytes) return {};
    auto o = decode_offer(bytes);
    if (!o) return {};
    return *o;
  }
  /// True when the other side closes within the socket's 10 s; beats on the way are skipped.
  bool closes() {
    char bytes[4096];
    for (;;) {
      const auto n = ::recv(fd_, bytes, sizeof(bytes), 0);
      if (n == 0) return true;
      if (n < 0) return errno == ECONNRESET;
    }
  }

 private:
  int fd_;
};

/// Comes to an abstract Unix socket with a nonce and, unless -1, a descriptor. True: it was
/// answered with a descriptor.
inline bool unix_visit(const std::array<std::byte, 16>& name,
                       const std::array<std::byte, 16>& nonce, int passed) {
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  std::string path(1, '\0');
  path += "stagecoach-";
  for (const std::byte b : name) path += fmt::format("{:02x}", static_cast<unsigned>(b));
  std::memcpy(to.sun_path, path.data(), path.size());
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  REQUIRE(::connect(fd, reinterpret_cast<sockaddr*>(&to), length) == 0);
  iovec part{const_cast<std::byte*>(nonce.data()), nonce.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (passed >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(head), &passed, sizeof(int));
  }
  REQUIRE(::sendmsg(fd, &message, MSG_NOSIGNAL) == 16);
  std::array<std::byte, 16> said;
  part = {said.data(), said.size()};
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const bool is_answered = ::recvmsg(fd, &message, MSG_WAITALL) == 16;
  if (is_answered) {
    int got = -1;
    REQUIRE(CMSG_FIRSTHDR(&message) != nullptr);
    std::memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    ::close(got);
  }
  ::close(fd);
  return is_answered;
}

/// Makes certificates the way `stagecoach certs` lays them out, in a folder of its own.
class certificate_maker {
 public:
  certificate_maker() {
    folder_ =
        std::filesystem::temp_directory_path() / ("stagecoach-links-" + std::to_string(::getpid()));
    std::filesystem::create_directories(folder_);
  }
  ~certificate_maker() { std::filesystem::remove_all(folder_); }

  struct authority {
    EVP_PKEY* key;
    X509* certificate;
    std::string file;
    ~authority() {
      EVP_PKEY_free(key);
      X509_free(certificate);
    }
  };

  std::unique_ptr<authority> make_authority(const std::string& name) {
    auto a = std::make_unique<authority>();
    a->key = EVP_EC_gen("P-256");
    a->certificate = make(a->key, nullptr, name, "ca", 3600);
    a->file = write_certificate("ca-" + name, a->certificate);
    return a;
  }

  tls_files issue(const authority& by, const std::string& name, const std::string& role,
                  long valid_s = 3600) {
    EVP_PKEY* key = EVP_EC_gen("P-256");
    X509* certificate = make(key, &by, name, role, valid_s);
    const std::string stem = name + "-" + role + std::to_string(++count_);
    tls_files files;
    files.ca = by.file;
    files.certificate = write_certificate(stem, certificate);
    files.key = (folder_ / (stem + ".key")).string();
    FILE* out = std::fopen(files.key.c_str(), "w");
    PEM_write_PrivateKey(out, key, nullptr, nullptr, 0, nullptr, nullptr);
    std::fclose(out);
    X509_free(certificate);
    EVP_PKEY_free(key);
    return files;
  }

 private:
  std::string write_certificate(const std::string& stem, X509* certificate) {
    const std::string file = (folder_ / (stem + ".pem")).string();
    FILE* out = std::fopen(file.c_str(), "w");
    PEM_write_X509(out, certificate);
    std::fclose(out);
    return file;
  }

  X509* make(EVP_PKEY* key, const authority* by, const std::string& name, const std::string& role,
             long valid_s) {
    X509* c = X509_new();
    X509_set_version(c, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(c), ++count_);
    X509_gmtime_adj(X509_getm_notBefore(c), -7200);
    X509_gmtime_adj(X509_getm_notAfter(c), valid_s);
    X509_set_pubkey(c, key);
    X509_NAME* subject = X509_get_subject_name(c);
    const auto add = [&](const char* field, const std::string& text) {
      X509_NAME_add_entry_by_txt(subject, field, MBSTRING_UTF8,
                                 reinterpret_cast<const unsigned char*>(text.c_str()), -1, -1, 0);
    };
    add("O", "stagecoach");
    add("OU", role);
    add("CN", name);
    X509_set_issuer_name(c, by ? X509_get_subject_name(by->certificate) : subject);
    X509V3_CTX scope;
    X509V3_set_ctx(&scope, by ? by->certificate : c, c, nullptr, nullptr, 0);
    const auto extend = [&](int nid, const char* text) {
      X509_EXTENSION* e = X509V3_EXT_conf_nid(nullptr, &scope, nid, text);
      X509_add_ext(c, e, -1);
      X509_EXTENSION_free(e);
    };
    if (by) {
      extend(NID_ext_key_usage, "serverAuth,clientAuth");
      extend(NID_subject_alt_name, "IP:127.0.0.1,DNS:localhost");
    } else {
      extend(NID_basic_constraints, "critical,CA:TRUE");
      extend(NID_key_usage, "critical,keyCertSign,cRLSign");
    }
    X509_sign(c, by ? by->key : key, EVP_sha256());
    return c;
  }

  std::filesystem::path folder_;
  long count_ = 0;
};

}  // namespace stagecoach
