// Manifests and their faults: checkpoint faults 2, 4, 5, 6, 18, 26.
#include "storage/manifest.hpp"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <random>

#include "storage/file.hpp"
#include "storage/hash.hpp"
#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;
namespace fs = std::filesystem;

namespace {

manifest sample(std::uint64_t seq = 12, std::int64_t step = 1200, std::uint64_t incarnation = 2) {
  manifest m;
  m.job = job_id{7};
  m.job_name = "tiny \"한국어\"";
  m.job_identity = "abc";
  m.step = step;
  m.seq = seq;
  m.generation = 3;
  m.plan_hash = 0xfedcba9876543210u;
  m.incarnation = incarnation;
  m.weights_hash = "w";
  m.state_hash = "s";
  m.layout = "stages=2 replicas=1";
  m.bytes = 3;
  m.created_unix_ms = 1'700'000'000'000;
  m.parts = {{"p0.safetensors", "", 1, std::string(32, 'a'), {"h.0.a", "h.0.b"}, {}},
             {"p1.safetensors", "sub", 2, std::string(32, 'b'), {}, {{"w2", "/data/copies"}}}};
  m.extra = {{"loss", "3.25"}, {"chain", "00ff"}};
  return m;
}

std::atomic<int> calls_left{0};
int fail_at_call(std::string_view, const fs::path&) {
  return calls_left.fetch_sub(1) == 1 ? ENOSPC : 0;
}
int die_at_call(std::string_view, const fs::path&) {
  if (calls_left.fetch_sub(1) == 1) ::_exit(99);
  return 0;
}

// The text with a right trailer, so that only the fields decide.
std::string sealed(std::string body) { return body + "xxh3-128:" + content_hash(body) + "\n"; }

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

std::string body_of(const manifest& m) {
  auto text = *format_manifest(m);
  return text.substr(0, text.find("xxh3-128:"));
}

}  // namespace

TEST_CASE(
    "a manifest is read back as written, its text is canonical, and its name tells seq and step") {
  temp_folder folder;
  const auto path = write_manifest(folder / "ckpt", sample());
  REQUIRE(path);
  CHECK(path->filename() == "manifest-000000000012-step-000000001200.json");
  const auto got = read_manifest(*path);
  REQUIRE(got);
  CHECK(*got == sample());
  CHECK(*format_manifest(*got) == test::slurp(*path));
  CHECK(test::names_in(folder / "ckpt").size() == 1);
}

TEST_CASE("a manifest torn at any byte is corrupt") {
  const auto text = *format_manifest(sample());
  for (std::size_t length = 0; length < text.size(); ++length) {
    CAPTURE(length);
    const auto r = parse_manifest(text.substr(0, length), "m");
    REQUIRE_FALSE(r);
    CHECK(r.err().code == errc::corrupt);
  }
  CHECK_FALSE(parse_manifest(text + " ", "m"));
  CHECK_FALSE(parse_manifest(text + text, "m"));
}

TEST_CASE("every flipped bit of a manifest is found") {
  const auto text = *format_manifest(sample());
  for (std::size_t bit = 0; bit < text.size() * 8; ++bit) {
    auto bytes = text;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
    CAPTURE(bit);
    REQUIRE_FALSE(parse_manifest(bytes, "m"));
  }
}

