#include "tools/process.hpp"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

namespace stagecoach {

result<child_process> child_process::start(const std::string& program,
                                           const std::vector<std::string>& arguments,
                                           const std::string& output) {
  std::vector<char*> argv;
  argv.push_back(const_cast<char*>(program.c_str()));
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);

  int out = -1;
  if (!output.empty()) {
    out = open(output.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
    if (out < 0) return make_error(errc::io, "can't open {}: {}", output, std::strerror(errno));
  }
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return make_error(errc::io, "can't start {}: {}", program, std::strerror(errno));
  if (pid == 0) {
    // Only calls that are safe after fork in a threaded program.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);
    // A session of its own: Ctrl-C at the terminal is for the command alone, which then ends its
    // children.
    setsid();
    const int null = open("/dev/null", O_RDONLY);
    if (null >= 0) dup2(null, 0);
    if (out >= 0) {
      dup2(out, 1);
      dup2(out, 2);
    }
    execv(program.c_str(), argv.data());
    _exit(127);
  }
  if (out >= 0) close(out);
  child_process child;
  child.pid_ = pid;
  return child;
}

child_process& child_process::operator=(child_process&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(status_, other.status_);
  return *this;
}

child_process::~child_process() {
  if (pid_ == 0 || status_) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

bool child_process::is_running() { return pid_ != 0 && !wait(std::chrono::milliseconds(0)); }

void child_process::signal(int number) const {
  if (pid_ != 0 && !status_) kill(pid_, number);
}

std::optional<int> child_process::wait(std::chrono::milliseconds within) {
  if (pid_ == 0) return 0;
  const auto until = std::chrono::steady_clock::now() + within;
  while (!status_) {
    int status = 0;
    const pid_t done = waitpid(pid_, &status, WNOHANG);
    if (done == pid_) {
      status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (done < 0 && errno != EINTR) {
      status_ = 127;
    } else if (std::chrono::steady_clock::now() >= until) {
      return std::nullopt;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  return status_;
}

void child_process::terminate(std::chrono::milliseconds grace) {
  if (pid_ == 0 || status_) return;
  signal(SIGTERM);
  signal(SIGCONT);  // a frozen child can't end otherwise
  if (wait(grace)) return;
  signal(SIGKILL);
  (void)wait(std::chrono::seconds(5));
}

std::string own_program() { return std::filesystem::read_symlink("/proc/self/exe").string(); }

}  // namespace stagecoach
