#include "model/schedule.hpp"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <deque>
#include <functional>
#include <optional>
#include <string_view>

#include "config/limits.hpp"

namespace stagecoach {

namespace {

// Tables are built before a step runs and walked by index; a share of a million microbatches is far
// beyond any run and would only be a mistake in a file.
constexpr int microbatch_count_max = 1 << 20;

// Writes one stage's list; knows which neighbours the stage has.
class stage_list {
 public:
  stage_list(int stage, int stage_count, int microbatch_count)
      : has_previous_(stage > 0), has_next_(stage + 1 < stage_count) {
    list_.reserve(static_cast<std::size_t>(microbatch_count) * 7 + 2);
  }

  void forward(int microbatch) {
    if (has_previous_) add(op::receive_activation, microbatch);
    add(op::forward, microbatch);
    if (has_next_) add(op::send_activation, microbatch);
  }

  void backward_input(int microbatch) {
    if (has_next_) add(op::receive_gradient, microbatch);
    add(op::backward_input, microbatch);
    // Before any weight gradient: the previous stage waits for this and for nothing else.
    if (has_previous_) add(op::send_gradient, microbatch);
  }

  void backward_weight(int microbatch) { add(op::backward_weight, microbatch); }

  std::vector<instruction> finish() {
    add(op::reduce, 0);
    add(op::step, 0);
    return std::move(list_);
  }

 private:
  void add(op what, int microbatch) { list_.push_back({what, microbatch}); }

  bool has_previous_;
  bool has_next_;
  std::vector<instruction> list_;
};

std::vector<instruction> gpipe(int stage, int stage_count, int microbatch_count) {
  stage_list list(stage, stage_count, microbatch_count);
  for (int m = 0; m < microbatch_count; ++m) list.forward(m);
  for (int m = 0; m < microbatch_count; ++m) {
    list.backward_input(m);
    list.backward_weight(m);
  }
  return list.finish();
}

// Warm-up fills the stages behind this one; then each forward is paid for by a backward (Narayanan
// et al. 2021, arXiv:2104.04473, 2.2). The weight gradients wait for nobody and nobody waits for
// them: late ones fill the places where a stage would wait for its neighbours.
std::vector<instruction> with_rhythm(stage_rhythm rhythm, int stage, int stage_count,
                                     int microbatch_count) {
  stage_list list(stage, stage_count, microbatch_count);
  for (int m = 0; m < std::min(rhythm.warm_up, microbatch_count); ++m) list.forward(m);
  for (int m = 0; m < microbatch_count; ++m) {
    list.backward_input(m);
    if (m >= rhythm.delay) list.backward_weight(m - rhythm.delay);
    if (m < microbatch_count - rhythm.warm_up) list.forward(m + rhythm.warm_up);
  }
  for (int m = std::max(microbatch_count - rhythm.delay, 0); m < microbatch_count; ++m)
    list.backward_weight(m);
  return list.finish();
}

constexpr std::string_view family_prefix = "zb:";

/// "4.0,3.1": what each stage does; none if the words are not of that form, or out of bounds.
std::optional<std::vector<stage_rhythm>> read_rhythms(std::string_view words) {
  std::vector<stage_rhythm> stages;
  const char* at = words.data();
  const char* const end = at + words.size();
  while (true) {
    stage_rhythm one;
    const auto warm_up = std::from_chars(at, end, one.warm_up);
    if (warm_up.ec != std::errc() || warm_up.ptr == end || *warm_up.ptr != '.') return {};
    const auto delay = std::from_chars(warm_up.ptr + 1, end, one.delay);
    if (delay.ec != std::errc()) return {};
    if (one.warm_up < 1 || one.warm_up > microbatch_count_max || one.delay < 0 ||
        one.delay > microbatch_count_max ||
        stages.size() == static_cast<std::size_t>(limits::stage_count_max))
      return {};
    stages.push_back(one);
    if (delay.ptr == end) return stages;
    if (*delay.ptr != ',') return {};
    at = delay.ptr + 1;
  }
}

/// None for gpipe, which has no rhythm, and for a name that is none.
std::optional<std::vector<stage_rhythm>> rhythms_of(const std::string& schedule, int stage_count) {
  if (schedule.starts_with(family_prefix)) {
    auto stages = read_rhythms(std::string_view(schedule).substr(family_prefix.size()));
    if (!stages || stages->size() != static_cast<std::size_t>(stage_count)) return {};
    return stages;
  }
  if (schedule != "1f1b" && schedule != "zb-h1") return {};
  std::vector<stage_rhythm> stages;
  for (int s = 0; s < stage_count; ++s)
    stages.push_back({stage_count - s, schedule == "zb-h1" ? s : 0});
  return stages;
}

struct frame {
  int microbatch;
  double ready;  // when it is there to be received
};

// What one stage has done so far in the replay.
struct replayed_stage {
  std::size_t next = 0;  // instruction
  double clock = 0;
  double busy = 0;
  int live = 0;
  int live_max = 0;
  int backward_inputs = 0;
  int backward_weights = 0;
  bool reduced = false;
  bool stepped = false;
  std::vector<char> received_activation, forwarded, sent_activation;
  std::vector<char> received_gradient, sent_gradient;
};

class replay {
 public:
  /// cost: seconds of instruction i of stage s.
  replay(const schedule_table& table, int microbatch_count,
         std::function<double(std::size_t s, std::size_t i)> cost, double link_seconds)
      : table_(table),
        microbatch_count_(microbatch_count),
        cost_(std::move(cost)),
        link_seconds_(link_seconds),
        stages_(table.size()),
        activations_(table.size()),
        gradients_(table.size()) {
    const auto count = static_cast<std::size_t>(microbatch_count);
    for (replayed_stage& s : stages_)
      for (auto* done : {&s.received_activation, &s.forwarded, &s.sent_activation,
                         &s.received_gradient, &s.sent_gradient})
        done->assign(count, 0);
  }

