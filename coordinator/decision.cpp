#include "coordinator/decision.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

#include "model/copies.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

namespace {

using tensor_set = std::vector<char>;  // by global tensor index

/// What a candidate can bring to one step.
struct holder {
  int candidate = 0;
  worker_id worker{};
  tensor_set tensors;
  bool rolls_forward = false;
};

/// A state that some candidate stands at.
struct stand {
  std::uint64_t step = 0, chain = 0;
  auto operator<=>(const stand&) const = default;
};

class chooser {
 public:
  chooser(const job_spec& spec, const layout& shape, const std::vector<candidate>& candidates)
      : spec_(spec), sizes_(all_tensor_sizes(spec.model)), shape_(shape), candidates_(candidates) {
    for (std::size_t i = 0; i < sizes_.size(); ++i) indices_[sizes_[i].name] = static_cast<int>(i);
    for (int stage = 0; stage < shape.stage_count; ++stage) {
      const auto at = static_cast<std::size_t>(stage);
      stages_.push_back(
          stage_tensor_indices(spec.model, shape.unit_cuts[at], shape.unit_cuts[at + 1]));
    }
    // As if all stood on one host: who sits where is not known yet, and this only weighs seats.
    const std::vector<std::string> hosts(static_cast<std::size_t>(shape.worker_count()));
    for (int seat = 0; seat < seat_kinds(); ++seat) wants_.push_back(needs(seat, hosts));
  }

  std::optional<live_choice> choose(const stand& at) const {
    std::optional<vote_result> vote;
    for (const candidate& c : candidates_) {
      const prepared& a = c.answer;
      if (a.has_state && a.step == at.step && a.chain == at.chain && a.last_vote &&
          a.last_vote->step == at.step && a.last_vote->chain == at.chain) {
        vote = a.last_vote;
      }
    }
    const std::vector<holder> holders = holders_of(at, vote.has_value());
    tensor_set covered(sizes_.size(), 0);
    const std::optional<std::vector<int>> chosen = seat(holders, {}, covered);
    if (!chosen || std::find(covered.begin(), covered.end(), 0) != covered.end())
      return std::nullopt;

    live_choice choice;
    choice.step = at.step;
    choice.chain = at.chain;
    std::map<int, const holder*> held;  // by candidate
    for (const holder& h : holders) held[h.candidate] = &h;
    choice.by_rank = sit(*chosen, held);
    for (const int c : choice.by_rank) {
      if (held.count(c) != 0 && held.at(c)->rolls_forward) choice.roll_forward = vote;
    }
    choice.transfers = transfers(choice.by_rank, choice.by_rank, held);
    return choice;
  }

  std::optional<feed_choice> choose_for_feed(const stand& at,
                                             const std::vector<bool>& is_leaving) const {
    const std::vector<holder> holders = holders_of(at, false);
    tensor_set covered(sizes_.size(), 0);
    const std::optional<std::vector<int>> chosen = seat(holders, is_leaving, covered);
    if (!chosen) return std::nullopt;
    std::map<int, const holder*> held;
    for (const holder& h : holders) held[h.candidate] = &h;
    feed_choice choice;
    choice.by_rank = sit(*chosen, held);
    std::vector<int> givers;
    for (const holder& h : holders) givers.push_back(h.candidate);
    for (transfer_record t : transfers(choice.by_rank, givers, held)) {
      t.from_rank = givers[static_cast<std::size_t>(t.from_rank)];
      t.to_rank = choice.by_rank[static_cast<std::size_t>(t.to_rank)];
      choice.transfers.push_back(std::move(t));
    }
    return choice;
  }

 private:
  /// Replicas of a stage hold the same and may sit in any order, unless each has its own share of
  /// the moments. Seats of one kind are the ranks that equal it modulo the count of kinds.
  int seat_kinds() const {
    return is_sharded(spec_, shape_.replica_count) ? shape_.worker_count() : shape_.stage_count;
  }

  /// Of what the holder of a rank must have parameters and moments: of its stage (or its share of
  /// it), then of the copies that it keeps.
  std::vector<int> needs(int rank, const std::vector<std::string>& hosts) const {
    const auto stage = static_cast<std::size_t>(rank % shape_.stage_count);
    std::vector<int> tensors =
        kept_moments(spec_, shape_.unit_cuts[stage], shape_.unit_cuts[stage + 1],
                     rank / shape_.stage_count, shape_.replica_count);
    for (const kept_copy& copy : copies_kept(spec_, shape_, hosts, rank))
      tensors.insert(tensors.end(), copy.tensors.begin(), copy.tensors.end());
    return tensors;
  }

