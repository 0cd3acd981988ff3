#include "tools/bench_ranks.hpp"

#include <time.h>

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "kernels/backend.hpp"
#include "model/stage.hpp"
#include "tools/bench_support.hpp"
#include "worker/link.hpp"

namespace stagecoach {
namespace {

// What a step costs, whatever else the cores do.
double process_cpu_seconds() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

}  // namespace

struct bench_ranks::rank {
  std::unique_ptr<backend> device = make_cpu_backend(1);
  std::unique_ptr<stage> model;
  std::unique_ptr<step_runner> runner;
  std::vector<instruction_span> spans;
  std::uint64_t chain = 0;
  bool has_failed = false;
};

namespace {

layout replicas_of_one_stage(const job_spec& spec, int replicas) {
  layout shape;
  shape.replica_count = replicas;
  shape.unit_cuts = {0, unit_count(spec.model)};
  shape.leaf_cuts = partition_leaves(spec.batch.leaf_count, replicas);
  return shape;
}

}  // namespace

bench_ranks::bench_ranks(job_spec spec, int replicas)
    : bench_ranks(spec, replicas_of_one_stage(spec, replicas)) {}

bench_ranks::bench_ranks(job_spec spec, layout shape)
    : spec_(std::move(spec)), links_(make_memory_links(shape.worker_count())) {
  shape_.generation = 1;
  shape_.shape = std::move(shape);
  const int ranks = shape_.shape.worker_count();
  shape_.members.resize(static_cast<std::size_t>(ranks));
  std::mt19937_64 random(7);
  tokens_.resize(100'000);
  for (auto& t : tokens_)
    t = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(spec_.model.vocab_size));
  const token_reader reader{static_cast<std::int64_t>(tokens_.size()),
                            [this](std::int64_t begin, std::int64_t n, std::int32_t* out) {
                              std::copy_n(tokens_.begin() + begin, n, out);
                            }};
  for (int r = 0; r < ranks; ++r) {
    auto one = std::make_unique<rank>();
    const auto s = static_cast<std::size_t>(shape_.stage_of(r));
    one->model = std::make_unique<stage>(spec_.model, spec_.batch, shape_.shape.unit_cuts[s],
                                         shape_.shape.unit_cuts[s + 1],
                                         *step_runner::slots(spec_, shape_, r), *one->device,
                                         std::nullopt, precision_of(spec_.precision));
    one->model->initialise_parameters();
    one->runner = std::make_unique<step_runner>(spec_, shape_, r, *one->model,
                                                *links_[static_cast<std::size_t>(r)], *one->device,
                                                reader, reader);
    one->runner->record_into(&one->spans);
    ranks_.push_back(std::move(one));
  }
}

bench_ranks::~bench_ranks() = default;

double bench_ranks::step_cpu_seconds() {
  ++step_;
  const double began = process_cpu_seconds();
  std::vector<std::thread> threads;
  for (const auto& one : ranks_)
    threads.emplace_back([this, r = one.get()] {
      r->spans.clear();
      auto vote = r->runner->compute(step_, r->chain, {});
      r->has_failed = !vote;
      if (!vote) {
        for (const auto& l : links_) l->cancel();  // the others would wait for it
        return;
      }
      r->runner->apply(*vote);
      r->chain = vote->chain;
    });
  for (auto& t : threads) t.join();
  const bool has_failed =
      std::any_of(ranks_.begin(), ranks_.end(), [](const auto& r) { return r->has_failed; });
  return has_failed ? std::nan("") : process_cpu_seconds() - began;
}

const step_times& bench_ranks::times(int rank) const {
  return ranks_[static_cast<std::size_t>(rank)]->runner->times();
}

const std::vector<instruction_span>& bench_ranks::spans(int rank) const {
  return ranks_[static_cast<std::size_t>(rank)]->spans;
}

unit_times measured_pieces(const job_spec& spec, int rounds) {
  struct pieces {
    double forward, input, weight, vote, apply;  // seconds; the first three of a microbatch
    std::int64_t parameters;
  };
  const auto pieces_of = [&](std::int64_t layers) {
    job_spec own = spec;
    own.model.n_layer = layers;
    // Fewer microbatches of the same size: a piece's time does not depend on their number.
    own.batch.global_sequences = 32 * own.batch.micro_sequences;
    own.batch.leaf_count = 32;
    bench_ranks alone(own, 1);
    std::vector<double> f, i, w, vote, apply;
    for (int k = 0; k < 2 + rounds; ++k) {
      (void)alone.step_cpu_seconds();
      if (k < 2) continue;
      const step_times& t = alone.times(0);
      f.push_back(static_cast<double>(t.forward_us));
      i.push_back(static_cast<double>(t.backward_input_us));
      w.push_back(static_cast<double>(t.backward_weight_us));
      vote.push_back(static_cast<double>(t.vote_us));
      apply.push_back(static_cast<double>(t.apply_us));
    }
    const double per = 1e-6 / static_cast<double>(own.batch.microbatch_count());
    return pieces{median(f) * per,     median(i) * per,      median(w) * per,
                  median(vote) * 1e-6, median(apply) * 1e-6, parameter_count(own.model)};
  };
  const pieces few = pieces_of(1), many = pieces_of(spec.model.n_layer);
  const double blocks = static_cast<double>(spec.model.n_layer - 1);
  unit_times t;
  t.block = {(many.forward - few.forward) / blocks, (many.input - few.input) / blocks,
             (many.weight - few.weight) / blocks};
  // Nearly all of the rest is the head's matrix product.
  t.head = {std::max(0.0, few.forward - t.block.forward),
            std::max(0.0, few.input - t.block.backward_input),
            std::max(0.0, few.weight - t.block.backward_weight)};
  t.vote_seconds = many.vote;
  t.optimizer_seconds_per_parameter = many.apply / static_cast<double>(many.parameters);
  // Ten gigabits and 50 us a frame, as between hosts of one rack; the target is for compute-bound
  // jobs.
  t.link_seconds = 50e-6;
  t.link_seconds_per_byte = 1.0 / 1.25e9;
  t.merge_seconds_per_parameter = 12.0 / 5e9;  // two reads and a write at 5 GB/s
  return t;
}

}  // namespace stagecoach
