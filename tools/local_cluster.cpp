#include "tools/local_cluster.hpp"

#include <csignal>
#include <filesystem>
#include <fstream>
#include <thread>

namespace stagecoach {

namespace fs = std::filesystem;

bool wait_until(const std::function<bool()>& condition, std::chrono::milliseconds within,
                std::chrono::milliseconds period) {
  const auto until = std::chrono::steady_clock::now() + within;
  for (;;) {
    if (condition()) return true;
    if (std::chrono::steady_clock::now() >= until) return false;
    std::this_thread::sleep_for(period);
  }
}

local_cluster::~local_cluster() { stop(); }

std::string local_cluster::log_of(const std::string& name) const {
  return options_.folder + "/logs/" + name + ".log";
}

result<void> local_cluster::start_coordinator() {
  std::error_code failed;
  fs::create_directories(options_.folder + "/logs", failed);
  if (failed)
    return make_error(errc::io, "can't make {}/logs: {}", options_.folder, failed.message());
  const std::string port_file = options_.folder + "/port";
  fs::remove(port_file, failed);
  const std::string listen = port_ == 0 ? options_.listen : fmt::format("127.0.0.1:{}", port_);
  auto child = child_process::start(own_program(),
                                    {"coordinator", "--state", options_.folder + "/state",
                                     "--listen", listen, "--port-file", port_file},
                                    log_of("coordinator"));
  if (!child) return child.err();
  coordinator_ = std::move(*child);
  const bool answers = wait_until(
      [&] {
        if (!coordinator_.is_running()) return true;
        std::ifstream file(port_file);
        int port = 0;
        if (!(file >> port)) return false;
        port_ = static_cast<std::uint16_t>(port);
        return api().text("/healthz").has_value();
      },
      std::chrono::seconds(30), std::chrono::milliseconds(10));
  if (!answers || !coordinator_.is_running()) {
    std::ifstream log(log_of("coordinator"));
    std::string line, last;
    while (std::getline(log, line))
      if (!line.empty()) last = line;
    return make_error(errc::unexpected, "the coordinator did not start: {} (log: {})", last,
                      log_of("coordinator"));
  }
  return ok();
}

result<std::string> local_cluster::start_worker(const std::vector<std::string>& extra_arguments) {
  const std::string name = fmt::format("w{}", ++started_workers_);
  std::vector<std::string> arguments = {
      "worker", "--coordinator", fmt::format("127.0.0.1:{}", port_), "--name",
      name,     "--threads",     std::to_string(options_.threads)};
  if (!options_.isa.empty()) arguments.insert(arguments.end(), {"--isa", options_.isa});
  arguments.insert(arguments.end(), extra_arguments.begin(), extra_arguments.end());
  auto child = child_process::start(own_program(), arguments, log_of(name));
  if (!child) return child.err();
  workers_[name] = std::move(*child);
  return name;
}

std::vector<std::string> local_cluster::workers() {
  std::vector<std::string> names;
  for (auto& [name, process] : workers_)
    if (process.is_running()) names.push_back(name);
  return names;
}

void local_cluster::stop() {
  // All at once, then each with its grace time.
  for (auto& [name, process] : workers_) {
    process.signal(SIGTERM);
    process.signal(SIGCONT);
  }
  for (auto& [name, process] : workers_) process.terminate();
  workers_.clear();
  coordinator_.terminate();
}

api_client local_cluster::api() const {
  http_server server;
  server.port = port_;
  return api_client(server);
}

}  // namespace stagecoach
