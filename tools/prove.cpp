// stagecoach prove: the promise as a command. One worker alone, then several under faults; same
// hash or exit 1.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <random>
#include <thread>

#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/job_file.hpp"
#include "tools/local_cluster.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using clock = std::chrono::steady_clock;

struct prove_flags {
  std::string file, state, isa;
  int kills = 4, workers = 3;
  std::uint64_t seed = 0;
  bool keep = false;
  std::vector<std::string> overrides;
};

enum class fault { kill_worker, freeze_worker, kill_without_spare, kill_coordinator };
const char* name_of(fault f) {
  switch (f) {
    case fault::kill_worker:
      return "kill -9 a worker, attach a new one";
    case fault::freeze_worker:
      return "freeze a worker (SIGSTOP), thaw it later";
    case fault::kill_without_spare:
      return "kill -9 a worker, go on without it, attach one later";
    case fault::kill_coordinator:
      return "kill -9 the coordinator, start it again";
  }
  return "";
}

struct fault_report {
  fault what;
  std::string target;
  std::int64_t at_step = 0;
  double recovery_s = 0;         // fault to the next committed step of a new generation
  std::int64_t rolled_back = 0;  // committed steps that were redone
  std::string note;
};

std::int64_t unix_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// One proof: the calm run's hash against the stormy run's.
class proof {
 public:
  proof(const global_flags& flags, const prove_flags& own, job_file job)
      : flags_(flags), own_(own), job_(std::move(job)), random_(own.seed) {}

  exit_code run() {
    const std::string calm = calm_run();
    if (calm.empty()) return code_;
    const std::string stormy = stormy_run();
    if (stormy.empty()) return code_;
    report(calm, stormy);
    return calm == stormy ? exit_code::success : exit_code::failed;
  }

 private:
  void say(const std::string& words) const {
    if (flags_.is_json() || flags_.quiet) return;
    std::printf("%s\n", words.c_str());
    std::fflush(stdout);
  }
  std::string fail(const error& e) {
    code_ = complain(flags_, e);
    return {};
  }

  std::string calm_run() {
    local_cluster cluster({own_.state + "/calm", "127.0.0.1:0", 1, own_.isa});
    if (auto up = cluster.start_coordinator(); !up) return fail(up.err());
    if (auto up = cluster.start_worker(); !up) return fail(up.err());
    const job_file alone = with_workers(job_, 1, 1);
    say(fmt::format("run 1: one worker alone, {} steps, nothing disturbs it",
                    job_.spec.stop_steps));
    return finish(cluster, alone, [] {});
  }

  std::string stormy_run() {
    local_cluster cluster({own_.state + "/storm", "127.0.0.1:0", 1, own_.isa});
    if (auto up = cluster.start_coordinator(); !up) return fail(up.err());
    for (int i = 0; i < own_.workers; ++i)
      if (auto up = cluster.start_worker(); !up) return fail(up.err());
    const job_file many = with_workers(job_, 1, own_.workers);
    say(fmt::format("run 2: {} workers, {} faults, seed {}", own_.workers, own_.kills, own_.seed));
    return finish(cluster, many, [&] { storm(cluster); });
  }

  template <class F>
  std::string finish(local_cluster& cluster, const job_file& job, F disturb) {
    auto id = submit_job_file(flags_, cluster.api(), job, code_);
    if (!id) return {};
    job_id_ = *id;
    const auto began = clock::now();
    disturb();
    if (is_interrupted()) {
      code_ = exit_code::interrupted;
      return {};
    }
    global_flags silent = flags_;
    silent.quiet = true;
    const follow_outcome end = follow_job(silent, cluster.api(), job_id_, 1 << 30);
    if (end.code != exit_code::success) {
      code_ = end.code;
      if (code_ != exit_code::interrupted)
        std::fprintf(stderr, "error: the job ended %s: %s (logs: %s)\n",
                     end.job.is_object() ? end.job.value("state", "?").c_str() : "?",
                     end.job.is_object() ? end.job.value("reason", "").c_str() : "",
                     cluster.settings().folder.c_str());
      return {};
    }
    const double seconds = std::chrono::duration<double>(clock::now() - began).count();
    const std::string hash = end.job.value("weights_hash", "");
    auto series = cluster.api().get("/jobs/" + job_id_ + "/series");
    if (series && !(*series)["steps"].empty()) {
      const auto& steps = (*series)["steps"];
      say(fmt::format("  loss {:.4f} at step {} -> {:.4f} at step {}, {}", loss_of(steps.front()),
                      steps.front().value("step", 0), loss_of(steps.back()),
                      steps.back().value("step", 0), format_duration(seconds)));
      first_loss_ = loss_of(steps.front());
      last_loss_ = loss_of(steps.back());
    }
    say(fmt::format("  hash {}", hash));
    if (hash.empty()) code_ = exit_code::failed;
    return hash;
  }

  static double loss_of(const nlohmann::json& step) {
    return step.contains("loss") && step["loss"].is_number() ? step["loss"].get<double>()
                                                             : std::nan("");
  }

