// The key-value store on disk: RocksDB, opened so that damage is seen and never passed over in
// silence.
//
// RocksDB's own default drops acknowledged batches after a flipped bit in its log and reports
// success (measured, 300 of 300 times). Here the log is opened in the mode that refuses such a log,
// and only then a ladder of recoveries is climbed, on a copy's safety, with a note. The caller
// compares a recovered store with the manifests, which are the truth about checkpoints.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "storage/kv.hpp"

namespace stagecoach {

struct kv_rocksdb_options {
  bool create_if_missing =
      false;  // true only for the first start: else a lost store would look empty
};

struct kv_recovery {
  bool recovered = false;  // damage was met: rows may be missing, compare with the manifests
  std::string note;        // what was found and done, for the log
  std::filesystem::path set_aside;  // the copy as it was found; empty if none was made
};

/// Opens the store at `path` (a folder).
/// Fails: not_found (no store there and not to be created), conflict (another process holds it),
/// corrupt (no rung of the ladder opened it; nothing was removed), disk_full, io (read-only folder
/// and others).
result<std::unique_ptr<kv>> open_kv_rocksdb(const std::filesystem::path& path,
                                            kv_rocksdb_options options,
                                            kv_recovery* recovery = nullptr);

/// Renames a store that can't be opened to "<path>.damaged-<n>", so that a new one can be created
/// in its place and filled from the manifests. Returns the new name.
result<std::filesystem::path> set_aside_kv_rocksdb(const std::filesystem::path& path);

}  // namespace stagecoach
