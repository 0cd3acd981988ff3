#include "tests/training_run.hpp"

#include <fmt/format.h>

#include <chrono>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "model/copies.hpp"
#include "model/shadow.hpp"
#include "model/stage.hpp"
#include "model/tensor_names.hpp"
#include "worker/step_runner.hpp"

namespace stagecoach::testing {
namespace {

// Text-like bytes from a fixed rule: words of a small vocabulary, so that a model can learn
// something.
std::vector<std::int32_t> synthetic_text(std::int64_t count) {
  static const char* words[] = {"stage ", "coach ", "the ",   "wheel ", "turns ", "and ",
                                "road ",  "is ",    "long. ", "train ", "on\n"};
  std::vector<std::int32_t> out;
  std::uint64_t x = 88172645463325252ull;
  while (static_cast<std::int64_t>(out.size()) < count) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    for (const char* p = words[x % std::size(words)]; *p != 0; ++p)
      out.push_back(static_cast<unsigned char>(*p));
  }
  out.resize(static_cast<std::size_t>(count));
  return out;
}

token_reader reader_of(const std::vector<std::int32_t>& text) {
  return {static_cast<std::int64_t>(text.size()),
          [&text](std::int64_t begin, std::int64_t count, std::int32_t* out) {
            std::copy_n(text.begin() + begin, count, out);
          }};
}

}  // namespace

job_spec small_job() {
  job_spec spec;
  spec.name = "small";
  spec.model = {"tiny", 4, 64, 4, 256, 256, 64, "random", 1234, 0.02};
  spec.data.tokenizer = "bytes";
  spec.batch = {16, 1, 64, 8};
  spec.optimizer.lr = 1e-3;
  spec.schedule.warmup_steps = 4;
  spec.stop_steps = 12;
  return spec;
}

layout make_layout(const job_spec& spec, int stages, int replicas, const std::string& schedule) {
  layout shape;
  shape.stage_count = stages;
  shape.replica_count = replicas;
  shape.schedule = schedule;
  shape.unit_cuts = partition_units(spec, stages);
  shape.leaf_cuts = partition_leaves(spec.batch.leaf_count, replicas);
  return shape;
}

std::int64_t allocated_by_stage(const job_spec& spec, const layout& shape, int stage_index) {
  plan p;
  p.shape = shape;
  p.members.resize(static_cast<std::size_t>(shape.worker_count()));
  auto device = make_cpu_backend(1);
  const stage model(spec.model, spec.batch, shape.unit_cuts[stage_index],
                    shape.unit_cuts[stage_index + 1], *step_runner::slots(spec, p, stage_index),
                    *device, std::nullopt, precision_of(spec.precision));
  return model.allocated_bytes();
}

