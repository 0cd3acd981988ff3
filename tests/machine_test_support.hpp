// What the machines' tests share: a small job, workers, and reading actions.
#pragma once

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "coordinator/cluster_machine.hpp"
#include "model/tensor_names.hpp"

namespace stagecoach::test {

inline job_spec small_spec(int workers_min = 2, int workers_max = 2) {
  job_spec s;
  s.name = "small";
  s.model.n_layer = 2;
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
  s.stop_steps = 100;
  s.elasticity.workers_min = workers_min;
  s.elasticity.workers_max = workers_max;
  s.checkpoint.store = "folder";
  return s;
}

/// 2 stages x 1 replica whatever the cost model says: units {embed, h.0}, {h.1, head}, or near it.
inline job_spec two_stages() {
  job_spec s = small_spec(2, 2);
  s.parallelism.is_explicit = true;
  s.parallelism.stages = 2;
  s.parallelism.replicas = 1;
  return s;
}
inline worker_id w(std::uint64_t n) { return static_cast<worker_id>(n); }

template <class T>
std::vector<T> all_of(const std::vector<action>& actions) {
  std::vector<T> found;
  for (const action& a : actions) {
    if (const T* x = std::get_if<T>(&a)) found.push_back(*x);
  }
  return found;
}

/// Messages of one type, with who gets them.
template <class T>
std::vector<std::pair<worker_id, T>> sent(const std::vector<action>& actions) {
  std::vector<std::pair<worker_id, T>> found;
  for (const auto& s : all_of<actions::send>(actions)) {
    if (const T* m = std::get_if<T>(&s.message)) found.emplace_back(s.worker, *m);
  }
  return found;
}

inline bool has_note(const std::vector<action>& actions, const std::string& kind) {
  for (const auto& n : all_of<actions::note>(actions)) {
    if (n.record.kind == kind) return true;
  }
  return false;
}

/// Place of the first action that is a T; -1: none.
template <class T>
int place_of(const std::vector<action>& actions) {
  for (std::size_t i = 0; i < actions.size(); ++i) {
    if (std::holds_alternative<T>(actions[i])) return static_cast<int>(i);
  }
  return -1;
}

}  // namespace stagecoach::test
