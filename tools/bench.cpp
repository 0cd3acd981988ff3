// stagecoach bench: speed against the floor of our own bare loop and against a peer, in one run, as
// ratios.
//
// Each part prints one JSON line per figure (with -o jsonl) or a table. Medians; candidates take
// turns, since rates on a shared machine drift. A benchmark is no test: it never fails for being
// slow.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "config/job_spec_yaml.hpp"
#include "config/presets.hpp"
#include "model/plan.hpp"
#include "model/stage.hpp"
#include "tools/bench_support.hpp"
#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/job_file.hpp"
#include "tools/local_cluster.hpp"
#include "worker/step_runner.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

struct bench_flags {
  std::string part = "all", peer, peer_script, precision = "both", shape = "both", save;
  int rounds = 5, threads = 2, kills = 20;
  elastic_flags elastic;
  comm_flags comm;
};

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line))
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

/// How many others wanted a core just now: figures of a busy machine say so.
double load_now() {
  double load = std::nan("");
  std::ifstream("/proc/loadavg") >> load;
  return load;
}

json environment() {
  json out = {{"cpu", cpu_name()},
              {"cores", std::thread::hardware_concurrency()},
              {"device", make_cpu_backend(1)->name()}};
  for (char** e = environ; *e != nullptr; ++e) {
    const std::string text = *e;
    for (const char* prefix : {"OMP_", "OPENBLAS_", "DNNL_", "STAGECOACH_MAX_ISA"})
      if (text.rfind(prefix, 0) == 0) out["env"].push_back(text);
  }
  return out;
}

