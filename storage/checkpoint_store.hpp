// The checkpoints of one job in its folders: list, verify, find the newest good one, delete, sweep.
//
// Reads manifests and parts and removes files when told to; when to do so is the caller's decision.
// Order is (incarnation, seq). Touches only what lies inside its folders.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "config/result.hpp"
#include "storage/manifest.hpp"
#include "storage/part.hpp"

namespace stagecoach {

enum class checkpoint_state {
  verified,   // manifest and all parts passed the check that was asked for
  elsewhere,  // the manifest is good, but parts lie only in folders that this host can't see
  bad,        // a part is missing or damaged in every place, or the manifest is damaged
};
const char* to_string(checkpoint_state state);

struct checkpoint_entry {
  manifest content;                              // of a bad manifest: only seq and step
  std::vector<std::filesystem::path> manifests;  // its copies
  std::vector<std::filesystem::path>
      parts;  // by index in content.parts; empty path: none usable here
  checkpoint_state state = checkpoint_state::bad;
  std::string reason;  // why not verified; also notes on copies that were damaged
};

struct skipped_checkpoint {
  std::int64_t step = 0;
  std::uint64_t seq = 0;
  std::string reason;
};

struct newest_good_checkpoint {
  checkpoint_entry entry;
  std::vector<skipped_checkpoint> skipped;  // newer ones that could not be used, newest first
};

/// What a sweep would remove or did remove.
struct orphan {
  std::filesystem::path path;
  std::uint64_t bytes = 0;
  std::string reason;
};

struct sweep_rule {
  std::uint64_t generation = 0;  // parts and temporary files of older generations may go
  std::int64_t foreign_age_min_ms =
      86'400'000;  // *.tmp files that name no generation: only if so old
};

class checkpoint_store {
 public:
  /// folders: the job's checkpoint folder, then further ones that hold copies of manifests and
  /// parts.
  explicit checkpoint_store(std::vector<std::filesystem::path> folders);

  /// Newest first; damaged manifests at the end. Fails: io.
  result<std::vector<checkpoint_entry>> list(check_depth depth = check_depth::quick) const;

  /// The newest checkpoint of that step. Fails: not_found, io. A damaged one is a success with
  /// state bad.
  result<checkpoint_entry> verify(std::int64_t step, check_depth depth) const;

  /// Walks back from the newest until one passes. Fails: not_found (says why each was skipped), io.
  result<newest_good_checkpoint> newest_good(check_depth depth = check_depth::quick) const;

  /// Checks one manifest's parts; `manifest_folder` resolves relative part folders.
  checkpoint_entry examine(const manifest& m, const std::filesystem::path& manifest_folder,
                           check_depth depth) const;

  /// Manifest copies first, then (folder fsynced) the parts that no other manifest names.
  /// A crash in between leaves orphans, never a manifest without parts. Repeatable.
  /// Fails: not_found, conflict (it is the only verified one), io.
  result<void> delete_checkpoint(std::uint64_t incarnation, std::uint64_t seq);

  /// Removes the copies of a manifest that can't be read, so that a sweep may look at its parts
  /// again.
  result<void> delete_damaged_manifests(std::uint64_t seq);

  /// Files that no manifest names: temporary files and parts of older generations. remove = false:
  /// only lists. A damaged manifest may name any part, so parts are left alone while there is one.
  result<std::vector<orphan>> sweep_orphans(const sweep_rule& rule, bool remove);

 private:
  struct found_manifests;
  result<found_manifests> find_manifests() const;
  checkpoint_entry examine_at(const manifest& m, std::vector<std::filesystem::path> manifests,
                              check_depth depth) const;
  std::vector<std::filesystem::path> places_of(
      const manifest_part& part, const std::vector<std::filesystem::path>& manifests) const;
  bool is_inside(const std::filesystem::path& path) const;

  std::vector<std::filesystem::path> folders_;
};

struct retention_item {
  std::int64_t step = 0;
  std::uint64_t incarnation = 0;
  std::uint64_t seq = 0;
  bool verified = false;
  bool pinned = false;
};
struct retention_rule {
  int keep_last = 3;                  // verified ones; at least 1 is kept
  std::int64_t keep_every_steps = 0;  // 0: none
};
/// Which items may go; pure. Kept: the newest `keep_last` verified, the newest verified of each
/// step that is a multiple of keep_every_steps, pinned ones, and everything newer than the newest
/// verified (it may be on its way to be verified). Without a verified one nothing goes. In order of
/// (incarnation, seq).
std::vector<retention_item> choose_deletions(std::vector<retention_item> items,
                                             retention_rule rule);

}  // namespace stagecoach
