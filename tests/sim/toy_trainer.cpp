// A trainer without arithmetic: prepares, loads, runs, votes and saves as the real one does.
#include <cmath>

#include "model/copies.hpp"
#include "model/layer_shares.hpp"
#include "model/tensor_names.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

void cluster::to_trainer(const process_ptr& p, const to_worker& message) {
  toy_trainer& t = p->trainer;
  if (p->is_hung) {
    // Commands queue; those that end a step cancel its links at once, from another thread.
    if (std::holds_alternative<prepare>(message) || std::holds_alternative<stop_stage>(message))
      close_links(p);
    p->after_hang.push_back([this, p, message] { to_trainer(p, message); });
    return;
  }
  if (const auto* x = std::get_if<prepare>(&message)) {
    const std::uint64_t epoch = ++t.epoch;
    close_links(p);
    t.now = toy_trainer::doing::nothing;
    // A receiver gets what is on its way, up to the step at which all hold.
    every(0, 10 * ms, [this, p, epoch, x = *x, until = now_ + 1500 * ms] {
      const toy_trainer& u = p->trainer;
      if (!p->is_alive || u.epoch != epoch) return false;
      if (p->is_frozen) return true;
      const auto& f = u.copying;
      const bool waits = f && f->order.job == x.job && !f->senders.empty() && !f->is_broken &&
                         f->step < x.wait_step && now_ < until;
      if (!waits) answer_prepare(p, x);
      return waits;
    });
  } else if (const auto* c = std::get_if<commit>(&message)) {
    load(p, *c);
  } else if (std::holds_alternative<run_stage>(message)) {
    if (t.now == toy_trainer::doing::ready) run_trainer(p);
  } else if (const auto* o = std::get_if<give_order>(&message)) {
    if (t.rank == 0) t.orders.push_back(*o);
  } else if (std::holds_alternative<resume_stage>(message)) {
    if (t.now == toy_trainer::doing::held) run_trainer(p);
  } else if (const auto* f = std::get_if<feed>(&message)) {
    open_feed(p, *f);
  } else if (const auto* e = std::get_if<stop_feed>(&message)) {
    if (t.copying && t.copying->order.request == e->request) close_feed(p);
  } else if (const auto* s = std::get_if<stop_stage>(&message)) {
    if (t.copying && t.copying->order.job == s->job) close_feed(p);
    const bool is_loading = t.now == toy_trainer::doing::loading;  // shape: of the plan before
    if (value((is_loading ? t.order.shape : t.shape).job) != s->job) return;
    check_drop(p, s->reason.c_str());
    close_links(p);
    const std::uint64_t epoch = t.epoch + 1;
    t = toy_trainer{};
    t.epoch = epoch;
  }
}

void cluster::answer_prepare(const process_ptr& p, const prepare& x) {
  toy_trainer& t = p->trainer;
  take_fed(p, x.job);
  prepared answer;
  answer.job = x.job;
  answer.number = x.number;
  if (t.has_state && value(t.shape.job) == x.job) {
    answer.has_state = true;
    answer.step = t.step;
    answer.chain = t.chain;
    for (const auto& [name, v] : t.weights) answer.tensors.push_back(name);
    answer.last_vote = t.last_vote;
    answer.has_pending = t.has_pending;
  }
  answers_[{x.job, x.number, p->id}] = answer;
  emit(p, answer);
}

/// The newest state that the vote decided, in place.
void cluster::forward(toy_trainer& t, const vote_result& vote) {
  for (auto& [name, v] : t.weights) v = mix(v, vote.step);
  t.step = vote.step;
  t.chain = vote.chain;
  t.last_vote = vote;
  t.has_pending = t.is_computed = false;
  std::erase_if(t.copy_gradients, [&t](const auto& g) { return g.first <= t.step; });
  while (!t.recent.empty() && t.recent.back().step >= vote.step) t.recent.pop_back();
  step_report r;
  r.step = vote.step;
  r.chain = vote.chain;
  t.recent.push_back(r);
  check_state(t);
}

