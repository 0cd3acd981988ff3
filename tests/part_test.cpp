// Parts on disk and their faults: checkpoint faults 1, 4, 5, 6, 7, 22.
#include "storage/part.hpp"

#include <doctest/doctest.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>

#include "storage/file.hpp"
#include "storage/hash.hpp"
#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;
namespace fs = std::filesystem;

namespace {

struct sample {
  // 3 M values are 12 MB: three chunks, the last one short; "b" crosses a chunk's border.
  std::vector<float> a = std::vector<float>(1'000'003), b = std::vector<float>(1'500'000),
                     c = std::vector<float>(7), d = std::vector<float>(500'001);
  explicit sample(unsigned seed = 1) {
    std::mt19937 random(seed);
    for (auto* v : {&a, &b, &c, &d})
      for (auto& x : *v) x = static_cast<float>(random()) * 1e-9f;
  }
  std::vector<tensor_view> views() const {
    return {{"h.0.a", {1'000'003}, a.data()},
            {"h.0.b", {1000, 1500}, b.data()},
            {"empty", {0}, nullptr},
            {"h.0.c", {7}, c.data()},
            {"opt.exp_avg.d", {500'001}, d.data()}};
  }
};

const std::map<std::string, std::string> metadata = {{"job", "7"}, {"step", "100"}};

std::atomic<int> calls_left{0};
std::atomic<int> fault_code{0};
int fail_at_call(std::string_view, const fs::path&) {
  return calls_left.fetch_sub(1) == 1 ? fault_code.load() : 0;
}
int die_at_call(std::string_view, const fs::path&) {
  if (calls_left.fetch_sub(1) == 1) ::_exit(99);
  return 0;
}
struct fault_guard {
  ~fault_guard() { disk_fault = nullptr; }
};

}  // namespace

TEST_CASE("a part is read back bit for bit: all, some, and ranges over chunk borders") {
  temp_folder folder;
  const sample s;
  const auto info = write_part(folder.path(), "p.safetensors", metadata, s.views());
  REQUIRE(info);
  CHECK(info->bytes == fs::file_size(folder / "p.safetensors"));
  CHECK(info->tensors.size() == 5);
  CHECK(info->root_hash.size() == 32);
  CHECK(test::names_in(folder.path()) == std::vector<std::string>{"p.safetensors"});
  CHECK(verify_part(folder / "p.safetensors", check_depth::deep, info->root_hash).has_value());

  const auto all = read_part(folder / "p.safetensors", {}, info->root_hash);
  REQUIRE(all);
  CHECK(all->info == *info);
  CHECK(all->metadata.at("job") == "7");
  CHECK(all->tensors[1].shape == std::vector<std::int64_t>{1000, 1500});
  CHECK(all->tensors[0].data == s.a);
  CHECK(all->tensors[1].data == s.b);
  CHECK(all->tensors[3].data == s.c);
  CHECK(all->tensors[4].data == s.d);

  const auto some = read_part(folder / "p.safetensors", {"h.0.c"});
  REQUIRE(some);
  CHECK(some->tensors.at(0).data == s.c);
  CHECK(read_part(folder / "p.safetensors", {"h.9"}).err().code == errc::not_found);

  auto part = part_file::open(folder / "p.safetensors");
  REQUIRE(part);
  std::mt19937 random(3);
  for (int trial = 0; trial < 50; ++trial) {
    const auto first = static_cast<std::int64_t>(random() % s.b.size());
    const auto count = static_cast<std::int64_t>(random() % (s.b.size() - first + 1));
    std::vector<float> got(count);
    REQUIRE(part->read("h.0.b", got.data(), first, count));
    CHECK(std::equal(got.begin(), got.end(), s.b.begin() + first));
  }
  float x = 0;
  CHECK(part->read("h.0.c", &x, 7, 1).err().code == errc::bad_input);
  CHECK(part->read("h.0.c", &x, -1, 1).err().code == errc::bad_input);
}

TEST_CASE("a part is a plain safetensors file whose data starts on a page") {
  temp_folder folder;
  const sample s;
  REQUIRE(write_part(folder.path(), "p.safetensors", metadata, s.views()));
  auto file = safetensors_file::open(folder / "p.safetensors");
  REQUIRE(file);
  CHECK(file->header().data_begin % 4096 == 0);
  std::vector<float> got(7);
  REQUIRE(file->read_floats(*file->header().find("h.0.c"), got.data(), 0, 7));
  CHECK(got == s.c);
}

TEST_CASE(
    "300 random bit flips anywhere in a part: every one is found, and no reader gets other "
    "values") {
  temp_folder folder;
  // Small, so that the header is a fair share of the file.
  std::vector<float> w(3000);
  std::mt19937 random(5);
  for (auto& x : w) x = static_cast<float>(random());
  const auto info = write_part(folder.path(), "p.safetensors", metadata,
                               {{"w", {3000}, w.data()}, {"v", {10}, w.data()}});
  REQUIRE(info);
  const auto bit_count = fs::file_size(folder / "p.safetensors") * 8;
  for (int trial = 0; trial < 300; ++trial) {
    const auto bit = random() % bit_count;
    CAPTURE(bit);
    test::flip_bit(folder / "p.safetensors", bit);
    const auto before = test::slurp(folder / "p.safetensors");
    // Without the manifest's root hash, too.
    const auto found = verify_part(folder / "p.safetensors", check_depth::deep);
    REQUIRE_FALSE(found);
    CHECK(found.err().code == errc::corrupt);
    CHECK_FALSE(read_part(folder / "p.safetensors"));
    CHECK(test::slurp(folder / "p.safetensors") == before);  // left alone
    test::flip_bit(folder / "p.safetensors", bit);
  }
}

TEST_CASE("every bit of a part's header is covered by the quick check") {
  temp_folder folder;
  const float v = 1;
  REQUIRE(write_part(folder.path(), "p.safetensors", metadata, {{"w", {}, &v}}));
  REQUIRE(fs::file_size(folder / "p.safetensors") == 4100);
  for (std::size_t bit = 0; bit < 4096 * 8; bit += 7) {
    CAPTURE(bit);
    test::flip_bit(folder / "p.safetensors", bit);
    REQUIRE_FALSE(verify_part(folder / "p.safetensors", check_depth::quick));
    test::flip_bit(folder / "p.safetensors", bit);
  }
  CHECK(verify_part(folder / "p.safetensors", check_depth::deep).has_value());
}

TEST_CASE("a part torn at any prefix, or never finished, is refused") {
  temp_folder folder;
  std::vector<float> w(20'000, 1.0f);
  REQUIRE(write_part(folder.path(), "p.safetensors", metadata, {{"w", {20'000}, w.data()}}));
  const auto good = test::slurp(folder / "p.safetensors");
  const auto refuse = [&](const std::string& bytes) {
    test::spill(folder / "p.safetensors", bytes);
    const auto r = verify_part(folder / "p.safetensors", check_depth::quick);
    REQUIRE_FALSE(r);
    CHECK(r.err().code == errc::corrupt);
  };
  for (std::size_t length = 0; length < good.size(); length += 1021) refuse(good.substr(0, length));
  refuse(good.substr(0, good.size() - 1));
  refuse(good + "x");
  // As a writer leaves it before its last step: all data, no header.
  refuse(std::string(4096, '\0') + good.substr(4096));
  refuse(std::string(good.size(), '\0'));
}

TEST_CASE("damage names the chunk, and ranges outside it can still be read") {
  temp_folder folder;
  const sample s;
  REQUIRE(write_part(folder.path(), "p.safetensors", metadata, s.views()));
  auto part = part_file::open(folder / "p.safetensors");
  REQUIRE(part);
  const auto at = part->header().data_begin + part_chunk_bytes + 5;
  test::flip_bit(folder / "p.safetensors", at * 8);
  part = part_file::open(folder / "p.safetensors");
  REQUIRE(part);
  std::vector<float> got(1'500'000);
  const auto r = part->read("h.0.b", got.data(), 0, 1'500'000);
  REQUIRE_FALSE(r);
  CHECK(r.err().code == errc::corrupt);
  CHECK(r.err().message.find("chunk 1 ") != std::string::npos);
  CHECK(part->read("h.0.a", got.data(), 0, 1'000'003));
  CHECK(part->read("h.0.c", got.data(), 0, 7));
}

TEST_CASE("an older part in the place of the right one is refused by the manifest's root hash") {
  temp_folder folder;
  const float one = 1, two = 2;
  const auto old = write_part(folder / "old", "p.safetensors", metadata, {{"w", {}, &one}});
  const auto now = write_part(folder / "now", "p.safetensors", metadata, {{"w", {}, &two}});
  REQUIRE(old);
  REQUIRE(now);
  CHECK(old->root_hash != now->root_hash);
  CHECK(verify_part(folder.path() / "old" / "p.safetensors", check_depth::quick, now->root_hash)
            .err()
            .code == errc::corrupt);
}

TEST_CASE(
    "the same part again is a success, another one under its name a conflict, a damaged one is "
    "replaced") {
  temp_folder folder;
  const float one = 1, two = 2;
  const auto first = write_part(folder.path(), "p.safetensors", metadata, {{"w", {}, &one}});
  REQUIRE(first);
  const auto again = write_part(folder.path(), "p.safetensors", metadata, {{"w", {}, &one}});
  REQUIRE(again);
  CHECK(*again == *first);
  const auto other = write_part(folder.path(), "p.safetensors", metadata, {{"w", {}, &two}});
  REQUIRE_FALSE(other);
  CHECK(other.err().code == errc::conflict);
  CHECK(verify_part(folder / "p.safetensors", check_depth::deep, first->root_hash).has_value());
  test::flip_bit(folder / "p.safetensors", 4097 * 8);
  CHECK(write_part(folder.path(), "p.safetensors", metadata, {{"w", {}, &two}}));
  CHECK(test::names_in(folder.path()).size() == 1);
  CHECK_FALSE(write_part(folder.path(), "../p", metadata, {}));
  CHECK_FALSE(write_part(folder.path(), "", metadata, {}));
}

TEST_CASE("an error at any disk call leaves no visible part, no rest, and the next try succeeds") {
  temp_folder folder;
  const sample s;
  const fault_guard guard;
  for (const int code : {ENOSPC, EIO, EDQUOT}) {
    int failures = 0;
    for (int call = 1;; ++call) {
      CAPTURE(code);
      CAPTURE(call);
      calls_left = call;
      fault_code = code;
      disk_fault = fail_at_call;
      const auto r = write_part(folder.path(), "p.safetensors", metadata, s.views());
      disk_fault = nullptr;
      if (r) break;
      ++failures;
      CHECK(r.err().code == (code == EIO ? errc::io : errc::disk_full));
      CHECK(test::names_in(folder.path()).empty());
      REQUIRE(call < 100);
    }
    CHECK(failures >= 8);  // create, reserve, 3 chunks, header, fsync, rename, fsync of the folder
    CHECK(verify_part(folder / "p.safetensors", check_depth::deep).has_value());
    fs::remove(folder / "p.safetensors");
  }
}

TEST_CASE("a process killed at any disk call leaves a whole part or only a temporary file") {
  temp_folder folder;
  const sample s;
  for (int call = 1;; ++call) {
    CAPTURE(call);
    const fs::path where = folder / fmt::format("kill-{}", call);
    const pid_t child = ::fork();
    if (child == 0) {
      calls_left = call;
      disk_fault = die_at_call;
      ::_exit(write_part(where, "p.safetensors", metadata, s.views()) ? 0 : 1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    if (fs::exists(where / "p.safetensors"))
      CHECK(verify_part(where / "p.safetensors", check_depth::deep).has_value());
    for (const auto& name : test::names_in(where))
      if (name != "p.safetensors") CHECK(name.ends_with(".tmp"));
    CHECK(write_part(where, "p.safetensors", metadata, s.views()));
    fs::remove_all(where);
    if (WEXITSTATUS(status) == 0) break;
    REQUIRE(WEXITSTATUS(status) == 99);
    REQUIRE(call < 100);
  }
}

TEST_CASE(
    "a disk that is really full: disk_full, nothing left behind, and a smaller part still fits") {
  temp_folder folder;
  const fs::path disk = folder / "disk";
  fs::create_directory(disk);
  if (::mount("none", disk.c_str(), "tmpfs", 0, "size=4m") != 0) {
    MESSAGE("skipped: this user can't mount a small file system");
    return;
  }
  const sample s;
  const auto r = write_part(disk, "p.safetensors", metadata, s.views());
  REQUIRE_FALSE(r);
  CHECK(r.err().code == errc::disk_full);
  CHECK(r.err().message.find("fix: free space") != std::string::npos);
  CHECK(test::names_in(disk).empty());
  CHECK(write_part(disk, "p.safetensors", metadata, {{"c", {7}, s.c.data()}}));
  CHECK(*free_bytes(disk) < (4u << 20));
  ::umount(disk.c_str());
}

TEST_CASE("a copy that arrives in pieces is checked before it is visible") {
  temp_folder folder;
  const sample s;
  const auto info = write_part(folder / "from", "p.safetensors", metadata, s.views());
  REQUIRE(info);
  auto bytes = test::slurp(folder.path() / "from" / "p.safetensors");
  const auto send = [&](const std::string& all, std::string_view root) -> result<part_info> {
    auto copy = part_copy_writer::begin(folder / "to", "p.safetensors", all.size());
    if (!copy) return copy.err();
    for (std::size_t at = 0; at < all.size(); at += 777'777)
      if (auto r = copy->append(all.data() + at, std::min<std::size_t>(777'777, all.size() - at));
          !r)
        return r.err();
    return copy->finish(root);
  };
  auto damaged = bytes;
  damaged[6'000'000] ^= 1;
  CHECK(send(damaged, info->root_hash).err().code == errc::corrupt);
  CHECK(send(bytes.substr(0, 5'000'000), info->root_hash).err().code == errc::corrupt);
  CHECK(test::names_in(folder / "to").empty());
  const auto copied = send(bytes, info->root_hash);
  REQUIRE(copied);
  CHECK(*copied == *info);
  CHECK(test::slurp(folder.path() / "to" / "p.safetensors") == bytes);
  auto copy = part_copy_writer::begin(folder / "to", "q.safetensors", 3);
  REQUIRE(copy);
  CHECK(copy->append("1234", 4).err().code == errc::bad_input);
}

TEST_CASE("part names sort, tell generation and seq, and nothing else is taken for one") {
  const part_name name{.generation = 3, .seq = 12, .stage = 2, .slice = 1};
  CHECK(part_file_name(name) == "g000003-q000000000012-s002-r001.safetensors");
  CHECK(parse_part_file_name(part_file_name(name)) == name);
  CHECK(parse_part_file_name(temporary_name(part_file_name(name)).string()) == name);
  part_name planned = name;
  planned.plan = 0xabc;
  CHECK(part_file_name(planned) == "g000003-q000000000012-s002-r001-p0000000000000abc.safetensors");
  CHECK(parse_part_file_name(part_file_name(planned)) == planned);
  for (const char* other :
       {"", "x", "g3-q12-s2-r1.safetensors", "g000003-q000000000012-s002-r001.safetensors.bak",
        "g000003-q000000000012-s002-r001.safetensorsx",
        "g000003-q000000000012-s002-r001-pabc.safetensors",
        "manifest-000000000001-step-000000000001.json"})
    CHECK_FALSE(parse_part_file_name(other));
}

TEST_CASE("hashes are XXH3 in big-endian hex, whole or in pieces") {
  // Values of xxhsum -H2 / -H3 (xxHash 0.8.1).
  CHECK(content_hash("") == "99aa06d3014798d86001c324468d497f");
  CHECK(content_hash("a") == "a96faf705af16834e6c632b61e964e1f");
  CHECK(hex16(chunk_hash("", 0)) == "2d06800538d394c2");
  content_hasher h;
  h.update("ab", 2);
  h.update("c", 1);
  CHECK(h.text() == content_hash("abc"));
  temp_folder folder;
  test::spill(folder / "f", "abc");
  CHECK(hash_file(folder / "f")->hash == content_hash("abc"));
  CHECK(hash_file(folder / "f")->bytes == 3);
}
