#include "tools/certs.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>

#include "config/limits.hpp"

namespace stagecoach {
namespace {

template <auto Free>
struct releaser {
  template <class T>
  void operator()(T* owned) const {
    Free(owned);
  }
};
using key_ptr = std::unique_ptr<EVP_PKEY, releaser<EVP_PKEY_free>>;
using certificate_ptr = std::unique_ptr<X509, releaser<X509_free>>;
using bio_ptr = std::unique_ptr<BIO, releaser<BIO_free>>;

error openssl_error(const char* call) {
  const unsigned long code = ERR_get_error();
  const char* reason = code != 0 ? ERR_reason_error_string(code) : nullptr;
  ERR_clear_error();
  return make_error(errc::unexpected, "OpenSSL {}: {}", call, reason != nullptr ? reason : "?");
}

error file_error(const std::filesystem::path& file, const char* doing) {
  const errc code = errno == ENOSPC || errno == EDQUOT ? errc::disk_full : errc::io;
  return make_error(code, "{} {}: {}", doing, file.string(), std::strerror(errno));
}

/// Whole or not at all: temp file with its mode from the start, fsync, rename.
result<void> write_file(const std::filesystem::path& file, const std::string& text, mode_t mode) {
  const std::filesystem::path temp = file.string() + ".tmp";
  ::unlink(temp.c_str());
  const int descriptor = ::open(temp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  if (descriptor < 0) return file_error(temp, "can't create");
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(descriptor, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const error failed = file_error(temp, "can't write");
      ::close(descriptor);
      ::unlink(temp.c_str());
      return failed;
    }
    done += static_cast<std::size_t>(n);
  }
  const bool synced = ::fsync(descriptor) == 0;
  const error failed = file_error(temp, "can't sync");
  ::close(descriptor);
  if (!synced || ::rename(temp.c_str(), file.c_str()) != 0) {
    const error why = synced ? file_error(file, "can't rename to") : failed;
    ::unlink(temp.c_str());
    return why;
  }
  return ok();
}

std::string take(BIO* memory) {
  char* data = nullptr;
  const long length = BIO_get_mem_data(memory, &data);
  return std::string(data, static_cast<std::size_t>(length));
}

result<void> write_pair(const std::filesystem::path& certificate_file,
                        const std::filesystem::path& key_file, X509* certificate, EVP_PKEY* key) {
  const bio_ptr key_text(BIO_new(BIO_s_mem()));
  const bio_ptr certificate_text(BIO_new(BIO_s_mem()));
  if (!key_text || !certificate_text) return openssl_error("BIO_new");
  if (PEM_write_bio_PrivateKey(key_text.get(), key, nullptr, nullptr, 0, nullptr, nullptr) != 1)
    return openssl_error("PEM_write_bio_PrivateKey");
  if (PEM_write_bio_X509(certificate_text.get(), certificate) != 1)
    return openssl_error("PEM_write_bio_X509");
  std::string secret = take(key_text.get());
  auto written = write_file(key_file, secret, 0600);
  OPENSSL_cleanse(secret.data(), secret.size());
  if (!written) return written;
  return write_file(certificate_file, take(certificate_text.get()), 0644);
}

result<void> check_free(const std::filesystem::path& file, bool overwrite) {
  std::error_code ec;
  if (!overwrite && std::filesystem::exists(file, ec))
    return make_error(errc::conflict,
                      "{} is there already; it was left alone. fix: --force to replace it",
                      file.string());
  return ok();
}

result<key_ptr> new_key() {
  key_ptr key(EVP_EC_gen("P-256"));
  if (!key) return openssl_error("EVP_EC_gen");
  return key;
}

bool add_entry(X509_NAME* name, const char* field, const std::string& text) {
  return X509_NAME_add_entry_by_txt(name, field, MBSTRING_UTF8,
                                    reinterpret_cast<const unsigned char*>(text.data()),
                                    static_cast<int>(text.size()), -1, 0) == 1;
}

bool add_extension(X509* to, X509* issuer, int nid, const std::string& text) {
  X509V3_CTX scope;
  X509V3_set_ctx_nodb(&scope);
  X509V3_set_ctx(&scope, issuer, to, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &scope, nid, text.c_str());
  if (extension == nullptr) return false;
  const bool added = X509_add_ext(to, extension, -1) == 1;
  X509_EXTENSION_free(extension);
  return added;
}

/// Version, serial, dates and public key; the subject, extensions and signature are the caller's.
result<certificate_ptr> blank_certificate(EVP_PKEY* key, int days) {
  certificate_ptr made(X509_new());
  if (!made || X509_set_version(made.get(), X509_VERSION_3) != 1) return openssl_error("X509_new");
  unsigned char serial[16];
  if (RAND_bytes(serial, sizeof(serial)) != 1) return openssl_error("RAND_bytes");
  serial[0] = static_cast<unsigned char>((serial[0] & 0x7f) | 0x40);  // positive, no leading zero
  BIGNUM* number = BN_bin2bn(serial, sizeof(serial), nullptr);
  const bool numbered =
      number != nullptr && BN_to_ASN1_INTEGER(number, X509_get_serialNumber(made.get())) != nullptr;
  BN_free(number);
  if (!numbered) return openssl_error("BN_to_ASN1_INTEGER");
  // An hour back: clocks of other machines may be behind ours.
  const int first_day = std::min(days, 0) - (days < 0 ? 1 : 0);
  if (X509_time_adj_ex(X509_getm_notBefore(made.get()), first_day, -3600, nullptr) == nullptr ||
      X509_time_adj_ex(X509_getm_notAfter(made.get()), days, 0, nullptr) == nullptr)
    return openssl_error("X509_time_adj_ex");
  if (X509_set_pubkey(made.get(), key) != 1) return openssl_error("X509_set_pubkey");
  return made;
}

bool is_address(const std::string& text) {
  unsigned char bytes[16];
  return inet_pton(AF_INET, text.c_str(), bytes) == 1 ||
         inet_pton(AF_INET6, text.c_str(), bytes) == 1;
}

// The text goes into OpenSSL's small extension language, where ',' and ':' would start another
// entry.
bool is_host_name(const std::string& text) {
  return !text.empty() && text.size() <= 253 &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '.' || c == '_';
         });
}

