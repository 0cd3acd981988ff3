#include "coordinator/metrics_text.hpp"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <initializer_list>
#include <limits>
#include <map>
#include <sstream>
#include <utility>
#include <vector>

#include "coordinator/api.hpp"

namespace stagecoach {

namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using label = ClientMetric::Label;
using labels = std::vector<label>;

/// Families in the order they were first named.
class page {
 public:
  void gauge(const char* name, const char* help, labels l, double value) {
    ClientMetric m;
    m.label = std::move(l);
    m.gauge.value = value;
    family(name, help, MetricType::Gauge).metric.push_back(std::move(m));
  }
  void counter(const char* name, const char* help, labels l, double value) {
    ClientMetric m;
    m.label = std::move(l);
    m.counter.value = value;
    family(name, help, MetricType::Counter).metric.push_back(std::move(m));
  }
  void histogram(const char* name, const char* help, labels l, const duration_histogram& h) {
    ClientMetric m;
    m.label = std::move(l);
    m.histogram.sample_count = h.count;
    m.histogram.sample_sum = h.sum;
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < h.bounds.size(); ++i) {
      sum += h.counts[i];
      m.histogram.bucket.push_back({sum, h.bounds[i]});
    }
    m.histogram.bucket.push_back({h.count, std::numeric_limits<double>::infinity()});
    family(name, help, MetricType::Histogram).metric.push_back(std::move(m));
  }
  std::string text() const {
    std::ostringstream out;
    prometheus::TextSerializer().Serialize(out, families_);
    return out.str();
  }

 private:
  MetricFamily& family(const char* name, const char* help, MetricType type) {
    for (auto& f : families_)
      if (f.name == name) return f;
    families_.push_back({name, help, type, {}});
    return families_.back();
  }
  std::vector<MetricFamily> families_;
};

void add_job(page& p, const api_state& s, const job_view& v) {
  const auto& machine = s.machine.jobs().at(v.id);
  const auto& spec = machine.record().spec;
  const labels job{{"job", v.name}};
  const auto with = [&v](std::initializer_list<label> more) {
    labels all{{"job", v.name}};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  p.gauge("stagecoach_job_info", "What the job is; always 1.",
          with({{"id", to_string(v.id)}, {"preset", spec.model.preset}}), 1);
  for (int i = 0; i < job_state_count; ++i) {
    const std::string name = to_string(static_cast<job_state>(i));
    p.gauge("stagecoach_job_state", "1 for the state that the job is in.", with({{"state", name}}),
            v.state == name ? 1 : 0);
  }
  const auto tokens = static_cast<double>(spec.batch.global_sequences * spec.batch.sequence_tokens);
  p.gauge("stagecoach_job_step", "Newest committed step.", job, static_cast<double>(v.step));
  p.counter("stagecoach_job_tokens_total", "Tokens of all committed steps.", job,
            tokens * static_cast<double>(v.step));
  p.gauge("stagecoach_job_generation", "Newest generation.", job,
          static_cast<double>(v.generation));
  p.gauge("stagecoach_job_workers", "Workers that the job has.", job, v.workers);
  p.gauge("stagecoach_job_losses_survived", "Further losses that lose no committed step now.",
          with({{"weakest", v.weakest}}), v.losses_survived);
  p.counter("stagecoach_steps_lost_total", "Committed steps that had to be done again.", job,
            static_cast<double>(v.redone_steps));
  p.counter("stagecoach_stale_messages_total", "Messages of older generations, dropped.", job,
            static_cast<double>(v.stale_messages));
  p.counter("stagecoach_job_divergences_total", "Steps that gave other bits when done again.", job,
            static_cast<double>(v.divergences));
  if (v.has_saved) {
    p.gauge("stagecoach_checkpoint_last_success_timestamp_seconds",
            "When the newest checkpoint became durable.", job,
            static_cast<double>(v.saved_unix_ms) * 1e-3);
    double bytes = 0;
    for (const auto& [step, c] : machine.checkpoints()) bytes += static_cast<double>(c.bytes);
    p.gauge("stagecoach_checkpoint_kept_bytes", "Size of the checkpoints that are kept.", job,
            bytes);
  }
  if (v.evaluated_step)
    p.gauge("stagecoach_job_loss", "Mean loss per token.", with({{"split", "valid"}}),
            v.evaluated_loss.get());
  const auto* history = s.history.of(v.id);
  if (!history) return;
  if (!history->steps.empty()) {
    const auto& newest = history->steps.rbegin()->second;
    p.gauge("stagecoach_job_loss", "Mean loss per token.", with({{"split", "train"}}),
            newest.loss.get());
    p.gauge("stagecoach_job_learning_rate", "Learning rate of the newest step.", job,
            newest.lr.get());
    p.gauge("stagecoach_job_grad_norm", "Global gradient norm before clipping.", job,
            newest.norm.get());
  }
  const auto step_us = s.history.step_us(v.id);
  if (step_us > 0 && v.state == "RUNNING")
    p.gauge("stagecoach_job_tokens_per_second", "From the median of the newest 100 steps.", job,
            tokens * 1e6 / static_cast<double>(step_us));
  p.histogram("stagecoach_job_step_duration_seconds", "Wall time of a step.", job,
              history->step_seconds);
  if (history->recovery_seconds.count > 0)
    p.histogram("stagecoach_recovery_duration_seconds",
                "From the detection of a loss to the first step after it.", job,
                history->recovery_seconds);
  for (const auto& [cause, count] : history->failures)
    p.counter("stagecoach_failures_total", "Failures, by the kind of their event.",
              with({{"cause", cause}}), static_cast<double>(count));
  p.counter("stagecoach_job_time_seconds_total", "Time spent, by kind.",
            with({{"kind", "productive"}}), static_cast<double>(history->step_us_total) * 1e-6);
}

}  // namespace

