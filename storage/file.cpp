#include "storage/file.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace stagecoach {
namespace fs = std::filesystem;

std::atomic<int (*)(std::string_view, const fs::path&)> disk_fault{nullptr};

namespace {

// One place for the tests' faults; errno is set as the real call would.
bool is_faulted(std::string_view call, const fs::path& path) {
  auto* fault = disk_fault.load(std::memory_order_relaxed);
  if (fault == nullptr) return false;
  const int code = fault(call, path);
  if (code == 0) return false;
  errno = code;
  return true;
}

const char* fix_of(int code) {
  switch (code) {
    case ENOSPC:
    case EDQUOT:
      return " fix: free space or raise the quota there";
    case EACCES:
    case EPERM:
      return " fix: give this user the right to write there, or name another folder";
    case EROFS:
      return " fix: name a folder on a writable file system";
    case EMFILE:
    case ENFILE:
      return " fix: raise the limit of open files (ulimit -n)";
    default:
      return "";
  }
}

}  // namespace

file_handle& file_handle::operator=(file_handle&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

file_handle::~file_handle() {
  if (fd_ >= 0) ::close(fd_);
}

error errno_error(int code, std::string_view what, const fs::path& path) {
  errc kind = errc::io;
  if (code == ENOSPC || code == EDQUOT) kind = errc::disk_full;
  if (code == ENOENT || code == ENOTDIR) kind = errc::not_found;
  return make_error(kind, "{} {}: {} (errno {}).{}", what, path.string(),
                    std::generic_category().message(code), code, fix_of(code));
}

result<file_handle> open_to_read(const fs::path& path) {
  // O_NONBLOCK: a fifo in place of a file must not stop us; it is refused below.
  file_handle file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.is_open()) return errno_error(errno, "can't open", path);
  struct stat facts {};
  if (::fstat(file.fd(), &facts) != 0) return errno_error(errno, "can't look at", path);
  if (!S_ISREG(facts.st_mode))
    return make_error(errc::bad_input, "{} is not a regular file. fix: name a file", path.string());
  return file;
}

result<file_handle> create_file(const fs::path& path) {
  if (is_faulted("create", path)) return errno_error(errno, "can't create", path);
  file_handle file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (!file.is_open()) return errno_error(errno, "can't create", path);
  return file;
}

result<std::uint64_t> file_bytes(const file_handle& file, const fs::path& path) {
  struct stat facts {};
  if (::fstat(file.fd(), &facts) != 0) return errno_error(errno, "can't look at", path);
  return static_cast<std::uint64_t>(facts.st_size);
}

result<void> read_exactly(const file_handle& file, const fs::path& path, void* out,
                          std::uint64_t bytes, std::uint64_t offset) {
  auto* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(file.fd(), to, std::min<std::uint64_t>(bytes, 1u << 30),
                                static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error(errno, "can't read", path);
    if (got == 0)
      return make_error(errc::corrupt, "{} ends at byte {}, {} more were expected", path.string(),
                        offset, bytes);
    to += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
  return ok();
}

result<void> write_exactly(const file_handle& file, const fs::path& path, const void* data,
                           std::uint64_t bytes, std::uint64_t offset) {
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    if (is_faulted("write", path)) return errno_error(errno, "can't write", path);
    const ssize_t done = ::pwrite(file.fd(), from, std::min<std::uint64_t>(bytes, 8u << 20),
                                  static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno_error(errno, "can't write", path);
    from += done;
    offset += static_cast<std::uint64_t>(done);
    bytes -= static_cast<std::uint64_t>(done);
  }
  return ok();
}

result<void> reserve_bytes(const file_handle& file, const fs::path& path, std::uint64_t bytes) {
  if (bytes == 0) return ok();
  if (is_faulted("reserve", path)) return errno_error(errno, "can't reserve room for", path);
  // fallocate and not posix_fallocate: glibc's stand-in would write every block by hand.
  if (::fallocate(file.fd(), 0, 0, static_cast<off_t>(bytes)) == 0) return ok();
  if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG || errno == EIO)
    return errno_error(errno, "can't reserve room for", path);
  return ok();
}

result<void> sync_file(const file_handle& file, const fs::path& path) {
  if (is_faulted("fsync", path) || ::fsync(file.fd()) != 0)
    return errno_error(errno, "can't make durable (fsync)", path);
  return ok();
}

