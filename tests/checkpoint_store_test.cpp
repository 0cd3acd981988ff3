// The checkpoints of a job: walk-back, copies, deletion, sweep, retention. Faults 1, 2, 4, 11, 12,
// 13, 16, 17, 18.
#include "storage/checkpoint_store.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <random>
#include <set>

#include "storage/file.hpp"
#include "storage_folder.hpp"

using namespace stagecoach;
using test::temp_folder;
namespace fs = std::filesystem;

namespace {

/// Writes a checkpoint of two parts; the tensor "w" holds the step.
manifest save(const fs::path& folder, std::int64_t step, std::uint64_t seq,
              std::uint64_t incarnation = 1, std::uint64_t generation = 1) {
  manifest m;
  m.job = job_id{1};
  m.step = step;
  m.seq = seq;
  m.incarnation = incarnation;
  m.generation = generation;
  const float value = static_cast<float>(step);
  for (int stage = 0; stage < 2; ++stage) {
    const auto info =
        write_part(folder, part_file_name({generation, seq, stage, 0}),
                   {{"step", std::to_string(step)}}, {{stage == 0 ? "w" : "v", {}, &value}});
    REQUIRE(info);
    m.parts.push_back({info->file, "", info->bytes, info->root_hash, info->tensors, {}});
    m.bytes += info->bytes;
  }
  REQUIRE(write_manifest(folder, m));
  return m;
}

std::atomic<int> calls_left{0};
int fail_at_call(std::string_view, const fs::path&) {
  return calls_left.fetch_sub(1) == 1 ? EIO : 0;
}

}  // namespace

TEST_CASE(
    "the newest good checkpoint is found by walking back, and every skipped one has its reason") {
  temp_folder folder;
  const checkpoint_store store({folder.path()});
  CHECK(store.newest_good().err().code == errc::not_found);
  for (int i = 0; i < 5; ++i) save(folder.path(), i * 10, 1 + i);
  CHECK(store.newest_good()->entry.content.step == 40);
  CHECK(store.newest_good()->skipped.empty());

  fs::remove(folder / part_file_name({1, 5, 1, 0}));                // step 40: a part is gone
  test::flip_bit(folder / part_file_name({1, 4, 0, 0}), 4097 * 8);  // step 30: damaged data
  test::flip_bit(folder / manifest_file_name(3, 20), 77);           // step 20: damaged manifest
  const auto quick = store.newest_good(check_depth::quick);
  REQUIRE(quick);
  CHECK(quick->entry.content.step == 30);  // the quick check does not read data
  const auto deep = store.newest_good(check_depth::deep);
  REQUIRE(deep);
  CHECK(deep->entry.content.step == 10);
  CHECK(deep->entry.parts.size() == 2);
  REQUIRE(deep->skipped.size() == 3);
  CHECK(deep->skipped[0].step == 40);
  CHECK(deep->skipped[0].reason.find("missing") != std::string::npos);
  CHECK(deep->skipped[1].step == 30);
  CHECK(deep->skipped[1].reason.find("chunk 0") != std::string::npos);
  CHECK(deep->skipped[2].step == 20);

  CHECK(store.verify(40, check_depth::quick)->state == checkpoint_state::bad);
  CHECK(store.verify(20, check_depth::quick)->state == checkpoint_state::bad);
  CHECK(store.verify(10, check_depth::deep)->state == checkpoint_state::verified);
  CHECK(store.verify(99, check_depth::deep).err().code == errc::not_found);
  const auto list = store.list(check_depth::deep);
  REQUIRE(list);
  CHECK(list->size() == 5);
  CHECK(std::count_if(list->begin(), list->end(),
                      [](const auto& e) { return e.state == checkpoint_state::verified; }) == 2);
}

TEST_CASE("a later save of an earlier step is the newest: order is (incarnation, seq)") {
  temp_folder folder;
  save(folder.path(), 90, 9, 1);
  save(folder.path(), 40, 10, 1);  // after a rollback
  save(folder.path(), 50, 3, 2);   // after a restart that lost its index
  const checkpoint_store store({folder.path()});
  CHECK(store.newest_good()->entry.content.step == 50);
  save(folder.path(), 40, 11, 2);
  CHECK(store.verify(40, check_depth::quick)->content.seq == 11);
}

TEST_CASE("a manifest or part that is damaged in one folder is taken from the second") {
  temp_folder folder;
  const fs::path a = folder / "a", b = folder / "b";
  save(a, 10, 1);
  fs::copy(a, b);
  const checkpoint_store store({a, b});
  CHECK(store.newest_good(check_depth::deep)->entry.manifests.size() == 2);
  test::flip_bit(a / manifest_file_name(1, 10), 50);
  test::flip_bit(a / part_file_name({1, 1, 0, 0}), 4096 * 8);
  fs::remove(b / part_file_name({1, 1, 1, 0}));
  const auto found = store.newest_good(check_depth::deep);
  REQUIRE(found);
  CHECK(found->entry.parts[0].parent_path() == b);
  CHECK(found->entry.parts[1].parent_path() == a);
  CHECK(found->skipped.empty());
  CHECK(found->entry.reason.find("damaged") != std::string::npos);
}

