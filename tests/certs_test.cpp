#include "tools/certs.hpp"

#include <doctest/doctest.h>
#include <openssl/ssl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>

using namespace stagecoach;

namespace {

struct temp_folder {
  temp_folder() {
    static int count = 0;
    path = std::filesystem::temp_directory_path() /
           ("certs_test." + std::to_string(::getpid()) + "." + std::to_string(count++));
  }
  ~temp_folder() { std::filesystem::remove_all(path); }
  std::filesystem::path path;
};

mode_t mode_of(const std::filesystem::path& file) {
  struct stat facts {};
  REQUIRE(::stat(file.c_str(), &facts) == 0);
  return facts.st_mode & 0777;
}

}  // namespace

TEST_CASE("a CA and its certificates carry role, name, hosts and dates") {
  temp_folder dir;
  REQUIRE(make_ca(dir.path));
  const auto ca = read_certificate(dir.path / "ca.crt");
  REQUIRE(ca);
  CHECK(ca->is_ca);
  CHECK(ca->name.rfind("stagecoach CA ", 0) == 0);
  CHECK(ca->issuer == ca->name);
  CHECK(mode_of(dir.path / "ca.key") == 0600);
  CHECK(mode_of(dir.path) == 0700);

  const auto files = make_certificate(
      dir.path, {.what = tls_role::worker, .name = "node-3", .hosts = {"node-3.lan", "10.0.0.3"}});
  REQUIRE(files);
  CHECK(mode_of(files->key) == 0600);
  const auto facts = read_certificate(files->certificate);
  REQUIRE(facts);
  CHECK(facts->what == tls_role::worker);
  CHECK(facts->name == "node-3");
  CHECK(facts->issuer == ca->name);
  CHECK_FALSE(facts->is_ca);
  CHECK_FALSE(facts->is_expired);
  const auto has = [&facts](const char* host) {
    return std::find(facts->hosts.begin(), facts->hosts.end(), host) != facts->hosts.end();
  };
  CHECK(has("node-3.lan"));
  CHECK(has("10.0.0.3"));
  CHECK(has("localhost"));
  CHECK(has("127.0.0.1"));
  const double days = static_cast<double>(facts->not_after - std::time(nullptr)) / 86400;
  CHECK(days > 364.9);
  CHECK(days < 365.1);
  // OpenSSL's own chain check is the oracle: a context takes the pair only if key and certificate
  // fit.
  const auto context = make_tls_context(*files, tls_side::server);
  REQUIRE(context);
  SSL_CTX_free(*context);
}

TEST_CASE("nothing is overwritten unless told") {
  temp_folder dir;
  REQUIRE(make_ca(dir.path));
  const auto again = make_ca(dir.path);
  REQUIRE_FALSE(again);
  CHECK(again.err().code == errc::conflict);
  const certificate_request request{.what = tls_role::operator_, .name = "ann"};
  REQUIRE(make_certificate(dir.path, request));
  const auto before = std::filesystem::last_write_time(dir.path / "ann.key");
  const auto second = make_certificate(dir.path, request);
  REQUIRE_FALSE(second);
  CHECK(second.err().code == errc::conflict);
  CHECK(std::filesystem::last_write_time(dir.path / "ann.key") == before);
  certificate_request forced = request;
  forced.overwrite = true;
  CHECK(make_certificate(dir.path, forced));
}

TEST_CASE("a bad name, host, role or missing CA is refused before anything is written") {
  temp_folder dir;
  const auto no_ca = make_certificate(dir.path, {.what = tls_role::worker, .name = "w"});
  REQUIRE_FALSE(no_ca);
  CHECK(no_ca.err().code == errc::not_found);
  REQUIRE(make_ca(dir.path));
  for (const char* name : {"", "../x", "a b", "ca", ".hidden", "a,DNS:evil"}) {
    CAPTURE(name);
    const auto refused = make_certificate(dir.path, {.what = tls_role::worker, .name = name});
    REQUIRE_FALSE(refused);
    CHECK(refused.err().code == errc::usage);
  }
  const auto host = make_certificate(
      dir.path, {.what = tls_role::worker, .name = "w", .hosts = {"good,DNS:evil"}});
  REQUIRE_FALSE(host);
  CHECK(host.err().code == errc::usage);
  const auto role = make_certificate(dir.path, {.what = tls_role::none, .name = "w"});
  REQUIRE_FALSE(role);
  CHECK_FALSE(std::filesystem::exists(dir.path / "w.crt"));
}

TEST_CASE("negative days make an expired certificate") {
  temp_folder dir;
  REQUIRE(make_ca(dir.path));
  const auto files =
      make_certificate(dir.path, {.what = tls_role::worker, .name = "old", .days = -1});
  REQUIRE(files);
  const auto facts = read_certificate(files->certificate);
  REQUIRE(facts);
  CHECK(facts->is_expired);
}

TEST_CASE("TLS files that are missing, garbage or do not fit each other name file and reason") {
  temp_folder dir, other;
  REQUIRE(make_ca(dir.path));
  REQUIRE(make_ca(other.path));
  const auto a = make_certificate(dir.path, {.what = tls_role::worker, .name = "a"});
  const auto b = make_certificate(other.path, {.what = tls_role::worker, .name = "b"});
  REQUIRE(a);
  REQUIRE(b);
  tls_files files = *a;
  files.key = b->key;
  const auto unfit = make_tls_context(files, tls_side::client);
  REQUIRE_FALSE(unfit);
  CHECK(unfit.err().code == errc::bad_input);
  CHECK(unfit.err().message.find(files.key) != std::string::npos);

  files = *a;
  files.ca = (dir.path / "none.crt").string();
  const auto missing = make_tls_context(files, tls_side::client);
  REQUIRE_FALSE(missing);
  CHECK(missing.err().code == errc::not_found);

  std::ofstream(dir.path / "garbage.crt") << "-----BEGIN CERTIFICATE-----\nnope\n";
  files = *a;
  files.certificate = (dir.path / "garbage.crt").string();
  const auto garbage = make_tls_context(files, tls_side::client);
  REQUIRE_FALSE(garbage);
  CHECK(garbage.err().code == errc::bad_input);
  CHECK_FALSE(read_certificate(dir.path / "garbage.crt"));

  files = *a;
  files.key.clear();
  const auto half = make_tls_context(files, tls_side::client);
  REQUIRE_FALSE(half);
  CHECK(half.err().code == errc::usage);
}

TEST_CASE("loopback names and addresses are told from look-alikes") {
  for (const char* host : {"127.0.0.1", "127.8.8.8", "localhost", "LocalHost", "::1", "[::1]"}) {
    CAPTURE(host);
    CHECK(is_loopback_host(host));
  }
  for (const char* host : {"", "127.0.0.1.evil.com", "localhost.evil.com", "0.0.0.0",
                           "::", "10.0.0.1", "2130706433", "127.1"}) {
    CAPTURE(host);
    CHECK_FALSE(is_loopback_host(host));
  }
}