  result<schedule_facts> run() {
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::size_t s = 0; s < stages_.size(); ++s) {
        while (stages_[s].next < table_[s].size() && !is_waiting(s)) {
          if (auto done = carry_out(s); !done) return done.err();
          spend(s, cost_(s, stages_[s].next));
          ++stages_[s].next;
          moved = true;
        }
      }
    }
    if (auto done = check_end(); !done) return done.err();
    return facts();
  }

 private:
  const instruction& current(std::size_t s) const { return table_[s][stages_[s].next]; }

  // Only a receive waits: sends are buffered by the links.
  bool is_waiting(std::size_t s) const {
    const instruction& i = current(s);
    if (i.what == op::receive_activation) return s > 0 && activations_[s].empty();
    if (i.what == op::receive_gradient) return s + 1 < stages_.size() && gradients_[s].empty();
    return false;
  }

  template <class... A>
  error wrong(std::size_t s, fmt::format_string<A...> format, A&&... args) const {
    return make_error(errc::bad_spec, "schedule: stage {}, instruction {} ({} {}): {}", s,
                      stages_[s].next, to_string(current(s).what), current(s).microbatch,
                      fmt::format(format, std::forward<A>(args)...));
  }

  result<void> carry_out(std::size_t s) {
    const instruction& i = current(s);
    replayed_stage& stage = stages_[s];
    const bool has_previous = s > 0;
    const bool has_next = s + 1 < stages_.size();
    const int m = i.microbatch;
    if (i.what == op::reduce || i.what == op::step) return close_step(s);
    if (m < 0 || m >= microbatch_count_)
      return wrong(s, "microbatch {} of {}; expected 0 to {}", m, microbatch_count_,
                   microbatch_count_ - 1);
    if (stage.reduced) return wrong(s, "comes after reduce, which ends the microbatches of a step");
    const auto at = static_cast<std::size_t>(m);
    switch (i.what) {
      case op::receive_activation: {
        if (!has_previous) return wrong(s, "the first stage has nobody to receive from");
        if (auto taken = take(s, activations_[s]); !taken) return taken;
        stage.received_activation[at] = 1;
        keep(stage);
        return ok();
      }
      case op::forward: {
        if (stage.forwarded[at]) return wrong(s, "a second forward of this microbatch");
        if (has_previous && !stage.received_activation[at])
          return wrong(s, "its activation was not received before");
        stage.forwarded[at] = 1;
        if (!has_previous) keep(stage);
        return ok();
      }
      case op::send_activation: {
        if (!has_next) return wrong(s, "the last stage has nobody to send to");
        if (!stage.forwarded[at]) return wrong(s, "sent before its forward");
        if (stage.sent_activation[at]) return wrong(s, "a second send of this microbatch");
        stage.sent_activation[at] = 1;
        activations_[s + 1].push_back({m, stage.clock + link_seconds_});
        return ok();
      }
      case op::receive_gradient: {
        if (!has_next) return wrong(s, "the last stage has no gradient to receive");
        if (auto taken = take(s, gradients_[s]); !taken) return taken;
        stage.received_gradient[at] = 1;
        return ok();
      }
      case op::backward_input: {
        // In order, like the weight gradients: a stage may add a norm's gain gradient here.
        if (m != stage.backward_inputs)
          return wrong(s, "expected microbatch {} (microbatch order)", stage.backward_inputs);
        if (!stage.forwarded[at]) return wrong(s, "comes before its forward");
        if (has_next && !stage.received_gradient[at])
          return wrong(s, "its output gradient was not received before");
        ++stage.backward_inputs;
        return ok();
      }
      case op::send_gradient: {
        if (!has_previous) return wrong(s, "the first stage has nobody to send a gradient to");
        if (m >= stage.backward_inputs) return wrong(s, "sent before its backward_input");
        if (stage.sent_gradient[at]) return wrong(s, "a second send of this microbatch");
        stage.sent_gradient[at] = 1;
        gradients_[s - 1].push_back({m, stage.clock + link_seconds_});
        return ok();
      }
      case op::backward_weight: {
        // The order of the sum is part of the result's bits (DESIGN 4).
        if (m != stage.backward_weights)
          return wrong(s, "expected microbatch {} (microbatch order)", stage.backward_weights);
        if (m >= stage.backward_inputs) return wrong(s, "comes before its backward_input");
        ++stage.backward_weights;
        --stage.live;
        return ok();
      }
      case op::reduce:
      case op::step:
        break;
    }
    return wrong(s, "unknown instruction");
  }