  struct view {
    std::string state;
    std::int64_t step = 0, generation = 0;
    std::vector<std::string> members;
    bool is_end() const { return is_end_state(state); }
  };
  std::optional<view> look(local_cluster& cluster) {
    auto job = cluster.api().get("/jobs/" + job_id_, 2s);
    if (!job) return std::nullopt;
    view v;
    v.state = job->value("state", "");
    v.step = job->value("step", std::int64_t{0});
    v.generation = job->value("generation", std::int64_t{0});
    if (job->contains("plan") && (*job)["plan"].is_object())
      for (const auto& m : (*job)["plan"]["members"]) v.members.push_back(m.value("name", ""));
    return v;
  }

  // The faults are spread over the run; which worker and how long is drawn from the seed.
  void storm(local_cluster& cluster) {
    std::vector<fault> list;
    const fault round[] = {fault::kill_worker, fault::kill_coordinator, fault::freeze_worker,
                           fault::kill_without_spare};
    for (int i = 0; i < own_.kills; ++i) list.push_back(round[i % 4]);
    std::shuffle(list.begin(), list.end(), random_);
    const std::int64_t steps = job_.spec.stop_steps;
    for (int i = 0; i < own_.kills; ++i) {
      const std::int64_t slice = std::max<std::int64_t>(1, steps / (own_.kills + 2));
      const std::int64_t target = std::min(
          steps - 1,
          slice * (i + 1) +
              static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(slice)) / 2);
      std::optional<view> now;
      wait_until(
          [&] {
            now = look(cluster);
            return is_interrupted() ||
                   (now && (now->is_end() || (now->state == "RUNNING" && now->step >= target)));
          },
          10min, 10ms);
      if (is_interrupted()) return;
      if (!now || now->is_end()) {
        say(fmt::format("  fault {}: the job ended before step {}; not done", i + 1, target));
        continue;
      }
      // A moment inside the step, not always just after one.
      std::this_thread::sleep_for(std::chrono::microseconds(random_() % 40'000));
      strike(cluster, list[static_cast<std::size_t>(i)], *now, i + 1);
    }
  }

  void strike(local_cluster& cluster, fault what, const view& before, int number) {
    fault_report done;
    done.what = what;
    if (what == fault::kill_coordinator) {
      strike_coordinator(cluster, before, done);
    } else {
      std::vector<std::string> targets;
      for (const std::string& w : cluster.workers())
        if (std::find(before.members.begin(), before.members.end(), w) != before.members.end())
          targets.push_back(w);
      if (targets.empty()) return;
      done.target = targets[random_() % targets.size()];
      strike_worker(cluster, before, done);
    }
    say(fmt::format("  fault {}: {}{}{} at step {}: next new step after {:.2f} s{}{}", number,
                    name_of(what), done.target.empty() ? "" : ": ", done.target, done.at_step,
                    done.recovery_s,
                    done.rolled_back > 0 ? fmt::format(", {} steps redone", done.rolled_back) : "",
                    done.note.empty() ? "" : ", " + done.note));
    reports_.push_back(done);
  }

  void strike_worker(local_cluster& cluster, const view& before, fault_report& done) {
    const auto began = clock::now();
    done.at_step = before.step;
    if (done.what == fault::freeze_worker)
      cluster.worker(done.target).signal(SIGSTOP);
    else
      cluster.worker(done.target).signal(SIGKILL);
    if (done.what == fault::kill_worker) (void)cluster.start_worker();
    std::int64_t resumed_at = -1;
    bool is_recovered = wait_until(
        [&] {
          auto now = look(cluster);
          if (is_interrupted()) return true;
          if (!now) return false;
          if (now->is_end()) return true;
          if (now->generation <= before.generation || now->state != "RUNNING") return false;
          if (resumed_at < 0) resumed_at = now->step;
          return now->step > resumed_at;
        },
        2min, 5ms);
    done.recovery_s = std::chrono::duration<double>(clock::now() - began).count();
    if (resumed_at >= 0 && resumed_at < before.step) done.rolled_back = before.step - resumed_at;
    if (!is_recovered) done.note = "NOT RECOVERED within 2 min";
    if (done.what == fault::freeze_worker) {
      cluster.worker(done.target).signal(SIGCONT);
    } else {
      cluster.forget_worker(done.target);
    }
    if (done.what == fault::kill_without_spare) (void)cluster.start_worker();
  }

  void strike_coordinator(local_cluster& cluster, const view& before, fault_report& done) {
    const auto began = clock::now();
    const std::int64_t away_from = unix_ms();
    done.at_step = before.step;
    cluster.coordinator().signal(SIGKILL);
    (void)cluster.coordinator().wait(5s);
    std::this_thread::sleep_for(std::chrono::milliseconds(500 + random_() % 1000));
    if (auto up = cluster.start_coordinator(); !up) {
      done.note = up.err().message;
      return;
    }
    const std::int64_t away_to = unix_ms();
    bool is_back = wait_until(
        [&] {
          auto now = look(cluster);
          return is_interrupted() ||
                 (now && (now->is_end() || (now->state == "RUNNING" && now->step > before.step)));
        },
        1min, 5ms);
    done.recovery_s = std::chrono::duration<double>(clock::now() - began).count();
    // The workers hand in what they did meanwhile; it is all there once a later step is.
    int meanwhile = 0;
    wait_until(
        [&] {
          meanwhile = 0;
          bool has_later = false;
          auto series =
              cluster.api().get("/jobs/" + job_id_ + "/series?from=" + std::to_string(before.step));
          if (!series) return is_interrupted();
          for (const auto& s : (*series)["steps"]) {
            const auto at = s.value("unix_ms", std::int64_t{0});
            if (at > away_from && at < away_to) ++meanwhile;
            has_later = has_later || at >= away_to;
          }
          return has_later || is_interrupted();
        },
        10s, 20ms);
    done.note = is_back ? fmt::format("{} steps committed in the {:.1f} s that it was away",
                                      meanwhile, static_cast<double>(away_to - away_from) / 1e3)
                        : "NOT BACK within 1 min";
  }

  void report(const std::string& calm, const std::string& stormy) {
    const bool same = calm == stormy;
    std::vector<double> times;
    for (const fault_report& r : reports_)
      if (r.what != fault::kill_coordinator) times.push_back(r.recovery_s);
    std::sort(times.begin(), times.end());
    if (flags_.is_json()) {
      nlohmann::json out = {{"same", same},
                            {"hash_alone", calm},
                            {"hash_storm", stormy},
                            {"seed", own_.seed},
                            {"loss_first", first_loss_},
                            {"loss_last", last_loss_},
                            {"faults", nlohmann::json::array()}};
      for (const fault_report& r : reports_)
        out["faults"].push_back({{"what", name_of(r.what)},
                                 {"target", r.target},
                                 {"at_step", r.at_step},
                                 {"recovery_s", r.recovery_s},
                                 {"steps_redone", r.rolled_back},
                                 {"note", r.note}});
      std::printf("%s\n", out.dump(flags_.output == "json" ? 2 : -1).c_str());
      return;
    }
    if (!times.empty())
      say(fmt::format("recovery after a lost worker: median {:.2f} s, longest {:.2f} s of {}",
                      times[times.size() / 2], times.back(), times.size()));
    std::printf("alone  %s\nstorm  %s\n%s\n", calm.c_str(), stormy.c_str(),
                same ? "same bits"
                     : "DIFFERENT BITS: please report this with the seed and both log folders");
  }

  const global_flags& flags_;
  const prove_flags& own_;
  job_file job_;
  std::mt19937_64 random_;
  std::string job_id_;
  std::vector<fault_report> reports_;
  double first_loss_ = 0, last_loss_ = 0;
  exit_code code_ = exit_code::failed;
};

exit_code run_prove(const global_flags& flags, prove_flags own) {
  watch_interrupts();
  exit_code code = exit_code::success;
  auto job = load_job_file(flags, own.file, own.overrides, code);
  if (!job) return code;
  if (own.seed == 0) own.seed = static_cast<std::uint64_t>(std::time(nullptr));
  const bool is_temporary = own.state.empty();
  if (is_temporary) {
    std::string pattern = (fs::temp_directory_path() / "stagecoach-prove-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr)
      return complain(flags, make_error(errc::io, "can't make a folder under {}",
                                        fs::temp_directory_path().string()));
    own.state = pattern;
  }
  code = proof(flags, own, std::move(*job)).run();
  if (is_temporary && !own.keep && code == exit_code::success) {
    std::error_code ignored;
    fs::remove_all(own.state, ignored);
  } else if (is_temporary) {
    std::fprintf(stderr, "logs and stores are kept in %s\n", own.state.c_str());
  }
  return code;
}

}  // namespace

void add_prove(command_line c) {
  auto own = std::make_shared<prove_flags>();
  CLI::App* app = c.app.add_subcommand(
      "prove", "train alone, then on several workers under faults; the weights must be the same");
  app->footer(
      "examples:\n"
      "  stagecoach prove job.yaml\n"
      "  stagecoach prove job.yaml --workers 4 --kills 8 --seed 7 --state /tmp/proof");
  app->add_option("FILE", own->file, "job file (- is stdin)")->required();
  app->add_option("--kills", own->kills,
                  "faults: workers killed, frozen, replaced; the coordinator too")
      ->check(CLI::Range(0, 1000));
  app->add_option("--workers", own->workers, "workers of the second run")->check(CLI::Range(1, 64));
  app->add_option("--seed", own->seed, "of the faults (default: the clock; printed)");
  app->add_option("--state", own->state,
                  "folder for both runs (default: a temporary one, removed)");
  app->add_option("--set", own->overrides, "PATH=VALUE over the file (repeatable)");
  app->add_option("--isa", own->isa, "cap the instruction set: avx2 or avx512");
  app->add_flag("--keep", own->keep, "keep the temporary folder");
  app->callback([c, own] { c.run = [c, own] { return run_prove(c.flags, *own); }; });
}

}  // namespace stagecoach