std::string metrics_text(const api_state& s) {
  page p;
  p.gauge("stagecoach_build_info", "Which program this is; always 1.",
          {{"version", program_version}}, 1);
  p.gauge("stagecoach_coordinator_incarnation", "Which start of the coordinator this is.", {},
          static_cast<double>(s.machine.incarnation()));
  std::map<std::string, int> by_state{{"JOINING", 0},  {"IDLE", 0},    {"BUSY", 0},
                                      {"DRAINING", 0}, {"DRAINED", 0}, {"LOST", 0}};
  const auto workers = s.machine.workers();
  for (const auto& w : workers) ++by_state[w.state];
  for (const auto& [state, count] : by_state)
    p.gauge("stagecoach_workers", "Workers, by state.", {{"state", state}}, count);
  for (const auto& w : workers) {
    if (w.state == "LOST") continue;
    p.gauge("stagecoach_worker_heartbeat_age_seconds", "Since the worker was heard.",
            {{"worker", w.name}}, static_cast<double>(w.heard_ms_ago) * 1e-3);
    p.gauge("stagecoach_worker_device_memory_bytes", "Memory of the worker's device.",
            {{"worker", w.name}, {"kind", "total"}}, static_cast<double>(w.memory_bytes));
  }
  // A name may come back after its job ended; two rows of one label set would void the whole page.
  std::map<std::string, job_view> newest;
  for (auto& view : s.machine.job_views()) {
    auto& kept = newest[view.name];
    if (value(kept.id) <= value(view.id)) kept = std::move(view);
  }
  for (const auto& [name, view] : newest) add_job(p, s, view);
  p.counter("stagecoach_dropped_messages_total",
            "Messages of unregistered connections or stale generations, dropped.", {},
            static_cast<double>(s.machine.dropped_messages()));
  p.counter("stagecoach_refused_handshakes_total", "TLS handshakes that were refused.", {},
            static_cast<double>(s.refused_handshakes));
  p.gauge("stagecoach_connections", "Open connections.", {}, static_cast<double>(s.connections));
  p.gauge("stagecoach_actor_mailbox_messages", "Messages that wait.", {{"actor", "coordinator"}},
          static_cast<double>(s.mailbox_messages));
  p.gauge("stagecoach_store_problem", "1 while the store takes no writes.", {},
          s.store_problem.empty() ? 0 : 1);
  return p.text();
}

}  // namespace stagecoach