TEST_CASE(
    "parts on other hosts are elsewhere, not bad; a folder of another host that appears serves "
    "them") {
  temp_folder folder;
  auto m = save(folder / "one", 10, 1);
  for (auto& p : m.parts) p.copies = {{"w2", (folder / "two").string()}};
  fs::remove(folder.path() / "one" / manifest_file_name(1, 10));
  REQUIRE(write_manifest(folder / "one", m));
  fs::rename(folder.path() / "one" / m.parts[0].file, folder / "away");
  const checkpoint_store store({folder / "one"});
  CHECK(store.verify(10, check_depth::quick)->state == checkpoint_state::elsewhere);
  CHECK_FALSE(store.newest_good());
  fs::create_directory(folder / "two");
  fs::rename(folder / "away", folder.path() / "two" / m.parts[0].file);
  CHECK(store.newest_good()->entry.parts[0].parent_path() == folder / "two");
}

TEST_CASE("deleting removes manifest and parts, spares the last good one and everything else") {
  temp_folder folder;
  const fs::path ckpt = folder / "ckpt";
  save(ckpt, 10, 1);
  checkpoint_store store({ckpt});
  CHECK(store.delete_checkpoint(1, 1).err().code == errc::conflict);
  auto second = save(ckpt, 20, 2);
  test::spill(ckpt / "notes.txt", "mine");
  CHECK(store.delete_checkpoint(1, 7).err().code == errc::not_found);
  REQUIRE(store.delete_checkpoint(1, 1));
  CHECK(store.delete_checkpoint(1, 1).err().code == errc::not_found);
  CHECK(test::names_in(ckpt).size() == 4);
  CHECK(store.newest_good(check_depth::deep)->entry.content.step == 20);
}

TEST_CASE(
    "deleting touches nothing outside the folders and nothing that another checkpoint names") {
  temp_folder folder;
  const fs::path ckpt = folder / "ckpt", other = folder / "other";
  auto first = save(ckpt, 10, 1);
  auto second = save(ckpt, 20, 2);
  // A third one that takes its parts by reference: one from the first, one from outside the store.
  const float v = 1;
  const auto outside = write_part(other, "frozen.safetensors", {}, {{"f", {}, &v}});
  REQUIRE(outside);
  manifest third = second;
  third.step = 30;
  third.seq = 3;
  third.parts = {first.parts[0],
                 {outside->file, other.string(), outside->bytes, outside->root_hash, {"f"}, {}}};
  REQUIRE(write_manifest(ckpt, third));
  checkpoint_store store({ckpt});
  CHECK(store.verify(30, check_depth::deep)->state == checkpoint_state::verified);
  REQUIRE(store.delete_checkpoint(1, 1));
  CHECK(store.verify(30, check_depth::deep)->state == checkpoint_state::verified);
  CHECK_FALSE(fs::exists(ckpt / first.parts[1].file));
  REQUIRE(store.delete_checkpoint(1, 3));
  CHECK(fs::exists(other / "frozen.safetensors"));
  CHECK_FALSE(fs::exists(ckpt / first.parts[0].file));
}

TEST_CASE(
    "a deletion that fails at any call leaves no manifest with a missing part, and can be "
    "repeated") {
  for (int call = 1; call < 20; ++call) {
    CAPTURE(call);
    temp_folder folder;
    save(folder.path(), 10, 1);
    save(folder.path(), 20, 2);
    checkpoint_store store({folder.path()});
    calls_left = call;
    disk_fault = fail_at_call;
    const auto r = store.delete_checkpoint(1, 1);
    disk_fault = nullptr;
    const auto entries = store.list(check_depth::deep);
    REQUIRE(entries);
    for (const auto& e : *entries) CHECK(e.state == checkpoint_state::verified);
    CHECK(store.newest_good()->entry.content.step == 20);
    if (r) return;
    // What is left are orphans of an older generation; the sweep takes them.
    if (entries->size() == 1) {
      CHECK(store.sweep_orphans({.generation = 2}, true));
      CHECK(test::names_in(folder.path()).size() == 3);
    }
  }
  FAIL("a deletion takes fewer than 20 calls");
}