run_outcome run_in_process(const job_spec& spec, const layout& shape, int threads,
                           const std::string& backend_name, std::int64_t drop_at) {
  plan p;
  p.job = static_cast<job_id>(1);
  p.generation = 1;
  p.shape = shape;
  for (int r = 0; r < shape.worker_count(); ++r)
    p.members.push_back(
        {static_cast<worker_id>(r + 1), fmt::format("{:032x}", r), fmt::format("w{}", r), "", 0});
  const auto text = synthetic_text(20'000);
  auto links = make_memory_links(shape.worker_count());
  auto broken = make_memory_links(shape.worker_count());

  run_outcome outcome;
  tensor_hash weights, state;
  std::map<int, std::string> stage_weights;        // of replica 0, by stage
  std::vector<std::pair<int, std::string>> twins;  // of all ranks
  const std::vector<tensor_info> all = all_tensors(spec.model);
  std::map<std::string, tensor_hash> owned;                                  // by tensor
  std::map<std::pair<int, int>, std::map<std::string, tensor_hash>> copied;  // by holder, owner
  std::mutex mutex;
  std::string problem;
  std::vector<std::thread> workers;
  for (int rank = 0; rank < shape.worker_count(); ++rank) {
    workers.emplace_back([&, rank] {
      auto device =
          backend_name == "reference" ? make_reference_backend() : make_cpu_backend(threads);
      const int s = p.stage_of(rank);
      stage model(spec.model, spec.batch, shape.unit_cuts[s], shape.unit_cuts[s + 1],
                  *step_runner::slots(spec, p, rank), *device,
                  kept_moments(spec, shape.unit_cuts[s], shape.unit_cuts[s + 1], p.replica_of(rank),
                               shape.replica_count),
                  precision_of(spec.precision));
      model.initialise_parameters();
      shadow_state copies(*device);
      const auto kept = copies_kept(spec, shape, hosts_of(p), rank);
      for (const kept_copy& copy : kept) {
        for (const int tensor : copy.tensors) {
          const tensor_info& t = all[static_cast<std::size_t>(tensor)];
          copies.add(t);
          initialise(copies.parameter(t.name), t, spec.model);
        }
      }
      step_runner runner(spec, p, rank, model, *links[rank], *device, reader_of(text),
                         reader_of(text), &copies);
      std::uint64_t chain = 0;
      for (std::int64_t step = 1; step <= spec.stop_steps; ++step) {
        if (step == drop_at) {
          // Each rank breaks wherever it is after a moment.
          step_runner lost(spec, p, rank, model, *broken[rank], *device, reader_of(text),
                           reader_of(text), &copies);
          std::thread cut([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
            broken[rank]->cancel();
          });
          (void)lost.compute(static_cast<std::uint64_t>(step), chain, {}).has_value();
          cut.join();
        }
        auto vote = runner.compute(static_cast<std::uint64_t>(step), chain, {});
        if (!vote) {
          std::lock_guard lock(mutex);
          problem = vote.err().message;
          for (auto& l : links) l->cancel();
          return;
        }
        runner.apply(*vote);
        if (auto shared = runner.share_weights(*vote); !shared) {
          std::lock_guard lock(mutex);
          problem = shared.err().message;
          return;
        }
        chain = vote->chain;
        if (rank == 0) {
          std::lock_guard lock(mutex);
          outcome.losses.push_back(vote->loss.get());
          outcome.chain = chain;
        }
      }
      std::lock_guard lock(mutex);
      const auto hash_of = [](auto& holder, const tensor_info& t) {
        tensor_hash h = hash_tensor(t.name, holder.parameter(t.name), t.count());
        h += hash_tensor(t.name + "@moment1", holder.moment1(t.name), t.count());
        h += hash_tensor(t.name + "@moment2", holder.moment2(t.name), t.count());
        return h;
      };
      if (shape.replica_count == 1)
        for (const tensor_info& t : model.tensors()) owned[t.name] = hash_of(model, t);
      for (const kept_copy& copy : kept) {
        for (const int tensor : copy.tensors) {
          const tensor_info& t = all[static_cast<std::size_t>(tensor)];
          copied[{rank, copy.owner}][t.name] = hash_of(copies, t);
        }
      }
      // A sharded optimizer without copies has each moment once, over all replicas.
      const bool is_shared_out =
          is_sharded(spec, shape.replica_count) && spec.elasticity.copies == 0;
      if (p.replica_of(rank) == 0 || is_shared_out)
        state += model.moments_hash(model.has_embedding());
      const tensor_hash own = model.weights_hash(model.has_embedding());
      if (p.replica_of(rank) == 0) {
        weights += own;
        state += own;
        stage_weights[s] = to_string(own);
      }
      twins.emplace_back(s, to_string(own));
    });
  }
  for (auto& w : workers) w.join();
  if (!problem.empty()) throw std::runtime_error(problem);
  for (const auto& [s, hash] : twins) {
    if (hash != stage_weights[s]) throw std::runtime_error("replicas ended with other weights");
  }
  for (const auto& [who, hashes] : copied) {
    bool is_same = true;
    for (const auto& [name, hash] : hashes) is_same = is_same && hash == owned.at(name);
    outcome.copies.push_back({who.first, who.second, is_same});
  }
  outcome.weights_hash = to_string(weights);
  outcome.state_hash = to_string(state);
  return outcome;
}

}  // namespace stagecoach::testing