  std::int64_t size(int tensor) const { return sizes_[static_cast<std::size_t>(tensor)].count; }

  std::vector<holder> holders_of(const stand& at, bool is_vote_known) const {
    std::vector<holder> holders;
    for (std::size_t i = 0; i < candidates_.size(); ++i) {
      const prepared& a = candidates_[i].answer;
      if (!a.has_state) continue;
      const bool stands = a.step == at.step && a.chain == at.chain;
      const bool rolls = a.step + 1 == at.step && a.has_pending && is_vote_known;
      if (!stands && !rolls) continue;
      holder h{static_cast<int>(i), candidates_[i].worker, tensor_set(sizes_.size(), 0), rolls};
      for (const std::string& name : a.tensors) {
        if (const auto found = indices_.find(name); found != indices_.end()) {
          h.tensors[static_cast<std::size_t>(found->second)] = 1;
        }
      }
      holders.push_back(std::move(h));
    }
    std::sort(holders.begin(), holders.end(),
              [](const holder& a, const holder& b) { return a.worker < b.worker; });
    return holders;
  }

  /// Candidates for all seats: such that together they hold as much as they can, which is covered.
  std::optional<std::vector<int>> seat(const std::vector<holder>& holders,
                                       const std::vector<bool>& is_leaving,
                                       tensor_set& covered) const {
    const auto seats = static_cast<std::size_t>(shape_.worker_count());
    const auto leaves = [&is_leaving](int c) {
      return !is_leaving.empty() && is_leaving[static_cast<std::size_t>(c)];
    };
    std::vector<int> chosen;
    std::vector<char> is_taken(holders.size(), 0);
    // Greedy by what is still missing. Not always the smallest cover, but holders are whole stages
    // of one former plan, for which it is.
    while (chosen.size() < seats) {
      std::int64_t best_gain = 0;
      std::size_t best = holders.size();
      for (std::size_t i = 0; i < holders.size(); ++i) {
        if (is_taken[i] != 0 || leaves(holders[i].candidate)) continue;
        std::int64_t gain = 0;
        for (std::size_t t = 0; t < covered.size(); ++t) {
          if (covered[t] == 0 && holders[i].tensors[t] != 0) gain += size(static_cast<int>(t));
        }
        if (gain > best_gain) {
          best_gain = gain;
          best = i;
        }
      }
      if (best == holders.size()) break;
      is_taken[best] = 1;
      chosen.push_back(holders[best].candidate);
      for (std::size_t t = 0; t < covered.size(); ++t) covered[t] |= holders[best].tensors[t];
    }
    // Other holders before those who would need everything.
    for (std::size_t i = 0; i < holders.size() && chosen.size() < seats; ++i) {
      if (is_taken[i] == 0 && !leaves(holders[i].candidate)) chosen.push_back(holders[i].candidate);
    }
    std::vector<int> rest(candidates_.size());
    std::iota(rest.begin(), rest.end(), 0);
    std::sort(rest.begin(), rest.end(), [this](int a, int b) {
      return candidates_[static_cast<std::size_t>(a)].worker <
             candidates_[static_cast<std::size_t>(b)].worker;
    });
    for (const int c : rest) {
      if (chosen.size() == seats) break;
      if (!leaves(c) && std::find(chosen.begin(), chosen.end(), c) == chosen.end())
        chosen.push_back(c);
    }
    if (chosen.size() < seats) return std::nullopt;
    return chosen;
  }

  /// Each to the seat of which, with the copies kept there, it holds the most.
  std::vector<int> sit(const std::vector<int>& chosen,
                       const std::map<int, const holder*>& held) const {
    // (elements held, worker, kind of seat, candidate): most first, then by id.
    std::vector<std::tuple<std::int64_t, worker_id, int, int>> wishes;
    for (const int c : chosen) {
      const worker_id worker = candidates_[static_cast<std::size_t>(c)].worker;
      for (int kind = 0; kind < seat_kinds(); ++kind) {
        std::int64_t overlap = 0;
        if (const auto h = held.find(c); h != held.end()) {
          for (const int t : wants_[static_cast<std::size_t>(kind)]) {
            if (h->second->tensors[static_cast<std::size_t>(t)] != 0) overlap += size(t);
          }
        }
        wishes.emplace_back(-overlap, worker, kind, c);
      }
    }
    std::sort(wishes.begin(), wishes.end());
    std::vector<int> by_rank(static_cast<std::size_t>(shape_.worker_count()), -1);
    std::vector<int> next(by_rank.size());  // free rank of each kind
    std::iota(next.begin(), next.end(), 0);
    std::set<int> seated;
    for (const auto& [overlap, worker, kind, c] : wishes) {
      int& rank = next[static_cast<std::size_t>(kind)];
      if (rank >= shape_.worker_count() || seated.count(c) != 0) continue;
      by_rank[static_cast<std::size_t>(rank)] = c;
      rank += seat_kinds();
      seated.insert(c);
    }
    return by_rank;
  }

