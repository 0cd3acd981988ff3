// The coordinator's folder: where things lie, the second copy of its records, and opening it all.
//
//   <state>/index/            RocksDB: the index (jobs, generations, checkpoints, events, series)
//   <state>/store-id          which store this is; outside the index, so that a lost index is known
//   as lost <state>/cluster.json      second copy of the meta and worker records
//   <state>/jobs/<id>.json    second copy of a job's record and newest generation
//   <state>/manifests/<id>/   second copy of its checkpoint manifests
//   <state>/checkpoints/<id>-<name>/   parts and manifests, unless the job names a store
// The index can be lost whole: it is filled again from the second copies and the manifests, and
// jobs go on from their newest good checkpoint. A damaged index is moved aside, never deleted.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "config/job_spec.hpp"
#include "config/result.hpp"
#include "coordinator/records.hpp"
#include "storage/kv.hpp"

namespace stagecoach {

/// Pure: names only.
class state_paths {
 public:
  state_paths() = default;
  state_paths(std::filesystem::path state, std::string store_id)
      : state_(std::move(state)), store_id_(std::move(store_id)) {}

  std::filesystem::path state() const { return state_; }
  std::filesystem::path index() const { return state_ / "index"; }
  std::filesystem::path store_id_file() const { return state_ / "store-id"; }
  std::filesystem::path cluster_file() const { return state_ / "cluster.json"; }
  std::filesystem::path jobs_folder() const { return state_ / "jobs"; }
  std::filesystem::path job_file(job_id id) const;
  std::filesystem::path manifests_folder(job_id id) const;
  /// Where the job's workers write parts. A store that the job names may be shared by several
  /// coordinators whose job ids clash, so the folder there also carries the store's id.
  std::filesystem::path checkpoint_folder(job_id id, const job_spec& spec) const;
  /// Folder in which that one is made; for the check of free space.
  std::filesystem::path checkpoint_root(const job_spec& spec) const;

  const std::string& store_id() const { return store_id_; }

 private:
  std::filesystem::path state_;
  std::string store_id_;
};

/// Keeps cluster.json and jobs/<id>.json equal to the newest rows. One thread at a time.
class record_copies {
 public:
  /// rows: all that the store holds; so that a file is whole when its first row changes.
  record_copies(state_paths paths, const std::vector<store_row>& rows);
  /// Files whose rows changed are written durably, each whole or not at all. What failed is tried
  /// again with the next call. Fails: disk_full, io.
  result<void> apply(const std::vector<kv_write>& rows);
  /// Writes all; after a rebuild.
  result<void> write_all();

 private:
  std::filesystem::path file_of(std::string_view key) const;  // empty: not copied
  void take(const kv_write& row);
  result<void> write_changed();

  state_paths paths_;
  std::map<std::filesystem::path, std::map<std::string, std::string>> files_;
  std::set<std::filesystem::path> changed_;
};

struct opened_state {
  state_paths paths;
  std::unique_ptr<kv> store;
  std::vector<store_row> rows;     // meta, workers, jobs, checkpoints, events; not the series
  bool is_recovered = false;       // damage was met or the index was lost
  std::vector<std::string> notes;  // what was found and done, for people
};

/// Opens or makes the folder. Fails: conflict (another process holds it), io (read-only, ...),
/// disk_full.
result<opened_state> open_state(const std::filesystem::path& state);

/// Rows of the second copies and of the manifests under `paths`, to fill a lost index. Unreadable
/// files are named in notes and left alone.
std::vector<store_row> rows_from_copies(const state_paths& paths, std::vector<std::string>& notes);

}  // namespace stagecoach