  result<void> close_step(std::size_t s) {
    replayed_stage& stage = stages_[s];
    if (current(s).what == op::reduce) {
      if (stage.reduced) return wrong(s, "a second reduce in one step");
      if (stage.backward_weights != microbatch_count_)
        return wrong(s, "{} of {} microbatches have their weight gradients", stage.backward_weights,
                     microbatch_count_);
      stage.reduced = true;
      return ok();
    }
    if (!stage.reduced) return wrong(s, "comes before reduce");
    if (stage.stepped) return wrong(s, "a second step");
    stage.stepped = true;
    return ok();
  }

  result<void> take(std::size_t s, std::deque<frame>& channel) {
    const frame first = channel.front();
    if (first.microbatch != current(s).microbatch)
      return wrong(s,
                   "the channel delivers microbatch {} next (sends and receives differ in order)",
                   first.microbatch);
    channel.pop_front();
    stages_[s].clock = std::max(stages_[s].clock, first.ready);
    return ok();
  }

  // An activation counts from its arrival (or from the forward that made it) to its weight
  // gradient.
  static void keep(replayed_stage& stage) {
    stage.live_max = std::max(stage.live_max, ++stage.live);
  }

  void spend(std::size_t s, double seconds) {
    stages_[s].clock += seconds;
    stages_[s].busy += seconds;
  }

  result<void> check_end() const {
    // A stage that waits for a peer which has ended waits for a send that does not exist; only if
    // no such stage exists do stages wait for one another.
    std::string waiting;
    for (std::size_t s = 0; s < stages_.size(); ++s) {
      if (stages_[s].next == table_[s].size()) continue;
      const std::size_t peer = current(s).what == op::receive_activation ? s - 1 : s + 1;
      if (stages_[peer].next == table_[peer].size())
        return wrong(s, "never sent: stage {} ends without it", peer);
      waiting += fmt::format("{}stage {} at instruction {} ({} {})", waiting.empty() ? "" : ", ", s,
                             stages_[s].next, to_string(current(s).what), current(s).microbatch);
    }
    if (!waiting.empty())
      return make_error(errc::bad_spec, "schedule: deadlock, all of these wait: {}", waiting);
    for (std::size_t s = 0; s < stages_.size(); ++s) {
      const replayed_stage& stage = stages_[s];
      if (!stage.reduced || !stage.stepped)
        return make_error(errc::bad_spec,
                          "schedule: stage {} is incomplete: {} of {} microbatches done, {}", s,
                          stage.backward_weights, microbatch_count_,
                          stage.reduced ? "no step at its end" : "no reduce at its end");
      for (const auto* channel : {&activations_[s], &gradients_[s]})
        if (!channel->empty())
          return make_error(
              errc::bad_spec, "schedule: stage {} never receives the {} {} sent to it", s,
              channel == &activations_[s] ? "activation" : "gradient", channel->front().microbatch);
    }
    return ok();
  }