  /// What the holders of the seats lack; from_rank is a place among the givers.
  std::vector<transfer_record> transfers(const std::vector<int>& by_rank,
                                         const std::vector<int>& givers,
                                         const std::map<int, const holder*>& held) const {
    std::vector<transfer_record> list;
    std::vector<std::int64_t> sent(givers.size(), 0);
    const auto holds = [&](int candidate, int tensor) {
      const auto h = held.find(candidate);
      return h != held.end() && h->second->tensors[static_cast<std::size_t>(tensor)] != 0;
    };
    std::vector<std::string> hosts;
    for (const int c : by_rank) hosts.push_back(candidates_[static_cast<std::size_t>(c)].link_host);
    for (std::size_t to = 0; to < by_rank.size(); ++to) {
      std::vector<int> tensors = needs(static_cast<int>(to), hosts);
      const std::size_t whole_count = tensors.size();
      // A sharded optimizer: the rest of the stage is computed with, too, but has no moments here.
      // Brought even to who had it, since a loss may have come between the owner's update and its
      // arrival.
      for (const int tensor : stages_[to % static_cast<std::size_t>(shape_.stage_count)]) {
        if (std::find(tensors.begin(), tensors.end(), tensor) == tensors.end())
          tensors.push_back(tensor);
      }
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        const int tensor = tensors[i];
        if (holds(by_rank[to], tensor)) continue;
        // The least busy sender, so that one survivor does not feed all joiners alone.
        std::size_t from = givers.size();
        for (std::size_t i = 0; i < givers.size(); ++i) {
          if (holds(givers[i], tensor) && (from == givers.size() || sent[i] < sent[from])) from = i;
        }
        invariant(from < givers.size(), "the members that were chosen hold every tensor");
        const bool is_parameter_only = i >= whole_count;
        sent[from] += is_parameter_only ? size(tensor) / 3 : size(tensor);
        list.push_back({sizes_[static_cast<std::size_t>(tensor)].name, static_cast<int>(from),
                        static_cast<int>(to), is_parameter_only});
      }
    }
    return list;
  }

  const job_spec& spec_;
  std::vector<tensor_size> sizes_;
  std::map<std::string, int> indices_;
  std::vector<std::vector<int>> stages_, wants_;
  const layout& shape_;
  const std::vector<candidate>& candidates_;
};

}  // namespace

std::optional<live_choice> choose_live(const job_spec& spec, const layout& shape,
                                       const std::vector<candidate>& candidates,
                                       std::uint64_t step_min) {
  std::set<stand> stands;
  for (const candidate& c : candidates) {
    if (c.answer.has_state && c.answer.step >= step_min) {
      stands.insert({c.answer.step, c.answer.chain});
    }
  }
  const chooser choose(spec, shape, candidates);
  for (auto at = stands.rbegin(); at != stands.rend(); ++at) {
    if (auto choice = choose.choose(*at)) return choice;
  }
  return std::nullopt;
}

std::optional<feed_choice> choose_feed(const job_spec& spec, const layout& shape,
                                       const std::vector<candidate>& candidates,
                                       const std::vector<bool>& is_leaving) {
  for (const candidate& c : candidates) {
    if (!c.answer.has_state) continue;
    return chooser(spec, shape, candidates)
        .choose_for_feed({c.answer.step, c.answer.chain}, is_leaving);
  }
  return std::nullopt;
}

std::vector<int> choose_fresh(const layout& shape, const std::vector<candidate>& candidates) {
  std::vector<int> by_rank(candidates.size());
  std::iota(by_rank.begin(), by_rank.end(), 0);
  std::sort(by_rank.begin(), by_rank.end(), [&candidates](int a, int b) {
    return candidates[static_cast<std::size_t>(a)].worker <
           candidates[static_cast<std::size_t>(b)].worker;
  });
  by_rank.resize(static_cast<std::size_t>(shape.worker_count()));
  return by_rank;
}

}  // namespace stagecoach
