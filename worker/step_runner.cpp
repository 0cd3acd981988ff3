#include "worker/step_runner.hpp"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <tuple>

#include "model/copies.hpp"
#include "model/data_order.hpp"
#include "model/leaf_tree.hpp"
#include "model/tensor_names.hpp"
#include "worker/vote.hpp"

namespace stagecoach {
namespace {

using clock = std::chrono::steady_clock;

class stopwatch {
 public:
  explicit stopwatch(std::int64_t& total) : total_(total), begin_(clock::now()) {}
  ~stopwatch() {
    total_ += std::chrono::duration_cast<std::chrono::microseconds>(clock::now() - begin_).count();
  }

 private:
  std::int64_t& total_;
  clock::time_point begin_;
};

std::int64_t thread_cpu_ns() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

/// Appends itself to `spans`, if there are any, when it ends.
class recorded_span {
 public:
  recorded_span(std::vector<instruction_span>* spans, const instruction& what) : spans_(spans) {
    if (spans_ == nullptr) return;
    span_.what = what;
    span_.begin_ns = clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    span_.cpu_ns = -thread_cpu_ns();
  }
  recorded_span(const recorded_span&) = delete;
  ~recorded_span() {
    if (spans_ == nullptr) return;
    span_.cpu_ns += thread_cpu_ns();
    span_.end_ns = clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    spans_->push_back(span_);
  }

