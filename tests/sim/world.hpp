// What there is in a simulated cluster: time, state as a hash per tensor, processes, channels,
// disks.
//
// Plain data; what happens to it is cluster.hpp's.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "coordinator/cluster_machine.hpp"
#include "worker/worker_machine.hpp"

namespace stagecoach::sim {

using us = std::int64_t;
constexpr us ms = 1000;
constexpr us second = 1000 * ms;

std::uint64_t mix(std::uint64_t a, std::uint64_t b);
std::uint64_t hash_name(const std::string& text);

/// A tensor's whole past in one number: every step mixes its own into it, so a lost, repeated or
/// reordered step shows.
using values = std::map<std::string, std::uint64_t>;
/// Order-free, as the hash of a checkpoint's weights is.
std::string hash_of(const values& some);

/// What an undisturbed run gives; nobody but the oracle looks here.
struct truth {
  std::vector<values> at;  // by step
  std::vector<std::uint64_t> chain;
};

/// How often what goes wrong; drawn per seed, so some histories are calm and some are storms.
struct rates {
  // Per second, in the whole cluster.
  double kill = 0, freeze = 0, cut_control = 0, cut_link = 0, coordinator_crash = 0,
         coordinator_freeze = 0, corrupt = 0, drain = 0, pause = 0, priority = 0, pace = 0;
  // Share of the messages, writes, actions.
  double slow = 0, disk_full = 0, disk_slow = 0, action_crash = 0, worker_action_crash = 0;
  double partition = 0;     // per second
  double long_absence = 0;  // share of the coordinator's crashes
};

struct disk_part {
  values weights;
  std::uint64_t step = 0;
  bool is_corrupt = false;
};
struct disk_manifest {
  checkpoint_facts facts;
  std::uint64_t incarnation = 0;
};

struct process;

/// A row of the vote log that is written and not synced.
struct logged_step {
  us time = 0;
  std::uint64_t job = 0, step = 0, chain = 0;
};

/// One process of the coordinator; a frozen one may wake beside its successor.
struct coordinator_process {
  std::unique_ptr<cluster_machine> machine;
  std::uint64_t incarnation = 0;
  bool is_alive = true, is_frozen = false;
  bool is_fenced = false;  // the store is its successor's
  std::deque<action> todo;
  bool is_saving = false;
  actions::save saving;
  std::vector<actions::row> unsynced;  // written; a crash may lose the end of them
  std::deque<logged_step> unsynced_log;
  std::vector<std::function<void()>> deferred;
  // The oracle's, by job: newest step it heard of; the generation that it told to run; and the step
  // after which it let somebody go on.
  std::map<std::uint64_t, std::uint64_t> reported, ran;
  std::map<std::uint64_t, std::uint64_t> resumed;
};
using coordinator_ptr = std::shared_ptr<coordinator_process>;

struct connection {
  connection_id id{};
  std::shared_ptr<process> who;
  coordinator_ptr whom;
  bool is_open = true;
  us last_up = 0, last_down = 0;
  // The oracle's: generation that it was told to run on this channel, step to go on from.
  std::map<std::uint64_t, std::uint64_t> told_run, told_resume;
};

/// What a sender gives a receiver after one step.
struct feed_frame {
  vote_result vote;
  std::set<std::string> gradients;  // of tensors that were given before
  values state;
};

/// A part in a background copy.
struct toy_feed {
  feed order;
  int index = -1;
  bool is_open = false, is_broken = false, has_begun = false;
  std::map<int, std::set<std::string>> given;  // by receiver
  std::map<int, us> last_sent;
  // As receiver:
  std::set<int> senders;
  std::set<std::string> wanted;
  std::map<int, std::deque<feed_frame>> inbox;  // by sender
  values shadow;
  std::uint64_t step = 0, chain = 0;
  std::optional<vote_result> last_vote;
  bool is_complete = false, is_taken = false;
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
  bool is_computed = false;  // its own stage's gradient of step + 1 is reduced
  std::map<std::uint64_t, std::set<int>> copy_gradients;  // by step: owners whose gradient is here
  bool are_links_open = false;
  std::set<int> lost_peers;
  enum class doing { nothing, loading, ready, running, held, finished } now = doing::nothing;
  std::uint64_t epoch = 0;  // events of an older one are void
  commit order;
  bool save_first = false;
  std::map<std::uint64_t, std::map<int, std::uint64_t>> ballots;  // rank 0: step, rank, chain
  std::vector<give_order> orders;
  std::deque<step_report> recent;  // that it did, by step
  std::optional<toy_feed> copying;
};

struct process {
  std::string name;
  process_id id;
  std::unique_ptr<worker_machine> machine;
  toy_trainer trainer;
  std::shared_ptr<connection> channel;
  bool is_alive = true, is_frozen = false;
  bool is_hung = false;  // its trainer's thread
  us hung_until = -60 * second;
  std::vector<std::function<void()>> after_hang;
  bool has_lost_host = false;  // died with its host: nobody refuses its port
  bool is_dialling = false;
  std::vector<std::function<void()>> deferred;
  us last_emit = 0, last_command = 0;
  std::map<process_id, us> last_to;  // by peer: its line keeps the order
  int step_ms = 50;                  // for a whole step by itself
  us paced_at = 0;                   // since when
  // The oracle's.
  std::uint64_t obeys = 0;      // newest incarnation that welcomed it
  connection_id welcomed_on{};  // the channel on which the newest did
  us steady_since = 0;          // not frozen and not cut since then
  // (job, step): when it was reported last, to nobody or on a channel that broke; and on this one.
  std::map<std::pair<std::uint64_t, std::uint64_t>, us> owed, said;
  std::set<std::pair<std::uint64_t, std::uint64_t>> reported;  // all of them
  us welcomed_at = 0;                                          // by the newest
};

using process_ptr = std::shared_ptr<process>;

/// What the oracle saw of one prepare.
struct asked {
  std::uint64_t incarnation = 0;
  us since = 0;
  bool is_committed = false;
  std::map<process_id, prepared> answers;
};
/// And of the newest commit of a job.
struct committed {
  std::uint64_t number = 0, hash = 0;
  std::vector<process_id> members;
};

}  // namespace stagecoach::sim
