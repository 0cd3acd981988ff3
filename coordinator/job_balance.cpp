// job_machine, fifth part: slow and fast workers. Leaves move to the replica, and layers to the
// stage, where they are done sooner: a change at a step boundary, the same members, the same bits.
//
//   leaves: hold --> prepare(n + 1), with nothing to transfer
//   layers: feed (job_feed.cpp) --all keep up--> hold --> prepare(n + 1), with nothing left to move
//
// When a move pays is model/leaf_shares.hpp's and model/layer_shares.hpp's business. One at a time:
// leaves first, since they move no state.
#include <algorithm>
#include <cmath>

#include "coordinator/job_machine.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach {

namespace {

std::string listed(const std::vector<int>& numbers) {
  std::string words;
  for (const int n : numbers) words += fmt::format("{}{}", words.empty() ? "" : ", ", n);
  return words;
}

/// A replica's pace is its slowest stage's.
std::vector<replica_pace> replica_paces(const layout& shape, const std::vector<seat_pace>& seats) {
  std::vector<replica_pace> paces(static_cast<std::size_t>(shape.replica_count));
  for (std::size_t r = 0; r < paces.size(); ++r)
    paces[r].leaves = shape.leaf_cuts[r + 1] - shape.leaf_cuts[r];
  for (std::size_t rank = 0; rank < seats.size(); ++rank) {
    double& slowest = paces[rank / static_cast<std::size_t>(shape.stage_count)].leaf_us;
    slowest = std::max(slowest, static_cast<double>(seats[rank].leaf_us));
  }
  return paces;
}

}  // namespace

void job_machine::start_balancing() {
  std::vector<seat_pace> seats;
  bool is_known = is_whole();
  for (const member* m : planned()) {
    is_known = is_known && m->is_connected && m->pulse && m->pulse->leaf_us > 0;
    if (is_known) seats.push_back({m->pulse->leaf_us, m->pulse->layer_us, m->facts.memory_bytes});
  }
  if (!is_known) seats.clear();
  const layout& shape = generation_->shape.shape;
  const auto paces = is_known ? replica_paces(shape, seats) : std::vector<replica_pace>{};
  const auto leaves = watch_.look(now_ms_, reported_step_, paces);
  const auto layers = layer_watch_.look(now_ms_, reported_step_, record_.spec, shape, seats);
  if (!leaves && !layers) return;

  generation_->leaf_us.clear();  // kept with the generation that they make
  generation_->layer_us.clear();
  for (const seat_pace& s : seats) {
    generation_->leaf_us.push_back(s.leaf_us);
    generation_->layer_us.push_back(s.layer_us);
  }
  if (leaves) return start_leaf_move(*leaves, paces);
  plan_layer_move(*layers);
}

void job_machine::start_leaf_move(const leaf_change& change,
                                  const std::vector<replica_pace>& paces) {
  std::vector<int> before;
  for (const replica_pace& p : paces) before.push_back(p.leaves);
  const double slowest_us = paces[static_cast<std::size_t>(change.replica)].leaf_us;
  std::string who;
  for (const member* m : planned()) {
    const bool is_the_one = generation_->shape.replica_of(m->rank) == change.replica &&
                            static_cast<double>(m->pulse->leaf_us) == slowest_us;
    if (is_the_one && who.empty()) who = m->facts.name;
  }
  balance_ = fmt::format(
      "at step {} {} took {:.1f} ms for a leaf, {:.2f} x its peers' median: leaves {} became {}, "
      "{:.0f} % less time to compute a step by that",
      reported_step_, who, slowest_us / 1e3, change.ratio, listed(before), listed(change.leaves),
      change.gain * 100);
  note("leaves_moved", balance_,
       {{"worker", who},
        {"ratio", fmt::format("{:.3f}", change.ratio)},
        {"gain", fmt::format("{:.3f}", change.gain)},
        {"from", listed(before)},
        {"to", listed(change.leaves)}});
  start_hold("balance", {order_kind::hold});
}

void job_machine::plan_layer_move(const layer_change& change) {
  const model_spec& model = record_.spec.model;
  const member& m = *planned()[static_cast<std::size_t>(change.rank)];
  const std::string before = listed(layers_of(model, generation_->shape.shape.unit_cuts));
  const std::string after = listed(layers_of(model, change.unit_cuts));
  layer_move_.emplace();
  layer_move_->unit_cuts = change.unit_cuts;
  layer_move_->failed_feeds = failed_feeds_;
  layer_move_->text = fmt::format(
      "at step {} {} took {:.2f} x its peers' median time for a layer: layers {} became {}, {:.0f} "
      "% less time of the slowest stage by that",
      reported_step_, m.facts.name, change.ratio, before, after, change.gain * 100);
  layer_move_->fields = {{"worker", m.facts.name},
                         {"ratio", fmt::format("{:.3f}", change.ratio)},
                         {"gain", fmt::format("{:.3f}", change.gain)},
                         {"from", before},
                         {"to", after}};
  (void)move_layers();
}

