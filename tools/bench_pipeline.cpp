// How long stages of a pipeline wait: measured, as the schedule's replay says, and by the formula.
//
// All ranks run here, one thread each. Where each has a core of its own, the clock tells; where
// cores are short it tells nothing, and the instructions' own CPU times, one by one, are laid on
// virtual time: every stage has a core there, and a frame arrives `link_seconds` after it was sent.
// The prediction knows the mean times of an earlier step's forwards, input and weight gradients.
#include <algorithm>
#include <cmath>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "model/plan.hpp"
#include "model/schedule.hpp"
#include "tools/bench_ranks.hpp"
#include "tools/bench_support.hpp"
#include "tools/follow.hpp"

namespace stagecoach {
namespace {

constexpr double link_seconds = 50e-6;  // a frame between hosts of one rack

/// The step's instructions of all stages as a table, and the CPU seconds of each.
struct recorded_step {
  schedule_table table;
  std::vector<std::vector<double>> seconds;
  double clock_bubble = 0;  // by the clock: idle share of the busiest stage
};

recorded_step record(const bench_ranks& ranks, int stages) {
  recorded_step step;
  std::int64_t begin = 0, end = 0, busiest = 0;
  for (int s = 0; s < stages; ++s) {
    step.table.emplace_back();
    step.seconds.emplace_back();
    std::int64_t busy = 0;
    for (const instruction_span& span : ranks.spans(s)) {
      const op what = span.what.what;
      const bool computes =
          what == op::forward || what == op::backward_input || what == op::backward_weight;
      step.table.back().push_back(span.what);
      step.seconds.back().push_back(computes ? static_cast<double>(span.cpu_ns) * 1e-9 : 0);
      if (!computes) continue;
      busy += span.end_ns - span.begin_ns;
      begin = begin == 0 ? span.begin_ns : std::min(begin, span.begin_ns);
      end = std::max(end, span.end_ns);
    }
    busiest = std::max(busiest, busy);
  }
  step.clock_bubble = 1 - static_cast<double>(busiest) / static_cast<double>(end - begin);
  return step;
}

/// Mean seconds of a stage's three kinds of instruction.
std::vector<stage_times> means_of(const recorded_step& step) {
  std::vector<stage_times> times;
  for (std::size_t s = 0; s < step.table.size(); ++s) {
    std::map<op, std::pair<double, int>> sums;
    for (std::size_t i = 0; i < step.table[s].size(); ++i) {
      auto& [sum, count] = sums[step.table[s][i].what];
      sum += step.seconds[s][i];
      ++count;
    }
    const auto mean = [&](op what) { return sums[what].first / std::max(1, sums[what].second); };
    times.push_back({mean(op::forward), mean(op::backward_input), mean(op::backward_weight)});
  }
  return times;
}

/// The formulas for equal stages, with the mean times of all; NaN where there is none.
double theory(const std::string& schedule, int microbatches,
              const std::vector<stage_times>& times) {
  const auto p = static_cast<double>(times.size());
  double f = 0, b = 0, w = 0;
  for (const stage_times& t : times) {
    f += t.forward / p;
    b += t.backward_input / p;
    w += t.backward_weight / p;
  }
  double idle = std::nan("");
  if (schedule == "zb-h1") idle = (p - 1) * (f + b - w);  // Qi et al. 2023
  // As published, where the gradient leaves after the weight gradient; ours leaves before it.
  if (schedule == "1f1b" || schedule == "gpipe") idle = (p - 1) * (f + b + w);
  return idle / (idle + microbatches * (f + b + w));
}

}  // namespace

std::vector<nlohmann::json> bench_pipeline(int rounds) {
  std::vector<nlohmann::json> figures;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  for (const int stages : {2, 4}) {
    job_spec spec;
    spec.name = "bench-pipeline";
    spec.model = {"", 14, 128, 4, 512, 512, 128, "random", 1, 0.02};
    spec.data.tokenizer = "none";
    const int microbatches = 16;
    spec.batch = {4 * microbatches, 4, 128, 1};
    spec.optimizer.weight_decay = 0;
    spec.stop_steps = 1 << 20;
    std::vector<stage_times> measured;
    for (std::string schedule : {"gpipe", "1f1b", "zb-h1", "searched"}) {
      if (is_interrupted()) return figures;
      const bool is_searched = schedule == "searched";
      if (is_searched) {
        // Within ZB-H1's memory, on the times that its run gave.
        auto found = search_schedule(microbatches, measured, link_seconds,
                                     std::vector<int>(static_cast<std::size_t>(stages), stages));
        if (!found) continue;
        schedule = found->name;
      }
      layout shape{stages, 1, schedule, partition_units(spec, stages), {0, 1}};
      bench_ranks ranks(spec, shape);
      (void)ranks.step_cpu_seconds();  // caches, and the allocator
      (void)ranks.step_cpu_seconds();
      recorded_step earlier = record(ranks, stages);
      std::vector<double> by_clock, by_virtual_time, predicted, formula;
      std::vector<double> makespans;
      for (int round = 0; round < 3 * rounds && !is_interrupted(); ++round) {
        if (std::isnan(ranks.step_cpu_seconds())) return figures;
        const recorded_step now = record(ranks, stages);
        const auto times = means_of(earlier);
        auto replayed = replay_schedule(now.table, microbatches, now.seconds, link_seconds);
        auto simulated = check_schedule(now.table, microbatches, times, link_seconds);
        if (!replayed || !simulated) return figures;
        by_clock.push_back(now.clock_bubble * 100);
        by_virtual_time.push_back(replayed->bubble * 100);
        makespans.push_back(replayed->makespan * 1e3);
        predicted.push_back(simulated->bubble * 100);
        formula.push_back(theory(schedule, microbatches, times) * 100);
        earlier = now;
      }
      measured = means_of(earlier);
      // A stage with a core of its own is timed by the clock.
      const bool is_by_clock = stages <= cores;
      const double bubble = median(is_by_clock ? by_clock : by_virtual_time);
      nlohmann::json line = {{"stages", stages},
                             {"microbatches", microbatches},
                             {"schedule", is_searched ? "searched " + schedule : schedule},
                             {"time", is_by_clock ? "clock" : "virtual"},
                             {"repetitions", by_clock.size()},
                             {"bubble_percent", bubble},
                             {"virtual_bubble_percent", median(by_virtual_time)},
                             {"simulated_bubble_percent", median(predicted)},
                             {"virtual_step_ms", median(makespans)}};
      if (!std::isnan(median(formula))) line["theory_percent"] = median(formula);
      line["off_by_points"] = bubble - median(predicted);
      for (std::size_t s = 0; s < measured.size(); ++s)
        line["stage_ms"].push_back({measured[s].forward * 1e3, measured[s].backward_input * 1e3,
                                    measured[s].backward_weight * 1e3});
      figures.push_back(std::move(line));
    }
  }
  return figures;
}

}  // namespace stagecoach
