// stagecoach coordinator, stagecoach worker: the two processes that stay.
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <map>
#include <thread>

#include "config/log.hpp"
#include "coordinator/coordinator.hpp"
#include "tools/command.hpp"
#include "worker/worker.hpp"

namespace stagecoach {
namespace {

struct daemon_flags {
  std::string state = "stagecoach-state", listen = "127.0.0.1:7070", port_file, log_file,
              log_level = "info";
  std::string token_file, name, link_host, isa;
  link_choice links = link_choice::automatic;
  std::uint16_t link_port = 0;
  int threads = 1;
  double preempt_after_s = 30, rebalance_after_s = 30;
  bool insecure = false;
  std::vector<std::string> labels, faults;
};

level parse_level(const std::string& text) {
  if (text == "debug") return level::debug;
  if (text == "warn") return level::warn;
  if (text == "error") return level::error;
  return level::info;
}

// Waits for SIGINT or SIGTERM with the handlers of watch_interrupts.
void wait_for_signal() {
  while (!is_interrupted()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

exit_code run_coordinator(const global_flags& flags, const daemon_flags& own) {
  configure_log(parse_level(own.log_level), own.log_file);
  auto where = parse_host_port(own.listen, 7070);
  if (!where) return complain(flags, where.err());
  coordinator::options options;
  options.state = own.state;
  options.host = where->host;
  options.port = where->port;
  options.tls = flags.tls();
  options.insecure = own.insecure;
  options.shares.runtime_min = static_cast<std::int64_t>(own.preempt_after_s * 1000);
  options.shares.leaves.cool_down_ms = static_cast<std::int64_t>(own.rebalance_after_s * 1000);
  if (!own.token_file.empty()) {
    std::ifstream file(own.token_file);
    if (!(file >> options.token))
      return complain(flags, make_error(errc::usage, "no token in {}. fix: a file with one line",
                                        own.token_file));
  }
  watch_interrupts();
  auto started = coordinator::start(options);
  if (!started) return complain(flags, started.err());
  if (!own.port_file.empty()) {
    // Whole or not at all: who waits for this file reads it once.
    const std::string temp = own.port_file + ".tmp";
    std::ofstream(temp) << (*started)->port() << "\n";
    if (std::rename(temp.c_str(), own.port_file.c_str()) != 0)
      return complain(flags, make_error(errc::io, "can't write {}", own.port_file));
  }
  wait_for_signal();
  log_event(level::info, "coordinator_stopping");
  (*started)->stop();
  return exit_code::success;
}

exit_code run_worker(const global_flags& flags, const daemon_flags& own) {
  configure_log(parse_level(own.log_level), own.log_file);
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  worker_options options;
  options.coordinator_host = api->server().host;
  options.coordinator_port = api->server().port;
  options.name = own.name;
  options.threads = own.threads;
  options.isa = own.isa;
  options.tls = flags.tls();
  options.insecure = own.insecure;
  if (!own.link_host.empty()) options.link_host = own.link_host;
  options.link_port = own.link_port;
  options.links = own.links;
  for (const std::string& label : own.labels) {
    const auto equals = label.find('=');
    if (equals == std::string::npos || equals == 0)
      return complain(flags, make_error(errc::usage, "label \"{}\" is not KEY=VALUE", label));
    options.labels[label.substr(0, equals)] = label.substr(equals + 1);
  }
  for (const std::string& text : own.faults) {
    auto fault = parse_fault(text);
    if (!fault) return complain(flags, fault.err());
    options.faults.push_back(std::move(*fault));
  }
  watch_interrupts();
  auto started = worker::start(options);
  if (!started) return complain(flags, started.err());
  std::thread signals([&] {
    wait_for_signal();
    (*started)->stop("signal");
  });
  auto ended = (*started)->wait();
  std::raise(SIGTERM);  // ends the signal thread where the coordinator ended us
  signals.join();
  if (!ended) return complain(flags, ended.err());
  return exit_code::success;
}

void add_daemon_flags(CLI::App* app, const std::shared_ptr<daemon_flags>& own) {
  app->add_option("--log-file", own->log_file, "write the log here instead of stderr");
  app->add_option("--log-level", own->log_level, "debug, info, warn or error")
      ->check(CLI::IsMember({"debug", "info", "warn", "error"}));
  app->add_flag("--insecure", own->insecure, "allow plain ports on other than loopback addresses");
}

}  // namespace

void add_coordinator(command_line c) {
  auto own = std::make_shared<daemon_flags>();
  CLI::App* app = c.app.add_subcommand("coordinator", "run the coordinator (API, queue, store)");
  app->footer(
      "examples:\n"
      "  stagecoach coordinator --state /var/lib/stagecoach\n"
      "  stagecoach coordinator --state S --listen 0.0.0.0:7070 --tls-ca ca.pem --tls-cert c.pem "
      "--tls-key c.key");
  app->add_option("--state", own->state, "folder of the store and, by default, the checkpoints");
  app->add_option("--listen", own->listen, "HOST:PORT of the one port (port 0: any free one)");
  app->add_option("--port-file", own->port_file, "write the port here once it is open");
  app->add_option("--token-file", own->token_file, "read-only bearer token (needs TLS)");
  app->add_option("--preempt-after", own->preempt_after_s,
                  "seconds that a job runs before a higher one may take its workers (default 30)")
      ->check(CLI::Range(0.0, 86400.0));
  app->add_option("--rebalance-after", own->rebalance_after_s,
                  "seconds between two moves of leaves or layers from slow workers (default 30)")
      ->check(CLI::Range(0.0, 86400.0));
  add_daemon_flags(app, own);
  app->callback([c, own] { c.run = [c, own] { return run_coordinator(c.flags, *own); }; });
}

void add_worker(command_line c) {
  auto own = std::make_shared<daemon_flags>();
  own->threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  CLI::App* app = c.app.add_subcommand("worker", "run a worker and attach it to a coordinator");
  app->footer(
      "examples:\n"
      "  stagecoach worker --coordinator 127.0.0.1:7070\n"
      "  stagecoach worker --coordinator head:7070 --name gpu-04 --threads 8 --label pool=a "
      "--link-host 10.0.0.14");
  app->add_option("--coordinator", c.flags.coordinator, "HOST:PORT of the coordinator");
  app->add_option("--name", own->name, "unique name (default: host and process number)");
  app->add_option("--label", own->labels, "KEY=VALUE that jobs may ask for (repeatable)");
  app->add_option("--threads", own->threads, "compute threads (default: all cores)")
      ->check(CLI::Range(1, 1024));
  app->add_option("--link-host", own->link_host,
                  "address that other workers dial (default 127.0.0.1)");
  app->add_option("--link-port", own->link_port, "port for links (default: any free one)");
  const std::map<std::string, link_choice> choices{{"auto", link_choice::automatic},
                                                   {"tcp", link_choice::tcp},
                                                   {"shared-memory", link_choice::shared_memory}};
  app->add_option("--links", own->links,
                  "auto (shared memory with workers of this host, TCP with others), tcp or "
                  "shared-memory")
      ->transform(CLI::CheckedTransformer(choices));
  app->add_option("--isa", own->isa, "cap the instruction set: avx2 or avx512")
      ->check(CLI::IsMember({"avx2", "avx512"}));
  app->add_option(
      "--inject", own->faults,
      "for tests: flip@STEP[:TENSOR] flips a bit of a weight in memory after that step; "
      "stall@STEP hangs the trainer in it, until SIGKILL (repeatable)");
  add_daemon_flags(app, own);
  app->callback([c, own] { c.run = [c, own] { return run_worker(c.flags, *own); }; });
}

}  // namespace stagecoach