TEST_CASE("a sealed manifest with impossible fields is refused with a reason") {
  const auto body = body_of(sample());
  CHECK(parse_manifest(sealed(body), "m").has_value());
  const std::vector<std::pair<std::string, std::string>> edits = {
      {"\"version\": 1", "\"version\": 2"},
      {"\"step\": 1200", "\"step\": -1"},
      {"\"step\": 1200", "\"step\": 1200.5"},
      {"\"step\": 1200", "\"step\": 9223372036854775808"},
      {"\"seq\": 12", "\"seq\": \"12\""},
      {"\"seq\": 12", "\"seq\": 12,\n \"seq\": 13"},
      {"\"file\": \"p0.safetensors\"", "\"file\": \"../../etc/passwd\""},
      {"\"file\": \"p0.safetensors\"", "\"file\": \"p1.safetensors\""},
      {"\"folder\": \"sub\"", "\"folder\": \"a/../../b\""},
      {"\"folder\": \"/data/copies\"", "\"folder\": \"/data/../copies\""},
      {"\"root_hash\": \"aaaa", "\"root_hash\": \"AAAA"},
      {"\"plan_hash\": \"fe", "\"plan_hash\": \"xx"},
      {"\"loss\": \"3.25\"", "\"loss\": 3.25"},
      {"\"job\": 7", "\"jab\": 7"},
      {"\"parts\": [", "\"parts\": [1, "},
  };
  for (const auto& [from, to] : edits) {
    CAPTURE(to);
    const auto r = parse_manifest(sealed(replaced(body, from, to)), "m");
    REQUIRE_FALSE(r);
    CHECK(r.err().code == errc::bad_input);
  }
  const auto newer =
      parse_manifest(sealed(replaced(body, "\"version\": 1", "\"version\": 2")), "m");
  CHECK(newer.err().message.find("version 2") != std::string::npos);
  std::string deep(100'000, '[');
  CHECK_FALSE(parse_manifest(sealed(deep), "m"));
  CHECK_FALSE(parse_manifest(sealed("{\"parts\":" + deep), "m"));
}

TEST_CASE("a manifest that could not be read back is not written") {
  auto m = sample();
  m.parts[0].file = "../x";
  CHECK_FALSE(format_manifest(m));
  m = sample();
  m.job_name = "\xff";
  CHECK_FALSE(format_manifest(m));
}

TEST_CASE(
    "the same manifest again is a success, another under its name a conflict, a damaged one is "
    "replaced") {
  temp_folder folder;
  const auto path = write_manifest(folder.path(), sample());
  REQUIRE(path);
  CHECK(write_manifest(folder.path(), sample()));
  auto other = sample();
  other.weights_hash = "x";
  CHECK(write_manifest(folder.path(), other).err().code == errc::conflict);
  CHECK(*read_manifest(*path) == sample());
  test::flip_bit(*path, 100);
  CHECK(write_manifest(folder.path(), other));
  CHECK(*read_manifest(*path) == other);
}

TEST_CASE("manifests are listed newest first by incarnation and seq, never by step, name or time") {
  temp_folder folder;
  // Written in an order that is none of the right ones; seq 9 of the later start is newer than
  // seq 30.
  for (const auto& m :
       {sample(9, 500, 3), sample(30, 900, 2), sample(8, 700, 3), sample(2, 950, 1)})
    REQUIRE(write_manifest(folder.path(), m));
  test::spill(folder / "manifest-000000000040-step-000000000001.json", "torn");
  test::spill(folder / "manifest-40-step-1.json", "not one of ours");
  test::spill(folder / "manifest-000000000041-step-000000000001.json",
              *format_manifest(sample(9, 500, 3)));  // under another's name
  test::spill(folder / "manifest-000000000042-step-000000000001.json.0123456789abcdef.tmp", "");
  const auto list = list_manifests(folder.path());
  REQUIRE(list);
  std::vector<std::uint64_t> order;
  for (const auto& m : list->good) order.push_back(m.content.seq);
  CHECK(order == std::vector<std::uint64_t>{9, 8, 30, 2});
  REQUIRE(list->bad.size() == 2);
  CHECK(list->bad[0].seq == 41);
  CHECK(list->bad[1].seq == 40);
  CHECK(list_manifests(folder / "none")->good.empty());
}

TEST_CASE("an error or a kill at any disk call of a manifest's write leaves none, or a whole one") {
  temp_folder folder;
  for (int call = 1;; ++call) {
    CAPTURE(call);
    calls_left = call;
    disk_fault = fail_at_call;
    const auto r = write_manifest(folder.path(), sample());
    disk_fault = nullptr;
    const auto list = list_manifests(folder.path());
    REQUIRE(list);
    CHECK(list->bad.empty());
    if (r) break;
    CHECK(r.err().code == errc::disk_full);
    REQUIRE(call < 20);
  }
  for (int call = 1;; ++call) {
    CAPTURE(call);
    const fs::path where = folder / fmt::format("kill-{}", call);
    const pid_t child = ::fork();
    if (child == 0) {
      calls_left = call;
      disk_fault = die_at_call;
      ::_exit(write_manifest(where, sample()) ? 0 : 1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    const auto list = list_manifests(where);
    REQUIRE(list);
    CHECK(list->bad.empty());
    CHECK(write_manifest(where, sample()));
    if (WEXITSTATUS(status) == 0) break;
    REQUIRE(WEXITSTATUS(status) == 99);
    REQUIRE(call < 20);
  }
}