class bench_run {
 public:
  bench_run(const global_flags& flags, const bench_flags& own) : flags_(flags), own_(own) {
    std::string pattern = (fs::temp_directory_path() / "stagecoach-bench-XXXXXX").string();
    folder_ = mkdtemp(pattern.data()) == nullptr ? "stagecoach-bench" : pattern;
    fs::create_directories(folder_);
    std::ofstream text(folder_ + "/text.txt");
    std::mt19937_64 random(1);
    for (int i = 0; i < 400'000; ++i) text << static_cast<char>(32 + random() % 90);
  }
  ~bench_run() {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  exit_code run() {
    const bool all = own_.part == "all";
    figure("environment", environment());
    if (all || own_.part == "gemm") gemm();
    if (all || own_.part == "step") step();
    if (all || own_.part == "kernels") kernels();
    if (all || own_.part == "pipeline")
      for (json& line : bench_pipeline(own_.rounds)) figure("pipeline", std::move(line));
    if (own_.part == "comm") return comm();
    if (all || own_.part == "overhead") overhead();
    if (all || own_.part == "scale") scale();
    if (all || own_.part == "recovery") recovery();
    if (all || own_.part == "checkpoint") checkpoint();
    return is_interrupted() ? exit_code::interrupted : exit_code::success;
  }

 private:
  void figure(const std::string& name, json values) {
    json line = {{"bench", name}};
    line.update(values);
    if (!own_.save.empty()) std::ofstream(own_.save, std::ios::app) << line.dump() << '\n';
    if (flags_.is_json()) {
      std::printf("%s\n", line.dump().c_str());
    } else {
      std::printf("%-28s", name.c_str());
      for (const auto& [key, value] : values.items()) {
        if (value.is_number_float())
          std::printf("  %s %.4g", key.c_str(), value.get<double>());
        else
          std::printf("  %s %s", key.c_str(),
                      value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
      }
      std::printf("\n");
    }
    std::fflush(stdout);
  }

  exit_code comm() {
    comm_flags own = own_.comm;
    own.rounds = own_.rounds;
    own.peer = own_.peer;
    own.peer_script = own_.peer_script;
    own.load_now = load_now;
    return bench_comm(flags_, own, [this](const std::string& name, json values) {
      figure(name, std::move(values));
    });
  }

  // ---- one worker's step, against PyTorch
  // -------------------------------------------------------------- d6/384 B4 T256 and d12/768 B4
  // T64, padded vocabulary: the shapes of the published peers' figures. One microbatch a step.
  static job_spec step_spec(const step_shape& shape, const std::string& precision) {
    job_spec spec;
    spec.precision = precision;
    spec.name = "bench-step";
    spec.model = {shape.name, shape.layers, shape.channels, shape.heads, 4 * shape.channels,
                  50304,      1024,         "random",       1,           0.02};
    spec.data.tokenizer = "none";
    spec.batch = {4, 4, shape.tokens, 1};
    spec.optimizer.weight_decay = 0;
    spec.stop_steps = 1 << 20;
    return spec;
  }

  struct bare {
    std::unique_ptr<backend> device;
    std::unique_ptr<stage> model;
    std::unique_ptr<step_runner> runner;
    std::vector<std::unique_ptr<link_set>> links;
    job_spec spec;
    plan shape;
    std::vector<std::int32_t> tokens;
    std::uint64_t step = 0, chain = 0;

    bare(job_spec s, int threads) : spec(std::move(s)) {
      device = make_cpu_backend(threads);
      shape.generation = 1;
      shape.shape.unit_cuts = {0, unit_count(spec.model)};
      shape.shape.leaf_cuts = {0, static_cast<int>(spec.batch.leaf_count)};
      shape.members.resize(1);
      links = make_memory_links(1);
      std::mt19937_64 random(7);
      tokens.resize(100'000);
      for (auto& t : tokens)
        t = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(std::min<std::int64_t>(
                                                     spec.model.vocab_size, 50257)));
      model = std::make_unique<stage>(spec.model, spec.batch, 0, unit_count(spec.model),
                                      *step_runner::slots(spec, shape, 0), *device, std::nullopt,
                                      precision_of(spec.precision));
      model->initialise_parameters();
      token_reader reader{static_cast<std::int64_t>(tokens.size()),
                          [this](std::int64_t begin, std::int64_t n, std::int32_t* out) {
                            std::copy_n(tokens.begin() + begin, n, out);
                          }};
      runner =
          std::make_unique<step_runner>(spec, shape, 0, *model, *links[0], *device, reader, reader);
    }
    double once() {
      const auto began = clock::now();
      auto vote = runner->compute(++step, chain, {});
      runner->apply(*vote);
      chain = vote->chain;
      return std::chrono::duration<double>(clock::now() - began).count();
    }
  };

  struct peer_times {
    double ms = std::nan(""), best_ms = std::nan("");
  };
  // The script prints one JSON line with "ms" (median) and "best_ms"; NaN where it does not run.
  peer_times run_peer(const step_shape& shape, const std::string& precision, int threads) {
    if (own_.peer.empty()) return {};
    // The traps of the environment: a BLAS core type meant for old libraries, spinning barriers.
    const std::string command = fmt::format(
        "env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE OMP_WAIT_POLICY=passive OMP_NUM_THREADS={0} "
        "OPENBLAS_NUM_THREADS={0} {1} {2} --threads {0} --precision {3} --layers {4} "
        "--channels {5} --heads {6} --tokens {7} 2>/dev/null",
        threads, own_.peer, own_.peer_script, precision, shape.layers, shape.channels, shape.heads,
        shape.tokens);
    FILE* pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return {};
    std::string text;
    char buffer[4096];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) text = buffer;
    pclose(pipe);
    const json line = json::parse(text, nullptr, false);
    if (line.is_discarded() || !line.contains("ms")) return {};
    peer_version_ = line.value("version", "");
    return {line["ms"].get<double>(), line.value("best_ms", std::nan(""))};
  }

  bool wants(const std::string& flag, const std::string& value) const {
    return flag == "both" || flag == value;
  }

  void step() {
    for (const step_shape& shape : step_shapes)
      for (const char* precision : {"fp32", "bf16"})
        for (int threads : {1, own_.threads})
          if (!is_interrupted() && wants(own_.shape, shape.name) &&
              wants(own_.precision, precision))
            step(shape, precision, threads);
  }

  void step(const step_shape& shape, const std::string& precision, int threads) {
    std::vector<double> ours, theirs, ours_all, theirs_best, ratios;
    step_times phases;
    std::int64_t bytes = 0;
    const double load = load_now();
    const job_spec spec = step_spec(shape, precision);
    for (int round = 0; round < own_.rounds; ++round) {
      {
        bare b(spec, threads);
        b.once();
        std::vector<double> ms;
        for (int i = 0; i < 5; ++i) {
          ms.push_back(b.once() * 1e3);
          if (ours_all.empty() || ms.back() <= *std::min_element(ours_all.begin(), ours_all.end()))
            phases = b.runner->times();
          ours_all.push_back(ms.back());
        }
        ours.push_back(median(ms));
        bytes = b.model->allocated_bytes() + b.runner->allocated_bytes();
      }
      const peer_times peer = run_peer(shape, precision, threads);
      if (std::isnan(peer.ms)) continue;
      theirs.push_back(peer.ms);
      theirs_best.push_back(peer.best_ms);
      ratios.push_back(peer.ms / ours.back());
    }
    const double tokens = static_cast<double>(4 * shape.tokens);
    const double best = *std::min_element(ours_all.begin(), ours_all.end());
    const double worst = *std::max_element(ours_all.begin(), ours_all.end());
    // Per token: 6 for each parameter that a token meets in a product, and causal attention.
    const double c = static_cast<double>(shape.channels), layers = shape.layers;
    const double flops =
        6 * (12 * layers * c * c + 50304 * c) + 6 * layers * c * static_cast<double>(shape.tokens);
    json out = {{"threads", threads},
                {"shape", fmt::format("{} B4 T{} V50304", shape.name, shape.tokens)},
                {"precision", precision},
                {"repetitions", ours_all.size()},
                {"ms", median(ours)},
                {"best_ms", best},
                {"spread_percent", (worst - best) / median(ours) * 100},
                {"tokens_per_s", tokens / median(ours) * 1e3},
                {"best_tokens_per_s", tokens / best * 1e3},
                {"best_gflop_per_s", flops * tokens / best / 1e6},
                {"flop_convention", "6N+6LCT, causal half"},
                {"load_before", load},
                {"forward_ms", static_cast<double>(phases.forward_us) / 1e3},
                {"input_gradient_ms", static_cast<double>(phases.backward_input_us) / 1e3},
                {"weight_gradient_ms", static_cast<double>(phases.backward_weight_us) / 1e3},
                {"vote_ms", static_cast<double>(phases.vote_us) / 1e3},
                {"apply_ms", static_cast<double>(phases.apply_us) / 1e3},
                {"memory_mb", static_cast<double>(bytes) / 1e6}};
    if (!theirs.empty()) {
      out["peer"] = "PyTorch " + peer_version_;
      out["peer_ms"] = median(theirs);
      out["peer_best_ms"] = *std::min_element(theirs_best.begin(), theirs_best.end());
      out["times_as_fast_as_peer"] = median(ratios);
      out["times_as_fast_as_peer_best"] = out["peer_best_ms"].get<double>() / best;
    }
    figure("step", std::move(out));
  }

  // ---- what a step consists of
  // --------------------------------------------------------------------------
  void kernels() {
    for (const step_shape& shape : step_shapes)
      for (const char* precision : {"fp32", "bf16"})
        for (int threads : {1, own_.threads}) {
          if (is_interrupted() || !wants(own_.shape, shape.name) ||
              !wants(own_.precision, precision))
            continue;
          json out = {{"threads", threads},
                      {"shape", fmt::format("{} B4 T{} V50304", shape.name, shape.tokens)},
                      {"precision", precision},
                      {"repetitions", own_.rounds},
                      {"load_before", load_now()}};
          for (const kernel_time& k :
               time_kernels(shape, precision_of(precision), threads, own_.rounds)) {
            out[k.name + "_ms"] = k.best_ms;
            if (k.flops > 0) out[k.name + "_gflop_per_s"] = k.flops / k.best_ms / 1e6;
          }
          figure("kernels", std::move(out));
        }
  }

  // ---- what the machine's matrix units give at best
  // -----------------------------------------------------
  void gemm() {
    const std::int64_t shapes[][3] = {{512, 512, 512},
                                      {1024, 1024, 1024},
                                      {2048, 2048, 2048},
                                      {1024, 384, 1536},
                                      {256, 768, 3072}};
    for (const char* precision : {"fp32", "bf16"})
      for (int threads : {1, own_.threads}) {
        double peak = 0;
        for (const auto& [m, k, n] : shapes) {
          if (is_interrupted() || !wants(own_.precision, precision)) continue;
          json out = {{"threads", threads},
                      {"shape", fmt::format("{}x{}x{}", m, k, n)},
                      {"precision", precision},
                      {"repetitions", 3 * own_.rounds},
                      {"load_before", load_now()}};
          for (const kernel_time& t :
               time_products(m, k, n, precision_of(precision), threads, 3 * own_.rounds)) {
            out[t.name + "_gflop_per_s"] = t.flops / t.best_ms / 1e6;
            peak = std::max(peak, t.flops / t.best_ms / 1e6);
          }
          figure("gemm", std::move(out));
        }
        if (peak > 0)
          figure("gemm_peak",
                 {{"threads", threads}, {"precision", precision}, {"gflop_per_s", peak}});
      }
  }

  // ---- whole clusters
  // -----------------------------------------------------------------------------------
  job_file cluster_job(const std::string& name, const std::vector<std::string>& sets) {
    std::string text = fmt::format(R"(version: 1
name: {}
model: {{n_layer: 6, d_model: 192, n_head: 6, vocab_size: 256, context: 128}}
data: {{tokenizer: bytes, train: [{{path: {}/text.txt, format: text}}]}}
batch: {{global: 32 sequences, micro: 4, sequence: 128, leaves: 8}}
optimizer: {{lr: 1e-3}}
stop: {{steps: 40}}
elasticity: {{workers: 1..4}}
checkpoint: {{every: never}}
)",
                                   name, folder_);
    exit_code code{};
    const std::string path = folder_ + "/" + name + ".yaml";
    std::ofstream(path) << text;
    auto job = load_job_file(flags_, path, sets, code);
    if (!job) std::exit(static_cast<int>(code));
    return *job;
  }

  // Median step time in ms of the steps after the first five, from the coordinator's own series.
  struct cluster_outcome {
    double step_ms = std::nan("");
    std::string hash;
    json job, checkpoints;
  };
  cluster_outcome run_cluster(const job_file& job, int workers, int threads) {
    cluster_outcome out;
    local_cluster cluster({fmt::format("{}/run{}", folder_, ++runs_), "127.0.0.1:0", threads, ""});
    if (!cluster.start_coordinator()) return out;
    for (int i = 0; i < workers; ++i) (void)cluster.start_worker().has_value();
    wait_until(
        [&] {
          auto w = cluster.api().get("/workers");
          return w && (*w)["workers"].size() == static_cast<std::size_t>(workers);
        },
        20s);
    exit_code code{};
    auto id = submit_job_file(flags_, cluster.api(), job, code);
    if (!id) return out;
    global_flags silent = flags_;
    silent.quiet = true;
    auto end = follow_job(silent, cluster.api(), *id, 1 << 20);
    out.job = end.job;
    if (end.job.is_object()) out.hash = end.job.value("weights_hash", "");
    std::vector<double> ms;
    if (auto series = cluster.api().get("/jobs/" + *id + "/series"))
      for (const auto& s : (*series)["steps"])
        if (s.value("step", 0) > 5 && s["step_ms"].is_number())
          ms.push_back(s["step_ms"].get<double>());
    out.step_ms = median(ms);
    if (auto list = cluster.api().get("/jobs/" + *id + "/checkpoints")) out.checkpoints = *list;
    cluster.stop();
    return out;
  }

  void overhead() {
    const job_file job = with_workers(cluster_job("overhead", {}), 1, 1);
    std::vector<double> bare_ms, cluster_ms, ratios;
    for (int round = 0; round < own_.rounds && !is_interrupted(); ++round) {
      bare b(job.spec, 1);
      std::vector<double> ms;
      for (int i = 0; i < 40; ++i) {
        const double x = b.once() * 1e3;
        if (i >= 5) ms.push_back(x);
      }
      bare_ms.push_back(median(ms));
      cluster_ms.push_back(run_cluster(job, 1, 1).step_ms);
      ratios.push_back(cluster_ms.back() / bare_ms.back());
    }
    figure("orchestration_overhead", {{"bare_ms", median(bare_ms)},
                                      {"cluster_ms", median(cluster_ms)},
                                      {"overhead_percent", (median(ratios) - 1) * 100},
                                      {"rounds", own_.rounds}});
  }

  void scale() {
    struct candidate {
      const char* name;
      int workers, threads, stages, replicas;
      std::vector<double> ms;
      std::string hash;
    };
    std::vector<candidate> list = {{"1 worker x 2 threads", 1, 2, 1, 1, {}, {}},
                                   {"2 stages x 1 replica, 1 thread each", 2, 1, 2, 1, {}, {}},
                                   {"1 stage x 2 replicas, 1 thread each", 2, 1, 1, 2, {}, {}}};
    for (int round = 0; round < own_.rounds && !is_interrupted(); ++round) {
      for (candidate& c : list) {
        job_file job = with_workers(cluster_job("scale", {}), c.workers, c.workers);
        job.spec.parallelism = {true, c.stages, c.replicas, "1f1b", {}};
        job.resolved_yaml = write_job_spec_yaml(job.spec);
        const auto got = run_cluster(job, c.workers, c.threads);
        c.ms.push_back(got.step_ms);
        c.hash = got.hash;
      }
    }
    for (const candidate& c : list) {
      std::vector<double> ratios;
      for (std::size_t i = 0; i < c.ms.size(); ++i) ratios.push_back(list[0].ms[i] / c.ms[i]);
      figure("scale", {{"layout", c.name},
                       {"ms", median(c.ms)},
                       {"speed_against_one_worker", median(ratios)},
                       {"hash", c.hash}});
    }
  }

  // ---- SIGKILL of a worker to the next committed step
  // ---------------------------------------------------
  void recovery() {
    job_file job = with_workers(cluster_job("recovery", {"stop.steps=1000000"}), 1, 2);
    job.spec.parallelism = {true, 1, 2, "1f1b", {}};
    job.spec.elasticity.workers_max = 2;
    job.resolved_yaml = write_job_spec_yaml(job.spec);
    local_cluster cluster({folder_ + "/recovery", "127.0.0.1:0", 1, ""});
    if (!cluster.start_coordinator()) return;
    for (int i = 0; i < 3; ++i) (void)cluster.start_worker().has_value();
    exit_code code{};
    auto id = submit_job_file(flags_, cluster.api(), job, code);
    if (!id) return;
    const auto view = [&] { return cluster.api().get("/jobs/" + *id, 2s); };
    std::mt19937_64 random(3);
    std::vector<double> seconds;
    int redone = 0;
    for (int i = 0; i < own_.kills && !is_interrupted(); ++i) {
      json before;
      const bool runs = wait_until(
          [&] {
            auto v = view();
            if (!v || v->value("state", "") != "RUNNING" || v->value("step", 0) < 3 ||
                !(*v)["plan"].is_object() || (*v)["plan"]["members"].size() < 2)
              return false;
            before = *v;
            return true;
          },
          60s, 20ms);
      if (!runs) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(300 + random() % 300));
      auto now = view();
      if (!now) break;
      const auto& members = (*now)["plan"]["members"];
      const std::string victim = members[random() % members.size()].value("name", "");
      const auto names = cluster.workers();
      if (std::find(names.begin(), names.end(), victim) == names.end()) continue;
      const std::int64_t generation = now->value("generation", std::int64_t{0}),
                         step = now->value("step", std::int64_t{0});
      const auto began = clock::now();
      cluster.worker(victim).signal(SIGKILL);
      std::int64_t first = -1;
      const bool is_back = wait_until(
          [&] {
            auto v = view();
            if (!v || v->value("generation", std::int64_t{0}) <= generation ||
                v->value("state", "") != "RUNNING")
              return false;
            if (first < 0) first = v->value("step", std::int64_t{0});
            return v->value("step", std::int64_t{0}) > first;
          },
          30s, 2ms);
      if (is_back) seconds.push_back(std::chrono::duration<double>(clock::now() - began).count());
      if (first >= 0 && first < step) ++redone;
      cluster.forget_worker(victim);
      (void)cluster.start_worker().has_value();
    }
    (void)cluster.api().post("/jobs/" + *id + "/cancel", {{"now", true}});
    figure("recovery", {{"layout", "1 stage x 2 replicas + 1 spare"},
                        {"kills", seconds.size()},
                        {"median_s", median(seconds)},
                        {"p90_s", quantile(seconds, 0.9)},
                        {"max_s", quantile(seconds, 1.0)},
                        {"kills_that_lost_committed_steps", redone}});
  }

