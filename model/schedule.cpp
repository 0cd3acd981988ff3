#include "model/schedule.hpp"

#include <algorithm>
#include <cstddef>
#include <deque>

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

  void backward(int microbatch) {
    if (has_next_) add(op::receive_gradient, microbatch);
    add(op::backward_input, microbatch);
    // Before the weight gradient: the previous stage waits for this and for nothing else.
    if (has_previous_) add(op::send_gradient, microbatch);
    add(op::backward_weight, microbatch);
  }

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
  for (int m = 0; m < microbatch_count; ++m) list.backward(m);
  return list.finish();
}

// Warm-up fills the stages behind this one; then each forward is paid for by a backward, so that
// stage_count - stage activations are alive at most (Narayanan et al. 2021, arXiv:2104.04473, 2.2).
std::vector<instruction> one_forward_one_backward(int stage, int stage_count,
                                                  int microbatch_count) {
  stage_list list(stage, stage_count, microbatch_count);
  const int warm_up = std::min(stage_count - stage - 1, microbatch_count);
  for (int m = 0; m < warm_up; ++m) list.forward(m);
  for (int m = warm_up; m < microbatch_count; ++m) {
    list.forward(m);
    list.backward(m - warm_up);
  }
  for (int m = microbatch_count - warm_up; m < microbatch_count; ++m) list.backward(m);
  return list.finish();
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
  replay(const schedule_table& table, int microbatch_count, const std::vector<stage_times>& times,
         double link_seconds)
      : table_(table),
        microbatch_count_(microbatch_count),
        times_(times),
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
        spend(s, times_[s].forward);
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
        spend(s, times_[s].backward_input);
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
        spend(s, times_[s].backward_weight);
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
  const std::vector<stage_times>& times_;
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

result<schedule_table> make_schedule(const std::string& schedule, int stage_count,
                                     int microbatch_count) {
  if (auto sizes = check_sizes(stage_count, microbatch_count); !sizes) return sizes.err();
  if (schedule != "gpipe" && schedule != "1f1b")
    return make_error(errc::bad_spec, "schedule \"{}\" is unknown. fix: gpipe or 1f1b", schedule);
  schedule_table table;
  for (int stage = 0; stage < stage_count; ++stage)
    table.push_back(schedule == "gpipe"
                        ? gpipe(stage, stage_count, microbatch_count)
                        : one_forward_one_backward(stage, stage_count, microbatch_count));
  return table;
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
  const std::vector<stage_times> equal(table.size());
  return replay(table, microbatch_count, times.empty() ? equal : times, link_seconds).run();
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
