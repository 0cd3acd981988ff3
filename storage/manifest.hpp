// The manifest: one self-checking text file per checkpoint. Durable manifest = the checkpoint
// exists.
//
// Canonical JSON (sorted keys) and a last line "xxh3-128:<hash of all before it>", so that every
// torn or flipped file is known as such. Self-contained: with the parts it rebuilds the index. Does
// not look at parts (storage/checkpoint_store.hpp does).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/ids.hpp"
#include "config/result.hpp"

namespace stagecoach {

inline constexpr int manifest_version = 1;

/// Another place of the same file.
struct part_copy {
  std::string worker;  // the worker's name
  std::string folder;  // absolute, on that worker's host
  bool operator==(const part_copy&) const = default;
};

struct manifest_part {
  std::string file;    // plain name
  std::string folder;  // relative to the manifest's folder ("" = the same), or absolute
  std::uint64_t bytes = 0;
  std::string root_hash;  // 32 hex digits (storage/part.hpp)
  std::vector<std::string> tensors;
  std::vector<part_copy> copies;
  bool operator==(const manifest_part&) const = default;
};

struct manifest {
  job_id job{};
  std::string job_name;
  std::string job_identity;  // hash of the resolved job
  std::int64_t step = 0;
  std::uint64_t seq = 0;  // of this save in its job; only grows
  std::uint64_t generation = 0;
  std::uint64_t plan_hash = 0;
  std::uint64_t incarnation = 0;
  std::string weights_hash;
  std::string state_hash;
  std::string layout;                // for people: "stages=2 replicas=1"
  std::uint64_t bytes = 0;           // of all parts
  std::int64_t created_unix_ms = 0;  // for people; never an order
  std::vector<manifest_part> parts;
  std::map<std::string, std::string> extra;  // loss, vote chain, ...
  bool operator==(const manifest&) const = default;
};

/// Newer first, by (incarnation, seq); never by clock, name or step.
bool is_newer(const manifest& a, const manifest& b);

/// "manifest-000000000012-step-000000001200.json" (seq, step).
std::string manifest_file_name(std::uint64_t seq, std::int64_t step);

/// The whole file's text, trailer line included. Fails: bad_input (a field breaks the rules that
/// the reader holds), too_large.
result<std::string> format_manifest(const manifest& m);
/// Fails: corrupt (trailer missing or wrong), bad_input (fields; another version says which),
/// too_large.
result<manifest> parse_manifest(std::string_view text, std::string_view what);

/// Writes it durably into `folder` (made if missing) and returns its path: the commit point, once
/// it is also in the second folder (call twice). The same content again is a success. Fails:
/// conflict (another valid manifest has the name), disk_full, io.
result<std::filesystem::path> write_manifest(const std::filesystem::path& folder,
                                             const manifest& m);
/// Fails: not_found, corrupt, bad_input, too_large, io.
result<manifest> read_manifest(const std::filesystem::path& path);

struct listed_manifest {
  std::filesystem::path path;
  manifest content;
};
struct bad_manifest {
  std::filesystem::path path;
  std::uint64_t seq = 0;  // from the file's name
  std::int64_t step = 0;
  error reason;
};
struct manifest_list {
  std::vector<listed_manifest> good;  // newest first
  std::vector<bad_manifest> bad;      // largest seq first
};
/// A folder that is not there has none. Fails: io.
result<manifest_list> list_manifests(const std::filesystem::path& folder);

}  // namespace stagecoach
