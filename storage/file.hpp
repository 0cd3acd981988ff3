// Files as the store needs them: every call returns a result, every length is checked.
//
// A short read is an error and never zeros; "written" means fsynced, and a new name means that its
// folder was fsynced too. Knows no format.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "config/result.hpp"

namespace stagecoach {

/// An open descriptor, closed when it dies.
class file_handle {
 public:
  file_handle() = default;
  explicit file_handle(int fd) : fd_(fd) {}
  file_handle(file_handle&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  file_handle& operator=(file_handle&& other) noexcept;
  file_handle(const file_handle&) = delete;
  file_handle& operator=(const file_handle&) = delete;
  ~file_handle();
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// ENOSPC and EDQUOT become disk_full, ENOENT not_found, all else io; the fix is named where one is
/// known.
error errno_error(int code, std::string_view what, const std::filesystem::path& path);

/// Fails: not_found, io. A folder or device in place of a file is refused (a fifo would block for
/// ever).
result<file_handle> open_to_read(const std::filesystem::path& path);
/// New file; fails (io) if the name is taken.
result<file_handle> create_file(const std::filesystem::path& path);

result<std::uint64_t> file_bytes(const file_handle& file, const std::filesystem::path& path);
/// Fails: corrupt when the file ends before offset + bytes.
result<void> read_exactly(const file_handle& file, const std::filesystem::path& path, void* out,
                          std::uint64_t bytes, std::uint64_t offset);
result<void> write_exactly(const file_handle& file, const std::filesystem::path& path,
                           const void* data, std::uint64_t bytes, std::uint64_t offset);
/// Takes room on disk now, so that a full disk is met before any data is written. No-op where the
/// file system can't.
result<void> reserve_bytes(const file_handle& file, const std::filesystem::path& path,
                           std::uint64_t bytes);
/// Never called twice on one file: after a failed fsync Linux may mark lost pages as clean, and a
/// second call would say OK. The caller throws the file away.
result<void> sync_file(const file_handle& file, const std::filesystem::path& path);
result<void> sync_folder(const std::filesystem::path& folder);

/// rename that refuses to take an existing name (conflict).
result<void> rename_to_new(const std::filesystem::path& from, const std::filesystem::path& to);
result<void> rename_over(const std::filesystem::path& from, const std::filesystem::path& to);
/// A file that is not there is no error.
result<void> remove_file(const std::filesystem::path& path);
result<void> make_folders(const std::filesystem::path& folder);

/// Fails: too_large before anything is allocated.
result<std::string> read_whole_file(const std::filesystem::path& path, std::int64_t bytes_max);
/// Temp file, fsync, rename (over an older one), fsync of the folder. A failure leaves the old
/// content.
result<void> write_file_durably(const std::filesystem::path& path, std::string_view content);

/// Bytes that an unprivileged process may still write on the file system of `folder`.
result<std::uint64_t> free_bytes(const std::filesystem::path& folder);

/// A name beside `path` that no other writer uses: "<path>.<random>.tmp".
std::filesystem::path temporary_name(const std::filesystem::path& path);

/// A single file name: not empty, no '/', not "." or "..", no control byte, at most 255 bytes.
bool is_plain_name(std::string_view name);

/// For tests: called before each call that changes a disk, with the call's name ("write", "fsync",
/// "rename", "create", "unlink", "reserve", "fsync_folder"); returns 0, or the errno to fail with.
/// Null: off.
extern std::atomic<int (*)(std::string_view call, const std::filesystem::path& path)> disk_fault;

}  // namespace stagecoach
