#include "coordinator/cluster_machine.hpp"

#include <algorithm>
#include <charconv>
#include <set>
#include <utility>

#include "config/limits.hpp"
#include "coordinator/wire.hpp"

namespace stagecoach {

namespace {
// A name whose process was heard this recently belongs to it; after that a newcomer is told to try
// again until the old connection is closed.
constexpr std::int64_t name_taken_ms = 1'500;
constexpr std::int64_t beat_period_ms = 1'000;
// A tick that comes later than this says that this process slept, not that everybody else was
// silent.
constexpr std::int64_t tick_gap_ms_max = 500;
// A worker whose channel is silent for this long may have given it up and follow a deputy since.
constexpr std::int64_t unheard_ms_max = 2'000;
constexpr std::int64_t forget_after_ms = 3'600'000;  // shown as LOST until then
constexpr std::int64_t avoid_ms = 10'000;            // a worker that a job gave up
constexpr std::int64_t stop_again_ms = 3'000;

std::uint64_t job_of(const to_coordinator& message) {
  return std::visit(
      [](const auto& m) -> std::uint64_t {
        if constexpr (requires { m.job; }) {
          return m.job;
        } else {
          return 0;
        }
      },
      message);
}
}  // namespace

std::string to_string(job_id id) { return fmt::format("j-{:06}", value(id)); }
std::string to_string(worker_id id) { return fmt::format("w-{:06}", value(id)); }

cluster_machine::cluster_machine(restored_records restored, std::string checkpoint_root,
                                 detection rules, fairness shares)
    : rules_(rules),
      shares_(shares),
      checkpoint_root_(std::move(checkpoint_root)),
      meta_(restored.meta),
      next_event_(restored.next_cluster_event),
      problems_(std::move(restored.problems)) {
  ++meta_.incarnation;
  for (auto& [id, record] : restored.workers) workers_[id].record = std::move(record);
  for (auto& [id, job] : restored.jobs)
    jobs_.emplace(id, job_machine(std::move(job), rules_, shares_.leaves));
}

std::vector<action> cluster_machine::start() {
  out_.push_back(actions::save{{meta_row()}, true});
  note("coordinator_started",
       fmt::format("incarnation {}, {} jobs", meta_.incarnation, jobs_.size()),
       {{"incarnation", std::to_string(meta_.incarnation)}});
  for (const std::string& problem : problems_) note("store_problem", problem, {}, "warn");
  return std::exchange(out_, {});
}

std::vector<action> cluster_machine::step(const event& e) {
  std::visit([this](const auto& x) { on(x); }, e);
  if (is_place_due_ && has_ticked_) {
    place();
    consider_patrol();
  }
  return std::exchange(out_, {});
}

// ---- workers come and go ----
void cluster_machine::on(const events::worker_attached& e) { attach(e.connection, e.greeting); }

void cluster_machine::refuse(connection_id connection, const std::string& why, bool is_final) {
  out_.push_back(actions::send{worker_id{}, connection, refused{why, is_final}});
  out_.push_back(actions::close{connection, why});
  note("worker_refused", why, {}, "warn");
}

void cluster_machine::attach(connection_id connection, const hello& greeting) {
  if (greeting.protocol != protocol_version) {
    return refuse(
        connection,
        fmt::format("worker {} on {} speaks protocol {}, this coordinator {}. fix: run the same "
                    "version on both",
                    greeting.name, greeting.host, greeting.protocol, protocol_version),
        true);
  }
  if (greeting.name.empty() || greeting.name.size() > limits::name_bytes_max ||
      greeting.process.empty() || greeting.process.size() > 64) {
    return refuse(connection,
                  fmt::format("a worker's name must have 1 to {} bytes and its process id 1 to 64",
                              limits::name_bytes_max),
                  true);
  }
  // It is printed in tables and logs, and a terminal obeys control characters.
  if (std::any_of(greeting.name.begin(), greeting.name.end(), [](char c) {
        return static_cast<unsigned char>(c) <= 0x20 || static_cast<unsigned char>(c) == 0x7f;
      })) {
    return refuse(connection, "a worker's name has no spaces and no control characters", true);
  }
  worker* known = by_name(greeting.name);
  if (known != nullptr && known->record.process != greeting.process) {
    if (known->connection != connection_id{}) {
      const bool is_alive = now_ms_ - known->heard_ms < name_taken_ms;
      return refuse(
          connection,
          fmt::format("the name {} is taken by a worker on {} that {}. fix: another --name",
                      greeting.name, known->record.host,
                      is_alive ? "is attached" : "was heard a moment ago; try again"),
          is_alive);
    }
    const worker_id old = known->record.id;
    forget(old, "a new process took its name");
    known = nullptr;
  }
  if (known == nullptr) {
    const auto id = static_cast<worker_id>(meta_.next_worker++);
    worker& w = workers_[id];
    w.record = {id, greeting.name, greeting.process, greeting.host, false, ""};
    out_.push_back(actions::save{{meta_row(), {keys::worker(id), to_json_text(w.record)}}, true});
    note("worker_attached",
         fmt::format("{} on {}, {} threads", greeting.name, greeting.host, greeting.threads),
         {{"worker", greeting.name},
          {"id", to_string(id)},
          {"host", greeting.host},
          {"device_class", greeting.device_class}});
    w.attached_unix_ms = unix_ms_;
    known = &w;
  } else if (known->connection != connection_id{} && known->connection != connection) {
    // The same process dialled again before we noticed that its old channel is gone.
    out_.push_back(actions::close{known->connection, "replaced by a newer connection"});
  }
  worker& w = *known;
  if (w.attached_unix_ms == 0) w.attached_unix_ms = unix_ms_;
  w.connection = connection;
  w.greeting = greeting;
  w.heard_ms = now_ms_;
  w.is_lost = false;
  w.step = greeting.step;
  if (w.audit) end_patrol(w);  // the order may have been lost with the old channel
  join(w);
}

/// Welcomes it and puts it where it belongs: its job, or among the free.
void cluster_machine::join(worker& w) {
  const worker_id id = w.record.id;
  const hello greeting = w.greeting;
  send(w, welcome{value(id), meta_.incarnation, beat_period_ms});
  is_place_due_ = true;
  const auto claimed = jobs_.find(static_cast<job_id>(greeting.job));
  if (w.job == job_id{} && claimed != jobs_.end() &&
      (claimed->second.expects(id) || claimed->second.is_claimed_by(greeting))) {
    w.job = claimed->first;
  }
  if (greeting.job != 0 && static_cast<job_id>(greeting.job) != w.job) {
    stop_stale(w, greeting.job, "the job goes on without this worker");
  }
  if (w.job == job_id{}) return;
  const job_id job = w.job;
  tell(job, job_events::worker_connected{id, greeting});
  if (w.record.is_drained && w.job == job) {
    tell(job, job_events::worker_draining{id, true, w.record.drain_reason});
  }
}

/// One that its job gave up as silent is heard again, on the same channel, while the job still
/// looks for it: as if it had greeted anew.
bool cluster_machine::readmit(worker& w, const beat& b) {
  const auto claimed = jobs_.find(static_cast<job_id>(b.job));
  if (w.job != job_id{} || claimed == jobs_.end() || !claimed->second.expects(w.record.id)) {
    return false;
  }
  w.job = claimed->first;
  hello greeting = w.greeting;
  greeting.job = b.job;
  greeting.generation = b.generation;
  greeting.phase = b.phase;
  greeting.step = b.step;
  tell(w.job, job_events::worker_connected{w.record.id, greeting});
  if (w.record.is_drained && w.job == claimed->first) {
    tell(w.job, job_events::worker_draining{w.record.id, true, w.record.drain_reason});
  }
  return true;
}

void cluster_machine::stop_stale(worker& w, std::uint64_t job, const std::string& why) {
  if (w.told_to_stop_ms >= 0 && now_ms_ - w.told_to_stop_ms < stop_again_ms) return;
  w.told_to_stop_ms = now_ms_;
  send(w, stop_stage{job, why});
}

void cluster_machine::on(const events::worker_detached& e) {
  worker* w = by_connection(e.connection);
  if (w == nullptr) return;
  w->connection = connection_id{};
  w->detached_ms = now_ms_;
  w->reason = e.why;
  w->told_to_stop_ms = -1;
  is_place_due_ = true;
  if (w->job != job_id{}) {
    tell(w->job, job_events::worker_disconnected{w->record.id, e.why});
  } else {
    note("worker_detached", fmt::format("{}: {}", w->record.name, e.why),
         {{"worker", w->record.name}});
  }
}

void cluster_machine::on(const events::worker_said& e) {
  if (const auto* greeting = std::get_if<hello>(&e.message)) return attach(e.connection, *greeting);
  worker* w = by_connection(e.connection);
  if (w == nullptr) {
    ++dropped_messages_;
    return;
  }
  w->heard_ms = now_ms_;
  const worker_id id = w->record.id;
  if (const auto* last = std::get_if<goodbye>(&e.message)) {
    out_.push_back(actions::close{e.connection, "goodbye"});
    return forget(id, "said goodbye: " + last->reason);
  }
  const std::uint64_t job = job_of(e.message);
  if (const auto* b = std::get_if<beat>(&e.message)) {
    w->step = b->step;
    w->is_stuck = b->job == 0 && b->activity != static_cast<int>(trainer_activity::idle) &&
                  b->stands_ms >= rules_.stand_ms;
    if (b->job != 0 && static_cast<job_id>(b->job) != w->job && !readmit(*w, *b)) {
      stop_stale(*w, b->job, "the job goes on without this worker");
    }
    // Free again only now: its first words may be of links, and name no state that its job wants.
    if (w->is_lost) {
      w->is_lost = false;
      is_place_due_ = true;
    }
    // Also a beat that names no job is a sign of life to the job that waits for an answer.
    if (w->job != job_id{}) tell(w->job, job_events::worker_said{id, e.message});
    return;
  }
  if (const auto* line = std::get_if<log_line>(&e.message); line != nullptr && job == 0) {
    out_.push_back(actions::log{job_id{}, id, *line});
    return;
  }
  if (const auto* found = std::get_if<audited>(&e.message)) return take_audited(*w, *found);
  if (const auto* made = std::get_if<progress>(&e.message);
      made != nullptr && !made->steps.empty()) {
    // The first words of one that thaws: it need not wait for its beat to be asked again.
    beat sign;
    sign.job = job;
    sign.generation = made->generation;
    sign.step = made->steps.back().step;
    sign.phase = static_cast<int>(worker_phase::running);
    (void)readmit(*w, sign);
  }
  // Of no matter whose: what it wrote or did while it was the job's.
  const bool is_of_any = std::holds_alternative<part_saved>(e.message) ||
                         std::holds_alternative<progress>(e.message) ||
                         (w->job == job_id{} && std::holds_alternative<probed>(e.message));
  const bool is_known = jobs_.count(static_cast<job_id>(job)) != 0;
  if (!is_known || (static_cast<job_id>(job) != w->job && !is_of_any)) {
    ++dropped_messages_;
    return;
  }
  tell(static_cast<job_id>(job), job_events::worker_said{id, e.message});
}

void cluster_machine::forget(worker_id id, const std::string& why) {
  const auto found = workers_.find(id);
  if (found == workers_.end()) return;
  const job_id job = found->second.job;
  note("worker_left", fmt::format("{}: {}", found->second.record.name, why),
       {{"worker", found->second.record.name}});
  found->second.connection = connection_id{};
  if (job != job_id{}) tell(job, job_events::worker_gone{id, why});
  out_.push_back(actions::save{{{keys::worker(id), std::nullopt}}, false});
  workers_.erase(id);
  is_place_due_ = true;
}

// ---- time ----
void cluster_machine::on(const events::tick& e) {
  // Own time: what this process slept through is not counted as others' silence.
  if (has_ticked_) now_ms_ += std::clamp<std::int64_t>(e.now_ms - clock_ms_, 0, tick_gap_ms_max);
  clock_ms_ = e.now_ms;
  unix_ms_ = e.unix_ms;
  has_ticked_ = true;
  is_place_due_ = true;
  for (auto& [id, job] : jobs_) {
    // One that has ended may still be computed again, and waits between two tries.
    const bool is_patrolled = job.record().spec.elasticity.patrol;
    if (!is_end(job.record().state) || is_patrolled) tell(id, job_events::tick{now_ms_, unix_ms_});
  }
  std::vector<worker_id> old;
  for (const auto& [id, w] : workers_) {
    const bool is_away = w.connection == connection_id{} && w.job == job_id{};
    const bool is_expected = std::any_of(
        jobs_.begin(), jobs_.end(), [id = id](const auto& job) { return job.second.expects(id); });
    if (is_away && !is_expected && now_ms_ - w.detached_ms >= forget_after_ms) old.push_back(id);
  }
  for (const worker_id id : old) forget(id, "away for an hour");
}

/// What it believed when it fell asleep may be over. A successor may have its store: it writes
/// there before it says anything. And deputies may have decided: whatever a worker was when it was
/// last heard is worth nothing until it greets anew.
void cluster_machine::on(const events::woke& e) {
  out_.push_back(actions::save{{meta_row()}, true});
  if (e.slept_ms < unheard_ms_max) return;
  const std::string why = fmt::format("the coordinator slept for {} ms", e.slept_ms);
  note("coordinator_slept", why, {}, "warn");
  std::vector<connection_id> open;
  for (const auto& [id, w] : workers_) {
    if (w.connection != connection_id{}) open.push_back(w.connection);
  }
  for (const connection_id connection : open) {
    out_.push_back(actions::close{connection, why});
    on(events::worker_detached{connection, why});
  }
}

// ---- requests ----
void cluster_machine::on(const events::submit_job& e) {
  for (const auto& [id, job] : jobs_) {
    if (!is_end(job.record().state) && job.record().spec.name == e.spec.name) {
      return reply(e.reply,
                   make_error(errc::conflict,
                              "a job named {} exists and is {} ({}). fix: another name, or "
                              "cancel it first",
                              e.spec.name, to_string(job.state()), to_string(id)));
    }
  }
  const job_spec& spec = e.spec;
  const int least = spec.parallelism.is_explicit
                        ? spec.parallelism.stages * spec.parallelism.replicas
                        : spec.elasticity.workers_min;
  if (least < 1 || least > limits::worker_count_max) {
    return reply(e.reply, make_error(errc::bad_spec, "the job asks for {} workers; the limit is {}",
                                     least, limits::worker_count_max));
  }
  if (const auto shape = choose_layout(spec, least); !shape) {
    return reply(e.reply, shape.err());
  }
  const auto id = static_cast<job_id>(meta_.next_job++);
  restored_job job;
  job.record.id = id;
  job.record.spec = spec;
  job.record.spec_text = e.spec_text;
  if (job.record.spec.checkpoint.store.empty() && !checkpoint_root_.empty()) {
    job.record.spec.checkpoint.store = checkpoint_root_ + "/" + to_string(id);
  }
  out_.push_back(actions::save{{meta_row()}, false});
  jobs_.emplace(id, job_machine(std::move(job), rules_, shares_.leaves));
  tell(id, job_events::tick{now_ms_, unix_ms_});
  tell(id, job_events::submitted{unix_ms_, e.reply});
  is_place_due_ = true;
}

void cluster_machine::ask_job(job_id job, reply_id reply_to, const job_event& e) {
  if (jobs_.count(job) == 0) {
    return reply(reply_to, make_error(errc::not_found, "no job {}", to_string(job)));
  }
  tell(job, e);
  is_place_due_ = true;
}
void cluster_machine::on(const events::cancel_job& e) {
  ask_job(e.job, e.reply, job_events::cancel{e.now, e.reply});
}
void cluster_machine::on(const events::pause_job& e) {
  ask_job(e.job, e.reply, job_events::pause{e.reply});
}
void cluster_machine::on(const events::resume_job& e) {
  ask_job(e.job, e.reply, job_events::resume{e.reply});
}
void cluster_machine::on(const events::save_now& e) {
  ask_job(e.job, e.reply, job_events::save_now{e.reply});
}

void cluster_machine::on(const events::drain_worker& e) {
  worker* w = by_name(e.name);
  if (w == nullptr) return reply(e.reply, make_error(errc::not_found, "no worker {}", e.name));
  w->record.is_drained = true;
  w->record.drain_reason = e.reason;
  out_.push_back(actions::save{{{keys::worker(w->record.id), to_json_text(w->record)}}, true});
  note("worker_draining", fmt::format("{}: {}", w->record.name, e.reason),
       {{"worker", w->record.name}});
  const job_id job = w->job;
  if (job != job_id{}) {
    tell(job, job_events::worker_draining{w->record.id, true, e.reason});
    reply(e.reply,
          actions::reply_value{job, fmt::format("draining: {} moves its stage after a step",
                                                jobs_.at(job).record().spec.name)});
  } else {
    reply(e.reply, actions::reply_value{job_id{}, "drained"});
  }
  is_place_due_ = true;
}

void cluster_machine::on(const events::undrain_worker& e) {
  worker* w = by_name(e.name);
  if (w == nullptr) return reply(e.reply, make_error(errc::not_found, "no worker {}", e.name));
  w->record.is_drained = false;
  w->record.drain_reason.clear();
  out_.push_back(actions::save{{{keys::worker(w->record.id), to_json_text(w->record)}}, true});
  note("worker_undrained", w->record.name, {{"worker", w->record.name}});
  if (w->job != job_id{}) tell(w->job, job_events::worker_draining{w->record.id, false, ""});
  reply(e.reply, actions::reply_value{job_id{}, "takes work again"});
  is_place_due_ = true;
}

void cluster_machine::on(const events::set_priority& e) {
  ask_job(e.job, e.reply, job_events::set_priority{e.priority, e.reply});
}

void cluster_machine::on(const checkpoint_found& e) {
  if (jobs_.count(e.job) != 0) tell(e.job, e);
}
void cluster_machine::on(const manifest_written& e) {
  if (jobs_.count(e.job) != 0) tell(e.job, e);
}
void cluster_machine::on(const checkpoints_retired& e) {
  if (jobs_.count(e.job) != 0) tell(e.job, e);
}

// ---- placement ----
bool cluster_machine::is_free(const worker& w) const {
  return w.connection != connection_id{} && w.job == job_id{} && !w.is_lost &&
         !w.record.is_drained && !w.is_stuck && now_ms_ >= w.avoid_until_ms &&
         now_ms_ - w.heard_ms < rules_.suspected_silence;
}

std::string cluster_machine::unsuited(const worker& w, const job_machine& job) const {
  const job_spec& spec = job.record().spec;
  if (w.greeting.device != spec.device) {
    return fmt::format("its device is {}, the job wants {}", w.greeting.device, spec.device);
  }
  for (const auto& [key, wanted] : spec.labels) {
    const auto label = w.greeting.labels.find(key);
    if (label == w.greeting.labels.end() || label->second != wanted) {
      return fmt::format("it has no label {}={}", key, wanted);
    }
  }
  std::string why;
  (void)job.accepts(facts_of(w), &why);
  return why;
}

// ---- between jobs and the shell ----
void cluster_machine::tell(job_id job, const job_event& e) { take(jobs_.at(job).step(e)); }

void cluster_machine::take(std::vector<action> from) {
  for (action& a : from) {
    if (auto* out = std::get_if<actions::send>(&a)) {
      const auto w = workers_.find(out->worker);
      if (w == workers_.end() || w->second.connection == connection_id{}) continue;
      out->connection = w->second.connection;
    } else if (const auto* back = std::get_if<actions::release>(&a)) {
      is_place_due_ = true;
      const auto w = workers_.find(back->worker);
      if (w != workers_.end() && !back->is_member) {
        distrust(w->second, back->reason);
        const job_id other =
            w->second.job;  // it has gone on to another job: that one moves its stage
        if (other != job_id{})
          tell(other, job_events::worker_draining{back->worker, true, back->reason});
      } else if (w != workers_.end()) {
        w->second.job = job_id{};
        w->second.is_lost = back->is_lost;
        w->second.reason = back->reason;
        // It is there and did not answer: give others a chance first.
        const bool is_mute = back->is_lost && w->second.connection != connection_id{};
        if (is_mute) w->second.avoid_until_ms = now_ms_ + avoid_ms;
        if (back->is_distrusted) distrust(w->second, back->reason);
      }
      continue;
    } else if (const auto* wanted = std::get_if<actions::seek_witness>(&a)) {
      for (const auto& [id, w] : workers_) {
        if (!is_free(w) || id == wanted->question.peer.worker || wanted->mute.count(id)) continue;
        send(w, wanted->question);
        break;
      }
      continue;
    }
    out_.push_back(std::move(a));
  }
}

/// Drained, so that it stands in `workers` with the reason, survives a restart, and a person who
/// has tested the machine can take it in again with undrain.
void cluster_machine::distrust(worker& w, const std::string& why) {
  w.record.is_drained = true;
  w.record.drain_reason = why;
  w.is_lost = w.is_lost && w.connection == connection_id{};  // it is there, only not wanted
  out_.push_back(actions::save{{{keys::worker(w.record.id), to_json_text(w.record)}}, true});
  note("worker_distrusted", fmt::format("{}: {}", w.record.name, why),
       {{"worker", w.record.name}, {"host", w.record.host}}, "error");
}

void cluster_machine::send(const worker& w, to_worker message) {
  if (w.connection == connection_id{}) return;
  out_.push_back(actions::send{w.record.id, w.connection, std::move(message)});
}

cluster_machine::worker* cluster_machine::by_connection(connection_id connection) {
  for (auto& [id, w] : workers_) {
    if (w.connection == connection && connection != connection_id{}) return &w;
  }
  return nullptr;
}

worker_id cluster_machine::worker_on(connection_id connection) const {
  for (const auto& [id, w] : workers_) {
    if (w.connection == connection && connection != connection_id{}) return id;
  }
  return {};
}

cluster_machine::worker* cluster_machine::by_name(const std::string& name) {
  for (auto& [id, w] : workers_) {
    if (w.record.name == name || to_string(id) == name) return &w;
  }
  return nullptr;
}

worker_facts cluster_machine::facts_of(const worker& w) const {
  return {
      w.record.id,          w.record.process,     w.record.name,           w.greeting.host,
      w.greeting.link_host, w.greeting.link_port, w.greeting.device_class, w.greeting.memory_bytes};
}

actions::row cluster_machine::meta_row() const { return {keys::meta(), to_json_text(meta_)}; }

void cluster_machine::note(const std::string& kind, const std::string& text,
                           std::map<std::string, std::string> fields, const std::string& level) {
  out_.push_back(
      actions::note{{job_id{}, next_event_++, unix_ms_, kind, level, text, std::move(fields)}});
}

void cluster_machine::reply(reply_id to, result<actions::reply_value> outcome) {
  if (to != reply_id{}) out_.push_back(actions::reply{to, std::move(outcome)});
}

// ---- views ----
std::vector<job_view> cluster_machine::job_views() const {
  std::vector<job_view> views;
  for (const auto& [id, job] : jobs_) {
    views.push_back(job.view());
    fill_queue_view(views.back());
  }
  return views;
}

std::optional<job_view> cluster_machine::job(job_id id) const {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) return std::nullopt;
  job_view v = found->second.view();
  fill_queue_view(v);
  return v;
}