TEST_CASE("a sweep lists orphans of older generations, and removes only when told to") {
  temp_folder folder;
  const fs::path ckpt = folder / "ckpt";
  save(ckpt, 10, 1, 1, 4);
  const float v = 1;
  const auto orphan_part = part_file_name({2, 9, 0, 0}), running = part_file_name({5, 9, 0, 0});
  REQUIRE(write_part(ckpt, orphan_part, {}, {{"w", {}, &v}}));
  REQUIRE(write_part(ckpt, running, {}, {{"w", {}, &v}}));
  test::spill(ckpt / (orphan_part + ".0123456789abcdef.tmp"), "half");
  test::spill(ckpt / (running + ".0123456789abcdef.tmp"), "half");
  test::spill(ckpt / "manifest-000000000009-step-000000000001.json.0123456789abcdef.tmp", "half");
  test::spill(ckpt / "users.tmp", "mine");
  fs::create_directory_symlink(folder / "elsewhere", ckpt / "link");
  checkpoint_store store({ckpt});
  const auto count = test::names_in(ckpt).size();
  const auto listed = store.sweep_orphans({.generation = 5}, false);
  REQUIRE(listed);
  REQUIRE(listed->size() == 2);
  CHECK((*listed)[0].path == ckpt / orphan_part);
  CHECK(test::names_in(ckpt).size() == count);
  CHECK(store.sweep_orphans({.generation = 5, .foreign_age_min_ms = 0}, false)->size() == 3);

  // While a manifest is damaged any part may be one of its own.
  test::spill(ckpt / manifest_file_name(8, 8), "torn");
  CHECK(store.sweep_orphans({.generation = 5}, false)->size() == 1);
  REQUIRE(store.delete_damaged_manifests(8));
  REQUIRE(store.sweep_orphans({.generation = 5}, true));
  CHECK(test::names_in(ckpt).size() == count - 2);
  CHECK(store.newest_good(check_depth::deep)->entry.content.step == 10);
  CHECK(fs::exists(ckpt / "users.tmp"));
  CHECK(fs::exists(ckpt / running));
}

TEST_CASE(
    "retention by hand: last three, every hundred steps, pinned, and what is newer than the newest "
    "good") {
  std::vector<retention_item> items;
  for (int i = 0; i < 10; ++i)
    items.push_back(
        {.step = i * 50, .incarnation = 1, .seq = std::uint64_t(i + 1), .verified = true});
  items[3].pinned = true;                                       // step 150
  items.push_back({.step = 500, .incarnation = 1, .seq = 11});  // not verified yet
  std::vector<std::int64_t> gone;
  for (const auto& g : choose_deletions(items, {.keep_last = 3, .keep_every_steps = 200}))
    gone.push_back(g.step);
  // Kept: 350 400 450 (last), 0 200 400 (every), 150 (pinned), 500 (newer).
  CHECK(gone == std::vector<std::int64_t>{50, 100, 250, 300});
  CHECK(choose_deletions({{.step = 1, .incarnation = 1, .seq = 1}}, {.keep_last = 0}).empty());
  CHECK(choose_deletions({}, {}).empty());
}

TEST_CASE(
    "retention never takes the newest verified, a pinned one, or more than the rule allows (2,000 "
    "seeds)") {
  for (unsigned seed = 0; seed < 2000; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    std::vector<retention_item> items;
    const int count = static_cast<int>(random() % 20);
    for (int i = 0; i < count; ++i)
      items.push_back({.step = static_cast<std::int64_t>(random() % 10) * 10,
                       .incarnation = 1 + random() % 3,
                       .seq = static_cast<std::uint64_t>(i),
                       .verified = random() % 3 != 0,
                       .pinned = random() % 8 == 0});
    std::shuffle(items.begin(), items.end(), random);
    const retention_rule rule{.keep_last = static_cast<int>(random() % 5),
                              .keep_every_steps = random() % 2 ? 20 : 0};
    const auto gone = choose_deletions(items, rule);
    const auto key = [](const retention_item& i) { return std::pair(i.incarnation, i.seq); };
    std::set<std::pair<std::uint64_t, std::uint64_t>> gone_keys;
    for (const auto& g : gone) {
      CHECK_FALSE(g.pinned);
      gone_keys.insert(key(g));
    }
    CHECK(gone_keys.size() == gone.size());
    std::vector<retention_item> verified;
    for (const auto& i : items)
      if (i.verified) verified.push_back(i);
    std::sort(verified.begin(), verified.end(),
              [&](const auto& a, const auto& b) { return key(a) > key(b); });
    if (verified.empty()) CHECK(gone.empty());
    for (std::size_t n = 0; n < verified.size() && n < std::size_t(std::max(1, rule.keep_last));
         ++n)
      CHECK_FALSE(gone_keys.contains(key(verified[n])));
    // Doing it twice changes nothing: the rest is stable.
    std::vector<retention_item> rest;
    for (const auto& i : items)
      if (!gone_keys.contains(key(i))) rest.push_back(i);
    CHECK(choose_deletions(rest, rule).empty());
  }
}
