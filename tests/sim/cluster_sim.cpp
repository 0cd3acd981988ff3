#include "tests/sim/cluster_sim.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "coordinator/cluster_machine.hpp"
#include "coordinator/wire.hpp"
#include "model/tensor_names.hpp"
#include "worker/worker_machine.hpp"

namespace stagecoach::sim {

namespace {

using us = std::int64_t;
constexpr us ms = 1000;
constexpr us second = 1000 * ms;

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {  // splitmix64 over both
  std::uint64_t x = a * 0x9e3779b97f4a7c15ull + b + 0x632be59bd9b4e019ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
std::uint64_t hash_name(const std::string& text) {
  std::uint64_t h = 14695981039346656037ull;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return h;
}

using values = std::map<std::string, std::uint64_t>;

std::string hash_of(const values& some) {
  std::uint64_t low = 0, high = 0;
  for (const auto& [name, v] : some) {
    low += mix(v, hash_name(name));
    high += mix(hash_name(name), v);
  }
  return fmt::format("{:016x}{:016x}", high, low);
}

/// What an undisturbed run gives; nobody but the oracle looks here.
struct truth {
  std::vector<values> at;  // by step
  std::vector<std::uint64_t> chain;
};

struct rates {  // events per second of the whole cluster
  double kill = 0, freeze = 0, cut_control = 0, cut_link = 0, coordinator_crash = 0,
         action_crash = 0;
  double disk_full = 0, corrupt = 0, drain = 0, pause = 0, slow = 0;  // slow: share of the messages
};

struct disk_part {
  values weights;
  std::uint64_t step = 0;
  bool is_corrupt = false;
};
struct disk_manifest {
  checkpoint_facts facts;
};

struct process;

struct connection {
  connection_id id{};
  std::shared_ptr<process> who;
  bool is_open = true;
  us last_up = 0, last_down = 0;
};

/// A trainer without arithmetic.
struct toy_trainer {
  job_spec spec;
  plan shape;
  std::uint64_t hash = 0;
  int rank = -1;
  bool has_state = false;
  std::uint64_t step = 0, chain = 0;
  values weights, serving;
  std::optional<vote_result> last_vote;
  bool has_pending = false;
  bool are_links_open = false;
  std::set<int> lost_peers;
  enum class doing { nothing, loading, ready, running, held, finished } now = doing::nothing;
  std::uint64_t epoch = 0;  // events of an older one are void
  commit order;
  bool save_first = false;
  std::map<std::uint64_t, std::map<int, std::uint64_t>> ballots;  // rank 0: step, rank, chain
  std::vector<give_order> orders;
};

struct process {
  std::string name;
  process_id id;
  std::unique_ptr<worker_machine> machine;
  toy_trainer trainer;
  std::shared_ptr<connection> channel;
  bool is_alive = true, is_frozen = false;
  bool is_dialling = false;
  std::vector<std::function<void()>> deferred;
  us last_emit = 0, last_command = 0;
  int step_ms = 50;
};
using process_ptr = std::shared_ptr<process>;

class cluster {
 public:
  cluster(std::uint64_t seed, bool is_loud) : random_(seed), is_loud_(is_loud) { set_up(seed); }
  cluster(const cluster&) = delete;
  ~cluster() {
    for (auto& [id, p] : by_id_) {  // a process and its channel know each other
      p->channel = nullptr;
      p->deferred.clear();
    }
  }
  outcome run();

 private:
  // ---- clock ----
  struct entry {
    us time;
    std::uint64_t order;
    std::function<void()> what;
    bool operator<(const entry& other) const {
      return std::tie(time, order) > std::tie(other.time, other.order);
    }
  };
  void at(us time, std::function<void()> what) {
    queue_.push({std::max(time, now_), order_++, std::move(what)});
  }
  void in(us delay, std::function<void()> what) { at(now_ + delay, std::move(what)); }
  /// Again and again, from `first` from now, until it says false.
  void every(us first, us period, std::function<bool()> what) {
    in(first, [this, period, what = std::move(what)] {
      if (what()) every(period, period, what);
    });
  }
  /// Runs on a process: not if it is dead, later if it is frozen.
  void on(const process_ptr& p, us delay, std::function<void()> what) {
    in(delay, [this, p, what = std::move(what)] { on_now(p, what); });
  }
  void on_now(const process_ptr& p, const std::function<void()>& what) {
    if (!p->is_alive) return;
    if (p->is_frozen) {
      p->deferred.push_back(what);
    } else {
      what();
    }
  }
  std::uint64_t draw(std::uint64_t from, std::uint64_t to) {  // inclusive
    return from + random_() % (to - from + 1);
  }
  us delay(us from, us to) {
    return static_cast<us>(draw(static_cast<std::uint64_t>(from), static_cast<std::uint64_t>(to)));
  }
  us travel() {
    const bool is_slow = are_faults_on_ && chance(rates_.slow);
    return is_slow ? delay(100 * ms, 4 * second) : delay(100, 20 * ms);
  }
  bool chance(double p) { return static_cast<double>(random_() >> 11) * 0x1p-53 < p; }
  template <class... A>
  void say(fmt::format_string<A...> format, A&&... args) {
    if (is_loud_) {
      fmt::print("{:9.3f} {}\n", static_cast<double>(now_) / second,
                 fmt::format(format, std::forward<A>(args)...));
    }
  }
  template <class... A>
  void violate(fmt::format_string<A...> format, A&&... args) {
    if (result_.safety.empty()) {
      result_.safety = fmt::format("at {:.3f} s: {}", static_cast<double>(now_) / second,
                                   fmt::format(format, std::forward<A>(args)...));
      say("VIOLATION {}", result_.safety);
    }
  }

  // ---- set-up ----
  void set_up(std::uint64_t seed);
  job_spec make_spec(int index);
  void start_process(const std::string& name);

  // ---- coordinator ----
  void start_coordinator();
  void crash_coordinator(const char* why);
  void tell(const event& e);
  void pump();
  void carry_out(action& a);
  void do_save(const actions::save& s);
  void check_commit(const commit& c);

  // ---- network ----
  void dial(const process_ptr& p);
  void cut(const std::shared_ptr<connection>& c, us to_worker, us to_coordinator);
  void up(const process_ptr& p, const to_coordinator& message);
  void down(connection_id id, const to_worker& message);

  // ---- workers ----
  void step_worker(const process_ptr& p, const worker_event& e);
  void emit(const process_ptr& p, to_coordinator message);
  void to_trainer(const process_ptr& p, const to_worker& message);
  void load(const process_ptr& p, const commit& c);
  void exchange(const process_ptr& p, std::uint64_t epoch);
  void run_trainer(const process_ptr& p);
  void begin_step(const process_ptr& p);
  void count_ballots(const process_ptr& zero, std::uint64_t step);
  void apply(const process_ptr& p, const vote_result& vote);
  void forward(toy_trainer& t, const vote_result& vote);
  void start_save(const process_ptr& p, bool is_final);
  void write_part(const process_ptr& p, part_saved report, const values& weights);
  void close_links(const process_ptr& p);
  void report_link(const process_ptr& p, int peer, const char* what, us after);
  process_ptr peer_of(const toy_trainer& t, int rank);
  bool share_links(const process_ptr& a, const process_ptr& b);
  void kill(const process_ptr& p);
  void faults();
  bool is_good(std::uint64_t job, const disk_manifest& m) {
    return std::all_of(m.facts.parts.begin(), m.facts.parts.end(), [&](const part_record& p) {
      const auto part = parts_[job].find(p.file);
      return part != parts_[job].end() && !part->second.is_corrupt;
    });
  }
  const truth& truth_of(std::uint64_t job);
  std::vector<std::string> needed(const toy_trainer& t, const commit& c, int rank) {
    (void)t;
    const auto stage = static_cast<std::size_t>(c.shape.stage_of(rank));
    return stage_tensor_names(c.spec.model, c.shape.shape.unit_cuts[stage],
                              c.shape.shape.unit_cuts[stage + 1]);
  }
  process_ptr pick() {
    std::vector<process_ptr> living;
    for (auto& [name, p] : processes_) {
      if (p->is_alive) living.push_back(p);
    }
    return living.empty() ? nullptr : living[random_() % living.size()];
  }

  std::mt19937_64 random_;
  bool is_loud_ = false, uses_wire_ = false;
  std::priority_queue<entry> queue_;
  us now_ = 0;
  std::uint64_t order_ = 0;
  outcome result_;

  // The world that survives crashes of the coordinator.
  std::map<std::string, std::string> rows_;
  std::map<std::uint64_t, std::map<std::string, disk_part>> parts_;            // by job, file
  std::map<std::uint64_t, std::map<std::uint64_t, disk_manifest>> manifests_;  // by job, step
  std::map<std::uint64_t, job_spec> specs_;                                    // by job
  std::map<std::uint64_t, truth> truths_;
  std::map<std::string, process_ptr> processes_;  // by name
  std::map<process_id, process_ptr> by_id_;
  std::set<std::uint64_t> cancelled_;
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint64_t> plans_;  // (job, number): hash
  std::map<std::tuple<std::uint64_t, std::uint64_t, int>, process_id>
      seats_;  // (job, number, rank)
  std::map<std::uint64_t, std::uint64_t> completed_;

  std::unique_ptr<cluster_machine> coordinator_;
  std::uint64_t incarnation_ = 0;  // of this simulation, to void old events
  std::deque<action> todo_;
  bool is_saving_ = false;
  actions::save saving_;
  std::map<std::uint64_t, std::shared_ptr<connection>> connections_;
  std::uint64_t next_connection_ = 1, next_process_ = 1;

  rates rates_;
  us faults_until_ = 0;
  bool are_faults_on_ = true;
  int worker_count_ = 0;
};

// ---- set-up ----
void cluster::set_up(std::uint64_t seed) {
  uses_wire_ = seed % 4 == 0;
  worker_count_ = static_cast<int>(draw(1, 6));
  // Rates are drawn per seed: some histories are calm, some are storms.
  const auto rate = [this](double max) {
    return chance(0.5) ? 0.0 : max * static_cast<double>(draw(0, 100)) / 100;
  };
  rates_.kill = rate(0.5);
  rates_.freeze = rate(0.15);
  rates_.cut_control = rate(0.3);
  rates_.cut_link = rate(0.2);
  rates_.coordinator_crash = rate(0.1);
  rates_.action_crash = rate(0.01);
  rates_.disk_full = rate(0.1);
  rates_.corrupt = rate(0.05);
  rates_.drain = rate(0.2);
  rates_.pause = rate(0.1);
  rates_.slow = rate(0.05);
  faults_until_ = delay(10 * second, 60 * second);
  for (int i = 0; i < worker_count_; ++i) {
    in(delay(0, 3 * second), [this, i] { start_process(fmt::format("w{}", i)); });
  }
  start_coordinator();
  const int jobs = static_cast<int>(draw(1, 3));
  for (int i = 0; i < jobs; ++i) {
    in(delay(0, 5 * second), [this, spec = make_spec(i)] {
      // A client tries until it is answered; by name, so a second try is a conflict and not a
      // second job.
      every(0, 300 * ms, [this, spec] {
        for (const auto& [id, known] : specs_) {
          if (known.name == spec.name) return false;
        }
        if (coordinator_) tell(events::submit_job{spec, "", reply_id{1}});
        return true;
      });
    });
  }
  in(500 * ms, [this] { faults(); });
}

job_spec cluster::make_spec(int index) {
  job_spec s;
  s.name = fmt::format("job{}", index);
  s.priority = static_cast<int>(draw(0, 2));
  s.model.n_layer = static_cast<std::int64_t>(draw(1, 3));
  s.model.d_model = 8;
  s.model.n_head = 2;
  s.model.d_ff = 32;
  s.model.vocab_size = 16;
  s.model.context = 8;
  s.model.init = "random";
  s.batch.global_sequences = 8;
  s.batch.micro_sequences = 1;
  s.batch.sequence_tokens = 8;
  s.batch.leaf_count = 8;
  s.stop_steps = static_cast<std::int64_t>(chance(0.3) ? draw(1, 20) : draw(20, 300));
  s.elasticity.workers_min =
      static_cast<int>(draw(1, static_cast<std::uint64_t>(std::max(1, worker_count_ - 1))));
  s.elasticity.workers_max = s.elasticity.workers_min + static_cast<int>(draw(0, 3));
  s.elasticity.on_loss = chance(0.7) ? "replace" : chance(0.5) ? "shrink" : "wait";
  s.elasticity.wait_for_min_ms = static_cast<std::int64_t>(draw(2'000, 30'000));
  s.elasticity.max_failures = 100'000;
  if (chance(0.5)) {
    s.parallelism.is_explicit = true;
    s.parallelism.stages =
        static_cast<int>(draw(1, static_cast<std::uint64_t>(std::min(3, worker_count_))));
    s.parallelism.replicas = static_cast<int>(
        draw(1, static_cast<std::uint64_t>(std::max(1, worker_count_ / s.parallelism.stages))));
  }
  s.checkpoint.every_steps = chance(0.2) ? 0 : static_cast<std::int64_t>(draw(3, 20));
  s.checkpoint.keep_last = static_cast<int>(draw(1, 3));
  s.checkpoint.store = "folder";
  return s;
}

const truth& cluster::truth_of(std::uint64_t job) {
  truth& t = truths_[job];
  if (!t.at.empty()) return t;
  const job_spec& spec = specs_.at(job);
  values v;
  for (const tensor_size& x : all_tensor_sizes(spec.model)) v[x.name] = hash_name(x.name);
  std::uint64_t chain = 0;
  for (std::int64_t s = 0; s <= spec.stop_steps; ++s) {
    if (s > 0) {
      for (auto& [name, x] : v) x = mix(x, static_cast<std::uint64_t>(s));
      chain = mix(chain, static_cast<std::uint64_t>(s));
    }
    t.at.push_back(v);
    t.chain.push_back(chain);
  }
  return t;
}

void cluster::start_process(const std::string& name) {
  auto p = std::make_shared<process>();
  p->name = name;
  p->id = fmt::format("{:032x}", next_process_++);
  p->step_ms = static_cast<int>(draw(5, 150));
  worker_identity identity;
  identity.name = name;
  identity.process = p->id;
  identity.host = "host-" + name;
  identity.device = "cpu";
  identity.device_class = "c";
  p->machine = std::make_unique<worker_machine>(identity);
  processes_[name] = p;
  by_id_[p->id] = p;
  say("{} starts, process {}", name, p->id.substr(28));
  dial(p);
  every(delay(0, 100 * ms), 100 * ms, [this, p] {
    if (!p->is_alive) return false;
    const std::uint64_t step = p->trainer.has_state ? p->trainer.step : 0;
    if (!p->is_frozen) step_worker(p, worker_events::tick{now_ / ms, step});
    return true;
  });
}

// ---- coordinator ----
void cluster::start_coordinator() {
  const std::uint64_t mine = ++incarnation_;
  std::vector<store_row> rows(rows_.begin(), rows_.end());
  restored_records restored = restore_records(rows);
  for (const std::string& problem : restored.problems) violate("restore: {}", problem);
  coordinator_ = std::make_unique<cluster_machine>(std::move(restored));
  say("coordinator starts, incarnation {}", coordinator_->incarnation());
  for (action& a : coordinator_->start()) todo_.push_back(std::move(a));
  every(0, 100 * ms, [this, mine] {
    if (incarnation_ != mine || !coordinator_) return false;
    tell(events::tick{now_ / ms, now_ / ms});
    return true;
  });
  pump();
}

void cluster::crash_coordinator(const char* why) {
  say("coordinator crashes: {}", why);
  ++result_.coordinator_crashes;
  ++incarnation_;
  coordinator_.reset();
  todo_.clear();
  if (is_saving_ && chance(0.5)) do_save(saving_);  // it may have reached the disk
  is_saving_ = false;
  for (auto& [id, c] : connections_) cut(c, delay(ms, 20 * ms), -1);
  in(delay(100 * ms, 5 * second), [this] { start_coordinator(); });
}

void cluster::tell(const event& e) {
  if (!coordinator_) return;
  ++result_.events;
  for (action& a : coordinator_->step(e)) todo_.push_back(std::move(a));
  pump();
}

void cluster::do_save(const actions::save& s) {
  for (const actions::row& r : s.rows) {
    if (r.value) {
      rows_[r.key] = *r.value;
    } else {
      rows_.erase(r.key);
    }
    if (r.key.ends_with("/record") && r.value) {
      const auto record = from_json_text<job_record>(*r.value);
      if (!record) {
        violate("row {} does not read: {}", r.key, record.err().message);
        continue;
      }
      const std::uint64_t job = value(record->id);
      specs_.emplace(job, record->spec);
      if (completed_.count(job) != 0 && record->state != job_state::completed) {
        violate("job {} was completed and is {} now", job, to_string(record->state));
      }
      if (record->state == job_state::completed && completed_.count(job) == 0) {
        completed_[job] = 1;
        const auto last = static_cast<std::uint64_t>(record->spec.stop_steps);
        const auto& have = manifests_[job];
        if (have.count(last) == 0) {
          violate("job {} is completed without a manifest of step {}", job, last);
        } else if (have.at(last).facts.weights_hash != hash_of(truth_of(job).at[last])) {
          violate("job {} ended with other bits", job);
        }
      }
      if (record->state == job_state::failed) violate("job {} failed: {}", job, record->reason);
    }
  }
}

void cluster::pump() {
  while (!todo_.empty() && !is_saving_ && coordinator_) {
    if (are_faults_on_ && chance(rates_.action_crash))
      return crash_coordinator("between two actions");
    action a = std::move(todo_.front());
    todo_.pop_front();
    carry_out(a);
  }
}

void cluster::carry_out(action& a) {
  const std::uint64_t mine = incarnation_;
  const auto later = [this, mine](us after, event e) {
    in(after, [this, mine, e = std::move(e)] {
      if (incarnation_ == mine) tell(e);
    });
  };
  if (auto* s = std::get_if<actions::save>(&a)) {
    if (!s->is_synced) return do_save(*s);
    is_saving_ = true;
    saving_ = *s;
    in(delay(200, 10 * ms), [this, mine] {
      if (incarnation_ != mine) return;
      is_saving_ = false;
      do_save(saving_);
      pump();
    });
  } else if (auto* x = std::get_if<actions::send>(&a)) {
    if (const auto* c = std::get_if<commit>(&x->message)) check_commit(*c);
    down(x->connection, x->message);
  } else if (auto* c = std::get_if<actions::close>(&a)) {
    const auto found = connections_.find(static_cast<std::uint64_t>(c->connection));
    if (found != connections_.end()) cut(found->second, delay(ms, 10 * ms), delay(0, ms));
  } else if (auto* f = std::get_if<actions::find_checkpoint>(&a)) {
    checkpoint_found answer{f->job, f->request, std::nullopt, {}};
    for (const auto& [step, m] : manifests_[value(f->job)]) {
      if (step > f->step_max) continue;
      if (is_good(value(f->job), m)) {
        answer.newest = m.facts;
      } else {
        answer.notes.push_back(fmt::format("step {} is damaged", step));
      }
    }
    later(delay(ms, 300 * ms), answer);
  } else if (auto* m = std::get_if<actions::write_manifest>(&a)) {
    const std::uint64_t job = value(m->job);
    if (are_faults_on_ && chance(rates_.disk_full)) {
      return later(delay(ms, 50 * ms), manifest_written{m->job, m->step, false, "disk full"});
    }
    values whole;
    for (const part_record& p : m->parts) {
      const auto part = parts_[job].find(p.file);
      if (part == parts_[job].end())
        return violate("manifest {} names {} that was never written", m->step, p.file);
      if (part->second.step != m->step)
        violate("manifest {} names a part of step {}", m->step, part->second.step);
      for (const auto& [name, v] : part->second.weights) {
        if (!whole.emplace(name, v).second) violate("manifest {} has {} twice", m->step, name);
      }
    }
    if (whole != truth_of(job).at[m->step])
      violate("manifest {} of job {} is not the whole model of that step", m->step, job);
    if (hash_of(whole) != m->weights_hash)
      violate("manifest {}: weights hash is not that of its parts", m->step);
    if (m->chain != truth_of(job).chain[m->step]) violate("manifest {}: wrong chain", m->step);
    // The write and its answer are apart: the coordinator may die in between.
    in(delay(ms, 30 * ms), [this, mine, m = *m, later] {
      if (incarnation_ != mine && chance(0.5)) return;
      ++result_.saves;
      manifests_[value(m.job)][m.step] = {
          {m.step, m.seq, m.chain, m.loss, m.weights_hash, m.parts}};
      later(delay(ms, 30 * ms), manifest_written{m.job, m.step, true, ""});
    });
  } else if (auto* r = std::get_if<actions::retire_checkpoints>(&a)) {
    auto& have = manifests_[value(r->job)];
    checkpoints_retired answer{r->job, {}};
    // As the real one: the newest that verifies stays, however old.
    std::uint64_t newest_good = 0;
    for (const auto& [step, m] : have) {
      if (is_good(value(r->job), m)) newest_good = step;
    }
    int too_many = static_cast<int>(have.size()) - r->keep_last;
    for (auto m = have.begin(); m != have.end() && too_many > 0; --too_many) {
      if (m->first == newest_good) break;
      answer.steps.push_back(m->first);
      m = have.erase(m);
    }
    if (!answer.steps.empty()) later(delay(ms, 20 * ms), answer);
  } else if (auto* n = std::get_if<actions::note>(&a)) {
    const event_record& e = n->record;
    rows_[keys::event(e.job, e.number)] = to_json_text(e);
    say("   [{}] {}: {}", value(e.job), e.kind, e.text);
    if (e.kind == "divergence") violate("divergence: {}", e.text);
    if (e.kind == "worker_lost") ++result_.lost_workers;
  }
}

void cluster::check_commit(const commit& c) {
  const std::uint64_t job = value(c.shape.job);
  const auto row = rows_.find(keys::generation(c.shape.job, c.shape.generation));
  if (row == rows_.end())
    return violate("commit {} of job {} is sent before it is saved", c.shape.generation, job);
  const auto saved = from_json_text<generation_record>(row->second);
  if (!saved || !(saved->shape == c.shape))
    violate("commit {} is not the plan that was saved", c.shape.generation);
  const std::uint64_t hash = plan_hash(c.shape);
  if (plans_.emplace(std::pair(job, c.shape.generation), hash).first->second != hash) {
    violate("two plans have number {} of job {}", c.shape.generation, job);
  }
  // Never below what is durable and whole.
  for (const auto& [step, m] : manifests_[job]) {
    const bool is_indexed = rows_.count(keys::checkpoint(c.shape.job, step)) != 0;
    if (is_indexed && is_good(job, m) && step > c.step) {
      violate("commit {} of job {} starts at step {} though step {} is durable", c.shape.generation,
              job, c.step, step);
    }
  }
}

// ---- network ----
void cluster::dial(const process_ptr& p) {
  if (p->is_dialling || !p->is_alive) return;
  p->is_dialling = true;
  on(p, delay(50 * ms, are_faults_on_ ? 2 * second : 500 * ms), [this, p] {
    p->is_dialling = false;
    if (!coordinator_) return dial(p);
    auto c = std::make_shared<connection>();
    c->id = static_cast<connection_id>(next_connection_++);
    c->who = p;
    connections_[static_cast<std::uint64_t>(c->id)] = c;
    p->channel = c;
    step_worker(p, worker_events::connected{p->trainer.has_state ? p->trainer.step : 0});
  });
}

/// -1: that side is never told (it is gone).
void cluster::cut(const std::shared_ptr<connection>& c, us to_worker, us to_coordinator) {
  if (!c->is_open) return;
  c->is_open = false;
  if (to_worker >= 0) {
    on(c->who, to_worker, [this, c] {
      if (c->who->channel != c) return;
      c->who->channel = nullptr;
      step_worker(c->who, worker_events::disconnected{"cut"});
      dial(c->who);
    });
  }
  const std::uint64_t mine = incarnation_;
  if (to_coordinator >= 0) {
    in(to_coordinator, [this, c, mine] {
      if (incarnation_ == mine) tell(events::worker_detached{c->id, "cut"});
    });
  }
}

void cluster::up(const process_ptr& p, const to_coordinator& message) {
  const auto c = p->channel;
  if (!c || !c->is_open) return;
  to_coordinator sent = message;
  if (uses_wire_) {
    auto decoded = decode_to_coordinator(encode(message));
    if (!decoded) return violate("wire: {}", decoded.err().message);
    sent = std::move(*decoded);
  }
  c->last_up = std::max(c->last_up, now_ + travel());
  const std::uint64_t mine = incarnation_;
  at(c->last_up, [this, c, mine, sent = std::move(sent)] {
    if (!c->is_open || incarnation_ != mine) return;
    if (chance(0.5)) tell(events::tick{now_ / ms, now_ / ms});
    if (const auto* h = std::get_if<hello>(&sent)) {
      tell(events::worker_attached{c->id, *h});
    } else {
      tell(events::worker_said{c->id, sent});
    }
  });
}

void cluster::down(connection_id id, const to_worker& message) {
  const auto found = connections_.find(static_cast<std::uint64_t>(id));
  if (found == connections_.end() || !found->second->is_open) return;
  const auto c = found->second;
  to_worker sent = message;
  if (uses_wire_) {
    auto decoded = decode_to_worker(encode(message));
    if (!decoded) return violate("wire: {}", decoded.err().message);
    sent = std::move(*decoded);
  }
  c->last_down = std::max(c->last_down, now_ + travel());
  at(c->last_down, [this, c, sent = std::move(sent)] {
    if (!c->is_open) return;
    on_now(c->who, [this, c, sent] {
      if (c->who->channel == c) step_worker(c->who, worker_events::coordinator_said{sent});
    });
  });
}

// ---- workers ----
void cluster::step_worker(const process_ptr& p, const worker_event& e) {
  ++result_.events;
  for (const worker_action& a : p->machine->step(e)) {
    if (const auto* s = std::get_if<worker_actions::send>(&a)) {
      up(p, s->message);
    } else if (const auto* t = std::get_if<worker_actions::tell_trainer>(&a)) {
      // In order: the trainer's commands are one queue.
      p->last_command = std::max(p->last_command + 1, now_ + delay(0, 5 * ms));
      at(p->last_command, [this, p, message = t->message] {
        on_now(p, [this, p, message] { to_trainer(p, message); });
      });
    } else if (std::holds_alternative<worker_actions::reconnect>(a)) {
      if (p->channel) cut(p->channel, ms, ms);
    } else if (const auto* g = std::get_if<worker_actions::give_up>(&a)) {
      say("{} gives up: {}", p->name, g->why);
      kill(p);
    }
  }
}

void cluster::emit(const process_ptr& p, to_coordinator message) {
  p->last_emit = std::max(p->last_emit + 1, now_ + (chance(0.5) ? 0 : travel()));
  at(p->last_emit, [this, p, message = std::move(message)] {
    on_now(p, [this, p, message] { step_worker(p, worker_events::trainer_said{message}); });
  });
}

process_ptr cluster::peer_of(const toy_trainer& t, int rank) {
  const auto found = by_id_.find(t.shape.members[static_cast<std::size_t>(rank)].process);
  return found == by_id_.end() ? nullptr : found->second;
}

bool cluster::share_links(const process_ptr& a, const process_ptr& b) {
  if (!a || !b || !a->is_alive || !b->is_alive) return false;
  const toy_trainer& x = a->trainer;
  const toy_trainer& y = b->trainer;
  return x.are_links_open && y.are_links_open && x.hash == y.hash && x.shape.job == y.shape.job &&
         x.lost_peers.count(y.rank) == 0 && y.lost_peers.count(x.rank) == 0;
}

void cluster::report_link(const process_ptr& p, int peer, const char* what, us after) {
  const toy_trainer& t = p->trainer;
  peer_report r;
  r.job = value(t.shape.job);
  r.generation = t.shape.generation;
  r.peer = value(t.shape.members[static_cast<std::size_t>(peer)].worker);
  r.what = what;
  on(p, after, [this, p, r] { emit(p, r); });
}

void cluster::close_links(const process_ptr& p) {
  toy_trainer& t = p->trainer;
  if (!t.are_links_open) return;
  for (int rank = 0; rank < static_cast<int>(t.shape.members.size()); ++rank) {
    const process_ptr other = peer_of(t, rank);
    if (rank == t.rank || !share_links(p, other)) continue;
    other->trainer.lost_peers.insert(t.rank);
    report_link(other, t.rank, "lost", delay(500, 20 * ms));
  }
  t.are_links_open = false;
}

void cluster::to_trainer(const process_ptr& p, const to_worker& message) {
  toy_trainer& t = p->trainer;
  if (const auto* x = std::get_if<prepare>(&message)) {
    ++t.epoch;
    close_links(p);
    t.now = toy_trainer::doing::nothing;
    prepared answer;
    answer.job = x->job;
    answer.number = x->number;
    if (t.has_state && value(t.shape.job) == x->job) {
      answer.has_state = true;
      answer.step = t.step;
      answer.chain = t.chain;
      for (const auto& [name, v] : t.weights) answer.tensors.push_back(name);
      answer.last_vote = t.last_vote;
      answer.has_pending = t.has_pending;
    }
    emit(p, answer);
  } else if (const auto* c = std::get_if<commit>(&message)) {
    load(p, *c);
  } else if (std::holds_alternative<run_stage>(message)) {
    if (t.now == toy_trainer::doing::ready) run_trainer(p);
  } else if (const auto* o = std::get_if<give_order>(&message)) {
    if (t.rank == 0) t.orders.push_back(*o);
  } else if (std::holds_alternative<resume_stage>(message)) {
    if (t.now == toy_trainer::doing::held) run_trainer(p);
  } else if (const auto* s = std::get_if<stop_stage>(&message)) {
    if (value(t.shape.job) != s->job) return;
    close_links(p);
    const std::uint64_t epoch = t.epoch + 1;
    t = toy_trainer{};
    t.epoch = epoch;
  }
}

/// The newest state that the vote decided, in place.
void cluster::forward(toy_trainer& t, const vote_result& vote) {
  for (auto& [name, v] : t.weights) v = mix(v, vote.step);
  t.step = vote.step;
  t.chain = vote.chain;
  t.last_vote = vote;
  t.has_pending = false;
  const truth& right = truth_of(value(t.shape.job));
  for (const auto& [name, v] : t.weights) {
    if (right.at[t.step].at(name) != v)
      violate("{} at step {} is not the undisturbed value", name, t.step);
  }
  if (right.chain[t.step] != t.chain)
    violate("the chain at step {} is not the undisturbed one", t.step);
}

void cluster::load(const process_ptr& p, const commit& c) {
  toy_trainer& t = p->trainer;
  const std::uint64_t job = value(c.shape.job), number = c.shape.generation;
  int rank = -1;
  for (std::size_t i = 0; i < c.shape.members.size(); ++i) {
    if (c.shape.members[i].process == p->id) rank = static_cast<int>(i);
  }
  if (rank < 0) return violate("{} got a plan in which it has no place", p->name);
  const auto [seat, is_new] = seats_.emplace(std::tuple(job, number, rank), p->id);
  if (!is_new && seat->second != p->id)
    violate("two workers hold rank {} of generation {}", rank, number);

  const std::uint64_t epoch = ++t.epoch;
  if (t.has_state && value(t.shape.job) != job) t.has_state = false;
  if (c.source == source_kind::live && c.roll_forward && t.has_state && t.has_pending &&
      t.step + 1 == c.roll_forward->step) {
    ++result_.roll_forwards;
    forward(t, *c.roll_forward);
  }
  t.serving = t.has_state && t.step == c.step ? t.weights : values{};
  t.order = c;
  t.spec = c.spec;
  t.now = toy_trainer::doing::loading;
  t.save_first = c.save_at_start;
  on(p, delay(ms, 300 * ms), [this, p, epoch, rank] {
    toy_trainer& u = p->trainer;
    if (u.epoch != epoch) return;
    u.shape = u.order.shape;
    u.hash = plan_hash(u.shape);
    u.rank = rank;
    u.lost_peers.clear();
    u.are_links_open = true;
    for (int r = 0; r < static_cast<int>(u.shape.members.size()); ++r) {
      const process_ptr other = peer_of(u, r);
      if (r != rank && !share_links(p, other)) return;  // the last one to open starts the exchange
    }
    for (int r = 0; r < static_cast<int>(u.shape.members.size()); ++r) {
      const process_ptr other = peer_of(u, r);
      on(other, delay(ms, 100 * ms),
         [this, other, e = other->trainer.epoch] { exchange(other, e); });
    }
  });
  on(p, 5 * second, [this, p, epoch, job, number] {
    if (p->trainer.epoch != epoch || p->trainer.now != toy_trainer::doing::loading) return;
    emit(p, failed{job, number, "unreachable", "links did not open", false});
  });
}

void cluster::exchange(const process_ptr& p, std::uint64_t epoch) {
  toy_trainer& t = p->trainer;
  if (t.epoch != epoch || t.now != toy_trainer::doing::loading) return;
  const commit& c = t.order;
  const std::uint64_t job = value(c.shape.job);
  values have;
  if (c.source == source_kind::live) {
    have = t.serving;
    for (const transfer_record& x : c.transfers) {
      if (x.to_rank != t.rank) continue;
      const process_ptr from = peer_of(t, x.from_rank);
      if (!share_links(p, from)) return;  // stuck until the next prepare
      const auto v = from->trainer.serving.find(x.tensor);
      if (v == from->trainer.serving.end()) {
        return violate("rank {} is to send {} at step {}, which it does not hold", x.from_rank,
                       x.tensor, c.step);
      }
      have[x.tensor] = v->second;
    }
    ++result_.live_recoveries;
  } else if (c.source == source_kind::checkpoint) {
    for (const part_record& part : c.parts) {
      const auto file = parts_[job].find(part.file);
      if (file == parts_[job].end() || file->second.is_corrupt) {
        emit(p, failed{job, c.shape.generation, "corrupt", "part " + part.file, false});
        t.now = toy_trainer::doing::nothing;
        return;
      }
      have.insert(file->second.weights.begin(), file->second.weights.end());
    }
    if (c.step > 0) ++result_.rollbacks;
  } else {
    have = truth_of(job).at[0];
  }
  values mine;
  for (const std::string& name : needed(t, c, t.rank)) {
    const auto v = have.find(name);
    if (v == have.end())
      return violate("rank {} has nobody to give it {} at step {}", t.rank, name, c.step);
    if (v->second != truth_of(job).at[c.step].at(name))
      violate("{} loaded for step {} has other bits", name, c.step);
    mine[name] = v->second;
  }
  // The old state goes only now: a prepare during the load finds it.
  t.weights = std::move(mine);
  t.has_state = true;
  t.step = c.step;
  t.chain = c.chain;
  if (t.last_vote && t.last_vote->step != c.step) t.last_vote.reset();
  t.has_pending = false;
  t.ballots.clear();
  t.orders.clear();
  t.now = toy_trainer::doing::ready;
  values counted = t.weights;
  if (c.shape.stage_of(t.rank) != 0) counted.erase("wte.weight");
  emit(p, ready{job, c.shape.generation, t.hash, c.step, hash_of(counted)});
}

void cluster::run_trainer(const process_ptr& p) {
  toy_trainer& t = p->trainer;
  t.now = toy_trainer::doing::running;
  if (t.save_first) {
    t.save_first = false;
    start_save(p, t.step == static_cast<std::uint64_t>(t.spec.stop_steps));
  }
  if (t.step >= static_cast<std::uint64_t>(t.spec.stop_steps)) {
    t.now = toy_trainer::doing::finished;
    emit(p, finished{value(t.shape.job), t.shape.generation, t.step});
    return;
  }
  begin_step(p);
}

void cluster::begin_step(const process_ptr& p) {
  const std::uint64_t epoch = p->trainer.epoch;
  on(p, delay(p->step_ms * ms / 2, p->step_ms * ms), [this, p, epoch] {
    toy_trainer& t = p->trainer;
    if (t.epoch != epoch || t.now != toy_trainer::doing::running) return;
    for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
      if (r != t.rank && !share_links(p, peer_of(t, r))) return;  // the step is broken
    }
    t.has_pending = true;
    const process_ptr zero = peer_of(t, 0);
    on(zero, zero == p ? 0 : delay(100, 5 * ms),
       [this, zero, rank = t.rank, hash = t.hash, step = t.step + 1, chain = t.chain] {
         toy_trainer& z = zero->trainer;
         if (z.hash != hash || !z.are_links_open) return;
         if (z.step + 1 != step)
           return violate("rank {} votes for step {}, rank 0 stands at {}", rank, step, z.step);
         z.ballots[step][rank] = chain;
         count_ballots(zero, step);
       });
  });
}

void cluster::count_ballots(const process_ptr& zero, std::uint64_t step) {
  toy_trainer& z = zero->trainer;
  if (z.now != toy_trainer::doing::running || z.ballots[step].size() != z.shape.members.size())
    return;
  vote_result vote;
  vote.step = step;
  for (const auto& [rank, chain] : z.ballots[step]) {
    if (chain != z.chain) return violate("rank {} votes from another chain", rank);
  }
  vote.chain = mix(z.chain, step);
  for (const give_order& o : z.orders) vote.orders |= order_bit(static_cast<order_kind>(o.kind));
  z.orders.clear();
  const auto every = static_cast<std::uint64_t>(z.spec.checkpoint.every_steps);
  if (every > 0 && step % every == 0) vote.orders |= order_bit(order_kind::save);
  z.ballots.erase(step);
  for (int r = 0; r < static_cast<int>(z.shape.members.size()); ++r) {
    const process_ptr p = peer_of(z, r);
    on(p, r == 0 ? 0 : delay(100, 30 * ms), [this, p, zero, vote, hash = z.hash] {
      toy_trainer& t = p->trainer;
      const bool is_open =
          t.are_links_open && t.hash == hash && (p == zero || t.lost_peers.count(0) == 0);
      if (is_open && t.has_pending && t.step + 1 == vote.step) apply(p, vote);
    });
  }
}

void cluster::apply(const process_ptr& p, const vote_result& vote) {
  toy_trainer& t = p->trainer;
  const std::uint64_t job = value(t.shape.job), number = t.shape.generation;
  forward(t, vote);
  ++result_.steps;
  if (t.rank == 0) {
    step_report r;
    r.step = vote.step;
    r.chain = vote.chain;
    emit(p, progress{job, number, t.hash, {r}});
  }
  const bool is_final = t.step == static_cast<std::uint64_t>(t.spec.stop_steps);
  if ((vote.orders & order_bit(order_kind::save)) != 0 || is_final) start_save(p, is_final);
  if ((vote.orders & (order_bit(order_kind::hold) | order_bit(order_kind::stop))) != 0) {
    t.now = toy_trainer::doing::held;
    emit(p, held{job, number, t.step});
    if (!is_final) return;
  }
  if (is_final) {
    t.now = toy_trainer::doing::finished;
    emit(p, finished{job, number, t.step});
    return;
  }
  begin_step(p);
}

void cluster::start_save(const process_ptr& p, bool is_final) {
  toy_trainer& t = p->trainer;
  // Each tensor of the stage is saved by one replica; the head's copy of wte by the embedding's
  // stage.
  const int stage = t.shape.stage_of(t.rank), replica = t.shape.replica_of(t.rank);
  const int replicas = t.shape.shape.replica_count;
  std::vector<std::vector<std::string>> shares(static_cast<std::size_t>(replicas));
  int parts = 0;
  for (int s = 0; s < t.shape.shape.stage_count; ++s) {
    auto names =
        stage_tensor_names(t.spec.model, t.shape.shape.unit_cuts[static_cast<std::size_t>(s)],
                           t.shape.shape.unit_cuts[static_cast<std::size_t>(s) + 1]);
    if (s != 0) std::erase(names, "wte.weight");
    for (int r = 0; r < replicas; ++r) {
      std::vector<std::string> share;
      for (std::size_t i = 0; i < names.size(); ++i) {
        if (static_cast<int>(i) % replicas == r) share.push_back(names[i]);
      }
      parts += share.empty() ? 0 : 1;
      if (s == stage) shares[static_cast<std::size_t>(r)] = share;
    }
  }
  const auto& mine = shares[static_cast<std::size_t>(replica)];
  if (mine.empty()) return;
  part_saved x;
  x.job = value(t.shape.job);
  x.generation = t.shape.generation;
  x.plan_hash = t.hash;
  x.step = t.step;
  x.chain = t.chain;
  x.part_count = parts;
  x.is_final = is_final;
  x.part.tensors = mine;
  x.part.host = p->name;
  x.part.folder = "folder";
  x.part.file = fmt::format("g{}-s{}-r{}", x.generation, x.step, t.rank);
  values weights;
  for (const std::string& name : mine) weights[name] = t.weights.at(name);
  x.part.weights_hash = hash_of(weights);
  write_part(p, x, weights);
}

void cluster::write_part(const process_ptr& p, part_saved x, const values& weights) {
  on(p, delay(ms, 400 * ms), [this, p, x, weights]() mutable {
    if (are_faults_on_ && chance(rates_.disk_full)) {
      x.problem = "disk full";
      emit(p, x);
      x.problem.clear();
      if (x.is_final) on(p, 2 * second, [this, p, x, weights] { write_part(p, x, weights); });
      return;
    }
    parts_[x.job][x.part.file] = {weights, x.step, false};
    emit(p, x);
  });
}

// ---- faults ----
void cluster::kill(const process_ptr& p) {
  if (!p->is_alive) return;
  say("{} is killed", p->name);
  close_links(p);
  p->is_alive = false;
  if (p->channel)
    cut(p->channel, -1, chance(0.9) ? delay(ms, 20 * ms) : delay(second, 10 * second));
  in(delay(100 * ms, 8 * second), [this, name = p->name] { start_process(name); });
}

void cluster::faults() {
  if (now_ >= faults_until_) {
    say("faults end");
    are_faults_on_ = false;
    for (auto& [name, p] : processes_) {
      tell(events::undrain_worker{name, reply_id{}});
    }
    // Who operates the cluster goes on until everything runs.
    every(second, 5 * second, [this] {
      if (coordinator_) {
        for (const worker_view& w : coordinator_->workers()) {
          if (w.state == "DRAINED" || w.state == "DRAINING")
            tell(events::undrain_worker{w.name, reply_id{}});
        }
        for (const job_view& j : coordinator_->job_views()) {
          if (j.state == "PAUSED" || j.state == "CHECKPOINTING")
            tell(events::resume_job{j.id, reply_id{}});
        }
      }
      return true;
    });
    return;
  }
  constexpr double period = 0.1;
  if (auto p = pick(); p && chance(rates_.kill * period)) kill(p);
  if (auto p = pick(); p && !p->is_frozen && chance(rates_.freeze * period)) {
    const us for_us = delay(200 * ms, 15 * second);
    say("{} freezes for {} ms", p->name, for_us / ms);
    p->is_frozen = true;
    // Its peers' links notice after a second of silence.
    if (for_us > second && p->trainer.are_links_open) {
      const toy_trainer& t = p->trainer;
      for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
        const process_ptr other = peer_of(t, r);
        if (r == t.rank || !share_links(p, other)) continue;
        const auto tell_peer = [this, p, other, rank = t.rank, hash = t.hash](const char* what) {
          if (other->trainer.hash == hash && share_links(p, other))
            report_link(other, rank, what, 0);
        };
        in(second, [tell_peer] { tell_peer("suspected"); });
        in(for_us + 10 * ms, [tell_peer] { tell_peer("recovered"); });
      }
    }
    in(for_us, [this, p] {
      p->is_frozen = false;
      say("{} thaws", p->name);
      auto late = std::move(p->deferred);
      p->deferred.clear();
      for (auto& what : late) on_now(p, what);
    });
  }
  if (auto p = pick(); p && p->channel && chance(rates_.cut_control * period)) {
    say("{} loses its control channel", p->name);
    cut(p->channel, delay(ms, chance(0.2) ? 5 * second : 50 * ms),
        delay(ms, chance(0.2) ? 5 * second : 50 * ms));
  }
  if (auto p = pick(); p && p->trainer.are_links_open && chance(rates_.cut_link * period)) {
    const int r = static_cast<int>(draw(0, p->trainer.shape.members.size() - 1));
    const process_ptr other = peer_of(p->trainer, r);
    if (r != p->trainer.rank && share_links(p, other)) {
      say("the link between {} and {} breaks", p->name, other->name);
      p->trainer.lost_peers.insert(r);
      other->trainer.lost_peers.insert(p->trainer.rank);
      report_link(p, r, "lost", delay(ms, 20 * ms));
      report_link(other, p->trainer.rank, "lost", delay(ms, 20 * ms));
    }
  }
  if (coordinator_ && chance(rates_.coordinator_crash * period)) crash_coordinator("killed");
  if (chance(rates_.corrupt * period)) {
    for (auto& [job, have] : manifests_) {
      const auto good = std::count_if(have.begin(), have.end(), [&, job = job](const auto& m) {
        return is_good(job, m.second);
      });
      if (good < 2 || !chance(0.5)) continue;  // without any the job rightly pauses
      for (const part_record& part : have.rbegin()->second.facts.parts) {
        parts_[job][part.file].is_corrupt = true;
        say("checkpoint {} of job {} is damaged", have.rbegin()->first, job);
        break;
      }
    }
  }
  if (auto p = pick(); p && chance(rates_.drain * period)) {
    say("{} is to be drained", p->name);
    tell(events::drain_worker{p->name, "test", reply_id{}});
    in(delay(second, 10 * second), [this, name = p->name] {
      tell(events::undrain_worker{name, reply_id{}});
    });
  }
  if (!specs_.empty() && chance(rates_.pause * period)) {
    const auto job = static_cast<job_id>(draw(1, specs_.size()));
    say("job {} is to pause", value(job));
    tell(events::pause_job{job, reply_id{}});
    in(delay(second, 10 * second), [this, job] { tell(events::resume_job{job, reply_id{}}); });
  }
  in(static_cast<us>(period * second), [this] { faults(); });
}

outcome cluster::run() {
  const us end = faults_until_ + 400 * second;
  while (!queue_.empty() && result_.safety.empty()) {
    entry next = queue_.top();
    queue_.pop();
    if (next.time > end) break;
    now_ = next.time;
    next.what();
    if (!are_faults_on_ && !specs_.empty() && completed_.size() == specs_.size() &&
        now_ > 8 * second)
      break;
  }
  result_.generations = plans_.size();
  if (result_.safety.empty() && (completed_.size() != specs_.size() || specs_.empty())) {
    for (const auto& [job, spec] : specs_) {
      if (completed_.count(job) != 0) continue;
      result_.liveness += fmt::format(
          "job {} did not end: {}; ", job,
          coordinator_ ? coordinator_->why(static_cast<job_id>(job)) : "no coordinator");
    }
    if (specs_.empty()) result_.liveness = "no job was ever accepted";
  }
  return result_;
}

}  // namespace

outcome run_cluster(std::uint64_t seed, bool is_loud) { return cluster(seed, is_loud).run(); }

}  // namespace stagecoach::sim