  schedule_facts facts() const {
    schedule_facts f;
    double busiest = 0;
    for (const replayed_stage& stage : stages_) {
      f.live_microbatches_max.push_back(stage.live_max);
      f.makespan = std::max(f.makespan, stage.clock);
      busiest = std::max(busiest, stage.busy);
    }
    if (f.makespan > 0) f.bubble = 1.0 - busiest / f.makespan;
    return f;
  }

  const schedule_table& table_;
  int microbatch_count_;
  std::function<double(std::size_t, std::size_t)> cost_;
  double link_seconds_;
  std::vector<replayed_stage> stages_;
  std::vector<std::deque<frame>> activations_;  // [s]: on the way from s-1 to s
  std::vector<std::deque<frame>> gradients_;    // [s]: on the way from s+1 to s
};

result<void> check_sizes(int stage_count, int microbatch_count) {
  if (stage_count < 1 || stage_count > limits::stage_count_max)
    return make_error(errc::bad_spec, "schedule: {} stages; expected 1 to {}", stage_count,
                      limits::stage_count_max);
  if (microbatch_count < 1 || microbatch_count > microbatch_count_max)
    return make_error(errc::bad_spec,
                      "schedule: {} microbatches on one replica; expected 1 to {}. fix: a larger "
                      "batch.micro_sequences or more replicas",
                      microbatch_count, microbatch_count_max);
  return ok();
}

}  // namespace

result<void> check_schedule_name(const std::string& schedule, int stage_count) {
  if (schedule == "gpipe" || rhythms_of(schedule, stage_count)) return ok();
  return make_error(errc::bad_spec,
                    "schedule \"{}\" is unknown, or not of {} stages. fix: zb-h1, 1f1b or gpipe",
                    schedule.substr(0, 100), stage_count);
}

std::string schedule_name(const std::vector<stage_rhythm>& stages) {
  std::string name(family_prefix);
  for (std::size_t s = 0; s < stages.size(); ++s)
    name += fmt::format("{}{}.{}", s == 0 ? "" : ",", stages[s].warm_up, stages[s].delay);
  return name;
}

result<schedule_table> make_schedule(const std::string& schedule, int stage_count,
                                     int microbatch_count) {
  if (auto sizes = check_sizes(stage_count, microbatch_count); !sizes) return sizes.err();
  if (auto named = check_schedule_name(schedule, stage_count); !named) return named.err();
  const auto rhythms = rhythms_of(schedule, stage_count);
  schedule_table table;
  for (int stage = 0; stage < stage_count; ++stage)
    table.push_back(rhythms ? with_rhythm((*rhythms)[static_cast<std::size_t>(stage)], stage,
                                          stage_count, microbatch_count)
                            : gpipe(stage, stage_count, microbatch_count));
  return table;
}

int live_microbatches(const std::string& schedule, int stage_count, int stage,
                      int microbatch_count) {
  const auto rhythms = rhythms_of(schedule, stage_count);
  if (!rhythms) return microbatch_count;
  const stage_rhythm& own = (*rhythms)[static_cast<std::size_t>(stage)];
  return std::min(own.warm_up + own.delay, microbatch_count);
}

namespace {

/// What search_schedule compares: when it ends, then what it keeps.
struct candidate_score {
  double makespan = 0;
  int live = 0;
  bool is_better_than(const candidate_score& other) const {
    // Sums of the same times in another order differ in their last bits: these are no gain.
    const double least = 1e-9 * other.makespan;
    if (makespan < other.makespan - least) return true;
    return makespan <= other.makespan + least && live < other.live;
  }
};

}  // namespace

