// The coordinator's actor: brings events to the cluster machine and carries out its actions in
// order.
//
//   gateway (io thread) --told, asked--> actor --rows--> store writer (own thread) --durable-->
//   actor
//                                          | \--find, write, retire--> storage thread --told-->
//                                          actor |  \--parse, hash, list--> intake threads
//                                          --checked--> actor
//                                          `--send, close, reply--> gateway
// Decides nothing. What follows a synced save waits for its acknowledgement; steps that are made
// meanwhile queue their actions behind.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <caf/all.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <future>
#include <latch>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "config/log.hpp"
#include "coordinator/api.hpp"
#include "coordinator/checkpoint_keeper.hpp"
#include "coordinator/cluster_machine.hpp"
#include "coordinator/coordinator.hpp"
#include "coordinator/gateway.hpp"
#include "coordinator/run_history.hpp"
#include "coordinator/serial_thread.hpp"
#include "coordinator/state_folder.hpp"
#include "coordinator/store_writer.hpp"
#include "coordinator/submission.hpp"
#include "coordinator/wire.hpp"

namespace stagecoach {

namespace {

struct question {
  http_request request;
  http_reply_function reply;
};
struct checked_job {
  submission checked;
  std::string yaml;
  http_reply_function reply;
};

}  // namespace

namespace mail {
struct begin {
  std::shared_ptr<std::promise<void>> is_durable;
};
struct told {
  std::shared_ptr<const event> what;
};
struct asked {
  std::shared_ptr<const question> what;
};
struct checked {
  std::shared_ptr<const checked_job> what;
};
/// What no machine has a part in: traces, clocks.
struct observed {
  connection_id connection{};
  std::shared_ptr<const to_coordinator> what;
  std::int64_t heard_ns = 0;  // steady clock
};
struct durable {
  store_writer::ticket ticket = 0;
};
struct due {};
struct halt {};
}  // namespace mail

}  // namespace stagecoach

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::begin)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::told)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::asked)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::checked)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::observed)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::durable)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::due)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::mail::halt)