void cluster::load(const process_ptr& p, const commit& c) {
  toy_trainer& t = p->trainer;
  const std::uint64_t job = value(c.shape.job), number = c.shape.generation;
  int rank = -1;
  for (std::size_t i = 0; i < c.shape.members.size(); ++i) {
    if (c.shape.members[i].process == p->id) rank = static_cast<int>(i);
  }
  if (rank < 0) return violate("{} got a plan in which it has no place", p->name);
  if (!c.decided_by.empty()) check_deputy(p, c);
  const auto [seat, is_new] =
      seats_.emplace(std::tuple(job, number, plan_hash(c.shape), rank), p->id);
  if (!is_new && seat->second != p->id)
    violate("two workers hold rank {} of generation {}", rank, number);

  const std::uint64_t epoch = ++t.epoch;
  if (t.has_state && value(t.shape.job) != job) {
    check_drop(p, "works for another job");
    t.has_state = false;
    t.recent.clear();
  }
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
  const auto stage = static_cast<std::size_t>(c.shape.stage_of(t.rank));
  const int replicas = c.shape.shape.replica_count;
  const std::vector<tensor_size> all = all_tensor_sizes(c.spec.model);
  // With a sharded optimizer its share alone: parameters without moments are nothing to go on with.
  for (const int i :
       kept_moments(c.spec, c.shape.shape.unit_cuts[stage], c.shape.shape.unit_cuts[stage + 1],
                    c.shape.replica_of(t.rank), replicas)) {
    const std::string& name = all[static_cast<std::size_t>(i)].name;
    const auto v = have.find(name);
    if (v == have.end())
      return violate("rank {} has nobody to give it {} at step {}", t.rank, name, c.step);
    if (v->second != truth_of(job).at[c.step].at(name))
      violate("{} loaded for step {} has other bits", name, c.step);
    mine[name] = v->second;
  }
  values counted = mine;
  if (stage != 0) counted.erase("wte.weight");
  for (const kept_copy& copy : copies_kept(c.spec, c.shape.shape, hosts_of(c.shape), t.rank)) {
    for (const int i : copy.tensors) {
      const std::string& name = all[static_cast<std::size_t>(i)].name;
      const auto v = have.find(name);
      if (v == have.end())
        return violate("rank {} has nobody to give it a copy of {}", t.rank, name);
      if (v->second != truth_of(job).at[c.step].at(name))
        violate("the copy of {} loaded for step {} has other bits", name, c.step);
      mine[name] = v->second;
    }
  }
  // The old state goes only now: a prepare during the load finds it.
  t.weights = std::move(mine);
  t.has_state = true;
  t.step = c.step;
  t.chain = c.chain;
  if (t.last_vote && t.last_vote->step != c.step) t.last_vote.reset();
  t.has_pending = t.is_computed = false;
  t.copy_gradients.clear();
  t.ballots.clear();
  t.orders.clear();
  close_feed(p);
  t.now = toy_trainer::doing::ready;
  ready_[{job, t.hash}].insert(t.rank);
  emit(p, ready{job, c.shape.generation, t.hash, c.step,
                is_sharded(c.spec, replicas) ? "" : hash_of(counted)});
  if (c.retell_rank == t.rank) retell(p, c.retell_after);
}

/// Every member keeps its newest steps: another tells those that rank 0 had not told when it died.
void cluster::retell(const process_ptr& p, std::uint64_t after) {
  const toy_trainer& t = p->trainer;
  progress again{value(t.shape.job), t.shape.generation, t.hash, {}};
  for (const step_report& r : t.recent) {
    if (r.step > after && r.step <= t.step) again.steps.push_back(r);
  }
  if (!again.steps.empty()) emit(p, again);
}

