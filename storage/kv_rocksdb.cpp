#include "storage/kv_rocksdb.hpp"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/file_checksum.h>
#include <rocksdb/sst_file_manager.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

#include <mutex>
#include <shared_mutex>
#include <system_error>

#include "storage/file.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
namespace {

// Each value has its reason and measurement in the reference on checkpoints, 5.10.
rocksdb::Options make_options(rocksdb::WALRecoveryMode mode, bool create) {
  rocksdb::Options o;
  o.create_if_missing = create;
  o.wal_recovery_mode = mode;
  o.track_and_verify_wals_in_manifest = true;
  o.recycle_log_file_num = 0;
  o.paranoid_checks = true;
  o.paranoid_file_checks = true;
  o.file_checksum_gen_factory = rocksdb::GetFileChecksumGenCrc32cFactory();
  o.max_open_files = -1;
  o.write_buffer_size = 8u << 20;
  o.max_total_wal_size = 64u << 20;
  o.compression = rocksdb::kLZ4Compression;
  o.bottommost_compression = rocksdb::kZSTD;
  o.max_background_jobs = 2;
  o.keep_log_file_num = 4;
  o.max_log_file_size = 4u << 20;
  o.info_log_level = rocksdb::WARN_LEVEL;
  // With a file manager RocksDB goes on by itself once a full disk has room again.
  o.sst_file_manager.reset(rocksdb::NewSstFileManager(o.env));
  rocksdb::BlockBasedTableOptions table;
  table.checksum = rocksdb::kXXH3;
  table.format_version = 5;
  table.block_cache = rocksdb::NewLRUCache(32u << 20);
  o.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return o;
}

bool mentions(const rocksdb::Status& s, std::string_view words) {
  return s.ToString().find(words) != std::string::npos;
}

bool is_no_space(const rocksdb::Status& s) {
  return s.IsNoSpace() || mentions(s, "No space left") || mentions(s, "Disk quota exceeded");
}

bool is_read_only(const rocksdb::Status& s) {
  return mentions(s, "Permission denied") || mentions(s, "Read-only file system");
}

bool is_held(const rocksdb::Status& s) {
  return mentions(s, "lock hold by current process") ||
         (mentions(s, "LOCK") && mentions(s, "temporarily unavailable"));
}

error to_error(const rocksdb::Status& s, std::string_view doing, const fs::path& path) {
  if (is_read_only(s))
    return make_error(errc::io, "can't {} the store {}: {}. fix: a folder that this user may write",
                      doing, path.string(), s.ToString());
  if (is_no_space(s))
    return make_error(errc::disk_full, "can't {} the store {}: {}. fix: free space there", doing,
                      path.string(), s.ToString());
  if (is_held(s))
    return make_error(
        errc::conflict,
        "the store {} is held by another process ({}). fix: stop that coordinator, or "
        "name another state folder",
        path.string(), s.ToString());
  const errc kind = s.IsCorruption() ? errc::corrupt : errc::io;
  return make_error(kind, "can't {} the store {}: {}", doing, path.string(), s.ToString());
}

class kv_rocksdb final : public kv {
 public:
  kv_rocksdb(fs::path path, std::unique_ptr<rocksdb::DB> db)
      : path_(std::move(path)), db_(std::move(db)) {}

  ~kv_rocksdb() override {
    // A log that has been moved into tables can't be damaged. A failure loses nothing: the log is
    // there.
    if (db_) db_->Flush(rocksdb::FlushOptions()).PermitUncheckedError();
  }

  result<std::optional<std::string>> get(std::string_view key) const override {
    const std::shared_lock lock(mutex_);
    if (!db_) return closed();
    std::string value;
    const auto s = db_->Get(rocksdb::ReadOptions(), slice(key), &value);
    if (s.IsNotFound()) return std::optional<std::string>{};
    if (!s.ok()) return to_error(s, "read", path_);
    return std::optional<std::string>{std::move(value)};
  }

