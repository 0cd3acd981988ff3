// stagecoach bench elastic: what failures and changes of the cluster cost, beside their targets.
//
// Each figure is one JSON line with -o json, with its target and whether it is met; a figure that
// could not be measured says so and is not met. Whole clusters of real processes on loopback; a
// fault's time is the machine's wall clock, against the time that rank 0 wrote on each committed
// step. Where a layout has more workers than this machine has cores, wall time would show the
// cores and not the layout: there, CPU time or virtual time is shown, and said.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "config/job_spec_yaml.hpp"
#include "model/plan.hpp"
#include "model/virtual_time.hpp"
#include "tools/bench_ranks.hpp"
#include "tools/bench_support.hpp"
#include "tools/job_file.hpp"
#include "tools/local_cluster.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

double unix_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// One job on one cluster, with the questions that the measurements ask again and again.
class live_job {
 public:
  struct commit_time {
    std::int64_t step = 0;
    double unix_ms = 0;
  };
  struct state {
    std::string phase_name;  // of the job: RUNNING, RECOVERING, ...
    std::int64_t step = -1, generation = -1;
    std::vector<std::string> members;
    bool is_running() const { return phase_name == "RUNNING"; }
  };

  live_job(const global_flags& flags, const std::string& folder, const job_file& job, int workers)
      : cluster({folder, "127.0.0.1:0", 1, ""}) {
    if (!cluster.start_coordinator()) return;
    for (int i = 0; i < workers; ++i)
      if (!cluster.start_worker()) return;
    wait_until(
        [&] {
          auto w = cluster.api().get("/workers");
          return w && (*w)["workers"].size() == static_cast<std::size_t>(workers);
        },
        20s);
    exit_code code{};
    if (auto submitted = submit_job_file(flags, cluster.api(), job, code)) id = *submitted;
  }

  bool is_up() const { return !id.empty(); }

  std::optional<state> look() {
    auto job = cluster.api().get("/jobs/" + id, 2s);
    if (!job) return std::nullopt;
    state s;
    s.phase_name = job->value("state", "");
    s.step = job->value("step", std::int64_t{0});
    s.generation = job->value("generation", std::int64_t{0});
    if ((*job)["plan"].is_object())
      for (const auto& m : (*job)["plan"]["members"]) s.members.push_back(m.value("name", ""));
    return s;
  }

  /// Waits for a look that pleases; the last look, or nothing in time.
  template <class F>
  std::optional<state> wait_for(F pleases, std::chrono::milliseconds within = 60s) {
    std::optional<state> seen;
    const bool is_there = wait_until(
        [&] {
          if (is_interrupted()) return true;
          seen = look();
          return seen && pleases(*seen);
        },
        within, 5ms);
    return is_there && !is_interrupted() ? seen : std::nullopt;
  }

  /// Runs with so many members, and `steps` more steps are done than now.
  std::optional<state> settle(std::size_t members, std::int64_t steps = 3) {
    auto now =
        wait_for([&](const state& s) { return s.is_running() && s.members.size() == members; });
    if (!now) return now;
    const std::int64_t generation = now->generation, from = now->step;
    auto then = wait_for([&](const state& s) {
      return s.is_running() && (s.step >= from + steps || s.generation != generation);
    });
    return then && then->generation != generation ? settle(members, steps) : then;
  }

  /// Commits from a step on, by step; waits until one after `after_ms` is among them.
  std::vector<commit_time> commits(std::int64_t from, double after_ms) {
    std::vector<commit_time> list;
    wait_until(
        [&] {
          list.clear();
          auto series = cluster.api().get(
              "/jobs/" + id + "/series?from=" + std::to_string(std::max<std::int64_t>(0, from)));
          if (!series) return is_interrupted();
          for (const auto& s : (*series)["steps"])
            list.push_back({s.value("step", std::int64_t{0}), s.value("unix_ms", 0.0)});
          return is_interrupted() || (!list.empty() && list.back().unix_ms > after_ms);
        },
        20s, 20ms);
    return list;
  }

  /// from_step of the first generation that began after a moment.
  std::optional<std::int64_t> first_start_after(double after_ms) {
    auto events = cluster.api().get("/jobs/" + id + "/events?since=" + std::to_string(event_seen_));
    if (!events) return std::nullopt;
    std::optional<std::int64_t> found;
    for (const auto& e : (*events)["events"]) {
      event_seen_ = std::max(event_seen_, e.value("n", std::int64_t{0}));
      if (found || e.value("kind", "") != "generation_started" ||
          e.value("unix_ms", 0.0) < after_ms)
        continue;
      found = std::stoll(e["fields"].value("from_step", "0"));
    }
    return found;
  }

