// Commands about workers: workers drain undrain.
#include <cmath>
#include <cstdio>
#include <thread>

#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/table.hpp"

namespace stagecoach {
namespace {

using nlohmann::json;

struct cluster_flags {
  std::vector<std::string> workers;
  std::string reason;
  double watch = 0;
};

// One word per cell, so that awk can read the table.
std::string as_word(std::string text) {
  for (char& c : text)
    if (c == ' ') c = '-';
  return text;
}

std::string worker_cell(const json& row, const std::string& key) {
  const auto at = row.find(key);
  const bool is_number = at != row.end() && at->is_number();
  if (key == "stage") {
    const std::string stage = plain(row, "stage");
    return stage == "-" ? stage : fmt::format("{}/{}", stage, plain(row, "replica"));
  }
  if (key == "memory_bytes") return is_number ? as_word(format_bytes(at->get<double>())) : "-";
  if (key == "heartbeat_ms")
    return is_number ? format_duration(std::max(0.0, at->get<double>() / 1e3)) : "-";
  if (key == "age_s") return is_number ? format_duration(at->get<double>()) : "-";
  if (key == "labels") {
    if (at == row.end() || !at->is_object() || at->empty()) return "-";
    std::string words;
    for (const auto& [name, value] : at->items())
      words += (words.empty() ? "" : ",") + name + "=" +
               (value.is_string() ? value.get<std::string>() : value.dump());
    return words;
  }
  return as_word(plain(row, key));
}

exit_code run_workers(const global_flags& flags, const cluster_flags& own) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  watch_interrupts();
  for (;;) {
    auto reply = api->get("/workers");
    if (!reply) return complain(flags, reply.err());
    print_table(flags,
                {{"NAME", "name"},
                 {"ID", "id", true},
                 {"STATE", "state"},
                 {"JOB", "job"},
                 {"STAGE", "stage"},
                 {"DEVICE", "device"},
                 {"CLASS", "device_class", true},
                 {"THREADS", "threads"},
                 {"MEM", "memory_bytes", true},
                 {"HEARTBEAT", "heartbeat_ms"},
                 {"ADDRESS", "address"},
                 {"HOST", "host", true},
                 {"LABELS", "labels", true},
                 {"AGE", "age_s"},
                 {"REASON", "drain_reason"}},
                reply->value("workers", json::array()), worker_cell);
    if (own.watch <= 0) return exit_code::success;
    std::fflush(stdout);
    std::this_thread::sleep_for(std::chrono::duration<double>(own.watch));
    if (is_interrupted()) return exit_code::interrupted;
  }
}

exit_code run_drain(const global_flags& flags, const cluster_flags& own, const std::string& verb) {
  auto api = flags.client();
  if (!api) return complain(flags, api.err());
  exit_code code = exit_code::success;
  json replies = json::array();
  for (const std::string& worker : own.workers) {
    json body = json::object();
    if (verb == "drain") body["reason"] = own.reason;
    auto reply = api->post("/workers/" + percent_encode(worker) + "/" + verb, body);
    if (!reply) {
      code = complain(flags, reply.err());
      continue;
    }
    replies.push_back(*reply);
    if (flags.output != "table" && flags.output != "wide") continue;
    const std::string text = reply->is_object() ? reply->value("text", "") : std::string();
    if (!flags.quiet)
      std::printf("worker/%s %s%s%s\n", worker.c_str(), verb == "drain" ? "draining" : "undrained",
                  text.empty() ? "" : ": ", text.c_str());
  }
  if (code == exit_code::success || !replies.empty()) print_object(flags, replies);
  return code;
}

}  // namespace

void add_cluster_commands(command_line c) {
  {
    auto own = std::make_shared<cluster_flags>();
    CLI::App* app = c.app.add_subcommand("workers", "list the attached workers");
    app->footer("examples:\n  stagecoach workers\n  stagecoach workers -o wide -w 2");
    app->add_option("-w,--watch", own->watch, "again every SECONDS")
        ->expected(0, 1)
        ->default_str("2");
    app->callback([c, own] { c.run = [c, own] { return run_workers(c.flags, *own); }; });
  }
  for (const auto& [verb, about, example] :
       {std::tuple{"drain", "take workers out of use; their work moves at a step boundary",
                   "  stagecoach drain w-05 --reason \"replace fan\""},
        std::tuple{"undrain", "let drained workers take work again",
                   "  stagecoach undrain w-05"}}) {
    auto own = std::make_shared<cluster_flags>();
    CLI::App* app = c.app.add_subcommand(verb, about);
    app->footer(fmt::format("examples:\n{}\n  stagecoach {} w-05 w-06 -o json", example, verb));
    app->add_option("WORKER", own->workers, "names or ids")->required();
    if (std::string(verb) == "drain")
      app->add_option("--reason", own->reason, "why; shown by `workers` and in the events");
    app->callback([c, own, name = std::string(verb)] {
      c.run = [c, own, name] { return run_drain(c.flags, *own, name); };
    });
  }
}

}  // namespace stagecoach