  result<void> write(const std::vector<kv_write>& batch, durability how) override {
    rocksdb::WriteBatch rows(0, 0, /*protection_bytes_per_key=*/8, 0);
    for (const auto& w : batch) {
      const auto s = w.what == kv_write::kind::put ? rows.Put(slice(w.key), slice(w.value))
                                                   : rows.Delete(slice(w.key));
      if (!s.ok()) return to_error(s, "prepare a batch for", path_);
    }
    rocksdb::WriteOptions options;
    options.sync = how == durability::synced;
    auto s = apply(options, rows);
    // Errors other than a full disk can stay latched until the store is opened anew. The batch may
    // be in the log already; to apply it twice changes nothing.
    if (!s.ok() && (!is_no_space(s) || has_room()) && reopen()) s = apply(options, rows);
    if (!s.ok()) return to_error(s, "write", path_);
    return ok();
  }

  result<void> scan(std::string_view prefix,
                    const std::function<bool(std::string_view, std::string_view)>& visit,
                    std::string_view first) const override {
    // Collected under the lock, visited without it: the visitor may write.
    std::vector<std::pair<std::string, std::string>> rows;
    std::string from(std::max(prefix, first));
    while (true) {
      rows.clear();
      {
        const std::shared_lock lock(mutex_);
        if (!db_) return closed();
        // The snapshot of the first block would have to outlive the lock, hence whole scans up to a
        // bound of memory and blocks beyond it.
        const std::unique_ptr<rocksdb::Iterator> at(db_->NewIterator(rocksdb::ReadOptions()));
        std::size_t bytes = 0;
        for (at->Seek(slice(from)); at->Valid() && bytes < scan_block_bytes; at->Next()) {
          const auto key = at->key().ToStringView();
          if (!key.starts_with(prefix)) break;
          rows.emplace_back(key, at->value().ToStringView());
          bytes += key.size() + at->value().size() + 64;
        }
        if (!at->status().ok()) return to_error(at->status(), "read", path_);
        if (bytes < scan_block_bytes) from.clear();
      }
      for (const auto& [key, value] : rows)
        if (!visit(key, value)) return ok();
      if (from.empty() || rows.empty()) return ok();
      from = rows.back().first + '\0';
    }
  }

  result<void> flush() override {
    const std::shared_lock lock(mutex_);
    if (!db_) return closed();
    const auto s = db_->Flush(rocksdb::FlushOptions());
    if (!s.ok()) return to_error(s, "flush", path_);
    return ok();
  }

 private:
  // 256 MiB: the whole catalog is under 100 MiB, so in practice a scan is one block and one moment.
  static constexpr std::size_t scan_block_bytes = 256u << 20;

  static rocksdb::Slice slice(std::string_view text) { return {text.data(), text.size()}; }

  error closed() const {
    return make_error(errc::io, "the store {} was closed after an error. fix: start again",
                      path_.string());
  }

  rocksdb::Status apply(const rocksdb::WriteOptions& options, rocksdb::WriteBatch& rows) {
    const std::shared_lock lock(mutex_);
    if (!db_) return rocksdb::Status::IOError("closed after an error");
    return db_->Write(options, &rows);
  }

  bool has_room() const {
    const auto bytes = free_bytes(path_);
    return bytes && *bytes > (32u << 20);
  }

  bool reopen() {
    const std::unique_lock lock(mutex_);
    db_.reset();
    rocksdb::DB* raw = nullptr;
    const auto options =
        make_options(rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords, false);
    if (!rocksdb::DB::Open(options, path_.string(), &raw).ok()) return false;
    db_.reset(raw);
    return true;
  }

