// One history: the production machines, and all that happens to them.
//
// The parts are apart by idea: coordinator_side (its shell), worker_side (a worker's shell),
// toy_trainer, network, faults, oracle; cluster_sim.cpp sets up and runs.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <queue>
#include <random>
#include <tuple>
#include <utility>

#include "tests/sim/cluster_sim.hpp"
#include "tests/sim/world.hpp"

namespace stagecoach::sim {

/// At most so much of a message stands in a trace.
std::string words(std::string text);

class cluster {
 public:
  cluster(std::uint64_t seed, bool is_loud) : random_(seed), is_loud_(is_loud) { set_up(seed); }
  cluster(const cluster&) = delete;
  ~cluster() {
    for (auto& [id, p] : by_id_) {  // a process and its channel know each other
      p->channel = nullptr;
      p->deferred.clear();
    }
    for (auto& [id, c] : connections_) c->whom->deferred.clear();
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
  template <class P>
  void on(const P& p, us delay, std::function<void()> what) {
    in(delay, [this, p, what = std::move(what)] { on_now(p, what); });
  }
  template <class P>
  void on_now(const P& p, const std::function<void()>& what) {
    if (!p->is_alive) return;
    if (p->is_frozen) {
      p->deferred.push_back(what);
    } else {
      what();
    }
  }
  template <class P>
  void thaw(const P& p) {
    p->is_frozen = false;
    auto late = std::move(p->deferred);
    p->deferred.clear();
    for (auto& what : late) on_now(p, what);
  }
  std::uint64_t draw(std::uint64_t from, std::uint64_t to) {  // inclusive
    return from + random_() % (to - from + 1);
  }
  us delay(us from, us to) {
    return static_cast<us>(draw(static_cast<std::uint64_t>(from), static_cast<std::uint64_t>(to)));
  }
  /// How long a write takes; now and then a disk is slow.
  us write_time(us usual_max) {
    const bool is_slow = are_faults_on_ && chance(rates_.disk_slow);
    return is_slow ? delay(usual_max, 4 * second) : delay(200, usual_max);
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
  void crash(const coordinator_ptr& c, const char* why);
  void freeze_coordinator();
  void tell(const event& e) {
    if (coordinator_) on_now(coordinator_, [this, c = coordinator_, e] { tell(c, e); });
  }
  void tell(const coordinator_ptr& c, const event& e);
  void tick(const coordinator_ptr& c);
  void pump(const coordinator_ptr& c);
  void carry_out(const coordinator_ptr& c, action& a);
  void start_save(const coordinator_ptr& c);
  void write_rows(const std::vector<actions::row>& rows);
  void write_log(const coordinator_ptr& c, us until);
  void lose_log(const coordinator_ptr& c);

  checkpoint_found find_on_disk(const actions::find_checkpoint& f);
  manifest_written put_manifest(const actions::write_manifest& m, std::uint64_t incarnation);
  checkpoints_retired retire_on_disk(const actions::retire_checkpoints& r);

  // ---- deputies, the line between workers, cuts of the network ----
  void send_peer(const process_ptr& p, const plan_member& to, const peer_message& message);
  void serve(const process_ptr& p, const deputy_actions::store& s);
  void make_tie_break(const process_ptr& p, const deputy_actions::make_tie_break& t);
  void check_deputy(const process_ptr& p, const commit& c);
  void check_one_run();
  void check_log(std::uint64_t job);
  void check_not_forgotten(const std::shared_ptr<connection>& c, const beat& b);
  void cut_off();
  /// A deputy decided for this job: the coordinator is no longer the only one whose word counts,
  /// so what the oracle derives from its words alone does not hold until it has the job again.
  bool is_shared(std::uint64_t job) const { return shared_.count(job) != 0; }
  bool can_reach(const process_ptr& a, const process_ptr& b) const {
    return island_.count(a->name) == island_.count(b->name);
  }
  bool can_reach_coordinator(const process_ptr& p) const { return island_.count(p->name) == 0; }

  // ---- oracle ----
  const truth& truth_of(std::uint64_t job);
  void check_row(const std::string& key, const std::string& value);
  void check_record(const job_record& record);
  void check_nothing_lost(const commit& c);
  void check_manifest(const actions::write_manifest& m);
  void check_sent(const std::shared_ptr<connection>& c, const to_worker& message);
  void check_decided(const coordinator_ptr& by, const commit& c);
  void check_commit(const coordinator_ptr& by, const commit& c);
  void check_state(const toy_trainer& t);
  void check_drop(const process_ptr& p, const char* why);
  void heard(const std::shared_ptr<connection>& c, const to_coordinator& message);
  std::optional<std::uint64_t> newest_held(std::uint64_t job, const std::vector<prepared>& by);
  std::optional<std::uint64_t> newest_kept(std::uint64_t job, const process_ptr& without);
  bool was_hung(const process_ptr& p) const {  // a moment ago: what it holds can't be had
    return p->is_hung || now_ < p->hung_until + 20 * second;
  }
  prepared holding_of(const process_ptr& p);
  // ---- jobs compete ----
  void change_priority();
  void check_preemption(const event_record& e);
  void check_size(const commit& c);
  void check_moves(const event_record& e);
  void check_layer_move(const commit& c, const plan& former);
  /// Something happened that excuses a gang that does not start; its effects last that long.
  void disturb(us for_us = 0) {
    ++disturbances_;
    quiet_since_ = std::max(quiet_since_, now_ + for_us);
  }

  // ---- network ----
  void dial(const process_ptr& p);
  void cut(const std::shared_ptr<connection>& c, us to_worker, us to_coordinator);
  void up(const process_ptr& p, const to_coordinator& message);
  void down(const coordinator_ptr& from, connection_id id, const to_worker& message);

  // ---- workers ----
  void step_worker(const process_ptr& p, const worker_event& e);
  void emit(const process_ptr& p, to_coordinator message);
  void ask_alive(const process_ptr& p, const probe& question);
  trainer_pulse pulse_of(const process_ptr& p);
  void hangs(std::uint64_t seed);
  void rivals(std::uint64_t seed);
  void check_stuck(const event_record& noted);
  void to_trainer(const process_ptr& p, const to_worker& message);
  void load(const process_ptr& p, const commit& c);
  void exchange(const process_ptr& p, std::uint64_t epoch);
  void run_trainer(const process_ptr& p);
  us leaf_us(const process_ptr& p);
  us layer_us(const process_ptr& p);
  double stage_share(const plan& shape, const job_spec& spec, int rank) const;
  void begin_step(const process_ptr& p);
  void end_compute(const process_ptr& p, std::uint64_t epoch);
  void give_to_copies(const process_ptr& p);
  void consider_vote(const process_ptr& p);
  void count_ballots(const process_ptr& zero, std::uint64_t step);
  void apply(const process_ptr& p, const vote_result& vote);
  void forward(toy_trainer& t, const vote_result& vote);
  void retell(const process_ptr& p, std::uint64_t after);
  void save_part(const process_ptr& p, bool is_final);
  void write_part(const process_ptr& p, part_saved report, const values& weights);
  void close_links(const process_ptr& p);
  void report_link(const process_ptr& p, int peer, const char* what, us after);
  process_ptr peer_of(const toy_trainer& t, int rank);
  bool share_links(const process_ptr& a, const process_ptr& b);
  void answer_prepare(const process_ptr& p, const prepare& x);
  // Background copies.
  process_ptr participant(const toy_feed& f, int index);
  bool share_feed(const process_ptr& a, const process_ptr& b);
  void open_feed(const process_ptr& p, const feed& order);
  void break_feed(const process_ptr& p, const char* why);
  void close_feed(const process_ptr& p);
  void give_to_feed(const process_ptr& p, const vote_result& vote);
  void follow_feed(const process_ptr& p);
  void take_fed(const process_ptr& p, std::uint64_t job);
  void kill(const process_ptr& p);
  void faults();
  bool is_good(std::uint64_t job, const disk_manifest& m) {
    return std::all_of(m.facts.parts.begin(), m.facts.parts.end(), [&](const part_record& p) {
      const auto part = parts_[job].find(p.file);
      return part != parts_[job].end() && !part->second.is_corrupt;
    });
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
  std::map<std::uint64_t, std::set<std::uint64_t>> vote_log_;                  // by job: steps
  std::map<std::uint64_t, std::map<std::string, disk_part>> parts_;            // by job, file
  std::map<std::uint64_t, std::map<std::uint64_t, disk_manifest>> manifests_;  // by job, step
  std::map<std::uint64_t, job_spec> specs_;                                    // by job
  std::map<std::uint64_t, truth> truths_;
  std::map<std::string, process_ptr> processes_;  // by name
  std::map<process_id, process_ptr> by_id_;
  // (job, number, decider): hash. Both sides of a cut may use one number, each once: what one
  // decided is never taken for the other's, since the hash goes with the number everywhere.
  std::map<std::tuple<std::uint64_t, std::uint64_t, std::string>, std::uint64_t> plans_;
  std::map<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, int>, process_id>
      seats_;                                      // (job, number, hash, rank)
  std::map<std::string, std::string> tie_breaks_;  // file: content
  std::set<std::string> island_;                   // cut off from the others and the coordinator
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::set<int>> ready_;  // (job, hash): ranks
  std::set<std::uint64_t> shared_;  // jobs for which a deputy decided
  std::set<std::uint64_t> let_go_;  // a deputy stood, and no member of it has greeted since
  std::map<std::uint64_t, std::uint64_t> completed_;
  std::map<std::uint64_t, plan> newest_plans_;  // by job, as sent
  std::map<std::uint64_t, plan> stored_plans_;
  std::set<std::pair<std::uint64_t, std::uint64_t>> ran_;  // (job, number)
  std::map<std::tuple<std::uint64_t, std::uint64_t, process_id>, prepared>
      answers_;  // (job, number, process)

  // What the oracle saw.
  std::map<std::pair<std::uint64_t, std::uint64_t>, asked> asked_;  // by (job, number)
  std::map<std::uint64_t, committed> committed_;                    // by job, the newest
  std::map<process_id, std::uint64_t> seat_;                        // job whose plan it is in
  std::map<std::uint64_t, std::set<std::uint64_t>> written_;  // by job: steps of all manifests
  std::map<std::uint64_t, std::set<std::uint64_t>> durable_;  // by job: steps ever indexed
  std::map<std::uint64_t, job_state> states_;                 // by job, as stored
  std::map<std::uint64_t, coordinator_process*> incarnations_;

  coordinator_ptr coordinator_;  // the newest; null: none runs
  coordinator_ptr former_;       // an older one that froze and woke beside it
  std::map<std::uint64_t, std::shared_ptr<connection>> connections_;
  std::uint64_t next_connection_ = 1, next_process_ = 1;

  rates rates_;
  fairness shares_;
  std::uint64_t disturbances_ = 0;
  us quiet_since_ = 0;
  std::map<std::uint64_t, std::uint64_t> starts_;   // by job: commits so far
  std::map<std::uint64_t, std::int64_t> started_;   // by job: unix_ms of its newest generation
  std::map<std::uint64_t, std::uint64_t> applied_;  // by job: newest of its newest plan
  us faults_until_ = 0, ended_us_ = -1;
  bool are_faults_on_ = true;
  int worker_count_ = 0;
};

}  // namespace stagecoach::sim