  void checkpoint() {
    job_file job = with_workers(cluster_job("checkpoint", {"checkpoint.every=5 steps"}), 1, 1);
    const auto got = run_cluster(job, 1, 1);
    std::vector<double> stalls, bytes;
    if (got.checkpoints.is_object())
      for (const auto& c : got.checkpoints["checkpoints"]) {
        if (c.contains("stall_ms") && c["stall_ms"].is_number())
          stalls.push_back(c["stall_ms"].get<double>());
        bytes.push_back(c.value("bytes", 0.0));
      }
    figure("checkpoint", {{"stall_ms_median", median(stalls)},
                          {"stall_ms_max", quantile(stalls, 1.0)},
                          {"saves", stalls.size()},
                          {"bytes", median(bytes)},
                          {"step_ms", got.step_ms}});
  }

  const global_flags& flags_;
  const bench_flags& own_;
  std::string folder_, peer_version_;
  int runs_ = 0;
};

}  // namespace

void add_bench(command_line c) {
  auto own = std::make_shared<bench_flags>();
  CLI::App* app = c.app.add_subcommand(
      "bench",
      "speed: gemm, step, kernels, pipeline, overhead, scale, recovery, checkpoint; comm: links "
      "between two processes; elastic: what failures and changes cost");
  app->footer(
      "examples:\n"
      "  stagecoach bench\n"
      "  stagecoach bench step --peer /usr/bin/python3 --peer-script tools/bench_peer_torch.py -o "
      "jsonl\n"
      "  stagecoach bench kernels --shape d6/384 --precision bf16\n"
      "  stagecoach bench recovery --kills 50\n"
      "  stagecoach bench comm --peer VENV         beside Gloo, from a Python venv with PyTorch\n"
      "  stagecoach bench elastic --peer VENV      beside torchrun, from a Python venv with "
      "PyTorch\n"
      "  stagecoach bench elastic --only kill,join --events 5");
  app->add_option("PART", own->part,
                  "all, gemm, step, kernels, pipeline, overhead, scale, recovery, checkpoint; or "
                  "comm, elastic (not in all)")
      ->check(CLI::IsMember({"all", "gemm", "step", "kernels", "pipeline", "overhead", "scale",
                             "recovery", "checkpoint", "comm", "elastic"}));
  app->add_option("--precision", own->precision, "step, kernels: fp32, bf16 or both")
      ->check(CLI::IsMember({"both", "fp32", "bf16"}));
  app->add_option("--shape", own->shape, "step, kernels: d6/384, d12/768 or both")
      ->check(CLI::IsMember({"both", "d6/384", "d12/768"}));
  app->add_option("--save", own->save, "a file that each figure is appended to, a JSON line each");
  app->add_option("--events", own->elastic.events, "elastic: events of each kind")
      ->check(CLI::Range(1, 10000));
  app->add_option("--only", own->elastic.only, "elastic: these figures alone, by comma");
  app->add_option("--rounds", own->rounds, "turns of each candidate")->check(CLI::Range(1, 1000));
  app->add_option("--threads", own->threads, "threads of the second step figure")
      ->check(CLI::Range(1, 1024));
  app->add_option("--kills", own->kills, "of the recovery part")->check(CLI::Range(1, 10000));
  app->add_option("--peer", own->peer,
                  "a Python with PyTorch; its step takes turns with ours (elastic: or its venv)");
  app->add_option("--peer-script", own->peer_script,
                  "the peer's step (default tools/bench_peer_torch.py; comm: "
                  "tools/bench_peer_gloo.py, elastic: tools/bench_peer_elastic.py)");
  // For the other rank of comm, which comm itself starts.
  app->add_option("--partner", own->comm.partner)->group("");
  app->add_option("--links", own->comm.links)
      ->transform(CLI::CheckedTransformer(std::map<std::string, link_choice>{
          {"tcp", link_choice::tcp}, {"shared-memory", link_choice::shared_memory}}))
      ->group("");
  app->callback([c, own] {
    c.run = [c, own] {
      if (!own->comm.partner.empty()) return bench_comm(c.flags, own->comm, nullptr);
      watch_interrupts();
      if (own->part == "elastic") {
        own->elastic.rounds = own->rounds;
        own->elastic.peer = own->peer;
        own->elastic.peer_script = own->peer_script;
        return bench_elastic(c.flags, own->elastic);
      }
      if (own->peer_script.empty() && own->part != "comm")
        own->peer_script = "tools/bench_peer_torch.py";
      return bench_run(c.flags, *own).run();
    };
  });
}

}  // namespace stagecoach