result<void> sync_folder(const fs::path& folder) {
  if (is_faulted("fsync_folder", folder)) return errno_error(errno, "can't fsync folder", folder);
  file_handle handle(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!handle.is_open()) return errno_error(errno, "can't open folder", folder);
  // EINVAL: the file system has no fsync of folders, so there is nothing that we could wait for.
  if (::fsync(handle.fd()) != 0 && errno != EINVAL)
    return errno_error(errno, "can't fsync folder", folder);
  return ok();
}

result<void> rename_to_new(const fs::path& from, const fs::path& to) {
  if (is_faulted("rename", to)) return errno_error(errno, "can't rename to", to);
  if (::syscall(SYS_renameat2, AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0)
    return ok();
  if (errno == EINVAL || errno == ENOSYS) {
    // Not offered here (NFS): link() takes only a free name, too.
    if (::link(from.c_str(), to.c_str()) == 0) {
      ::unlink(from.c_str());
      return ok();
    }
  }
  if (errno == EEXIST)
    return make_error(errc::conflict, "{} is there already. fix: write under another name",
                      to.string());
  return errno_error(errno, "can't rename to", to);
}

result<void> rename_over(const fs::path& from, const fs::path& to) {
  if (is_faulted("rename", to) || ::rename(from.c_str(), to.c_str()) != 0)
    return errno_error(errno, "can't rename to", to);
  return ok();
}

result<void> remove_file(const fs::path& path) {
  if (is_faulted("unlink", path)) return errno_error(errno, "can't remove", path);
  if (::unlink(path.c_str()) != 0 && errno != ENOENT)
    return errno_error(errno, "can't remove", path);
  return ok();
}

result<void> make_folders(const fs::path& folder) {
  if (folder.empty()) return make_error(errc::bad_input, "a folder's name is empty. fix: name one");
  std::error_code code;
  fs::create_directories(folder, code);
  if (code) return errno_error(code.value(), "can't make folder", folder);
  if (!fs::is_directory(folder, code))
    return make_error(errc::io, "{} is not a folder. fix: remove it or name another",
                      folder.string());
  return ok();
}

result<std::string> read_whole_file(const fs::path& path, std::int64_t bytes_max) {
  auto file = open_to_read(path);
  if (!file) return file.err();
  auto bytes = file_bytes(*file, path);
  if (!bytes) return bytes.err();
  if (*bytes > static_cast<std::uint64_t>(bytes_max))
    return make_error(errc::too_large, "{} has {} bytes; the limit is {}", path.string(), *bytes,
                      bytes_max);
  std::string text(*bytes, '\0');
  if (auto done = read_exactly(*file, path, text.data(), *bytes, 0); !done) return done.err();
  return text;
}

result<void> write_file_durably(const fs::path& path, std::string_view content) {
  const fs::path temp = temporary_name(path);
  const auto write = [&]() -> result<void> {
    auto file = create_file(temp);
    if (!file) return file.err();
    if (auto r = write_exactly(*file, temp, content.data(), content.size(), 0); !r) return r;
    if (auto r = sync_file(*file, temp); !r) return r;
    return rename_over(temp, path);
  };
  if (auto r = write(); !r) {
    ::unlink(temp.c_str());
    return r;
  }
  return sync_folder(path.has_parent_path() ? path.parent_path() : fs::path("."));
}

result<std::uint64_t> free_bytes(const fs::path& folder) {
  struct statvfs facts {};
  if (::statvfs(folder.c_str(), &facts) != 0)
    return errno_error(errno, "can't ask for the free space of", folder);
  return static_cast<std::uint64_t>(facts.f_bavail) * facts.f_frsize;
}

fs::path temporary_name(const fs::path& path) {
  std::uint64_t random = 0;
  // Only a name: two writers of one file must not meet. No decision depends on it.
  if (::getrandom(&random, sizeof random, 0) != sizeof random)
    random = static_cast<std::uint64_t>(::getpid());
  fs::path name = path;
  name += fmt::format(".{:016x}.tmp", random);
  return name;
}

bool is_plain_name(std::string_view name) {
  if (name.empty() || name.size() > 255 || name == "." || name == "..") return false;
  for (const char c : name)
    if (c == '/' || static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return false;
  return true;
}

}  // namespace stagecoach