bool is_plain_name(const std::string& text) {
  return !text.empty() && text.size() <= static_cast<std::size_t>(limits::name_bytes_max) &&
         text.front() != '.' && text.front() != '-' && is_host_name(text);
}

result<certificate_ptr> load_certificate(const std::filesystem::path& file) {
  std::error_code ec;
  if (!std::filesystem::exists(file, ec))
    return make_error(errc::not_found, "certificate {} is not there", file.string());
  ERR_clear_error();
  const bio_ptr in(BIO_new_file(file.c_str(), "r"));
  certificate_ptr loaded(in ? PEM_read_bio_X509(in.get(), nullptr, nullptr, nullptr) : nullptr);
  ERR_clear_error();
  if (!loaded) return make_error(errc::bad_input, "{} holds no PEM certificate", file.string());
  return loaded;
}

std::string entry(const X509_NAME* name, int nid) {
  char text[256] = {};
  X509_NAME_get_text_by_NID(const_cast<X509_NAME*>(name), nid, text, sizeof(text));
  return text;
}

}  // namespace

result<void> make_ca(const std::filesystem::path& dir, int days, bool overwrite) {
  std::error_code ec;
  if (!std::filesystem::exists(dir, ec)) {
    std::filesystem::create_directories(dir, ec);
    if (ec) return make_error(errc::io, "can't create folder {}: {}", dir.string(), ec.message());
    ::chmod(dir.c_str(), 0700);
  }
  if (auto r = check_free(dir / "ca.crt", overwrite); !r) return r;
  if (auto r = check_free(dir / "ca.key", overwrite); !r) return r;
  auto key = new_key();
  if (!key) return key.err();
  auto made = blank_certificate(key->get(), days);
  if (!made) return made.err();
  X509* certificate = made->get();
  // A tag in the name, so that a person can tell two clusters' CAs apart.
  unsigned char tag[3];
  if (RAND_bytes(tag, sizeof(tag)) != 1) return openssl_error("RAND_bytes");
  X509_NAME* subject = X509_get_subject_name(certificate);
  if (!add_entry(subject, "O", "stagecoach") ||
      !add_entry(subject, "CN",
                 fmt::format("stagecoach CA {:02x}{:02x}{:02x}", tag[0], tag[1], tag[2])) ||
      X509_set_issuer_name(certificate, subject) != 1 ||
      !add_extension(certificate, certificate, NID_basic_constraints,
                     "critical,CA:TRUE,pathlen:0") ||
      !add_extension(certificate, certificate, NID_key_usage, "critical,keyCertSign,cRLSign") ||
      !add_extension(certificate, certificate, NID_subject_key_identifier, "hash") ||
      X509_sign(certificate, key->get(), EVP_sha256()) == 0)
    return openssl_error("making the CA");
  return write_pair(dir / "ca.crt", dir / "ca.key", certificate, key->get());
}

