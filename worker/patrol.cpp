#include "worker/patrol.hpp"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "config/log.hpp"
#include "worker/window_run.hpp"

namespace stagecoach {

patrol::patrol(options o) : options_(std::move(o)), thread_([this] { loop(); }) {}

patrol::~patrol() {
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
    cancelled_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void patrol::begin(const audit& order) {
  {
    const std::lock_guard lock(mutex_);
    next_ = order;
    cancelled_ = true;  // what runs
  }
  wake_.notify_all();
}

void patrol::stop() {
  const std::lock_guard lock(mutex_);
  next_.reset();
  cancelled_ = true;
}

void patrol::loop() {
  // Linux counts niceness by thread, and threads that this one starts inherit it: whatever else
  // runs on this host goes first.
  (void)setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), 10);
  for (;;) {
    audit order;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return is_ending_ || next_; });
      if (is_ending_) return;
      order = *std::exchange(next_, std::nullopt);
      cancelled_ = false;
    }
    run(order);
  }
}

void patrol::run(const audit& order) {
  window w;
  w.spec = order.spec;
  w.spec.parallelism.is_explicit = false;
  audited answer;
  answer.job = order.job;
  answer.audit = order.audit;
  const auto give_up = [&](const error& why) {
    answer.is_done = false;
    answer.text = fmt::format("steps {} to {} could not be computed again on {}: {}",
                              order.step + 1, order.last, options_.host, why.message);
    if (why.code != errc::cancelled) options_.say(answer);
  };
  auto shape = choose_layout(w.spec, 1);
  if (!shape) return give_up(shape.err());
  w.shape = std::move(*shape);
  w.step = order.step;
  w.chain = order.chain;
  w.parts = order.parts;
  w.last = order.last;
  for (const step_report& r : order.log) w.log[r.step] = r;
  if (!order.after.empty()) w.saved[order.last] = order.after;
  w.layouts = order.layouts;
  w.threads = options_.threads;
  w.isa = options_.isa;
  auto verdict = run_window(w, cancelled_);
  if (!verdict) return give_up(verdict.err());
  answer.is_identical = verdict->is_identical;
  answer.step = verdict->step;
  answer.tensors = verdict->tensors;
  answer.what = verdict->what;
  answer.stages = verdict->stages;
  answer.text = verdict->text;
  log_event(verdict->is_identical ? level::info : level::error, "window_audited",
            {{"job", order.job}, {"text", verdict->text}});
  options_.say(answer);
}

}  // namespace stagecoach
