#include "tools/state_api.hpp"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tools/local_cluster.hpp"

namespace stagecoach {

namespace fs = std::filesystem;

namespace {

std::string last_line(const fs::path& file) {
  std::ifstream log(file);
  std::string line, last;
  while (std::getline(log, line))
    if (!line.empty()) last = line;
  return last;
}

}  // namespace

result<state_api> state_api::open(const global_flags& flags, const std::string& state) {
  if (state.empty()) {
    auto api = flags.client();
    if (!api) return api.err();
    return state_api(std::move(*api));
  }
  std::error_code ignored;
  // train, up and prove keep the store in a folder beside their logs.
  fs::path store = fs::path(state) / "state";
  if (!fs::exists(store, ignored)) store = state;
  if (!fs::is_directory(store, ignored) || fs::is_empty(store, ignored))
    return make_error(errc::not_found,
                      "{} holds no store. fix: name the --state of a coordinator, train or prove",
                      state);
  std::string pattern = (fs::temp_directory_path(ignored) / "stagecoach-state-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr)
    return make_error(errc::io, "can't make a folder under {}",
                      fs::temp_directory_path(ignored).string());
  const fs::path folder = pattern;
  const fs::path port_file = folder / "port", log = folder / "log";
  auto child = child_process::start(own_program(),
                                    {"coordinator", "--state", store.string(), "--listen",
                                     "127.0.0.1:0", "--port-file", port_file.string()},
                                    log.string());
  if (!child) return child.err();
  http_server server;
  server.port = 0;
  const bool answers = wait_until(
      [&] {
        if (!child->is_running()) return true;
        int port = 0;
        if (std::ifstream file(port_file); !(file >> port)) return false;
        server.port = static_cast<std::uint16_t>(port);
        return api_client(server).text("/healthz").has_value();
      },
      std::chrono::seconds(30), std::chrono::milliseconds(10));
  const bool is_up = answers && child->is_running();
  const std::string last = is_up ? std::string() : last_line(log);
  fs::remove_all(folder, ignored);
  if (!is_up)
    return make_error(errc::conflict, "no coordinator could be started on {}: {}", store.string(),
                      last.empty() ? "it did not answer in 30 s" : last);
  state_api opened{api_client(server)};
  opened.coordinator_ = std::move(*child);
  return opened;
}

}  // namespace stagecoach