result<tls_files> make_certificate(const std::filesystem::path& dir,
                                   const certificate_request& request) {
  if (request.what == tls_role::none)
    return make_error(errc::usage,
                      "a certificate needs a role: coordinator, worker, operator or reader");
  if (!is_plain_name(request.name) || request.name == "ca")
    return make_error(
        errc::usage,
        "certificate name \"{}\"; expected 1 to {} letters, digits, '.', '_' or '-', not "
        "\"ca\"",
        request.name, limits::name_bytes_max);
  const tls_files files = {(dir / "ca.crt").string(), (dir / (request.name + ".crt")).string(),
                           (dir / (request.name + ".key")).string()};
  if (auto r = check_free(files.certificate, request.overwrite); !r) return r.err();
  if (auto r = check_free(files.key, request.overwrite); !r) return r.err();
  auto ca = load_certificate(files.ca);
  if (!ca)
    return make_error(ca.err().code, "{}. fix: make a CA first with `stagecoach certs ca`",
                      ca.err().message);
  ERR_clear_error();
  const bio_ptr key_in(BIO_new_file((dir / "ca.key").c_str(), "r"));
  const key_ptr ca_key(key_in ? PEM_read_bio_PrivateKey(key_in.get(), nullptr, nullptr, nullptr)
                              : nullptr);
  if (!ca_key || X509_check_private_key(ca->get(), ca_key.get()) != 1) {
    ERR_clear_error();
    return make_error(errc::not_found, "{} is missing, not readable, or not the key of {}",
                      (dir / "ca.key").string(), files.ca);
  }

  std::vector<std::string> hosts = request.hosts;
  const bool serves = request.what == tls_role::coordinator || request.what == tls_role::worker;
  if (serves)
    for (const char* own : {"localhost", "127.0.0.1", "::1"})
      if (std::find(hosts.begin(), hosts.end(), own) == hosts.end()) hosts.push_back(own);
  std::string names;
  for (const std::string& host : hosts) {
    if (!is_address(host) && !is_host_name(host))
      return make_error(errc::usage, "\"{}\" is neither a host name nor an IP address", host);
    names +=
        fmt::format("{}{}:{}", names.empty() ? "" : ",", is_address(host) ? "IP" : "DNS", host);
  }

  auto key = new_key();
  if (!key) return key.err();
  auto made = blank_certificate(key->get(), request.days);
  if (!made) return made.err();
  X509* certificate = made->get();
  X509_NAME* subject = X509_get_subject_name(certificate);
  if (!add_entry(subject, "O", "stagecoach") ||
      !add_entry(subject, "OU", to_string(request.what)) ||
      !add_entry(subject, "CN", request.name) ||
      X509_set_issuer_name(certificate, X509_get_subject_name(ca->get())) != 1 ||
      !add_extension(certificate, ca->get(), NID_basic_constraints, "critical,CA:FALSE") ||
      !add_extension(certificate, ca->get(), NID_key_usage, "critical,digitalSignature") ||
      // A worker's links listen as well as dial; people's certificates only ask.
      !add_extension(certificate, ca->get(), NID_ext_key_usage,
                     serves ? "serverAuth,clientAuth" : "clientAuth") ||
      !add_extension(certificate, ca->get(), NID_authority_key_identifier, "keyid:always") ||
      (!names.empty() && !add_extension(certificate, ca->get(), NID_subject_alt_name, names)) ||
      X509_sign(certificate, ca_key.get(), EVP_sha256()) == 0)
    return openssl_error("making the certificate");
  if (auto r = write_pair(files.certificate, files.key, certificate, key->get()); !r)
    return r.err();
  return files;
}

result<certificate_facts> read_certificate(const std::filesystem::path& file) {
  auto loaded = load_certificate(file);
  if (!loaded) return loaded.err();
  X509* certificate = loaded->get();
  certificate_facts facts;
  const X509_NAME* subject = X509_get_subject_name(certificate);
  facts.name = entry(subject, NID_commonName);
  facts.what = role_from_string(entry(subject, NID_organizationalUnitName));
  facts.issuer = entry(X509_get_issuer_name(certificate), NID_commonName);
  facts.is_ca = X509_check_ca(certificate) == 1;
  std::tm when{};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &when) == 1) facts.not_after = timegm(&when);
  facts.is_expired = X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0;
  auto* names = static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
  for (int i = 0; i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names, i);
    if (name->type == GEN_DNS) {
      facts.hosts.emplace_back(
          reinterpret_cast<const char*>(ASN1_STRING_get0_data(name->d.dNSName)),
          static_cast<std::size_t>(ASN1_STRING_length(name->d.dNSName)));
    } else if (name->type == GEN_IPADD) {
      const int length = ASN1_STRING_length(name->d.iPAddress);
      char text[INET6_ADDRSTRLEN] = {};
      if (length == 4 || length == 16) {
        inet_ntop(length == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(name->d.iPAddress), text,
                  sizeof(text));
        facts.hosts.emplace_back(text);
      }
    }
  }
  GENERAL_NAMES_free(names);
  ERR_clear_error();
  return facts;
}

}  // namespace stagecoach
