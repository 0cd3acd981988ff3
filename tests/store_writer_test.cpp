#include "coordinator/store_writer.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <future>
#include <memory>
#include <thread>

namespace stagecoach {
namespace {

using namespace std::chrono_literals;

/// A store in memory whose writes can be made to wait or fail.
class slow_store final : public kv {
 public:
  result<std::optional<std::string>> get(std::string_view key) const override {
    return inner_->get(key);
  }
  result<void> write(const std::vector<kv_write>& batch, durability how) override {
    ++tries;
    while (is_shut) std::this_thread::sleep_for(1ms);
    if (failures > 0) {
      --failures;
      return make_error(errc::disk_full, "no space");
    }
    if (how == durability::synced) ++synced;
    return inner_->write(batch, how);
  }
  result<void> scan(std::string_view prefix,
                    const std::function<bool(std::string_view, std::string_view)>& visit,
                    std::string_view first) const override {
    return inner_->scan(prefix, visit, first);
  }
  result<void> flush() override { return inner_->flush(); }
  std::string value(const std::string& key) const {
    auto found = get(key);
    return found && *found ? **found : std::string("-");
  }

  std::atomic<int> tries{0}, synced{0}, failures{0};
  std::atomic<bool> is_shut{false};

 private:
  std::unique_ptr<kv> inner_ = make_kv_memory();
};

template <class F>
bool soon(F condition) {
  for (int i = 0; i < 2000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(1ms);
  }
  return false;
}

TEST_CASE(
    "a ticket becomes durable after its rows are in the store, and in the order of the calls") {
  slow_store store;
  std::vector<store_writer::ticket> durable;
  std::vector<std::string> seen;
  {
    store_writer writer(store, {},
                        {[&](store_writer::ticket t) {
                           durable.push_back(t);
                           seen.push_back(store.value("a"));
                         },
                         {},
                         {},
                         {}});
    const auto first = writer.write({kv_write::put("a", "1")}, true);
    const auto second = writer.write({kv_write::put("a", "2")}, true);
    CHECK(first < second);
    CHECK(soon([&] { return writer.queued_batches() == 0; }));
  }
  REQUIRE(!durable.empty());
  CHECK(durable.back() == 2);
  CHECK(seen.back() == "2");
  CHECK(store.value("a") == "2");
}

TEST_CASE("batches that came while the disk was busy are one synced write") {
  slow_store store;
  store.is_shut = true;
  std::atomic<store_writer::ticket> durable{0};
  store_writer writer(store, {}, {[&](store_writer::ticket t) { durable = t; }, {}, {}, {}});
  writer.write({kv_write::put("first", "x")}, true);
  REQUIRE(soon([&] { return store.tries == 1; }));
  for (int i = 0; i < 50; ++i)
    writer.write({kv_write::put("k" + std::to_string(i), "v")}, i % 2 == 0);
  store.is_shut = false;
  REQUIRE(soon([&] { return durable == 50; }));  // number 51 was not synced
  REQUIRE(soon([&] { return writer.queued_batches() == 0; }));
  CHECK(store.synced == 2);
  CHECK(writer.written_groups() == 2);
  CHECK(store.value("k49") == "v");
}

TEST_CASE("a full disk loses nothing: batches wait, are tried again, and only then are durable") {
  slow_store store;
  store.failures = 3;
  std::atomic<int> problems{0}, recoveries{0};
  std::atomic<store_writer::ticket> durable{0};
  store_writer writer(store, {.is_synced = true, .retry = 5ms},
                      {[&](store_writer::ticket t) { durable = t; },
                       [&](const error& e) {
                         CHECK(e.code == errc::disk_full);
                         CHECK(durable == 0);
                         ++problems;
                       },
                       [&] { ++recoveries; },
                       {}});
  writer.write({kv_write::put("a", "1")}, true);
  writer.write({kv_write::put("b", "2")}, true);
  REQUIRE(soon([&] { return durable == 2; }));
  CHECK(problems == 3);
  CHECK(recoveries == 1);
  CHECK(store.value("a") == "1");
  CHECK(store.value("b") == "2");
}

TEST_CASE("a second copy that failed is tried again though nobody writes, and then all is well") {
  slow_store store;
  std::atomic<int> failures{3}, tries{0}, problems{0}, recoveries{0};
  store_writer::callbacks on;
  on.copy = [&](const std::vector<kv_write>&) -> result<void> {
    ++tries;
    if (failures-- > 0) return make_error(errc::disk_full, "no space");
    return ok();
  };
  on.on_problem = [&](const error&) { ++problems; };
  on.on_recovered = [&] { ++recoveries; };
  store_writer::options how;
  how.retry = 5ms;
  store_writer writer(store, how, std::move(on));
  (void)writer.write({kv_write::put("a", "1")}, true);
  CHECK(soon([&] { return recoveries == 1; }));
  std::this_thread::sleep_for(30ms);
  CHECK(tries == 4);
  CHECK(problems == 3);
  CHECK(recoveries == 1);
}

TEST_CASE("the second copy gets synced rows only, before they count as durable") {
  slow_store store;
  std::vector<std::string> copied;
  std::promise<std::size_t> copied_when_durable;
  store_writer writer(store, {},
                      {[&](store_writer::ticket) { copied_when_durable.set_value(copied.size()); },
                       {},
                       {},
                       [&](const std::vector<kv_write>& rows) {
                         for (const auto& r : rows) copied.push_back(r.key);
                         return ok();
                       }});
  writer.write({kv_write::put("series", "x")}, false);
  writer.write({kv_write::put("record", "y")}, true);
  CHECK(copied_when_durable.get_future().get() == 1);
  CHECK(copied == std::vector<std::string>{"record"});
}

TEST_CASE("stopping writes what is queued") {
  slow_store store;
  store.is_shut = true;
  auto writer =
      std::make_unique<store_writer>(store, store_writer::options{}, store_writer::callbacks{});
  for (int i = 0; i < 100; ++i) writer->write({kv_write::put(std::to_string(i), "v")}, false);
  store.is_shut = false;
  writer.reset();
  for (int i = 0; i < 100; ++i) CHECK(store.value(std::to_string(i)) == "v");
}

}  // namespace
}  // namespace stagecoach
