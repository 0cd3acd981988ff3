// What every subcommand shares: global flags, output form, exit codes. One add_* function per
// command.
//
// main.cpp parses; the chosen command's `run` returns the exit code. Data goes to stdout, words to
// stderr.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <functional>
#include <string>
#include <vector>

#include "config/result.hpp"
#include "tools/api_client.hpp"

namespace stagecoach {

struct global_flags {
  std::string coordinator;  // HOST:PORT; empty: STAGECOACH_COORDINATOR, config file, 127.0.0.1:7070
  std::string tls_ca, tls_certificate, tls_key, token;
  std::string output = "table";  // table wide json jsonl yaml csv name
  std::string color = "auto";
  bool quiet = false, verbose = false, no_headers = false, yes = false;

  bool is_json() const { return output == "json" || output == "jsonl"; }
  /// Where the coordinator is; fails: usage (not HOST:PORT).
  result<api_client> client() const;
  tls_files tls() const { return {tls_ca, tls_certificate, tls_key}; }
};

/// A command sets this when it was chosen; main runs it.
using command_run = std::function<exit_code()>;

struct command_line {
  CLI::App& app;
  global_flags& flags;
  command_run& run;
};

// Each in the file of its name or group.
void add_coordinator(command_line c);  // tools/daemons.cpp
void add_worker(command_line c);       // tools/daemons.cpp
void add_up(command_line c);           // tools/train.cpp
void add_train(command_line c);        // tools/train.cpp
void add_prove(command_line c);        // tools/prove.cpp
void add_bench(command_line c);        // tools/bench.cpp
void add_job_commands(
    command_line c);  // tools/jobs.cpp: plan submit jobs status why logs events metrics
                      //   pause resume cancel wait
void add_cluster_commands(command_line c);  // tools/cluster.cpp: workers drain undrain
void add_checkpoint_commands(
    command_line c);                     // tools/checkpoints.cpp: checkpoints hash export sample
void add_replay(command_line c);         // tools/replay.cpp
void add_trace(command_line c);          // tools/trace.cpp
void add_file_commands(command_line c);  // tools/files.cpp: init data certs version

/// "error: ..." on stderr (or {"error": ...} with -o json) and the exit code of its kind.
exit_code complain(const global_flags& flags, const error& e);
/// All problems of a job file, compiler style or as JSON; exit code bad_spec.
exit_code complain(const global_flags& flags, const std::string& formatted,
                   const nlohmann::json& problems);

/// HOST:PORT, [::1]:PORT. Fails: usage.
struct host_port {
  std::string host;
  std::uint16_t port = 0;
};
result<host_port> parse_host_port(const std::string& text, std::uint16_t default_port);

bool is_terminal(int descriptor);
/// True where colour and redrawn lines fit: a terminal, no NO_COLOR, TERM not dumb, or
/// --color=always.
bool wants_color(const global_flags& flags, int descriptor);

/// Set by SIGINT and SIGTERM (installed by watch_interrupts); long commands look at it.
void watch_interrupts();
bool is_interrupted();
void clear_interrupt();

}  // namespace stagecoach