std::optional<job_id> cluster_machine::find_job(const std::string& text) const {
  // The newest of a name: a person who runs "shakes" again means the new one.
  for (auto job = jobs_.rbegin(); job != jobs_.rend(); ++job) {
    if (job->second.record().spec.name == text) return job->first;
  }
  const std::string_view digits = std::string_view(text).starts_with("j-")
                                      ? std::string_view(text).substr(2)
                                      : std::string_view(text);
  std::uint64_t number = 0;
  const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (problem != std::errc{} || end != digits.data() + digits.size()) return std::nullopt;
  const auto id = static_cast<job_id>(number);
  return jobs_.count(id) != 0 ? std::optional(id) : std::nullopt;
}

std::vector<worker_view> cluster_machine::workers() const {
  std::vector<worker_view> views;
  for (const auto& [id, w] : workers_) {
    worker_view v;
    v.id = id;
    v.name = w.record.name;
    v.host = w.record.host;
    v.job = w.job;
    const bool has_job = w.job != job_id{};
    v.state = w.connection == connection_id{} || w.is_lost || w.is_stuck ? "LOST"
              : w.record.is_drained ? (has_job ? "DRAINING" : "DRAINED")
              : has_job             ? "BUSY"
                                    : "IDLE";
    v.device = w.greeting.device;
    v.device_class = w.greeting.device_class;
    v.threads = w.greeting.threads;
    v.memory_bytes = w.greeting.memory_bytes;
    v.labels = w.greeting.labels;
    v.link_host = w.greeting.link_host;
    v.link_port = w.greeting.link_port;
    v.step = w.step;
    v.heard_ms_ago = now_ms_ - w.heard_ms;
    v.attached_unix_ms = w.attached_unix_ms;
    v.version = w.greeting.version;
    v.reason = w.record.is_drained ? w.record.drain_reason
               : w.is_stuck        ? "its trainer's thread is stuck. fix: restart the worker"
               : v.state == "LOST" ? w.reason
                                   : "";
    views.push_back(std::move(v));
  }
  return views;
}