/// True: layers are on their way.
bool job_machine::move_layers() {
  if (!layer_move_) return false;
  const int failed_before = layer_move_->failed_feeds;
  const bool is_prepared =
      failed_feeds_ == failed_before && is_prepared_for_change("layers");  // which may drop it
  const bool is_wanted = layer_move_ && failed_feeds_ == failed_before;
  if (is_wanted && !is_prepared) return true;
  // A move is no need: where its copies fail, the run is left alone until another one pays.
  // Moments that replicas share can't be fed and are copied while all hold.
  const bool can_move =
      is_wanted && (feed_ || is_sharded(record_.spec, generation_->shape.shape.replica_count));
  if (!can_move) {
    layer_move_.reset();
    layer_watch_.restart(now_ms_);
    return false;
  }
  layer_balance_ = layer_move_->text;
  note("layers_moved", layer_balance_, layer_move_->fields);
  start_hold("layers", {order_kind::hold});
  return true;
}

// ---- the next plan ----
/// As the newest generation knows them; none: not all of them, or their times.
std::optional<pace_table> job_machine::paces_of(const std::vector<worker_id>& by_rank) const {
  if (!generation_) return std::nullopt;
  const auto& former = generation_->shape.members;
  const auto& leaf_us = generation_->leaf_us;
  const auto& layer_us = generation_->layer_us;
  if (leaf_us.size() != former.size()) return std::nullopt;
  std::vector<seat_pace> seats;
  for (std::size_t rank = 0; rank < former.size(); ++rank)
    seats.push_back({leaf_us[rank], layer_us.size() == former.size() ? layer_us[rank] : 0});
  const auto known = read_paces(record_.spec, generation_->shape.shape, seats);
  if (!known) return std::nullopt;
  pace_table table;
  table.weights = known->weights;
  for (const worker_id worker : by_rank) {
    const auto seat = std::find_if(former.begin(), former.end(),
                                   [worker](const auto& m) { return m.worker == worker; });
    if (seat == former.end()) return std::nullopt;
    table.layer_us.push_back(known->layer_us[static_cast<std::size_t>(seat - former.begin())]);
    const auto here = members_.find(worker);
    table.memory_bytes.push_back(here == members_.end() ? 0 : here->second.facts.memory_bytes);
  }
  return table;
}

/// Each in its former stage.
bool job_machine::sits_as_before(const std::vector<worker_id>& by_rank) const {
  const plan& former = generation_->shape;
  if (by_rank.size() != former.members.size()) return false;
  for (std::size_t rank = 0; rank < by_rank.size(); ++rank) {
    const auto seat = std::find_if(former.members.begin(), former.members.end(),
                                   [&](const plan_member& m) { return m.worker == by_rank[rank]; });
    const int stage = former.stage_of(static_cast<int>(rank));
    if (seat == former.members.end() ||
        former.stage_of(static_cast<int>(seat - former.members.begin())) != stage)
      return false;
  }
  return true;
}

/// choose_layout, its cuts by what is known of those who would sit there. The same workers in the
/// same stages keep their cuts, unless these are being moved: for a change the paces must be
/// steadily apart, and what moves is to be fed. Somebody new is measured first.
result<layout> job_machine::choose_shape(int count, const seating& seats_of) const {
  result<layout> shape = choose_layout(record_.spec, count);
  if (!shape || !generation_ || shape->stage_count < 2 || !record_.spec.parallelism.layers.empty())
    return shape;
  const layout& former = generation_->shape.shape;
  layout other = *shape;
  if (shape->stage_count == former.stage_count && shape->replica_count == former.replica_count) {
    for (const auto& cuts :
         {layer_move_ ? layer_move_->unit_cuts : former.unit_cuts, former.unit_cuts}) {
      other.unit_cuts = cuts;
      if (sits_as_before(seats_of(other))) return other;
    }
  }
  const std::vector<worker_id> seats = seats_of(*shape);
  const auto paces = seats.empty() ? std::nullopt : paces_of(seats);
  if (!paces) return shape;
  if (const auto cuts = choose_cuts(record_.spec, *shape, *paces)) {
    other.unit_cuts = *cuts;
    if (seats_of(other) == seats) return other;  // else they were chosen for somebody else
  }
  return shape;
}

/// The shares of leaves for those who sit in this plan, by the times of the newest one; answers
/// these times by the new ranks. Empty: somebody is new, all begin with even shares and are
/// measured.
job_machine::times job_machine::weigh_leaves(plan& p) const {
  std::vector<worker_id> by_rank;
  for (const plan_member& m : p.members) by_rank.push_back(m.worker);
  const auto paces = paces_of(by_rank);
  if (!paces) return {};
  const plan& former = generation_->shape;
  times known;
  std::vector<double> slowest(static_cast<std::size_t>(p.shape.replica_count), 0);
  for (int rank = 0; rank < p.shape.worker_count(); ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    int seat = 0;
    while (former.members[static_cast<std::size_t>(seat)].worker != by_rank[at]) ++seat;
    const bool is_measured =
        former.shape.unit_cuts == p.shape.unit_cuts && former.stage_of(seat) == p.stage_of(rank);
    const double predicted_us = predicted_leaf_us(*paces, p.shape, rank);
    known.leaf_us.push_back(is_measured ? generation_->leaf_us[static_cast<std::size_t>(seat)]
                                        : std::max<std::int64_t>(1, std::llround(predicted_us)));
    known.layer_us.push_back(std::llround(paces->layer_us[at]));
    double& us = slowest[static_cast<std::size_t>(p.replica_of(rank))];
    us = std::max(us, static_cast<double>(known.leaf_us.back()));
  }
  p.shape.leaf_cuts = cuts_of(share_leaves(record_.spec.batch.leaf_count, slowest));
  return known;
}

}  // namespace stagecoach
