// Both stores behind one interface, and what RocksDB does with damage: checkpoint faults 3, 4, 6,
// 10, 14.
#include "storage/kv_rocksdb.hpp"

#include <doctest/doctest.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <random>

#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;
namespace fs = std::filesystem;

namespace {

std::string key_of(int i) { return fmt::format("row/{:06}", i); }

std::vector<std::string> keys_with(const kv& store, std::string_view prefix,
                                   std::string_view first = {}) {
  std::vector<std::string> keys;
  REQUIRE(store.scan(
      prefix,
      [&](std::string_view key, std::string_view) {
        keys.emplace_back(key);
        return true;
      },
      first));
  return keys;
}

// A store whose commits are in the log alone, as a killed process leaves it: written by a child
// that exits without closing.
void leave_a_log_of(const fs::path& path, int commit_count) {
  const pid_t child = ::fork();
  if (child == 0) {
    auto store = open_kv_rocksdb(path, {.create_if_missing = true});
    if (!store) ::_exit(2);
    for (int i = 0; i < commit_count; ++i)
      if (!(*store)->write({kv_write::put(key_of(i), std::string(100, 'v')),
                            kv_write::put("last", std::to_string(i))},
                           durability::synced))
        ::_exit(3);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  REQUIRE(WEXITSTATUS(status) == 0);
}

fs::path file_ending(const fs::path& folder, const std::string& end) {
  fs::path found;
  for (const auto& name : test::names_in(folder))
    if (name.ends_with(end) && !name.starts_with("LOG")) found = folder / name;
  return found;
}

// Rows must be a prefix of the commits, each whole.
int check_prefix(const kv& store) {
  const auto rows = keys_with(store, "row/");
  for (std::size_t i = 0; i < rows.size(); ++i) CHECK(rows[i] == key_of(static_cast<int>(i)));
  const auto last = store.get("last");
  REQUIRE(last);
  if (rows.empty())
    CHECK(!last->has_value());
  else
    CHECK(last->value() == std::to_string(rows.size() - 1));
  return static_cast<int>(rows.size());
}

}  // namespace

TEST_CASE(
    "a store puts, erases, scans a prefix in order, and sees one moment (memory and RocksDB)") {
  temp_folder folder;
  std::unique_ptr<kv> store;
  SUBCASE("memory") { store = make_kv_memory(); }
  SUBCASE("rocksdb") {
    auto opened = open_kv_rocksdb(folder / "db", {.create_if_missing = true});
    REQUIRE(opened);
    store = std::move(*opened);
  }
  REQUIRE(store->write({kv_write::put("a/2", "two"), kv_write::put("a/1", "one"),
                        kv_write::put("b/1", "x"), kv_write::put(std::string("a/\xff\0z", 5), "")},
                       durability::synced));
  CHECK(store->get("a/1")->value() == "one");
  CHECK_FALSE(store->get("a/3")->has_value());
  CHECK(keys_with(*store, "a/") ==
        std::vector<std::string>{"a/1", "a/2", std::string("a/\xff\0z", 5)});
  CHECK(keys_with(*store, "a/", "a/2").size() == 2);
  CHECK(keys_with(*store, "").size() == 4);
  CHECK(keys_with(*store, "c").empty());
  REQUIRE(
      store->write({kv_write::erase("a/1"), kv_write::put("a/1", "again"), kv_write::erase("a/2")},
                   durability::buffered));
  CHECK(store->get("a/1")->value() == "again");
  CHECK_FALSE(store->get("a/2")->has_value());
  int seen = 0;
  REQUIRE(store->scan("", [&](std::string_view key, std::string_view) {
    // The visitor may write; what it adds is not visited.
    CHECK(store->write({kv_write::put(std::string(key) + "+", "")}, durability::buffered));
    return ++seen < 2;
  }));
  CHECK(seen == 2);
  CHECK(store->flush());
}

TEST_CASE(
    "rows are there after closing and opening again, and only a first start creates a store") {
  temp_folder folder;
  CHECK(open_kv_rocksdb(folder / "db", {}).err().code == errc::not_found);
  CHECK_FALSE(fs::exists(folder / "db"));
  {
    auto store = open_kv_rocksdb(folder / "db", {.create_if_missing = true});
    REQUIRE(store);
    REQUIRE((*store)->write({kv_write::put("k", "v")}, durability::synced));
  }
  kv_recovery recovery;
  auto store = open_kv_rocksdb(folder / "db", {}, &recovery);
  REQUIRE(store);
  CHECK((*store)->get("k")->value() == "v");
  CHECK_FALSE(recovery.recovered);
}

TEST_CASE("a store that another process or handle holds is refused by name and stays whole") {
  temp_folder folder;
  auto store = open_kv_rocksdb(folder / "db", {.create_if_missing = true});
  REQUIRE(store);
  auto second = open_kv_rocksdb(folder / "db", {});
  REQUIRE_FALSE(second);
  CHECK(second.err().code == errc::conflict);
  CHECK(second.err().message.find("held by another process") != std::string::npos);
  const pid_t child = ::fork();
  if (child == 0) {
    // exec-free child: RocksDB's in-process lock table is inherited, so only the answer counts.
    auto third = open_kv_rocksdb(folder / "db", {});
    ::_exit(!third && third.err().code == errc::conflict ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WEXITSTATUS(status) == 0);
  CHECK((*store)->write({kv_write::put("k", "v")}, durability::synced));
}

TEST_CASE("a log cut anywhere opens with whole commits only, and without a recovery") {
  temp_folder folder;
  leave_a_log_of(folder / "db", 40);
  const auto log = test::slurp(file_ending(folder / "db", ".log"));
  std::mt19937 random(7);
  for (int trial = 0; trial < 12; ++trial) {
    CAPTURE(trial);
    const fs::path copy = folder / fmt::format("cut-{}", trial);
    fs::copy(folder / "db", copy);
    test::spill(file_ending(copy, ".log"), log.substr(0, random() % log.size()));
    kv_recovery recovery;
    auto store = open_kv_rocksdb(copy, {}, &recovery);
    REQUIRE(store);
    CHECK_FALSE(recovery.recovered);
    check_prefix(**store);
  }
}

TEST_CASE(
    "a flipped bit in the log is never passed over in silence; the ladder opens and says so") {
  temp_folder folder;
  leave_a_log_of(folder / "db", 40);
  const fs::path log = file_ending(folder / "db", ".log");
  const auto log_bits = fs::file_size(log) * 8;
  std::mt19937 random(11);
  for (int trial = 0; trial < 12; ++trial) {
    CAPTURE(trial);
    const fs::path copy = folder / fmt::format("flip-{}", trial);
    fs::copy(folder / "db", copy);
    test::flip_bit(copy / log.filename(), random() % log_bits);
    kv_recovery recovery;
    auto store = open_kv_rocksdb(copy, {}, &recovery);
    REQUIRE(store);
    const int rows = check_prefix(**store);
    CHECK((recovery.recovered || rows == 40));
    if (recovery.recovered) {
      CHECK(fs::exists(file_ending(recovery.set_aside, ".log")));
      CHECK(recovery.note.find("rows are lost") != std::string::npos);
      CHECK((*store)->write({kv_write::put("after", "1")}, durability::synced));
    }
  }
}

TEST_CASE("a store without its CURRENT is rebuilt, and never comes up empty") {
  temp_folder folder;
  for (const bool is_flushed : {false, true}) {
    CAPTURE(is_flushed);
    const fs::path db = folder / (is_flushed ? "flushed" : "log");
    leave_a_log_of(db, 40);
    if (is_flushed) REQUIRE((*open_kv_rocksdb(db, {}))->flush());
    fs::remove(db / "CURRENT");
    kv_recovery recovery;
    auto store = open_kv_rocksdb(db, {.create_if_missing = true}, &recovery);
    REQUIRE(store);
    CHECK(recovery.recovered);
    CHECK(check_prefix(**store) == 40);
  }
}

TEST_CASE("a damaged MANIFEST is recovered with a note or refused as corrupt with the copy kept") {
  temp_folder folder;
  leave_a_log_of(folder / "db", 40);
  REQUIRE((*open_kv_rocksdb(folder / "db", {}))->flush());
  for (const auto& name : test::names_in(folder / "db"))
    if (name.starts_with("MANIFEST-")) test::spill(folder.path() / "db" / name, "garbage");
  kv_recovery recovery;
  auto store = open_kv_rocksdb(folder / "db", {}, &recovery);
  if (store) {
    CHECK(recovery.recovered);
    check_prefix(**store);
  } else {
    CHECK(store.err().code == errc::corrupt);
  }
  CHECK(fs::exists(recovery.set_aside));
}

TEST_CASE(
    "a store that nothing opens is refused as corrupt, can be set aside, and a new one takes its "
    "place") {
  temp_folder folder;
  const fs::path db = folder / "db";
  leave_a_log_of(db, 5);
  REQUIRE(open_kv_rocksdb(db, {}));
  for (const auto& name : test::names_in(db)) test::spill(db / name, "x");
  auto refused = open_kv_rocksdb(db, {});
  if (!refused) CHECK(refused.err().code == errc::corrupt);
  refused = error{};
  auto aside = set_aside_kv_rocksdb(db);
  REQUIRE(aside);
  CHECK(fs::exists(*aside));
  auto fresh = open_kv_rocksdb(db, {.create_if_missing = true});
  REQUIRE(fresh);
  CHECK(keys_with(**fresh, "").empty());
}

TEST_CASE(
    "a full disk fails writes as disk_full, loses nothing, and writing goes on once there is "
    "room") {
  temp_folder folder;
  const fs::path disk = folder / "disk";
  fs::create_directory(disk);
  if (::mount("none", disk.c_str(), "tmpfs", 0, "size=24m") != 0) {
    MESSAGE("skipped: this user can't mount a small file system");
    return;
  }
  {
    auto store = open_kv_rocksdb(disk / "db", {.create_if_missing = true});
    REQUIRE(store);
    // Values that do not compress, else the tables would never fill the disk.
    const auto value_of = [](int i) {
      std::mt19937 random(static_cast<unsigned>(i));
      std::string value(256 << 10, '\0');
      for (auto& c : value) c = static_cast<char>(random());
      return value;
    };
    int acked = 0;
    error met;
    for (; acked < 400; ++acked) {
      auto r = (*store)->write({kv_write::put(key_of(acked), value_of(acked))}, durability::synced);
      if (!r) {
        met = r.err();
        break;
      }
    }
    CHECK(met.code == errc::disk_full);
    CHECK(::mount("none", disk.c_str(), "tmpfs", MS_REMOUNT, "size=200m") == 0);
    bool goes_on = false;
    for (int wait = 0; wait < 100 && !goes_on; ++wait) {
      goes_on = bool((*store)->write({kv_write::put("after", "1")}, durability::synced));
      if (!goes_on) ::usleep(100'000);
    }
    CHECK(goes_on);
    store = error{};
    auto again = open_kv_rocksdb(disk / "db", {});
    REQUIRE(again);
    for (int i = 0; i < acked; ++i) CHECK((*again)->get(key_of(i))->value() == value_of(i));
    CHECK((*again)->get("after")->has_value());
  }
  ::umount(disk.c_str());
}

TEST_CASE("a read-only folder is refused with the fix") {
  temp_folder folder;
  const fs::path disk = folder / "disk";
  fs::create_directory(disk);
  if (::mount("none", disk.c_str(), "tmpfs", 0, "size=8m") != 0) {
    MESSAGE("skipped: this user can't mount a small file system");
    return;
  }
  leave_a_log_of(disk / "db", 3);
  REQUIRE(::mount("none", disk.c_str(), "tmpfs", MS_REMOUNT | MS_RDONLY, "") == 0);
  auto store = open_kv_rocksdb(disk / "db", {});
  REQUIRE_FALSE(store);
  CHECK(store.err().code == errc::io);
  CHECK(store.err().message.find("fix:") != std::string::npos);
  CHECK(open_kv_rocksdb(disk / "other", {.create_if_missing = true}).err().code == errc::io);
  ::umount(disk.c_str());
}