std::string cluster_machine::why(job_id id) const {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) return {};
  const job_machine& job = found->second;
  job_view v = job.view();
  v.queue = positions_.count(id) != 0 ? positions_.at(id) : 0;
  std::string text = fmt::format("{}{}", v.state, v.reason.empty() ? "" : ": " + v.reason);
  if (job.state() != job_state::pending && job.state() != job_state::recovering) {
    if (v.recovery_count > 0) text += fmt::format("\n  recovered {} times", v.recovery_count);
    if (!job.balance().empty()) text += "\n  leaves  " + job.balance();
    if (!job.layer_balance().empty()) text += "\n  layers  " + job.layer_balance();
    return text;
  }
  int attached = 0, free = 0;
  std::string others;
  for (const auto& [worker, w] : workers_) {
    if (w.connection == connection_id{}) continue;
    ++attached;
    const std::string unfit = unsuited(w, job);
    if (is_free(w) && unfit.empty()) ++free;
    if (!unfit.empty()) others += fmt::format("\n  not {}: {}", w.record.name, unfit);
    if (unfit.empty() && w.record.is_drained) {
      others +=
          fmt::format("\n  not {}: it is drained{}", w.record.name,
                      w.record.drain_reason.empty() ? "" : " (" + w.record.drain_reason + ")");
    }
  }
  const int missing = std::max(0, v.workers_min - v.workers - free);
  text += fmt::format(
      "\n  needs   {} workers to start; {} are attached, {} of them are free and suit it",
      v.workers_min, attached, free);
  if (missing > 0) text += fmt::format("\n  next    attach {} more", missing);
  if (v.queue > 0) {
    text +=
        fmt::format("\n  queue   place {} of {}, {}", v.queue, positions_.size(), described(job));
  }
  if (const auto waits = waits_.find(id); waits != waits_.end()) {
    text += fmt::format("\n  waits   {}", waits->second);
  }
  for (const auto& [other, machine] : jobs_) {
    const auto busy = machine.workers().size();
    if (other != id && busy > 0) {
      text += fmt::format("\n  later   when {} ends, {} workers are free",
                          machine.record().spec.name, busy);
    }
  }
  return text + others;
}

}  // namespace stagecoach