  void end() {
    (void)cluster.api().post("/jobs/" + id + "/cancel", {{"now", true}});
    cluster.stop();
  }

  local_cluster cluster;
  std::string id;

 private:
  std::int64_t event_seen_ = 0;
};

class elastic_run {
 public:
  elastic_run(const global_flags& flags, const elastic_flags& own) : flags_(flags), own_(own) {
    std::string pattern = (fs::temp_directory_path() / "stagecoach-bench-XXXXXX").string();
    folder_ = mkdtemp(pattern.data()) == nullptr ? "stagecoach-bench" : pattern;
    fs::create_directories(folder_);
    std::ofstream text(folder_ + "/text.txt");
    std::mt19937_64 random(1);
    for (int i = 0; i < 200'000; ++i) text << static_cast<char>(32 + random() % 90);
    std::stringstream names(own.only);
    for (std::string name; std::getline(names, name, ',');) only_.insert(name);
  }
  ~elastic_run() {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  exit_code run() {
    const struct {
      const char* name;
      void (elastic_run::*measure)();
    } parts[] = {{"kill", &elastic_run::kill},           {"copies", &elastic_run::kill_with_copies},
                 {"join", &elastic_run::join},           {"coordinator", &elastic_run::coordinator},
                 {"deputy", &elastic_run::deputy},       {"throughput", &elastic_run::throughput},
                 {"exactness", &elastic_run::exactness}, {"balance", &elastic_run::balance},
                 {"flip", &elastic_run::flip},           {"patrol", &elastic_run::patrol},
                 {"copy_cost", &elastic_run::copy_cost}, {"peer", &elastic_run::peer}};
    std::set<std::string> known;
    for (const auto& part : parts) known.insert(part.name);
    for (const std::string& name : only_)
      if (!known.contains(name))
        return complain(flags_, make_error(errc::usage, "--only: no figure \"{}\"", name));
    if (!flags_.is_json())
      std::printf(
          "%u cores here; more workers than cores share them, so wall times are then upper "
          "bounds\n%-58s %7s %11s %11s %11s  %-10s %s\n",
          std::thread::hardware_concurrency(), "FIGURE", "EVENTS", "MEDIAN", "P99", "TARGET", "MET",
          "NOTE");
    for (const auto& part : parts) {
      if (is_interrupted()) break;
      if (only_.empty() || only_.contains(part.name)) (this->*part.measure)();
    }
    return is_interrupted() ? exit_code::interrupted : exit_code::success;
  }

 private:
  struct figure {
    std::string name, unit;
    std::size_t events = 0;
    double value = std::nan(""), p99 = std::nan("");  // value: median, or the one number
    std::string target;
    std::optional<bool> is_met;  // none: reported only
    std::string note;
    json more = json::object();
  };

  void print(const figure& f) {
    const auto number = [](double x) { return std::isnan(x) ? json(nullptr) : json(x); };
    if (flags_.is_json()) {
      json line = {{"bench", "elastic"},
                   {"figure", f.name},
                   {"unit", f.unit},
                   {"events", f.events},
                   {"value", number(f.value)},
                   {"p99", number(f.p99)},
                   {"target", f.target},
                   {"met", f.is_met ? json(*f.is_met) : json(nullptr)},
                   {"note", f.note}};
      line.update(f.more);
      std::printf("%s\n", line.dump().c_str());
    } else {
      const auto text = [&](double x) {
        return std::isnan(x) ? std::string("-") : fmt::format("{:.4g} {}", x, f.unit);
      };
      std::printf("%-58s %7zu %11s %11s %11s  %-10s %s\n", f.name.c_str(), f.events,
                  text(f.value).c_str(), text(f.p99).c_str(), f.target.c_str(),
                  !f.is_met   ? "reported"
                  : *f.is_met ? "yes"
                              : "MISSED",
                  f.note.c_str());
    }
    std::fflush(stdout);
  }

  /// A tiny model with steps of some 50 ms on one core, so that the rest of a step is not what is
  /// measured.
  job_file small_job(const std::string& name, const std::vector<std::string>& sets,
                     const std::string& model = "{preset: tiny}", int sequences = 64) {
    const std::string text = fmt::format(R"(version: 1
name: {}
model: {}
data: {{tokenizer: bytes, train: [{{path: {}/text.txt, format: text}}]}}
batch: {{global: {} sequences, micro: 2, sequence: 64, leaves: 16}}
optimizer: {{lr: 1e-3}}
stop: {{steps: 1000000}}
elasticity: {{workers: 1..4, max_failures: 1000000}}
checkpoint: {{every: 200 steps, keep: {{last: 2}}}}
)",
                                         name, model, folder_, sequences);
    exit_code code{};
    const std::string path = folder_ + "/" + name + ".yaml";
    std::ofstream(path) << text;
    auto job = load_job_file(flags_, path, sets, code);
    if (!job) std::exit(static_cast<int>(code));
    return *job;
  }
  static job_file laid_out(job_file job, int stages, int replicas, int most) {
    job.spec.parallelism.is_explicit = true;
    job.spec.parallelism.stages = stages;
    job.spec.parallelism.replicas = replicas;
    job.spec.elasticity.workers_max = most;
    job.resolved_yaml = write_job_spec_yaml(job.spec);
    return job;
  }
  std::string next_folder() { return fmt::format("{}/run{}", folder_, ++runs_); }

  // ---- kill -9 of a member, a spare at hand
  // ----------------------------------------------------------
  struct losses {
    std::vector<double> seconds, lost;
    std::vector<double> usual_ms;
  };
  losses kill_members(const job_file& job, int members) {
    losses out;
    live_job run(flags_, next_folder(), job, members + 1);
    if (!run.is_up()) return out;
    std::mt19937_64 random(3);
    for (int i = 0; i < own_.events && !is_interrupted(); ++i) {
      if (!run.settle(static_cast<std::size_t>(members), 5)) break;
      // A moment inside a step, not always just after one.
      std::this_thread::sleep_for(std::chrono::milliseconds(200 + random() % 200));
      auto before = run.look();
      const auto alive = run.cluster.workers();
      if (!before || before->members.empty()) break;
      const std::string victim = before->members[random() % before->members.size()];
      if (std::find(alive.begin(), alive.end(), victim) == alive.end()) continue;
      (void)run.first_start_after(1e300);  // events until now are read
      const double struck = unix_ms();
      run.cluster.worker(victim).signal(SIGKILL);
      auto after = run.wait_for([&](const live_job::state& s) {
        return s.generation > before->generation && s.is_running();
      });
      run.cluster.forget_worker(victim);
      (void)run.cluster.start_worker();
      const auto start = after ? run.first_start_after(struck) : std::nullopt;
      if (!start) break;
      (void)run.wait_for([&](const live_job::state& s) { return s.step > *start + 1; });
      const auto steps = run.commits(*start - 30, struck);
      for (std::size_t k = 0; k < steps.size(); ++k) {
        if (steps[k].step == *start + 1) out.seconds.push_back((steps[k].unix_ms - struck) / 1e3);
        if (k > 0 && steps[k].step <= *start)
          out.usual_ms.push_back(steps[k].unix_ms - steps[k - 1].unix_ms);
      }
      out.lost.push_back(static_cast<double>(std::max<std::int64_t>(0, before->step - *start)));
    }
    run.end();
    return out;
  }

  void kill() {
    const auto got = kill_members(laid_out(small_job("kill", {}), 1, 2, 2), 2);
    figure f{"committed steps lost per failure, 2 replicas",
             "",
             got.lost.size(),
             median(got.lost),
             quantile(got.lost, 1.0),
             "0",
             {},
             "kill -9 of a member; p99 is the most"};
    f.is_met = !got.lost.empty() && quantile(got.lost, 1.0) == 0;
    print(f);
    figure t{"SIGKILL to the next committed step, 2 replicas + 1 spare",
             "s",
             got.seconds.size(),
             median(got.seconds),
             quantile(got.seconds, 0.99),
             "<1 / <3",
             {},
             ""};
    t.is_met = t.value < 1 && t.p99 < 3;
    t.note = fmt::format("usual step {:.0f} ms", median(got.usual_ms));
    print(t);
  }

  void kill_with_copies() {
    const auto got =
        kill_members(laid_out(small_job("copies", {"elasticity.copies=1"}), 2, 1, 2), 2);
    figure f{"committed steps lost per failure, single pipeline, copies: 1",
             "",
             got.lost.size(),
             median(got.lost),
             quantile(got.lost, 1.0),
             "0",
             {},
             "2 stages + 1 spare; p99 is the most"};
    f.is_met = !got.lost.empty() && quantile(got.lost, 1.0) == 0;
    print(f);
    figure t{"SIGKILL to the next committed step, copies: 1",
             "s",
             got.seconds.size(),
             median(got.seconds),
             quantile(got.seconds, 0.99),
             "<1 / <3",
             {},
             ""};
    t.is_met = t.value < 1 && t.p99 < 3;
    print(t);
  }

  // ---- a worker more
  // -----------------------------------------------------------------------------------
  void join() {
    std::vector<double> pauses, shares;
    live_job run(flags_, next_folder(), small_job("join", {}), 1);
    for (int i = 0; run.is_up() && i < own_.events && !is_interrupted(); ++i) {
      auto before = run.settle(1, 8);
      if (!before) break;
      const double struck = unix_ms();
      auto joiner = run.cluster.start_worker();
      if (!joiner) break;
      auto after = run.wait_for(
          [](const live_job::state& s) { return s.members.size() == 2 && s.is_running(); });
      if (!after) break;
      (void)run.settle(2, 4);
      const auto steps = run.commits(before->step - 8, unix_ms());
      std::vector<double> calm;
      double longest = 0;
      for (std::size_t k = 1; k < steps.size(); ++k) {
        const double gap = steps[k].unix_ms - steps[k - 1].unix_ms;
        if (steps[k].unix_ms < struck)
          calm.push_back(gap);
        else
          longest = std::max(longest, gap);
      }
      if (!calm.empty()) {
        pauses.push_back(longest - median(calm));
        shares.push_back(pauses.back() / median(calm));
      }
      run.cluster.worker(*joiner).terminate();
      run.cluster.forget_worker(*joiner);
    }
    if (run.is_up()) run.end();
    figure f{"pause when a worker joins (longest gap less a usual step)",
             "ms",
             pauses.size(),
             median(pauses),
             quantile(pauses, 0.99),
             "<1 step",
             {},
             ""};
    f.is_met = !shares.empty() && median(shares) < 1;
    f.note =
        fmt::format("in steps: median {:.2f}, p99 {:.2f}", median(shares), quantile(shares, 0.99));
    f.more = {{"steps_median", median(shares)}, {"steps_p99", quantile(shares, 0.99)}};
    print(f);
  }

  // ---- the coordinator away
  // ----------------------------------------------------------------------------
  void coordinator() {
    std::vector<double> calm, away;
    int silent = 0, absences = 0;
    live_job run(flags_, next_folder(), laid_out(small_job("coordinator", {}), 1, 2, 2), 2);
    for (int i = 0; run.is_up() && i < own_.events && !is_interrupted(); ++i) {
      auto before = run.settle(2, 5);
      if (!before) break;
      const double calm_from = unix_ms();
      std::this_thread::sleep_for(2s);
      const double killed = unix_ms();
      run.cluster.coordinator().signal(SIGKILL);
      (void)run.cluster.coordinator().wait(5s);
      std::this_thread::sleep_for(2s);
      const double back = unix_ms();
      if (!run.cluster.start_coordinator()) break;
      (void)run.wait_for([](const live_job::state& s) { return s.is_running(); });
      const auto steps = run.commits(before->step, back);
      ++absences;
      std::size_t meanwhile = 0;
      for (std::size_t k = 1; k < steps.size(); ++k) {
        const double gap = steps[k].unix_ms - steps[k - 1].unix_ms, at = steps[k].unix_ms;
        if (at > calm_from && at <= killed) calm.push_back(gap);
        if (at > killed && at <= back) {
          away.push_back(gap);
          ++meanwhile;
        }
      }
      if (meanwhile == 0) ++silent;
    }
    if (run.is_up()) run.end();
    const double ratio = quantile(away, 0.99) / quantile(calm, 0.99);
    figure f{"p99 of the time between commits, coordinator dead / alive",
             "x",
             static_cast<std::size_t>(absences),
             ratio,
             std::nan(""),
             "<1.05",
             {},
             ""};
    f.is_met = ratio < 1.05;
    f.note = fmt::format("medians {:.1f} / {:.1f} ms, p99 {:.1f} / {:.1f} ms", median(away),
                         median(calm), quantile(away, 0.99), quantile(calm, 0.99));
    f.more = {{"median_ratio", median(away) / median(calm)}, {"gaps", away.size()}};
    print(f);
    figure g{"kills of the coordinator after which no step came",
             "",
             static_cast<std::size_t>(absences),
             static_cast<double>(silent),
             std::nan(""),
             "0",
             {},
             "of 2 s each"};
    g.is_met = absences > 0 && silent == 0;
    print(g);
  }

  void deputy() {
    std::vector<double> seconds;
    int without = 0;
    std::mt19937_64 random(5);
    live_job run(flags_, next_folder(), laid_out(small_job("deputy", {}), 1, 3, 3), 3);
    for (int i = 0; run.is_up() && i < own_.events && !is_interrupted(); ++i) {
      auto before = run.settle(3, 5);
      if (!before || before->members.size() < 3) break;
      const std::string victim = before->members[random() % before->members.size()];
      run.cluster.coordinator().signal(SIGKILL);
      (void)run.cluster.coordinator().wait(5s);
      std::this_thread::sleep_for(200ms);
      const double struck = unix_ms();
      run.cluster.worker(victim).signal(SIGKILL);
      (void)run.cluster.worker(victim).wait(5s);
      run.cluster.forget_worker(victim);
      std::this_thread::sleep_for(10s);
      const double back = unix_ms();
      if (!run.cluster.start_coordinator()) break;
      (void)run.cluster.start_worker();
      (void)run.wait_for([&](const live_job::state& s) {
        return s.is_running() && s.generation > before->generation;
      });
      const auto steps = run.commits(before->step - 3, back);
      // A step that all had voted for may still come in; the longest gap after it is the loss.
      double longest = 0, ended = 0;
      for (std::size_t k = 1; k < steps.size(); ++k) {
        const double gap = steps[k].unix_ms - steps[k - 1].unix_ms;
        if (steps[k].unix_ms <= struck || steps[k - 1].unix_ms >= back || gap <= longest) continue;
        longest = gap;
        ended = steps[k].unix_ms;
      }
      if (ended == 0) continue;
      seconds.push_back((ended - struck) / 1e3);
      without += ended < back;
    }
    if (run.is_up()) run.end();
    figure f{"worker killed while the coordinator is dead: to the next commit",
             "s",
             seconds.size(),
             median(seconds),
             quantile(seconds, 0.99),
             "<10",
             {},
             ""};
    f.is_met = !seconds.empty() && quantile(seconds, 0.99) < 10;
    f.note = fmt::format("{} of {} before the coordinator came back, 10 s later", without,
                         seconds.size());
    print(f);
  }

  // ---- what exactness costs: CPU seconds of a step in one process, all ranks, one thread each
  // ----------
  void exactness() {
    for (const int replicas : {1, 2, 4, 3, 5, 6, 7}) {
      if (is_interrupted()) return;
      // Leaves named: as many as there are replicas to share them evenly at powers of two.
      job_spec spec =
          small_job("exactness", {},
                    "{n_layer: 6, d_model: 192, n_head: 6, vocab_size: 256, context: 128}", 32)
              .spec;
      spec.batch.sequence_tokens = 128;
      spec.batch.leaf_count = 8;
      job_spec plain = spec;
      plain.optimizer.exact = false;
      bench_ranks exact_ranks(spec, replicas), plain_ranks(plain, replicas);
      (void)exact_ranks.step_cpu_seconds();
      (void)plain_ranks.step_cpu_seconds();
      std::vector<double> ratios, exact_s;
      for (int round = 0; round < own_.rounds * 3 && !is_interrupted(); ++round) {
        const double a = exact_ranks.step_cpu_seconds(), b = plain_ranks.step_cpu_seconds();
        ratios.push_back(a / b);
        exact_s.push_back(a);
      }
      figure f{fmt::format("cost of exactness, {} replica{}", replicas, replicas == 1 ? "" : "s"),
               "%",
               ratios.size(),
               (median(ratios) - 1) * 100,
               std::nan(""),
               replicas == 1 || replicas == 2 || replicas == 4 ? "<5" : "report",
               {},
               ""};
      if (f.target == "<5") f.is_met = f.value < 5;
      f.note =
          fmt::format("CPU time of all ranks, 8 leaves, {:.0f} ms a step", median(exact_s) * 1e3);
      print(f);
    }
  }

  // ---- throughput at N of N0: measured pieces, replayed on virtual time
  // ----------------------------------
  void throughput() {
    job_spec spec =
        small_job("throughput",
                  {"elasticity.workers=1..8", "batch.micro=auto", "batch.leaves=auto"},
                  "{n_layer: 6, d_model: 192, n_head: 6, vocab_size: 256, context: 64}", 2048)
            .spec;
    const unit_times pieces = measured_pieces(spec, own_.rounds);
    for (const auto& [along, name] : {std::pair{stretch::replicas, "replicas"},
                                      std::pair{stretch::chosen, "the planner's layouts"}}) {
      auto points = predicted_throughput(spec, 8, 4, along, pieces);
      figure f{fmt::format("throughput at 4..8 of 8 workers against N/8, {}", name),
               "",
               0,
               std::nan(""),
               std::nan(""),
               ">=0.90",
               false,
               ""};
      if (!points) {
        f.note = points.err().message;
        print(f);
        continue;
      }
      f.events = points->size();
      f.value = 2;
      std::string row;
      for (const throughput_point& p : *points) {
        f.value = std::min(f.value, p.share_kept);
        row += fmt::format("{}{}: {:.2f}", row.empty() ? "" : ", ", p.workers, p.share_kept);
        f.more["shares"][std::to_string(p.workers)] = p.share_kept;
      }
      f.is_met = f.value >= 0.9;
      f.note = "virtual time from measured pieces, links of 10 Gbit/s; " + row;
      print(f);
    }
  }

  void balance() {
    for (const int most : {4, 8, 16, 64}) {
      job_spec spec =
          small_job("balance", {fmt::format("elasticity.workers=1..{}", most), "batch.leaves=auto",
                                "batch.micro=auto", "batch.global=2048 sequences"})
              .spec;
      double worst = 1;
      int at = 1;
      for (int n = 1; n <= most; ++n) {
        const double b = leaf_balance(spec.batch.leaf_count, n);
        if (b < worst) worst = b, at = n;
      }
      figure f{fmt::format("load balance with leaves auto, 1..{} workers, worst", most),
               "",
               static_cast<std::size_t>(most),
               worst,
               std::nan(""),
               ">=0.90",
               worst >= 0.9,
               ""};
      f.note = fmt::format("{} leaves; worst at {} replicas", spec.batch.leaf_count, at);
      print(f);
    }
  }

  // ---- a bit flipped in a worker's memory
  // --------------------------------------------------------------
  // Three replicas compare in the vote; one worker alone is watched by the patrol of an idle one.
  void flip() { flips("3 replicas, in the vote", 3, 3, {"checkpoint.every=10 steps"}); }
  void patrol() {
    flips("1 replica, by the patrol", 1, 2,
          {"checkpoint.every=20 steps", "elasticity.patrol=true", "checkpoint.keep.last=4"});
  }
  void flips(const std::string& what, int replicas, int workers,
             const std::vector<std::string>& sets) {
    std::vector<double> steps_until, seconds;
    int named = 0, events = 0;
    // A cluster of its own for each.
    for (; events < own_.events && !is_interrupted(); ++events) {
      job_file job = laid_out(small_job("flip", sets), 1, replicas, replicas);
      local_cluster cluster({next_folder(), "127.0.0.1:0", 1, ""});
      if (!cluster.start_coordinator()) break;
      const int at = 15 + events;
      std::string bad, id;
      const auto start_worker = [&](bool is_bad) {
        auto name = cluster.start_worker(
            is_bad ? std::vector<std::string>{"--inject", fmt::format("flip@{}", at)}
                   : std::vector<std::string>{});
        if (name && is_bad) bad = *name;
        return name.has_value();
      };
      for (int i = 0; i < replicas; ++i)
        if (!start_worker(i == events % replicas)) return;
      exit_code code{};
      if (auto submitted = submit_job_file(flags_, cluster.api(), job, code)) id = *submitted;
      if (id.empty()) break;
      for (int i = replicas; i < workers; ++i) {  // idle ones
        wait_until(
            [&] {
              auto now = cluster.api().get("/jobs/" + id);
              return is_interrupted() || (now && now->value("state", "") == "RUNNING");
            },
            20s, 20ms);
        if (!start_worker(false)) return;
      }
      // The row of the flipped step is read while it is there: the job goes back before it.
      json found, row;
      wait_until(
          [&] {
            if (row.is_null()) {
              auto series = cluster.api().get(fmt::format("/jobs/{}/series?from={}", id, at));
              if (series && !(*series)["steps"].empty() && (*series)["steps"][0]["step"] == at)
                row = (*series)["steps"][0];
            }
            auto events_now = cluster.api().get("/jobs/" + id + "/events");
            if (events_now)
              for (const auto& e : (*events_now)["events"])
                if (e.value("kind", "") == "silent_corruption") found = e;
            return !found.is_null() || is_interrupted();
          },
          180s, 10ms);  // the patrol yields to all else on its host
      cluster.stop();
      if (found.is_null()) continue;
      named += found["fields"].value("workers", "") == bad;
      steps_until.push_back(std::stod(found["fields"].value("step", "0")) - at);
      if (!row.is_null())
        seconds.push_back((found.value("unix_ms", 0.0) - row.value("unix_ms", 0.0)) / 1e3);
    }
    figure f{"a silent bit flip: seconds until it is found, " + what,
             "s",
             static_cast<std::size_t>(events),
             median(seconds),
             quantile(seconds, 1.0),
             "named",
             {},
             ""};
    f.is_met = events > 0 && named == events;
    f.note = fmt::format("{} of {} found, {} worker(s) named; first wrong step {:.0f} after it",
                         steps_until.size(), events, named, median(steps_until));
    print(f);
  }

  // ---- one neighbour copy against none: a pipeline of two on two cores
  // ----------------------------------
  void copy_cost() {
    for (const int microbatches : {32, 4}) {
      std::vector<double> ratios, none_ms;
      const auto job = [&](int copies) {
        return laid_out(
            small_job("copies" + std::to_string(copies),
                      {fmt::format("elasticity.copies={}", copies), "checkpoint.every=never",
                       fmt::format("batch.leaves={}", std::min(16, microbatches))},
                      "{preset: tiny}", 2 * microbatches),
            2, 1, 2);
      };
      for (int round = 0; round < own_.rounds && !is_interrupted(); ++round) {
        const double a = usual_step_ms(job(0)), b = usual_step_ms(job(1));
        none_ms.push_back(a);
        ratios.push_back(b / a);
      }
      figure f{fmt::format("cost of one neighbour copy, 2 stages, {} microbatches", microbatches),
               "%",
               ratios.size(),
               (median(ratios) - 1) * 100,
               std::nan(""),
               "<10",
               {},
               ""};
      f.is_met = f.value < 10;
      f.note =
          fmt::format("wall time, two workers on two cores, {:.0f} ms a step", median(none_ms));
      print(f);
    }
  }
  double usual_step_ms(const job_file& job) {
    live_job run(flags_, next_folder(), job, 2);
    if (!run.is_up() || !run.settle(2, 150)) return std::nan("");
    const auto steps = run.commits(5, 0);
    run.end();
    if (steps.size() < 2) return std::nan("");
    // The rows count whole milliseconds: the mean of many steps, not the median of gaps.
    return (steps.back().unix_ms - steps.front().unix_ms) / static_cast<double>(steps.size() - 1);
  }

  // ---- beside torchrun + DDP + Gloo: the same kills, seeded
  // ---------------------------------------------
  void peer() {
    if (own_.peer.empty()) return;
    std::string python = own_.peer;
    if (fs::is_directory(python)) python += "/bin/python";
    std::mt19937_64 random(3);
    std::vector<std::pair<double, int>> kills;
    std::string list;
    for (int i = 0; i < own_.events; ++i) {
      kills.emplace_back(0.2 + static_cast<double>(random() % 400) / 1e3,
                         static_cast<int>(random() % 2));
      list +=
          fmt::format("{}{:.3f}:{}", i == 0 ? "" : " ", kills.back().first, kills.back().second);
    }
    const int steps = 100 + 40 * own_.events;
    const auto theirs = peer_outcome(fmt::format(
        "env -u OPENBLAS_CORETYPE OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo {} {} --steps {} --kills "
        "'{}'",
        python, own_.peer_script.empty() ? "tools/bench_peer_elastic.py" : own_.peer_script, steps,
        list));
    // Ours trains on while a new worker copies the state, so the same kills take more steps.
    const auto ours = our_outcome(kills, 3 * steps);
    if (is_interrupted()) return;
    for (const auto& [who, o] : {std::pair{std::string("stagecoach"), ours},
                                 std::pair{"torchrun + DDP + Gloo " + theirs.version, theirs}}) {
      figure f{"same kills, 2 workers: " + who,
               "s",
               o.seconds.size(),
               median(o.seconds),
               quantile(o.seconds, 0.99),
               "",
               {},
               ""};
      f.note =
          o.problem.empty()
              ? fmt::format("{:.0f} steps lost; step {:.0f} ms; {} alone, {} after the kills: {}",
                            o.lost, o.step_s * 1e3, o.calm.substr(0, 8), o.storm.substr(0, 8),
                            o.calm == o.storm ? "same bits" : "OTHER BITS")
              : "not measured: " + o.problem;
      f.more = {{"steps_lost", o.lost}, {"hash_calm", o.calm}, {"hash_storm", o.storm}};
      print(f);
    }
  }

  struct outcome {
    std::vector<double> seconds;
    double lost = 0, step_s = std::nan("");
    std::string calm, storm, version, problem;
  };

  static outcome peer_outcome(const std::string& command) {
    outcome o;
    FILE* pipe = popen(command.c_str(), "r");
    std::string text;
    char buffer[4096];
    while (pipe != nullptr && std::fgets(buffer, sizeof buffer, pipe) != nullptr) text = buffer;
    if (pipe != nullptr) pclose(pipe);
    const json line = json::parse(text, nullptr, false);
    if (line.is_discarded() || !line.contains("seconds")) {
      o.problem = "the peer's script printed no result (does its Python have PyTorch?)";
      return o;
    }
    for (const auto& x : line["seconds"]) o.seconds.push_back(x.get<double>());
    for (const auto& x : line["lost"]) o.lost += x.get<double>();
    o.step_s = line.value("step_s", 0.0);
    o.calm = line.value("hash_calm", "");
    o.storm = line.value("hash_storm", "");
    o.version = line.value("version", "");
    return o;
  }

  // Two workers, as the peer has; a killed one is started again at once, as torchrun does.
  outcome our_outcome(const std::vector<std::pair<double, int>>& kills, int steps) {
    outcome o;
    const std::vector<std::string> sets = {fmt::format("stop.steps={}", steps),
                                           "checkpoint.every=20 steps"};
    for (const bool is_calm : {true, false}) {
      live_job run(flags_, next_folder(), laid_out(small_job("peer", sets), 1, 2, 2), 2);
      if (!run.is_up()) return o.problem = "the cluster did not start", o;
      for (std::size_t i = 0; !is_calm && i < kills.size() && !is_interrupted(); ++i) {
        auto before = run.settle(2, 3);
        if (!before || before->step > steps - 10) break;
        std::this_thread::sleep_for(std::chrono::duration<double>(kills[i].first));
        before = run.look();
        if (!before || before->members.size() < 2) continue;
        const std::string victim = before->members[static_cast<std::size_t>(kills[i].second)];
        (void)run.first_start_after(1e300);
        const double struck = unix_ms();
        run.cluster.worker(victim).signal(SIGKILL);
        run.cluster.forget_worker(victim);
        (void)run.cluster.start_worker();
        auto after = run.wait_for([&](const live_job::state& s) {
          return s.generation > before->generation && s.is_running();
        });
        const auto start = after ? run.first_start_after(struck) : std::nullopt;
        if (!start) break;
        o.lost += static_cast<double>(std::max<std::int64_t>(0, before->step - *start));
        (void)run.wait_for([&](const live_job::state& s) { return s.step > *start + 1; });
        for (const auto& c : run.commits(*start, struck))
          if (c.step == *start + 1) o.seconds.push_back((c.unix_ms - struck) / 1e3);
      }
      json end;
      wait_until(
          [&] {
            auto job = run.cluster.api().get("/jobs/" + run.id, 2s);
            if (job) end = *job;
            return is_interrupted() || end.value("state", "") == "COMPLETED";
          },
          600s, 50ms);
      (is_calm ? o.calm : o.storm) = end.value("weights_hash", "");
      if (is_calm) {
        const auto list = run.commits(5, 0);
        std::vector<double> gaps;
        for (std::size_t k = 1; k < list.size(); ++k)
          gaps.push_back((list[k].unix_ms - list[k - 1].unix_ms) / 1e3);
        o.step_s = median(gaps);
      }
      run.cluster.stop();
    }
    return o;
  }

  const global_flags& flags_;
  const elastic_flags& own_;
  std::string folder_;
  std::set<std::string> only_;
  int runs_ = 0;
};

}  // namespace

exit_code bench_elastic(const global_flags& flags, const elastic_flags& own) {
  return elastic_run(flags, own).run();
}

}  // namespace stagecoach