namespace stagecoach {

namespace {

using std::chrono::milliseconds;
using steady = std::chrono::steady_clock;

constexpr milliseconds tick_period{100};
constexpr milliseconds tick_again{10};  // an event this long after a tick brings its own

std::int64_t steady_ms() {
  return std::chrono::duration_cast<milliseconds>(steady::now().time_since_epoch()).count();
}
std::int64_t steady_ns() { return steady::now().time_since_epoch() / std::chrono::nanoseconds(1); }
std::int64_t unix_ms_now() {
  return std::chrono::duration_cast<milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

level level_of(const std::string& name) {
  if (name == "debug") return level::debug;
  if (name == "warn") return level::warn;
  if (name == "error") return level::error;
  return level::info;
}

/// What lives as long as the coordinator and is shared by its threads.
struct world {
  checkpoint_keeper keeper;
  std::unique_ptr<kv> store;
  std::unique_ptr<store_writer> writer;
  std::unique_ptr<gateway> port;
  std::latch port_is_open{1};
  std::atomic<bool> is_stopping{false};
  serial_thread storage;     // what the machines wait for
  serial_thread intake;      // job files
  serial_thread inspection;  // what people look at
  std::mutex problem_lock;
  std::string store_problem;  // empty: the store takes writes

  std::string problem() {
    const std::lock_guard guard(problem_lock);
    return store_problem;
  }
};

/// The machine, its queue of actions and whom to answer.
class shell {
 public:
  shell(world& w, state_paths paths, cluster_machine machine, run_history history)
      : world_(w),
        paths_(std::move(paths)),
        machine_(std::move(machine)),
        history_(std::move(history)) {}

  caf::actor self;  // set by the actor when it starts
  std::size_t mailbox_messages = 0;

  void on(const mail::begin& m) {
    begun_ = m.is_durable;
    enqueue(machine_.start());
    tick();
    carry_out();
  }
  void on(const mail::due&) {
    tick();
    carry_out();
  }
  void on(const mail::told& m) { deliver(*m.what); }
  void on(const mail::durable& m) {
    if (waiting_for_ != 0 && m.ticket >= waiting_for_) waiting_for_ = 0;
    carry_out();
  }
  void on(const mail::observed& m) {
    const worker_id from = machine_.worker_on(m.connection);
    if (const auto* x = std::get_if<traced>(&*m.what)) traces_.take(from, *x);
    if (const auto* x = std::get_if<clock_answer>(&*m.what))
      send(traces_.take(from, *x, m.heard_ns));
  }
  void on(const mail::asked& m) {
    auto outcome = route(m.what->request, state());
    std::visit([&](auto& x) { answer(x, *m.what); }, outcome);
  }
  void on(const mail::checked& m) {
    const reply_id id{next_reply_++};
    waiting_replies_[id] = [this, job = m.what](const result<actions::reply_value>& outcome) {
      job->reply(outcome ? submitted_answer(*outcome, job->checked) : error_answer(outcome.err()));
    };
    deliver(events::submit_job{*m.what->checked.spec, m.what->yaml, id});
  }

 private:
  api_state state() {
    api_state s{machine_,         history_, traces_, unix_ms_now(),
                world_.problem(), 0,        0,       mailbox_messages};
    if (world_.port) {
      s.refused_handshakes = world_.port->refused_handshakes();
      s.connections = world_.port->connection_count();
    }
    return s;
  }

  // ---- requests
  void answer(const http_response& r, const question& q) { q.reply(r); }
  void answer(const api_submit& x, const question& q) {
    if (refuse_without_store(q)) return;
    auto job = std::make_shared<checked_job>();
    job->yaml = x.request.yaml;
    job->reply = q.reply;
    world_.intake.post([this_self = self, paths = paths_, request = x.request, job] {
      job->checked = prepare_submission(request, paths);
      if (!job->checked.spec)
        job->reply(problems_answer(job->checked.problems));
      else
        caf::anon_send(this_self, mail::checked{job});
    });
  }
  void answer(const api_plan& x, const question& q) {
    world_.intake.post(
        [paths = paths_, request = x.request, reply = q.reply, workers = machine_.workers()] {
          const auto checked = prepare_submission(request, paths);
          if (!checked.spec) return reply(problems_answer(checked.problems));
          http_response r;
          r.body = plan_answer(checked, workers);
          reply(r);
        });
  }
  void answer(const api_checkpoints& x, const question& q) {
    world_.inspection.post([this, x, job = place_of(x.job), reply = q.reply,
                            index = machine_.jobs().at(x.job).checkpoints()] {
      auto entries = x.step ? result<std::vector<checkpoint_entry>>(std::vector<checkpoint_entry>{})
                            : world_.keeper.list(job, x.depth);
      if (x.step && entries) {
        auto one = world_.keeper.verify(job, *x.step, x.depth);
        if (!one) return reply(error_answer(one.err()));
        entries->push_back(std::move(*one));
      }
      reply(entries ? checkpoints_answer(*entries, x.depth, index) : error_answer(entries.err()));
    });
  }
  void answer(const api_manifest& x, const question& q) {
    world_.inspection.post([this, x, job = place_of(x.job), reply = q.reply] {
      auto entry = world_.keeper.verify(job, x.step, check_depth::quick);
      reply(entry ? manifest_answer(world_.keeper, job, *entry) : error_answer(entry.err()));
    });
  }
  void answer(const api_log& x, const question& q) {
    world_.inspection.post([this, x, reply = q.reply] {
      auto log = read_vote_log(*world_.store, x.job, x.from, x.to, log_rows_max);
      reply(log ? log_answer(*log) : error_answer(log.err()));
    });
  }
  void answer(const api_generations& x, const question& q) {
    world_.inspection.post([this, x, reply = q.reply] {
      auto list = read_generations(*world_.store, x.job);
      reply(list ? generations_answer(*list) : error_answer(list.err()));
    });
  }
  void answer(const api_trace& x, const question& q) {
    const auto view = machine_.job(x.job);
    auto orders =
        view ? traces_.begin(x.job, x.first, x.last, view->members, view->stages, view->step)
             : result<trace_desk::messages>(error{errc::not_found, "no such job"});
    if (!orders) return q.reply(error_answer(orders.err()));
    send(*orders);
    q.reply(trace_answer(*traces_.find(x.job)));
  }
  /// A clock's question is stamped here, as late as can be.
  void send(const trace_desk::messages& list) {
    for (const auto& [to, message] : list) {
      const connection_id connection = machine_.connection_of(to);
      if (value(connection) == 0 || !world_.port) continue;
      to_worker stamped = message;
      if (auto* x = std::get_if<clock_question>(&stamped)) x->asked_ns = steady_ns();
      world_.port->send(connection, encode(stamped));
    }
  }
  void answer(api_event& x, const question& q) {
    if (refuse_without_store(q)) return;
    const reply_id id{next_reply_++};
    waiting_replies_[id] = [this, reply = q.reply](const result<actions::reply_value>& outcome) {
      reply(outcome ? accepted_answer(*outcome, machine_) : error_answer(outcome.err()));
    };
    std::visit(
        [id](auto& e) {
          if constexpr (requires { e.reply; }) e.reply = id;
        },
        x.what);
    deliver(x.what);
  }
  /// What can't be made durable is refused at once, instead of left waiting for a disk.
  bool refuse_without_store(const question& q) {
    const auto problem = world_.problem();
    if (problem.empty()) return false;
    q.reply(error_response(503, "disk_full", "the store takes no writes now: " + problem));
    return true;
  }

  // ---- events
  void deliver(const event& e) {
    if (steady_ms() - ticked_ms_ >= tick_again.count()) tick();
    enqueue(machine_.step(e));
    carry_out();
  }
  /// Time stands still while a write is waited for: what is to be sent after it (a prepare) has
  /// not been sent, so nobody is late with an answer. A tick after a gap counts a second at most.
  void tick() {
    const std::int64_t slept_ms = steady_ms() - std::exchange(awake_ms_, steady_ms());
    if (slept_ms >= cluster_machine::sleep_ms_min) enqueue(machine_.step(events::woke{slept_ms}));
    if (waiting_for_ != 0) return;
    ticked_ms_ = steady_ms();
    enqueue(machine_.step(events::tick{ticked_ms_, unix_ms_now()}));
  }
  void enqueue(std::vector<action> list) {
    for (auto& a : list) queue_.push_back(std::move(a));
  }

  // ---- actions
  void carry_out() {
    while (!queue_.empty() && waiting_for_ == 0) {
      const action a = std::move(queue_.front());
      queue_.pop_front();
      std::visit([this](const auto& x) { act(x); }, a);
    }
    if (begun_ && queue_.empty() && waiting_for_ == 0) {
      begun_->set_value();
      begun_.reset();
    }
  }
  void act(const actions::save& x) {
    std::vector<kv_write> rows;
    for (const auto& r : x.rows)
      rows.push_back(r.value ? kv_write::put(r.key, *r.value) : kv_write::erase(r.key));
    const auto ticket = world_.writer->write(std::move(rows), x.is_synced);
    if (x.is_synced) waiting_for_ = ticket;
  }
  void act(const actions::send& x) {
    if (value(x.connection) == 0 || !world_.port) return;
    if (const auto* c = std::get_if<commit>(&x.message)) {
      commit placed = *c;
      placed.checkpoint_folder = folder_of(placed.shape.job, placed.spec);
      world_.port->send(x.connection, encode(to_worker(std::move(placed))));
      return;
    }
    world_.port->send(x.connection, encode(x.message));
  }
  void act(const actions::close& x) {
    if (world_.port) world_.port->close(x.connection, 1008, x.reason);
  }
  void act(const actions::find_checkpoint& x) {
    world_.storage.post(
        [this, self = self, job = place_of(x.job), x] { tell(self, world_.keeper.find(job, x)); });
  }
  void act(const actions::write_manifest& x) {
    world_.storage.post(
        [this, self = self, job = place_of(x.job), x] { tell(self, world_.keeper.write(job, x)); });
  }
  void act(const actions::retire_checkpoints& x) {
    world_.storage.post([this, self = self, job = place_of(x.job), x] {
      std::vector<std::string> problems;
      auto answer = world_.keeper.retire(job, x, problems);
      for (const auto& p : problems)
        log_event(level::warn, "retention_problem", {{"job", to_string(job.id)}, {"text", p}});
      tell(self, std::move(answer));
    });
  }
  void act(const actions::note& x) {
    const auto& r = x.record;
    log_event(level_of(r.level), r.kind,
              {{"job", value(r.job) == 0 ? std::string("-") : to_string(r.job)}, {"text", r.text}});
    history_.add(r);
    world_.writer->write({kv_write::put(keys::event(r.job, r.number), to_json_text(r))}, false);
  }
  void act(const actions::series& x) {
    std::vector<kv_write> rows;
    for (const auto& report : x.steps) {
      history_.add_step(x.job, report);
      rows.push_back(kv_write::put(keys::series(x.job, report.step), to_json_text(report)));
    }
    if (!rows.empty()) world_.writer->write(std::move(rows), false);
    if (const auto view = machine_.job(x.job); view && view->last_recovery_ms > 0) {
      auto& known = recovery_ms_[x.job];
      if (known != view->last_recovery_ms)
        history_.add_recovery(x.job, static_cast<double>(view->last_recovery_ms) * 1e-3);
      known = view->last_recovery_ms;
    }
  }
  void act(const actions::gather_audit& x) {
    world_.inspection.post([this, self = self, job = place_of(x.job), x] {
      events::audit_gathered answer{x.worker, {}, {}};
      answer.message.audit = x.audit;
      auto gathered = gather_window(*world_.store, world_.keeper, job, x.from, x.to);
      if (gathered) {
        answer.message = std::move(*gathered);
        answer.message.audit = x.audit;
      } else {
        answer.message.job = value(x.job);
        answer.problem = gathered.err().message;
      }
      tell(self, std::move(answer));
    });
  }
  void act(const actions::forget_series& x) {
    std::vector<kv_write> rows;
    for (const std::uint64_t step : history_.forget_steps_after(x.job, x.step))
      rows.push_back(kv_write::erase(keys::series(x.job, step)));
    if (!rows.empty()) world_.writer->write(std::move(rows), false);
  }
  void act(const actions::evaluation& x) {
    history_.add_evaluation(x.job, x.step, x.loss);
    world_.writer->write(
        {kv_write::put(keys::evaluation(x.job, x.step), format_evaluation_row(x.loss))}, false);
  }
  void act(const actions::log& x) {
    const auto& line =
        history_.add_line(x.job, {0, x.line.unix_ms, x.line.level, name_of(x.worker), x.line.text});
    std::vector<kv_write> rows{kv_write::put(keys::line(x.job, line.n), format_line_row(line))};
    const auto kept = history_bounds{}.lines_per_job;
    if (line.n > kept) rows.push_back(kv_write::erase(keys::line(x.job, line.n - kept)));
    world_.writer->write(std::move(rows), false);
  }
  void act(const actions::reply& x) {
    const auto found = waiting_replies_.find(x.id);
    if (found == waiting_replies_.end()) return;
    auto reply = std::move(found->second);
    waiting_replies_.erase(found);
    reply(x.outcome);
  }
  void act(const actions::seek_witness&) {
    invariant(false, "the cluster machine finds witnesses itself");
  }
  void act(const actions::release&) {
    invariant(false, "the cluster machine takes releases itself");
  }

  static void tell(const caf::actor& to, event e) {
    caf::anon_send(to, mail::told{std::make_shared<const event>(std::move(e))});
  }
  std::string folder_of(job_id id, const job_spec& spec) const {
    return paths_.checkpoint_folder(id, spec).string();
  }
  job_place place_of(job_id id) const {
    job_place place;
    place.id = id;
    place.incarnation = machine_.incarnation();
    place.unix_ms = unix_ms_now();
    if (const auto job = machine_.jobs().find(id); job != machine_.jobs().end()) {
      place.spec = job->second.record().spec;
      place.submitted_unix_ms = job->second.record().submitted_unix_ms;
      place.folder = paths_.checkpoint_folder(id, place.spec);
      place.copies = paths_.manifests_folder(id);
      const auto view = job->second.view();
      place.plan_hash = view.plan_hash;
      if (view.stages > 0)
        place.layout = fmt::format("stages={} replicas={}", view.stages, view.replicas);
    }
    return place;
  }
  /// Names change only when workers come, and a thousand log lines may come at once.
  std::string name_of(worker_id id) {
    const auto found = worker_names_.find(id);
    if (found != worker_names_.end()) return found->second;
    worker_names_.clear();
    for (const auto& w : machine_.workers()) worker_names_[w.id] = w.name;
    return worker_names_[id];
  }

  world& world_;
  state_paths paths_;
  cluster_machine machine_;
  run_history history_;
  trace_desk traces_;
  std::deque<action> queue_;
  store_writer::ticket waiting_for_ = 0;  // 0: nothing
  std::int64_t ticked_ms_ = 0;
  std::int64_t awake_ms_ = steady_ms();  // last known to run, whatever it waits for
  std::shared_ptr<std::promise<void>> begun_;
  std::uint64_t next_reply_ = 1;
  std::map<reply_id, std::function<void(const result<actions::reply_value>&)>> waiting_replies_;
  std::map<job_id, std::int64_t> recovery_ms_;
  std::map<worker_id, std::string> worker_names_;
};

caf::behavior coordinator_actor(caf::event_based_actor* self, std::shared_ptr<shell> s) {
  // Our own code throws nothing; if a library does, a coordinator without its actor would be deaf.
  self->set_exception_handler([](std::exception_ptr&) -> caf::error {
    log_event(level::error, "coordinator_threw", {});
    std::abort();
  });
  s->self = caf::actor_cast<caf::actor>(self);
  return {
      [s](const mail::begin& m) { s->on(m); },
      [s](const mail::told& m) { s->on(m); },
      [s, self](const mail::asked& m) {
        s->mailbox_messages = self->mailbox().size();
        s->on(m);
      },
      [s](const mail::checked& m) { s->on(m); },
      [s](const mail::observed& m) { s->on(m); },
      [s](const mail::durable& m) { s->on(m); },
      [s](const mail::due& m) { s->on(m); },
      [s, self](const mail::halt&) {
        s->self = nullptr;  // a handle to oneself keeps an actor for ever
        self->quit();
      },
  };
}

/// Ticks from a steady clock, from a thread of its own: the actor's own timers would drift.
class ticker {
 public:
  ticker(milliseconds period, std::function<void()> due)
      : due_(std::move(due)), thread_([this, period] {
          auto next = steady::now();
          std::unique_lock guard(lock_);
          while (!is_stopping_) {
            next = std::max(next + period, steady::now());
            if (changed_.wait_until(guard, next, [this] { return is_stopping_; })) return;
            due_();
          }
        }) {}
  ~ticker() {
    {
      const std::lock_guard guard(lock_);
      is_stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  std::mutex lock_;
  std::condition_variable changed_;
  bool is_stopping_ = false;
  std::function<void()> due_;
  std::thread thread_;
};

struct actor_configuration : caf::actor_system_config {
  actor_configuration() {
    set("scheduler.policy", caf::atom("sharing"));  // stealing polls: a third of a core for nothing
    set("scheduler.max-threads", std::size_t{2});
  }
};

/// Series, evaluations, log lines and events as they stand in the store.
result<run_history> restore_history(const kv& store, const std::vector<store_row>& rows,
                                    std::vector<std::string>& notes) {
  run_history history;
  std::size_t unreadable = 0;
  // Over all jobs events go by time; inside a job by number, which the sort keeps.
  std::vector<event_record> events;
  for (const auto& [key, text] : rows) {
    if (!key.starts_with("event/")) continue;
    auto e = from_json_text<event_record>(text);
    if (e)
      events.push_back(std::move(*e));
    else
      ++unreadable;
  }
  std::stable_sort(events.begin(), events.end(),
                   [](const auto& a, const auto& b) { return a.unix_ms < b.unix_ms; });
  for (const auto& e : events) history.add(e);
  for (const auto& area : {keys::series_prefix(), keys::evaluation_prefix(), keys::line_prefix()}) {
    auto scanned = store.scan(area, [&](std::string_view key, std::string_view text) {
      if (!restore_row(history, std::string(key), std::string(text))) ++unreadable;
      return true;
    });
    if (!scanned) return scanned.err();
  }
  if (unreadable > 0)
    notes.push_back(
        fmt::format("{} row(s) of events and series can't be read; skipped", unreadable));
  return history;
}

class whole_coordinator final : public coordinator {
 public:
  ~whole_coordinator() override { stop(); }

  result<void> begin(const options& o, opened_state opened) {
    store_notes_ = std::move(opened.notes);
    for (const auto& note : store_notes_)
      log_event(level::warn, "store_recovered", {{"text", note}});
    world_.store = std::move(opened.store);

    auto history = restore_history(*world_.store, opened.rows, store_notes_);
    if (!history) return history.err();
    auto copies = std::make_shared<record_copies>(opened.paths, opened.rows);
    if (opened.is_recovered)
      if (auto written = copies->write_all(); !written) return written;

    auto restored = restore_records(opened.rows);
    opened.rows.clear();
    opened.rows.shrink_to_fit();
    restored.problems.insert(restored.problems.end(), store_notes_.begin(), store_notes_.end());
    // No root: where a job's checkpoints lie is state_paths' word, so that the folder may move.
    cluster_machine machine(std::move(restored), {}, o.rules, o.shares);
    incarnation_ = machine.incarnation();

    auto state =
        std::make_shared<shell>(world_, opened.paths, std::move(machine), std::move(*history));
    system_ = std::make_unique<caf::actor_system>(configuration_);
    actor_ = system_->spawn(coordinator_actor, state);
    actor_->attach_functor([w = &world_](const caf::error&) {
      if (w->is_stopping) return;
      log_event(level::error, "coordinator_actor_died", {});
      std::abort();
    });
    start_writer(o, std::move(copies));

    auto is_durable = std::make_shared<std::promise<void>>();
    auto started = is_durable->get_future();
    caf::anon_send(actor_, mail::begin{std::move(is_durable)});
    if (started.wait_for(std::chrono::seconds(30)) != std::future_status::ready)
      return make_error(errc::disk_full,
                        "{}: the store takes no writes ({}). fix: free space or another state "
                        "folder",
                        opened.paths.state().string(), world_.problem());
    return open_port(o);
  }

  std::uint16_t port() const override { return world_.port ? world_.port->port() : 0; }
  std::uint64_t incarnation() const override { return incarnation_; }
  const std::vector<std::string>& store_notes() const override { return store_notes_; }

  void stop() override {
    if (std::exchange(is_stopped_, true)) return;
    world_.is_stopping = true;
    ticker_.reset();
    if (world_.port) world_.port->stop();
    world_.intake.stop();
    world_.inspection.stop();
    world_.storage.stop();
    if (actor_) {
      caf::anon_send(actor_, mail::halt{});
      actor_ = nullptr;
    }
    system_.reset();  // waits for the actor; what it had queued is written below
    world_.writer.reset();
    world_.store.reset();
    world_.port.reset();  // after everything that may hold a reply
  }

 private:
  void start_writer(const options& o, std::shared_ptr<record_copies> copies) {
    store_writer::callbacks on;
    on.on_durable = [to = actor_](store_writer::ticket t) { caf::anon_send(to, mail::durable{t}); };
    on.on_problem = [w = &world_](const error& e) {
      const std::lock_guard guard(w->problem_lock);
      if (w->store_problem != e.message)  // once, not with every try
        log_event(level::error, "store_write_failed", {{"text", e.message}});
      w->store_problem = e.message;
    };
    on.on_recovered = [w = &world_] {
      const std::lock_guard guard(w->problem_lock);
      w->store_problem.clear();
      log_event(level::info, "store_writes_again", {});
    };
    on.copy = [copies = std::move(copies)](const std::vector<kv_write>& rows) {
      return copies->apply(rows);
    };
    store_writer::options how;
    how.is_synced = o.fsync;
    world_.writer = std::make_unique<store_writer>(*world_.store, how, std::move(on));
  }

  result<void> open_port(const options& o) {
    gateway::options p;
    p.host = o.host;
    p.port = o.port;
    p.tls = o.tls;
    p.token = o.token;
    p.insecure = o.insecure;
    gateway::callbacks on;
    // Until start() of the gateway has returned, the actor has no port to answer through.
    on.on_request = [this, to = actor_](http_request r, http_reply_function reply) {
      world_.port_is_open.wait();
      caf::anon_send(
          to,
          mail::asked{std::make_shared<const question>(question{std::move(r), std::move(reply)})});
    };
    on.on_open = [this](connection_id id, const gateway_peer& peer) {
      if (peer.is_tls) certified_names_[value(id)] = peer.name;
      log_event(level::debug, "control_opened", {{"peer", peer.address}, {"name", peer.name}});
    };
    on.on_message = [this, to = actor_](connection_id id, const std::string& text) {
      world_.port_is_open.wait();
      auto message = decode_to_coordinator(text);
      if (!message) {
        log_event(level::warn, "bad_message",
                  {{"connection", value(id)}, {"text", message.err().message}});
        world_.port->close(id, 1008, "bad message: " + message.err().message);
        return;
      }
      if (const auto* greeting = std::get_if<hello>(&*message);
          greeting != nullptr && !may_be_called(id, *greeting))
        return;
      if (std::holds_alternative<traced>(*message) ||
          std::holds_alternative<clock_answer>(*message)) {
        caf::anon_send(
            to, mail::observed{id, std::make_shared<const to_coordinator>(std::move(*message)),
                               steady_ns()});
        return;
      }
      tell(to, std::holds_alternative<hello>(*message)
                   ? event(events::worker_attached{id, std::get<hello>(*message)})
                   : event(events::worker_said{id, std::move(*message)}));
    };
    on.on_close = [this, to = actor_](connection_id id, const std::string& why) {
      world_.port_is_open.wait();
      certified_names_.erase(value(id));
      tell(to, events::worker_detached{id, why});
    };
    auto opened = gateway::start(p, std::move(on));
    if (!opened) return opened.err();
    world_.port = std::move(*opened);
    world_.port_is_open.count_down();
    ticker_ =
        std::make_unique<ticker>(tick_period, [to = actor_] { caf::anon_send(to, mail::due{}); });
    log_event(level::info, "port_opened",
              {{"incarnation", incarnation_}, {"host", o.host}, {"port", world_.port->port()}});
    return ok();
  }

  /// Under TLS a worker's name is its certificate's: one worker can't take another's place, and its
  /// links, which are checked against the plan's names, will stand. Gateway's thread.
  bool may_be_called(connection_id id, const hello& greeting) {
    const auto certified = certified_names_.find(value(id));
    if (certified == certified_names_.end() || certified->second == greeting.name) return true;
    const auto why = fmt::format(
        "worker {} on {} shows the certificate of {}. fix: --name {}, or a certificate for {}",
        greeting.name, greeting.host, certified->second, certified->second, greeting.name);
    log_event(level::warn, "worker_refused", {{"text", why}});
    world_.port->send(id, encode(to_worker(refused{why, true})));
    world_.port->close(id, 1008, why);
    return false;
  }

  static void tell(const caf::actor& to, event e) {
    caf::anon_send(to, mail::told{std::make_shared<const event>(std::move(e))});
  }

  world world_;
  actor_configuration configuration_;
  std::unique_ptr<caf::actor_system> system_;
  caf::actor actor_;
  std::unique_ptr<ticker> ticker_;
  std::map<std::uint64_t, std::string> certified_names_;  // of open channels; gateway's thread
  std::vector<std::string> store_notes_;
  std::uint64_t incarnation_ = 0;
  bool is_stopped_ = false;
};

}  // namespace

result<std::unique_ptr<coordinator>> coordinator::start(const options& o) {
  auto opened = open_state(o.state);
  if (!opened) return opened.err();
  auto whole = std::make_unique<whole_coordinator>();
  if (auto begun = whole->begin(o, std::move(*opened)); !begun) return begun.err();
  return std::unique_ptr<coordinator>(std::move(whole));
}

}  // namespace stagecoach
