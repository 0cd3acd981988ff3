// What must hold whatever happens; from the simulation's own truth, never from a machine.
#include "coordinator/wire.hpp"
#include "model/copies.hpp"
#include "model/tensor_names.hpp"
#include "tests/sim/cluster.hpp"

namespace stagecoach::sim {

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

void cluster::check_commit(const commit& c) {
  const std::uint64_t job = value(c.shape.job);
  const auto row = rows_.find(keys::generation(c.shape.job, c.shape.generation));
  if (row == rows_.end())
    return violate("commit {} of job {} is sent before it is saved", c.shape.generation, job);
  const auto saved = from_json_text<generation_record>(row->second);
  if (!saved || !(saved->shape == c.shape))
    violate("commit {} is not the plan that was saved", c.shape.generation);
  const std::uint64_t hash = plan_hash(c.shape);
  const auto [known, is_new] = plans_.emplace(std::pair(job, c.shape.generation), hash);
  if (known->second != hash) violate("two plans have number {} of job {}", c.shape.generation, job);
  if (is_new) {
    check_nothing_lost(c);
    newest_plans_[job] = c.shape;
  }
  check_size(c);
  // Never below what is durable and whole.
  for (const auto& [step, m] : manifests_[job]) {
    const bool is_indexed = rows_.count(keys::checkpoint(c.shape.job, step)) != 0;
    if (is_indexed && is_good(job, m) && step > c.step) {
      violate("commit {} of job {} starts at step {} though step {} is durable", c.shape.generation,
              job, c.step, step);
    }
  }
}

/// Where those who remain of the former plan held a copy of every stage, no step that one of them
/// stands at is given up.
void cluster::check_nothing_lost(const commit& c) {
  const std::uint64_t job = value(c.shape.job);
  const auto former = newest_plans_.find(job);
  if (former == newest_plans_.end() || ran_.count({job, former->second.generation}) == 0) return;
  const layout& shape = former->second.shape;
  const bool are_replicas_copies = shape.replica_count > 1 && !c.spec.parallelism.shard_optimizer;
  const int holders_max = shape.replica_count > 1 ? shape.replica_count : shape.worker_count();
  const int copies = are_replicas_copies ? shape.replica_count - 1
                                         : std::min(c.spec.elasticity.copies, holders_max - 1);
  int remaining = 0;
  std::uint64_t newest = 0;
  for (const plan_member& m : former->second.members) {
    const bool stays = std::any_of(c.shape.members.begin(), c.shape.members.end(),
                                   [&m](const auto& n) { return n.process == m.process; });
    const auto answer = answers_.find({job, c.shape.generation, m.process});
    if (!stays || answer == answers_.end() || !answer->second.has_state) continue;
    ++remaining;
    newest = std::max(newest, answer->second.step);
  }
  if (remaining == 0 || shape.worker_count() - remaining > copies) return;
  ++result_.covered_losses;
  // A checkpoint that became durable meanwhile may be newer than all of them.
  if (c.step < newest || (c.source != source_kind::live && c.step == newest)) {
    violate("commit {} of job {} starts at step {}, though those who remain hold all of step {}",
            c.shape.generation, job, c.step, newest);
  }
}

void cluster::check_record(const job_record& record) {
  const std::uint64_t job = value(record.id);
  specs_.emplace(job, record.spec);
  if (completed_.count(job) != 0 && record.state != job_state::completed) {
    violate("job {} was completed and is {} now", job, to_string(record.state));
  }
  if (record.state == job_state::completed && completed_.count(job) == 0) {
    completed_[job] = 1;
    const auto last = static_cast<std::uint64_t>(record.spec.stop_steps);
    const auto& have = manifests_[job];
    if (have.count(last) == 0) {
      violate("job {} is completed without a manifest of step {}", job, last);
    } else if (have.at(last).facts.weights_hash != hash_of(truth_of(job).at[last])) {
      violate("job {} ended with other bits", job);
    }
  }
  if (record.state == job_state::failed) violate("job {} failed: {}", job, record.reason);
}

void cluster::check_manifest(const actions::write_manifest& m) {
  const std::uint64_t job = value(m.job);
  values whole;
  for (const part_record& p : m.parts) {
    const auto part = parts_[job].find(p.file);
    if (part == parts_[job].end())
      return violate("manifest {} names {} that was never written", m.step, p.file);
    if (part->second.step != m.step)
      violate("manifest {} names a part of step {}", m.step, part->second.step);
    for (const auto& [name, v] : part->second.weights) {
      if (!whole.emplace(name, v).second) violate("manifest {} has {} twice", m.step, name);
    }
  }
  if (whole != truth_of(job).at[m.step])
    violate("manifest {} of job {} is not the whole model of that step", m.step, job);
  if (hash_of(whole) != m.weights_hash)
    violate("manifest {}: weights hash is not that of its parts", m.step);
  if (m.chain != truth_of(job).chain[m.step]) violate("manifest {}: wrong chain", m.step);
}

/// After every apply: the bits of an undisturbed run, tensor by tensor.
void cluster::check_state(const toy_trainer& t) {
  const truth& right = truth_of(value(t.shape.job));
  for (const auto& [name, v] : t.weights) {
    if (right.at[t.step].at(name) != v)
      violate("{} at step {} is not the undisturbed value", name, t.step);
  }
  if (right.chain[t.step] != t.chain)
    violate("the chain at step {} is not the undisturbed one", t.step);
}

}  // namespace stagecoach::sim
