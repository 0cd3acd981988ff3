// An ordered key-value store: the interface, and its twin in memory.
//
// Keys are bytes, ordered as unsigned bytes; areas are key prefixes. A batch is applied whole or
// not at all. One writer thread is enough (and is what the coordinator has); calls from several
// threads are safe.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/result.hpp"

namespace stagecoach {

struct kv_write {
  enum class kind { put, erase };
  kind what = kind::put;
  std::string key;
  std::string value;  // ignored by erase
  static kv_write put(std::string key, std::string value) {
    return {kind::put, std::move(key), std::move(value)};
  }
  static kv_write erase(std::string key) { return {kind::erase, std::move(key), {}}; }
};

/// synced: on disk when the call returns (decisions). buffered: a crash of the host may lose it
/// (progress, metrics); a later synced batch makes it durable, too.
enum class durability { synced, buffered };

class kv {
 public:
  virtual ~kv() = default;

  /// Empty optional: no such key. Fails: corrupt, io.
  virtual result<std::optional<std::string>> get(std::string_view key) const = 0;

  /// Applies all of the batch in order, or none. Fails: disk_full (works again once there is room),
  /// io.
  virtual result<void> write(const std::vector<kv_write>& batch, durability how) = 0;

  /// Visits keys that start with `prefix`, in order, from `first` on (if given; it is a full key),
  /// until `visit` returns false. Sees one moment of the store; `visit` may call the store.
  virtual result<void> scan(
      std::string_view prefix,
      const std::function<bool(std::string_view key, std::string_view value)>& visit,
      std::string_view first = {}) const = 0;

  /// Moves what only the log holds into tables, so that a damaged log can't lose it. Call after a
  /// commit.
  virtual result<void> flush() = 0;
};

std::unique_ptr<kv> make_kv_memory();

}  // namespace stagecoach