result<found_schedule> search_schedule(int microbatch_count, const std::vector<stage_times>& times,
                                       double link_seconds, const std::vector<int>& live_max) {
  const int stage_count = static_cast<int>(times.size());
  if (auto sizes = check_sizes(stage_count, microbatch_count); !sizes) return sizes.err();
  if (live_max.size() != times.size() || *std::min_element(live_max.begin(), live_max.end()) < 1)
    return make_error(errc::bad_spec,
                      "schedule: {} limits of live microbatches for {} stages, each "
                      "at least 1",
                      live_max.size(), stage_count);

  std::vector<stage_rhythm> best;
  candidate_score best_score;
  found_schedule found;
  // Takes the candidate if it is within the limits, free of deadlock, and better.
  const auto consider = [&](const std::vector<stage_rhythm>& candidate) {
    candidate_score score;
    for (std::size_t s = 0; s < candidate.size(); ++s) {
      const int live = std::min(candidate[s].warm_up + candidate[s].delay, microbatch_count);
      if (candidate[s].warm_up < 1 || candidate[s].delay < 0 || live > live_max[s]) return false;
      score.live += live;
    }
    const std::string name = schedule_name(candidate);
    auto table = make_schedule(name, stage_count, microbatch_count);
    if (!table) return false;
    auto facts = check_schedule(*table, microbatch_count, times, link_seconds);
    if (!facts) return false;  // stages would wait for one another
    score.makespan = facts->makespan;
    if (!best.empty() && !score.is_better_than(best_score)) return false;
    best = candidate;
    best_score = score;
    found = {name, std::move(*facts)};
    return true;
  };

  // One microbatch at a time is within any limit; 1F1B, ZB-H1 and ZB-H2 as far as the limits let.
  consider(std::vector<stage_rhythm>(times.size()));
  for (const int extra : {0, 1}) {
    for (const int delay_share : {0, 1, 2}) {
      std::vector<stage_rhythm> start;
      for (int s = 0; s < stage_count; ++s) {
        const int most = live_max[static_cast<std::size_t>(s)];
        const int behind = stage_count - s;
        const int warm_up = std::min(behind + extra * (behind - 1), most);
        start.push_back({warm_up, std::min(delay_share * s, most - warm_up)});
      }
      consider(start);
    }
  }
  // Then one stage after the other, a step in each direction, until none gains.
  for (bool has_gained = true; has_gained;) {
    has_gained = false;
    for (std::size_t s = 0; s < times.size(); ++s)
      for (const stage_rhythm by :
           {stage_rhythm{1, 0}, {0, 1}, {-1, 0}, {0, -1}, {1, -1}, {-1, 1}}) {
        std::vector<stage_rhythm> next = best;
        next[s].warm_up += by.warm_up;
        next[s].delay += by.delay;
        has_gained = consider(next) || has_gained;
      }
  }
  return found;
}

result<schedule_facts> check_schedule(const schedule_table& table, int microbatch_count,
                                      const std::vector<stage_times>& times, double link_seconds) {
  if (table.size() > static_cast<std::size_t>(limits::stage_count_max))
    return make_error(errc::bad_spec, "schedule: {} stages; the limit is {}", table.size(),
                      limits::stage_count_max);
  if (auto sizes = check_sizes(static_cast<int>(table.size()), microbatch_count); !sizes)
    return sizes.err();
  if (!times.empty() && times.size() != table.size())
    return make_error(errc::bad_spec, "schedule: times of {} stages for a table of {}",
                      times.size(), table.size());
  const auto cost = [&](std::size_t s, std::size_t i) {
    const stage_times one = times.empty() ? stage_times{} : times[s];
    switch (table[s][i].what) {
      case op::forward:
        return one.forward;
      case op::backward_input:
        return one.backward_input;
      case op::backward_weight:
        return one.backward_weight;
      default:
        return 0.0;
    }
  };
  return replay(table, microbatch_count, cost, link_seconds).run();
}

result<schedule_facts> replay_schedule(const schedule_table& table, int microbatch_count,
                                       const std::vector<std::vector<double>>& seconds,
                                       double link_seconds) {
  if (auto sizes = check_sizes(static_cast<int>(table.size()), microbatch_count); !sizes)
    return sizes.err();
  bool are_all_timed = seconds.size() == table.size();
  for (std::size_t s = 0; are_all_timed && s < table.size(); ++s)
    are_all_timed = seconds[s].size() == table[s].size();
  if (!are_all_timed)
    return make_error(errc::bad_spec, "schedule: expected a time for each instruction of {} stages",
                      table.size());
  const auto cost = [&](std::size_t s, std::size_t i) { return seconds[s][i]; };
  return replay(table, microbatch_count, cost, link_seconds).run();
}

std::string to_string(op what) {
  switch (what) {
    case op::receive_activation:
      return "receive_activation";
    case op::forward:
      return "forward";
    case op::send_activation:
      return "send_activation";
    case op::receive_gradient:
      return "receive_gradient";
    case op::backward_input:
      return "backward_input";
    case op::send_gradient:
      return "send_gradient";
    case op::backward_weight:
      return "backward_weight";
    case op::reduce:
      return "reduce";
    case op::step:
      return "step";
  }
  return "unknown";
}

}  // namespace stagecoach