void cluster::run_trainer(const process_ptr& p) {
  toy_trainer& t = p->trainer;
  t.now = toy_trainer::doing::running;
  ran_.emplace(value(t.shape.job), t.shape.generation);
  const std::set<int>& ready = ready_[{value(t.shape.job), t.hash}];
  if (ready.size() != t.shape.members.size()) {
    violate("{} runs in generation {} when {} of {} members are ready", p->name, t.shape.generation,
            ready.size(), t.shape.members.size());
  }
  if (t.save_first) {
    t.save_first = false;
    save_part(p, t.step == static_cast<std::uint64_t>(t.spec.stop_steps));
  }
  if (t.step >= static_cast<std::uint64_t>(t.spec.stop_steps)) {
    t.now = toy_trainer::doing::finished;
    emit(p, finished{value(t.shape.job), t.shape.generation, t.step});
    return;
  }
  begin_step(p);
}

/// Of a step in which it has all leaves it takes step_ms at most. As a trainer, only once it has
/// computed.
us cluster::leaf_us(const process_ptr& p) {
  const toy_trainer& t = p->trainer;
  if (t.now != toy_trainer::doing::running || t.step <= t.order.step) return 0;
  return std::max<us>(
      1, std::llround(static_cast<double>(p->step_ms * ms) * stage_share(t.shape, t.spec, t.rank) /
                      static_cast<double>(t.spec.batch.leaf_count)));
}

us cluster::layer_us(const process_ptr& p) {
  const toy_trainer& t = p->trainer;
  const int stage = t.shape.stage_of(t.rank);
  if (leaf_us(p) == 0 ||
      layers_of(t.spec.model, t.shape.shape.unit_cuts)[static_cast<std::size_t>(stage)] == 0)
    return 0;
  plan one_layer = t.shape;
  one_layer.shape.unit_cuts[static_cast<std::size_t>(stage)] = 1;
  one_layer.shape.unit_cuts[static_cast<std::size_t>(stage) + 1] = 2;
  return std::max<us>(1, std::llround(static_cast<double>(p->step_ms * ms) *
                                      stage_share(one_layer, t.spec, t.rank) /
                                      static_cast<double>(t.spec.batch.leaf_count)));
}

/// Of a step's work, its stage's part times the count of stages: about 1, whatever the layout.
double cluster::stage_share(const plan& shape, const job_spec& spec, int rank) const {
  const auto stage = static_cast<std::size_t>(shape.stage_of(rank));
  double mine = 0, all = 0;
  for (int unit = 0; unit < unit_count(spec.model); ++unit) {
    const double cost = unit_cost(spec.model, spec.batch.sequence_tokens, unit);
    all += cost;
    if (unit >= shape.shape.unit_cuts[stage] && unit < shape.shape.unit_cuts[stage + 1])
      mine += cost;
  }
  return shape.shape.stage_count * mine / all;
}

void cluster::begin_step(const process_ptr& p) {
  const std::uint64_t epoch = p->trainer.epoch;
  const plan& shape = p->trainer.shape;
  const auto replica = static_cast<std::size_t>(shape.replica_of(p->trainer.rank));
  const int leaves = shape.shape.leaf_cuts[replica + 1] - shape.shape.leaf_cuts[replica];
  const us most = std::llround(static_cast<double>(p->step_ms * ms * leaves) *
                               stage_share(shape, p->trainer.spec, p->trainer.rank) /
                               static_cast<double>(p->trainer.spec.batch.leaf_count));
  on(p, delay(most / 2, most), [this, p, epoch] { end_compute(p, epoch); });
}

void cluster::end_compute(const process_ptr& p, std::uint64_t epoch) {
  if (p->is_hung) return p->after_hang.push_back([this, p, epoch] { end_compute(p, epoch); });
  toy_trainer& t = p->trainer;
  if (t.epoch != epoch || t.now != toy_trainer::doing::running) return;
  for (int r = 0; r < static_cast<int>(t.shape.members.size()); ++r) {
    if (r != t.rank && !share_links(p, peer_of(t, r))) return;  // the step is broken
  }
  t.is_computed = true;
  give_to_copies(p);
  consider_vote(p);
}