 private:
  std::vector<instruction_span>* spans_;
  instruction_span span_;
};

std::span<const std::byte> bytes_of(const float* p, std::int64_t count) {
  return {reinterpret_cast<const std::byte*>(p), static_cast<std::size_t>(count) * sizeof(float)};
}
std::span<std::byte> writable(float* p, std::int64_t count) {
  return {reinterpret_cast<std::byte*>(p), static_cast<std::size_t>(count) * sizeof(float)};
}

constexpr std::uint64_t evaluation_number = 1ull << 40;  // keeps its frames apart from a step's
constexpr std::size_t ballot_bytes_max = 16 << 20;

// Range k of a flat gradient buffer among n owners; borders on multiples of 16 floats (64 bytes).
std::pair<std::int64_t, std::int64_t> range_of(std::int64_t count, int k, int n) {
  const std::int64_t units = (count + 15) / 16;
  const auto border = [&](int i) { return std::min(count, units * i / n * 16); };
  return {border(k), border(k + 1)};
}

const gradient_slot* find_slot(const stage& s, const std::string& name) {
  for (const gradient_slot& slot : s.gradient_layout())
    if (slot.name == name) return &slot;
  return nullptr;
}

}  // namespace

result<int> step_runner::slots(const job_spec& spec, const plan& shape, int rank) {
  const int replica = shape.replica_of(rank);
  const std::int64_t per_leaf = spec.batch.microbatch_count() / spec.batch.leaf_count;
  const int microbatches = static_cast<int>(
      per_leaf * (shape.shape.leaf_cuts[replica + 1] - shape.shape.leaf_cuts[replica]));
  auto table = make_schedule(shape.shape.schedule, shape.shape.stage_count, microbatches);
  if (!table) return table.err();
  auto facts = check_schedule(*table, microbatches);
  if (!facts) return facts.err();
  return std::max(1, facts->live_microbatches_max[shape.stage_of(rank)]);
}

step_runner::step_runner(const job_spec& spec, const plan& shape, int rank, stage& model,
                         link_set& links, backend& device, token_reader train, token_reader valid,
                         shadow_state* copies)
    : spec_(spec),
      plan_(shape),
      rank_(rank),
      stage_index_(shape.stage_of(rank)),
      replica_(shape.replica_of(rank)),
      stage_(model),
      links_(links),
      device_(device),
      train_(std::move(train)),
      valid_(std::move(valid)),
      copies_(copies) {
  const int replicas = shape.shape.replica_count;
  std::vector<std::vector<gradient_stretch>> shares(static_cast<std::size_t>(replicas));
  if (is_sharded(spec, replicas)) {
    std::vector<int> tensors;
    for (const tensor_info& t : stage_.tensors()) tensors.push_back(t.index);
    const std::vector<int> owners = moment_owners(spec.model, tensors, replicas);
    for (std::size_t i = 0; i < tensors.size(); ++i) owner_of_[tensors[i]] = owners[i];
    for (const gradient_slot& slot : stage_.gradient_layout()) {
      auto& own = shares[static_cast<std::size_t>(owner_of_.at(slot.tensor_index))];
      // Neighbours in the buffer become one; the few floats of padding between them travel too.
      if (!own.empty() && slot.offset - own.back().end < 16) {
        own.back().end = slot.offset + slot.count;
      } else {
        own.push_back({slot.offset, slot.offset + slot.count});
      }
    }
  } else {
    for (int k = 0; k < replicas; ++k) {
      const auto [begin, end] = range_of(stage_.gradient_count(), k, replicas);
      shares[static_cast<std::size_t>(k)].push_back({begin, end});
    }
  }
  if (replicas > 1) make_reduction(std::move(shares));
  leaf_first_ = shape.shape.leaf_cuts[replica_];
  leaf_last_ = shape.shape.leaf_cuts[replica_ + 1];
  per_leaf_ = spec.batch.microbatch_count() / spec.batch.leaf_count;
  microbatches_ = static_cast<int>(per_leaf_ * (leaf_last_ - leaf_first_));
  auto table = make_schedule(shape.shape.schedule, shape.shape.stage_count, microbatches_);
  invariant(table.has_value(), "a committed plan has a valid schedule");
  table_ = std::move((*table)[stage_index_]);
  auto live = slots(spec, shape, rank);
  invariant(live.has_value(), "a committed plan has a valid schedule");
  slot_count_ = *live;

  const std::size_t rows =
      static_cast<std::size_t>(spec.batch.micro_sequences * spec.batch.sequence_tokens);
  tokens_.resize(rows * slot_count_);
  targets_.resize(rows * slot_count_);
  samples_.resize(spec.batch.sequence_tokens + 1);
  const std::size_t boundary = static_cast<std::size_t>(stage_.boundary_count());
  if (stage_index_ > 0) input_.resize(boundary * slot_count_);
  if (stage_index_ > 0) gradient_out_.resize(boundary);
  if (stage_index_ + 1 < shape.shape.stage_count) {
    output_.resize(boundary);
    gradient_in_.resize(boundary);
  }
  losses_.resize(microbatches_);
  find_copies();
}

// Which stretch of whose gradient goes where: the tensors of a copy lie side by side in the owner's
// buffer, since at most the tied matrix, at its one or other end, is left out.
void step_runner::find_copies() {
  if (spec_.elasticity.copies == 0) return;
  const std::vector<std::string> hosts = hosts_of(plan_);
  const std::vector<tensor_info> all = all_tensors(spec_.model);
  for (int holder = 0; holder < static_cast<int>(plan_.members.size()); ++holder) {
    for (const kept_copy& copy : copies_kept(spec_, plan_.shape, hosts, holder)) {
      if (holder != rank_ && copy.owner != rank_) continue;
      const int s = plan_.stage_of(copy.owner);
      const auto slots = stage_gradient_layout(spec_.model, plan_.shape.unit_cuts[s],
                                               plan_.shape.unit_cuts[s + 1]);
      std::int64_t begin = -1, end = 0;
      std::vector<copy_tensor> tensors;
      for (const gradient_slot& slot : slots) {
        if (std::find(copy.tensors.begin(), copy.tensors.end(), slot.tensor_index) ==
            copy.tensors.end())
          continue;
        if (begin < 0) begin = slot.offset;
        end = slot.offset + slot.count;
        tensors.push_back({all[static_cast<std::size_t>(slot.tensor_index)], slot.offset});
      }
      if (copy.owner == rank_) copies_out_.push_back({holder, begin, end - begin});
      if (holder != rank_) continue;
      const auto base = static_cast<std::int64_t>(copy_gradients_.size());
      copies_in_.push_back({copy.owner, begin, end - begin});
      copy_gradients_.resize(copy_gradients_.size() + static_cast<std::size_t>(end - begin));
      for (copy_tensor& t : tensors) {
        t.offset += base - begin;
        copy_tensors_.push_back(std::move(t));
      }
    }
  }
  invariant(copy_tensors_.empty() || copies_ != nullptr, "who keeps copies has room for them");
}

result<void> step_runner::send_to_copies(std::uint64_t step) {
  for (const copy_stretch& out : copies_out_) {
    if (auto sent = links_.send(out.peer, {link_tag::copy_gradient, step, 0},
                                bytes_of(stack_.front() + out.begin, out.count));
        !sent)
      return sent;
  }
  return ok();
}

result<void> step_runner::receive_for_copies(std::uint64_t step) {
  stopwatch watch(times_.copy_us);
  std::int64_t at = 0;
  for (const copy_stretch& in : copies_in_) {
    if (auto got = links_.receive(in.peer, {link_tag::copy_gradient, step, 0},
                                  writable(copy_gradients_.data() + at, in.count));
        !got)
      return got;
    at += in.count;
  }
  return ok();
}

void step_runner::make_reduction(std::vector<std::vector<gradient_stretch>> shares) {
  reduction_shape of;
  of.replica = replica_;
  of.shares = std::move(shares);
  of.leaf_count = spec_.batch.leaf_count;
  of.is_exact = spec_.optimizer.exact;
  const int replicas = plan_.shape.replica_count;
  for (int r = 0; r < replicas; ++r) {
    of.ranks.push_back(plan_.rank_of(stage_index_, r));
    of.blocks.push_back(maximal_blocks(plan_.shape.leaf_cuts[r], plan_.shape.leaf_cuts[r + 1]));
    if (!of.is_exact) of.blocks.back().resize(1);
  }
  of.needs = [is_shared_out = !owner_of_.empty(), replicas, copies = spec_.elasticity.copies](
                 int from, int to) {
    return !is_shared_out || (to - from + replicas) % replicas <= copies;
  };
  reduction_.emplace(std::move(of), links_, device_);
}

step_runner::~step_runner() {
  for (float* p : owned_) device_.release(p);
}

std::int64_t step_runner::allocated_bytes() const {
  return static_cast<std::int64_t>(owned_.size()) * stage_.gradient_count() * 4 +
         static_cast<std::int64_t>(input_.size() + output_.size() + gradient_in_.size() +
                                   gradient_out_.size() + copy_gradients_.size()) *
             4;
}

float* step_runner::take_buffer() {
  if (free_.empty()) {
    owned_.push_back(device_.allocate(stage_.gradient_count()));
    return owned_.back();
  }
  float* p = free_.back();
  free_.pop_back();
  return p;
}

void step_runner::load_samples(std::uint64_t step, int microbatch) {
  const auto& batch = spec_.batch;
  const int slot = microbatch % slot_count_;
  const std::int64_t rows = batch.micro_sequences * batch.sequence_tokens;
  const std::int64_t global = leaf_first_ * per_leaf_ + microbatch;
  for (std::int64_t b = 0; b < batch.micro_sequences; ++b) {
    // Steps count from 1, positions from 0.
    const std::int64_t position = static_cast<std::int64_t>(step - 1) * batch.global_sequences +
                                  global * batch.micro_sequences + b;
    train_.read(
        sample_begin(position, train_.token_count, batch.sequence_tokens, spec_.data.shuffle_seed),
        batch.sequence_tokens + 1, samples_.data());
    const std::int64_t at = slot * rows + b * batch.sequence_tokens;
    std::copy_n(samples_.data(), batch.sequence_tokens, tokens_.data() + at);
    std::copy_n(samples_.data() + 1, batch.sequence_tokens, targets_.data() + at);
  }
}

result<void> step_runner::forward(const instruction& what) {
  const int slot = what.microbatch % slot_count_;
  const std::int64_t rows = spec_.batch.micro_sequences * spec_.batch.sequence_tokens;
  if (stage_.has_embedding() || stage_.has_head()) load_samples(step_, what.microbatch);
  const float* in = stage_index_ > 0 ? input_.data() + stage_.boundary_count() * slot : nullptr;
  float* out = output_.empty() ? nullptr : output_.data();
  stopwatch watch(times_.forward_us);
  losses_[what.microbatch] =
      stage_.forward(slot, in, tokens_.data() + slot * rows, targets_.data() + slot * rows, out);
  return ok();
}

result<void> step_runner::backward_input(const instruction& what) {
  stopwatch watch(times_.backward_input_us);
  const double tokens = static_cast<double>(spec_.batch.global_sequences) *
                        static_cast<double>(spec_.batch.sequence_tokens);
  stage_.backward_input(
      what.microbatch % slot_count_, gradient_in_.empty() ? nullptr : gradient_in_.data(),
      gradient_out_.empty() ? nullptr : gradient_out_.data(), static_cast<float>(1.0 / tokens));
  return ok();
}

void step_runner::backward_weight(const instruction& what) {
  stopwatch watch(times_.backward_weight_us);
  // In plain order all microbatches of a replica are one sum, whatever its leaves are.
  const std::int64_t run_length = spec_.optimizer.exact ? per_leaf_ : microbatches_;
  const bool is_first = what.microbatch % run_length == 0;
  const bool is_last = what.microbatch % run_length == run_length - 1;
  if (is_first) accumulating_ = take_buffer();
  stage_.backward_weight(what.microbatch % slot_count_, accumulating_, !is_first);
  if (!is_last) return;
  stack_.push_back(accumulating_);
  accumulating_ = nullptr;
  if (!spec_.optimizer.exact) return;
  const std::int64_t leaf = leaf_first_ + what.microbatch / per_leaf_;
  for (int i = merges_after_leaf(leaf_first_, leaf_last_, leaf); i > 0; --i) {
    float* right = stack_.back();
    stack_.pop_back();
    device_.add(stack_.back(), stack_.back(), right, stage_.gradient_count());
    free_.push_back(right);
  }
}

result<vote_result> step_runner::compute(std::uint64_t step, std::uint64_t chain,
                                         const order_source& orders) {
  times_ = {};
  step_ = step;
  pending_step_ = 0;
  // What an earlier, cancelled try left behind is garbage, this runner's or that of an older
  // generation.
  stage_.forget_microbatches();
  for (float* p : stack_) free_.push_back(p);
  stack_.clear();
  if (accumulating_ != nullptr) free_.push_back(accumulating_);
  accumulating_ = nullptr;

  for (const instruction& what : table_) {
    if (cancelled_.load(std::memory_order_relaxed))
      return error{errc::cancelled, "the step was dropped"};
    if (middle_ && &what == &table_[table_.size() / 2]) middle_(step);
    // The vote comes after the table; its span is the step's.
    const recorded_span span(what.what == op::step ? nullptr : spans_, what);
    if (auto done = carry_out(what, step); !done) return done.err();
    if (pulse_ != nullptr) pulse_->count();
  }
  times_.layers_us = stage_.layers_us();
  const recorded_span span(spans_, {op::step});
  return vote(step, chain, orders);
}

result<void> step_runner::carry_out(const instruction& what, std::uint64_t step) {
  const int previous = rank_ - 1, next = rank_ + 1;
  const auto number = static_cast<std::uint64_t>(what.microbatch);
  const std::int64_t boundary = stage_.boundary_count();
  switch (what.what) {
    case op::receive_activation: {
      stopwatch watch(times_.wait_us);
      return links_.receive(
          previous, {link_tag::activation, step, number},
          writable(input_.data() + boundary * (what.microbatch % slot_count_), boundary));
    }
    case op::forward:
      return forward(what);
    case op::send_activation:
      return links_.send(next, {link_tag::activation, step, number},
                         bytes_of(output_.data(), boundary));
    case op::receive_gradient: {
      stopwatch watch(times_.wait_us);
      return links_.receive(next, {link_tag::gradient, step, number},
                            writable(gradient_in_.data(), boundary));
    }
    case op::backward_input:
      return backward_input(what);
    case op::send_gradient:
      return links_.send(previous, {link_tag::gradient, step, number},
                         bytes_of(gradient_out_.data(), boundary));
    case op::backward_weight:
      backward_weight(what);
      return ok();
    case op::reduce:
      return reduce(step);
    case op::step:
      break;
  }
  return ok();
}

result<void> step_runner::reduce(std::uint64_t step) {
  stopwatch watch(times_.reduce_us);
  if (plan_.shape.replica_count > 1) {
    if (auto done = reduce_replicas(step); !done) return done;
  }
  invariant(stack_.size() == 1, "the leaf tree ends in one root");
  return tie_gradients(step);
}

/// Are the reduced gradient and the moments of a tensor at this replica?
bool step_runner::keeps(int tensor_index, int replica) const {
  const auto owner = owner_of_.find(tensor_index);
  if (owner == owner_of_.end()) return true;  // not sharded
  const int replicas = plan_.shape.replica_count;
  return (replica - owner->second + replicas) % replicas <= spec_.elasticity.copies;
}

result<void> step_runner::reduce_replicas(std::uint64_t step) {
  float* root = take_buffer();
  if (auto done = reduction_->run(step, stack_, root); !done) {
    free_.push_back(root);
    return done;
  }
  for (float* p : stack_) free_.push_back(p);
  stack_.assign(1, root);
  return ok();
}

result<void> step_runner::tie_gradients(std::uint64_t step) {
  const gradient_slot* embed = find_slot(stage_, "wte.weight@embed");
  const gradient_slot* head = find_slot(stage_, "wte.weight@head");
  if (embed == nullptr && head == nullptr) return ok();
  if (!keeps((embed != nullptr ? embed : head)->tensor_index, replica_)) return ok();
  float* root = stack_.front();
  // One fixed order of the two terms, head + embed, whoever computes it.
  if (embed != nullptr && head != nullptr) {
    device_.add(root + head->offset, root + head->offset, root + embed->offset, head->count);
    device_.copy(root + embed->offset, root + head->offset, head->count);
    return ok();
  }
  const int last = plan_.shape.stage_count - 1;
  const gradient_slot* have = embed != nullptr ? embed : head;
  const int partner = plan_.rank_of(embed != nullptr ? last : 0, replica_);
  const std::uint64_t mine = embed != nullptr ? 0 : 1;
  if (auto sent = links_.send(partner, {link_tag::tied_gradient, step, mine},
                              bytes_of(root + have->offset, have->count));
      !sent)
    return sent;
  float* other = take_buffer();
  auto got = links_.receive(partner, {link_tag::tied_gradient, step, 1 - mine},
                            writable(other, have->count));
  if (got) {
    const float* first = embed != nullptr ? other : root + have->offset;   // head's term
    const float* second = embed != nullptr ? root + have->offset : other;  // embed's term
    device_.add(root + have->offset, first, second, have->count);
  }
  free_.push_back(other);
  return got;
}

/// "after step 7 ranks 0, 2 hold other bits than the rest in h.0.ln_1.weight and 3 more tensors"
std::string step_runner::describe(const weights_dispute& d) const {
  std::string ranks;
  for (const auto& s : d.suspects) ranks += fmt::format("{}{}", ranks.empty() ? "" : ", ", s.rank);
  const auto all = all_tensors(spec_.model);
  const std::string more =
      d.tensors.size() > 1 ? fmt::format(" and {} more tensors", d.tensors.size() - 1) : "";
  return fmt::format(
      "after step {} ranks {} {} {}{}", d.step, ranks,
      d.is_certain ? "hold other bits than the rest in" : "differ from each other in",
      all[d.tensors.front()].name, more);
}

result<vote_result> step_runner::vote(std::uint64_t step, std::uint64_t chain,
                                      const order_source& orders) {
  stopwatch watch(times_.vote_us);
  // Sent first and awaited last: the stage's own sums are computed while the gradients travel.
  if (auto sent = send_to_copies(step); !sent) return sent.err();
  ballot mine;
  mine.step = step;
  mine.plan_hash = plan_hash(plan_);
  mine.chain = chain;
  mine.rank = rank_;
  const float* root = stack_.front();
  for (const gradient_slot& slot : stage_.gradient_layout()) {
    // The tied matrix counts once: where the embedding is (both places hold the same sum).
    if (slot.name == "wte.weight@head" || !keeps(slot.tensor_index, replica_)) continue;
    mine.squares.emplace_back(static_cast<std::uint32_t>(slot.tensor_index),
                              device_.sum_of_squares(root + slot.offset, slot.count));
  }
  if (stage_.has_head()) {
    for (int i = 0; i < microbatches_; ++i)
      mine.losses.emplace_back(static_cast<std::uint32_t>(leaf_first_ * per_leaf_ + i), losses_[i]);
  }
  if (auto got = receive_for_copies(step); !got) return got.err();
  // Every step, and before anyone applies it: what a flipped bit gave to this step's gradients is
  // dropped with it, and a replica that is whole stands at a state that nothing has touched. Some
  // 20 to 75 GB/s on one core; a step reads the weights far more often.
  {
    stopwatch hashing(times_.hash_us);
    mine.weights = stage_.tensor_hashes();
  }
  pending_step_ = step;  // from here on somebody may count our vote and apply

  if (rank_ != 0) {
    if (auto sent = links_.send(0, {link_tag::vote, step, 0}, encode_ballot(mine)); !sent)
      return sent.err();
    auto bytes = links_.receive_any(0, {link_tag::vote_result, step, 0}, ballot_bytes_max);
    if (!bytes) return bytes.err();
    return decode_vote(*bytes);
  }

  std::vector<ballot> ballots{std::move(mine)};
  for (int r = 1; r < static_cast<int>(plan_.members.size()); ++r) {
    auto bytes = links_.receive_any(r, {link_tag::vote, step, 0}, ballot_bytes_max);
    if (!bytes) return bytes.err();
    auto theirs = decode_ballot(*bytes);
    if (!theirs) return theirs.err();
    ballots.push_back(std::move(*theirs));
  }
  dispute_ = find_dispute(ballots);
  if (dispute_) {
    return make_error(errc::corrupt, "silent corruption: {}", describe(*dispute_));
  }
  voted_weights_.assign(all_tensors(spec_.model).size(), {});
  for (const ballot& b : ballots)
    for (const auto& [tensor, hash] : b.weights)
      if (tensor < voted_weights_.size()) voted_weights_[tensor] = hash;
  auto counted = count_votes(spec_, ballots, all_tensors(spec_.model).size());
  if (!counted) return counted;
  if (orders) std::tie(counted->orders, counted->order_ids) = orders(step);
  const auto bytes = encode_vote(*counted);
  for (int r = 1; r < static_cast<int>(plan_.members.size()); ++r) {
    // A failed send is the peer's loss, which its own link reports; those who got the result apply.
    (void)links_.send(r, {link_tag::vote_result, step, 0}, bytes).has_value();
  }
  return counted;
}

void step_runner::apply(const vote_result& vote) {
  invariant(has_pending(vote.step), "a vote is applied to its own reduced gradient");
  stopwatch watch(times_.apply_us);
  if (vote.finite) {
    const adamw_scalars scalars = scalars_of(vote, spec_);
    stage_.apply(stack_.front(), scalars);
    for (const copy_tensor& t : copy_tensors_)
      copies_->apply(t.tensor, copy_gradients_.data() + t.offset, scalars);
  }
  pending_step_ = 0;
}

result<void> step_runner::share_weights(const vote_result& vote) {
  if (owner_of_.empty() || !vote.finite) return ok();
  stopwatch watch(times_.apply_us);
  const int replicas = plan_.shape.replica_count;
  const auto key_of = [&vote](const tensor_info& t) {
    return link_key{link_tag::weights, vote.step, static_cast<std::uint64_t>(t.index)};
  };
  for (const tensor_info& t : stage_.tensors()) {
    if (owner_of_.at(t.index) != replica_) continue;
    for (int r = 0; r < replicas; ++r) {
      if (keeps(t.index, r)) continue;  // it replays the update itself
      if (auto sent = links_.send(plan_.rank_of(stage_index_, r), key_of(t),
                                  bytes_of(stage_.parameter(t.name), t.count()));
          !sent)
        return sent;
    }
  }
  for (const tensor_info& t : stage_.tensors()) {
    if (keeps(t.index, replica_)) continue;
    if (auto got = links_.receive(plan_.rank_of(stage_index_, owner_of_.at(t.index)), key_of(t),
                                  writable(stage_.parameter(t.name), t.count()));
        !got)
      return got;
  }
  return ok();
}

const float* step_runner::reduced_gradient(int tensor_index) const {
  if (stack_.empty()) return nullptr;
  for (const gradient_slot& slot : stage_.gradient_layout())
    if (slot.tensor_index == tensor_index) return stack_.front() + slot.offset;
  for (const copy_tensor& t : copy_tensors_)
    if (t.tensor.index == tensor_index) return copy_gradients_.data() + t.offset;
  return nullptr;
}

bool step_runner::takes_part_in_evaluation() const { return replica_ == 0; }
bool step_runner::reports_evaluation() const { return replica_ == 0 && stage_.has_head(); }

result<double> step_runner::evaluate(std::uint64_t step) {
  const auto& batch = spec_.batch;
  const std::int64_t rows = batch.micro_sequences * batch.sequence_tokens;
  const std::int64_t boundary = stage_.boundary_count();
  std::vector<double> sums;
  for (std::int64_t i = 0; i < spec_.eval_batches; ++i) {
    if (cancelled_.load()) return error{errc::cancelled, "the evaluation was dropped"};
    const link_key key{link_tag::activation, step,
                       evaluation_number + static_cast<std::uint64_t>(i)};
    if (stage_index_ > 0) {
      if (auto got = links_.receive(rank_ - 1, key, writable(input_.data(), boundary)); !got)
        return got.err();
    }
    for (std::int64_t b = 0; b < batch.micro_sequences; ++b) {
      const std::int64_t begin = validation_begin(i * batch.micro_sequences + b, valid_.token_count,
                                                  batch.sequence_tokens);
      valid_.read(begin, batch.sequence_tokens + 1, samples_.data());
      std::copy_n(samples_.data(), batch.sequence_tokens,
                  tokens_.data() + b * batch.sequence_tokens);
      std::copy_n(samples_.data() + 1, batch.sequence_tokens,
                  targets_.data() + b * batch.sequence_tokens);
    }
    sums.push_back(stage_.evaluate(stage_index_ > 0 ? input_.data() : nullptr, tokens_.data(),
                                   targets_.data(), output_.empty() ? nullptr : output_.data()));
    if (stage_index_ + 1 < plan_.shape.stage_count) {
      if (auto sent = links_.send(rank_ + 1, key, bytes_of(output_.data(), boundary)); !sent)
        return sent.err();
    }
  }
  return tree_sum(sums) / static_cast<double>(rows * spec_.eval_batches);
}

}  // namespace stagecoach
