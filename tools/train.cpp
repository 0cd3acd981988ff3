// stagecoach train, stagecoach up: a whole cluster on this machine in one command.
#include <csignal>
#include <filesystem>
#include <thread>

#include "config/job_spec_yaml.hpp"
#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/job_file.hpp"
#include "tools/local_cluster.hpp"

namespace stagecoach {
namespace {

struct train_flags {
  std::string file, state = "stagecoach-state", isa;
  int workers = 0, threads = 0;
  std::vector<std::string> overrides;
  std::string listen = "127.0.0.1:7070";
};

int threads_each(int asked, int workers) {
  if (asked > 0) return asked;
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return std::max(1, cores / std::max(1, workers));
}

// What decides the bits; sizes and hashes of files are filled in at submit, and where a job runs
// may change.
job_spec what_is_trained(job_spec s) {
  for (auto* files : {&s.data.train, &s.data.valid})
    for (data_file& f : *files) {
      f.bytes = 0;
      f.hash.clear();
    }
  s.data.tokenizer_hash.clear();
  s.priority = 0;
  s.parallelism = {};
  s.elasticity = {};
  s.checkpoint = {};
  s.log_every_steps = 0;
  return s;
}

// A run that was interrupted, or whose every process died, left its job unfinished in the store:
// the same command goes on with it. Empty: there is none; nullopt: complained.
std::optional<std::string> find_unfinished(const global_flags& flags, const api_client& api,
                                           const job_file& job, int workers, exit_code& code) {
  auto view = api.get("/jobs/" + job.spec.name);
  if (!view || is_end_state(view->value("state", ""))) return std::string();
  const std::string state = view->value("state", "");
  auto stored = parse_job_spec(view->value("resolved_yaml", ""), "stored job");
  if (!stored.spec || what_is_trained(*stored.spec) != what_is_trained(job.spec)) {
    code = complain(flags, make_error(errc::conflict,
                                      "the store has a job {} that is {} and not this one. fix: "
                                      "another name, or another --state",
                                      job.spec.name, state));
    return std::nullopt;
  }
  const auto& range = stored.spec->elasticity;
  if (workers < range.workers_min || workers > range.workers_max) {
    code = complain(
        flags, make_error(errc::conflict,
                          "job {} was started for {} to {} workers. fix: --workers in that range",
                          job.spec.name, range.workers_min, range.workers_max));
    return std::nullopt;
  }
  const std::string id = view->value("id", "");
  if (!flags.quiet && !flags.is_json())
    std::printf("job/%s goes on (it was %s at step %lld)\n", job.spec.name.c_str(), state.c_str(),
                static_cast<long long>(view->value("step", std::int64_t{0})));
  if (state == "PAUSED")
    if (auto resumed = api.post("/jobs/" + id + "/resume", nlohmann::json::object()); !resumed) {
      code = complain(flags, resumed.err());
      return std::nullopt;
    }
  return id;
}

exit_code run_train(const global_flags& flags, const train_flags& own) {
  watch_interrupts();
  exit_code code = exit_code::success;
  auto job = load_job_file(flags, own.file, own.overrides, code);
  if (!job) return code;
  const auto& range = job->spec.elasticity;
  const int workers = own.workers > 0 ? own.workers : range.workers_max;
  const auto& fixed = job->spec.parallelism;
  // A fixed layout starts whole, so with fewer workers than it has places it would wait for ever.
  if (workers < range.workers_min || workers > range.workers_max ||
      (fixed.is_explicit && fixed.stages * fixed.replicas > workers))
    job = with_workers(std::move(*job), workers, workers);

  local_cluster cluster({own.state, "127.0.0.1:0", threads_each(own.threads, workers), own.isa});
  if (auto started = cluster.start_coordinator(); !started) return complain(flags, started.err());
  auto id = find_unfinished(flags, cluster.api(), *job, workers, code);
  if (!id) return code;
  for (int i = 0; i < workers; ++i)
    if (auto started = cluster.start_worker(); !started) return complain(flags, started.err());
  if (id->empty()) id = submit_job_file(flags, cluster.api(), *job, code);
  if (!id) return code;
  const bool quiet = flags.quiet || flags.is_json();
  if (!quiet)
    std::printf("job/%s submitted (%s): %d worker%s of %d thread%s, logs in %s/logs\n",
                job->spec.name.c_str(), id->c_str(), workers, workers == 1 ? "" : "s",
                cluster.settings().threads, cluster.settings().threads == 1 ? "" : "s",
                own.state.c_str());
  follow_outcome end = follow_job(flags, cluster.api(), *id, job->spec.log_every_steps);
  if (end.code == exit_code::interrupted) {
    std::fprintf(stderr, "interrupted: saving a checkpoint and stopping (Ctrl-C again: at once)\n");
    clear_interrupt();
    (void)cluster.api().post("/jobs/" + *id + "/pause", nlohmann::json::object());
    wait_until(
        [&] {
          auto view = cluster.api().get("/jobs/" + *id);
          if (view) end.job = *view;
          const std::string state = view ? view->value("state", "") : "";
          return is_interrupted() || !view || state == "PAUSED" || is_end_state(state);
        },
        std::chrono::seconds(60));
    if (!flags.quiet) std::fprintf(stderr, "the same command goes on from there\n");
  }
  cluster.stop();
  if (flags.is_json()) {
    std::printf("%s\n", end.job.dump(flags.output == "json" ? 2 : -1).c_str());
  } else if (end.job.is_object()) {
    const std::string state = end.job.value("state", ""), hash = end.job.value("weights_hash", "");
    if (state == "FAILED")
      std::fprintf(stderr, "error: job/%s failed: %s\n", job->spec.name.c_str(),
                   end.job.value("reason", "").c_str());
    if (flags.quiet)
      std::printf("%s\n", hash.c_str());
    else
      std::printf("%s  step %lld  hash %s\n", state.c_str(),
                  static_cast<long long>(end.job.value("step", std::int64_t{0})), hash.c_str());
  }
  return end.code;
}

exit_code run_up(const global_flags& flags, const train_flags& own) {
  watch_interrupts();
  local_cluster cluster({own.state, own.listen, threads_each(own.threads, own.workers), own.isa});
  if (auto started = cluster.start_coordinator(); !started) return complain(flags, started.err());
  for (int i = 0; i < std::max(1, own.workers); ++i)
    if (auto started = cluster.start_worker(); !started) return complain(flags, started.err());
  std::printf("coordinator on 127.0.0.1:%d, %d workers; logs in %s/logs; Ctrl-C stops all\n",
              cluster.port(), std::max(1, own.workers), own.state.c_str());
  std::printf("  stagecoach submit job.yaml --coordinator 127.0.0.1:%d\n", cluster.port());
  std::fflush(stdout);
  while (!is_interrupted() && cluster.coordinator().is_running())
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const bool is_dead = !is_interrupted();
  cluster.stop();
  return is_dead ? exit_code::failed : exit_code::success;
}

void add_cluster_flags(CLI::App* app, const std::shared_ptr<train_flags>& own) {
  app->add_option("--state", own->state, "folder of the store, checkpoints and logs");
  app->add_option("--workers", own->workers, "worker processes")->check(CLI::Range(1, 256));
  app->add_option("--threads", own->threads,
                  "compute threads per worker (default: cores / workers)");
  app->add_option("--isa", own->isa, "cap the instruction set: avx2 or avx512");
}

}  // namespace

void add_train(command_line c) {
  auto own = std::make_shared<train_flags>();
  CLI::App* app =
      c.app.add_subcommand("train", "coordinator + workers + submit + progress, in one command");
  app->footer(
      "examples:\n"
      "  stagecoach train job.yaml\n"
      "  stagecoach train job.yaml --workers 4 --state /tmp/run\n"
      "  stagecoach train job.yaml --workers 1 --set stop.steps=20 -q      prints the weights "
      "hash");
  app->add_option("FILE", own->file, "job file (- is stdin)")->required();
  app->add_option("--set", own->overrides, "PATH=VALUE over the file (repeatable)");
  add_cluster_flags(app, own);
  app->callback([c, own] { c.run = [c, own] { return run_train(c.flags, *own); }; });
}

void add_up(command_line c) {
  auto own = std::make_shared<train_flags>();
  own->workers = 2;
  CLI::App* app = c.app.add_subcommand("up", "a coordinator and N local workers, until Ctrl-C");
  app->footer(
      "examples:\n  stagecoach up --workers 3\n  stagecoach up --workers 2 --listen 127.0.0.1:0");
  app->add_option("--listen", own->listen, "HOST:PORT of the coordinator");
  add_cluster_flags(app, own);
  app->callback([c, own] { c.run = [c, own] { return run_up(c.flags, *own); }; });
}

}  // namespace stagecoach