/// The reduced gradient of its stage to who keeps copies of it.
void cluster::give_to_copies(const process_ptr& p) {
  const toy_trainer& t = p->trainer;
  const auto kept = copied_ranks(t.spec.elasticity.copies, t.shape.shape, hosts_of(t.shape));
  for (int r = 0; r < static_cast<int>(kept.size()); ++r) {
    const auto& owners = kept[static_cast<std::size_t>(r)];
    if (std::find(owners.begin(), owners.end(), t.rank) == owners.end()) continue;
    const process_ptr holder = peer_of(t, r);
    on(holder, delay(100, 10 * ms),
       [this, holder, rank = t.rank, hash = t.hash, step = t.step + 1] {
         toy_trainer& h = holder->trainer;
         if (h.hash != hash || !h.are_links_open) return;
         h.copy_gradients[step].insert(rank);
         consider_vote(holder);
       });
  }
}

void cluster::consider_vote(const process_ptr& p) {
  toy_trainer& t = p->trainer;
  if (!t.is_computed || t.has_pending || t.now != toy_trainer::doing::running) return;
  const auto kept = copied_ranks(t.spec.elasticity.copies, t.shape.shape, hosts_of(t.shape));
  if (t.copy_gradients[t.step + 1].size() < kept[static_cast<std::size_t>(t.rank)].size()) return;
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
  for (const give_order& o : z.orders) {
    vote.orders |= order_bit(static_cast<order_kind>(o.kind)) | o.with;
    vote.order_ids.push_back(o.order);
  }
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
  applied_[job] = std::max(applied_[job], t.step);
  give_to_feed(p, vote);
  if (t.rank == 0) emit(p, progress{job, number, t.hash, {t.recent.back()}});
  const bool is_final = t.step == static_cast<std::uint64_t>(t.spec.stop_steps);
  if ((vote.orders & order_bit(order_kind::save)) != 0 || is_final) save_part(p, is_final);
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

void cluster::save_part(const process_ptr& p, bool is_final) {
  toy_trainer& t = p->trainer;
  // Each tensor of the stage is saved by one replica; the head's copy of wte by the embedding's
  // stage.
  const int stage = t.shape.stage_of(t.rank), replica = t.shape.replica_of(t.rank);
  const int replicas = t.shape.shape.replica_count;
  std::vector<std::vector<std::string>> shares(static_cast<std::size_t>(replicas));
  int parts = 0;
  const std::vector<tensor_size> all = all_tensor_sizes(t.spec.model);
  for (int s = 0; s < t.shape.shape.stage_count; ++s) {
    const auto tensors =
        stage_tensor_indices(t.spec.model, t.shape.shape.unit_cuts[static_cast<std::size_t>(s)],
                             t.shape.shape.unit_cuts[static_cast<std::size_t>(s) + 1]);
    const std::vector<int> owners = moment_owners(t.spec.model, tensors, replicas);
    for (int r = 0; r < replicas; ++r) {
      std::vector<std::string> share;
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (s != 0 && tensors[i] == 0) continue;
        const int owner = is_sharded(t.spec, replicas) ? owners[i] : static_cast<int>(i) % replicas;
        if (owner == r) share.push_back(all[static_cast<std::size_t>(tensors[i])].name);
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
  // With the plan: both sides of a cut may use one number.
  x.part.file = fmt::format("g{}-s{}-r{}-p{:x}", x.generation, x.step, t.rank, t.hash);
  values weights;
  for (const std::string& name : mine) weights[name] = t.weights.at(name);
  x.part.weights_hash = hash_of(weights);
  write_part(p, x, weights);
}

void cluster::write_part(const process_ptr& p, part_saved x, const values& weights) {
  on(p, write_time(400 * ms), [this, p, x, weights]() mutable {
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

}  // namespace stagecoach::sim