  fs::path path_;
  mutable std::shared_mutex mutex_;  // shared: use of db_; alone: its exchange
  std::unique_ptr<rocksdb::DB> db_;
};

struct attempt {
  rocksdb::Status status;
  std::unique_ptr<rocksdb::DB> db;
};

attempt try_open(const fs::path& path, rocksdb::WALRecoveryMode mode, bool create) {
  rocksdb::DB* raw = nullptr;
  attempt a;
  a.status = rocksdb::DB::Open(make_options(mode, create), path.string(), &raw);
  a.db.reset(raw);
  return a;
}

/// Has files of a store, whether or not they can be opened.
bool holds_store_files(const fs::path& path) {
  std::error_code code;
  for (fs::directory_iterator at(path, code), end; !code && at != end; at.increment(code)) {
    const auto name = at->path().filename().string();
    if (name == "CURRENT" || name.starts_with("MANIFEST-") || name.ends_with(".sst") ||
        name.ends_with(".log"))
      return true;
  }
  return false;
}

fs::path damaged_name(const fs::path& path) {
  std::error_code code;
  for (int n = 1;; ++n) {
    fs::path name = path;
    name += fmt::format(".damaged-{}", n);
    if (!fs::exists(name, code)) return name;
  }
}

result<fs::path> copy_aside(const fs::path& path) {
  const fs::path aside = damaged_name(path);
  if (auto r = make_folders(aside); !r) return r.err();
  std::error_code code;
  for (fs::directory_iterator at(path, code), end; !code && at != end; at.increment(code)) {
    if (!at->is_regular_file(code) || at->path().filename() == "LOCK") continue;
    // Real copies and not links: recovery writes to the log that it reads.
    fs::copy_file(at->path(), aside / at->path().filename(), code);
    if (code) break;
  }
  if (code) return errno_error(code.value(), "can't copy the damaged store to", aside);
  return aside;
}

bool is_damage(const rocksdb::Status& s) {
  if (is_held(s) || is_read_only(s) || is_no_space(s)) return false;
  return s.IsCorruption() || s.IsNotFound() || s.IsPathNotFound() || s.IsInvalidArgument() ||
         mentions(s, "No such file");
}

fs::path without_slash(const fs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

}  // namespace

result<std::unique_ptr<kv>> open_kv_rocksdb(const fs::path& given, kv_rocksdb_options options,
                                            kv_recovery* recovery) {
  using mode = rocksdb::WALRecoveryMode;
  const fs::path path = without_slash(given);
  kv_recovery ignored;
  kv_recovery& what = recovery != nullptr ? *recovery : ignored;
  what = {};

  const bool is_there = holds_store_files(path);
  if (!is_there && !options.create_if_missing)
    return make_error(errc::not_found,
                      "no store at {}. fix: check the state folder; only a first start creates one",
                      path.string());
  if (auto r = make_folders(path); !r) return r.err();

  // Never create over remains: a store that lost its CURRENT must not come up empty.
  attempt first = try_open(path, mode::kTolerateCorruptedTailRecords, !is_there);
  if (first.status.ok())
    return std::unique_ptr<kv>(std::make_unique<kv_rocksdb>(path, std::move(first.db)));
  if (!is_there || !is_damage(first.status)) return to_error(first.status, "open", path);

  auto aside = copy_aside(path);
  if (!aside) return aside.err();
  what.set_aside = *aside;
  std::string done;
  attempt next = try_open(path, mode::kPointInTimeRecovery, false);
  if (next.status.ok()) {
    done = "opened up to the damage in its log; later rows are lost";
  } else {
    const auto repaired =
        rocksdb::RepairDB(path.string(), make_options(mode::kTolerateCorruptedTailRecords, false));
    if (repaired.ok()) next = try_open(path, mode::kPointInTimeRecovery, false);
    done = "rebuilt from its tables and log (RepairDB); rows may be lost";
  }
  if (!next.status.ok())
    return make_error(
        errc::corrupt,
        "the store {} is damaged ({}) and no recovery opened it ({}); as found it is kept "
        "in {}. fix: set it aside and rebuild it from the manifests",
        path.string(), first.status.ToString(), next.status.ToString(), aside->string());
  what.recovered = true;
  what.note = fmt::format("{}: {}; {}; as found it is kept in {}", path.string(),
                          first.status.ToString(), done, aside->string());
  auto store = std::make_unique<kv_rocksdb>(path, std::move(next.db));
  if (auto r = store->flush(); !r) return r.err();
  return std::unique_ptr<kv>(std::move(store));
}

result<fs::path> set_aside_kv_rocksdb(const fs::path& given) {
  const fs::path path = without_slash(given);
  const fs::path aside = damaged_name(path);
  if (auto r = rename_to_new(path, aside); !r) return r.err();
  if (auto r = sync_folder(path.has_parent_path() ? path.parent_path() : fs::path(".")); !r)
    return r.err();
  return aside;
}

}  // namespace stagecoach
