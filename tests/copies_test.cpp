// Who keeps whose stage; expected lists by hand.
#include "model/copies.hpp"

#include <doctest/doctest.h>

#include <set>

#include "model/tensor_names.hpp"

using namespace stagecoach;

namespace {

using lists = std::vector<std::vector<int>>;

layout pipeline(int stages, int replicas = 1) {
  layout shape;
  shape.stage_count = stages;
  shape.replica_count = replicas;
  shape.unit_cuts = stages == 3 ? std::vector<int>{0, 1, 2, 4} : std::vector<int>{0, 2, 4};
  return shape;
}

job_spec two_layers(int copies) {
  job_spec spec;
  spec.model.n_layer = 2;
  spec.model.d_model = 8;
  spec.model.n_head = 2;
  spec.model.d_ff = 32;
  spec.model.vocab_size = 16;
  spec.model.context = 8;
  spec.elasticity.copies = copies;
  return spec;
}

}  // namespace

TEST_CASE("on one host each stage is kept by the next ranks") {
  CHECK(copied_ranks(1, pipeline(3), {"a", "a", "a"}) == lists{{2}, {0}, {1}});
  CHECK(copied_ranks(2, pipeline(3), {"a", "a", "a"}) == lists{{1, 2}, {0, 2}, {0, 1}});
}

TEST_CASE("a copy stands on another host where there is one, and no rank keeps all") {
  CHECK(copied_ranks(1, pipeline(4), {"a", "a", "b", "b"}) == lists{{2}, {3}, {0}, {1}});
  CHECK(copied_ranks(1, pipeline(3), {"a", "a", "b"}) == lists{{2}, {}, {0, 1}});
  CHECK(copied_ranks(2, pipeline(3), {"a", "b", "c"}) == lists{{1, 2}, {0, 2}, {0, 1}});
}

TEST_CASE(
    "no copies where replicas hold the state, where none are asked for, or where one is alone") {
  CHECK(copied_ranks(1, pipeline(2, 2), {"a", "a", "a", "a"}) == lists{{}, {}, {}, {}});
  CHECK(copied_ranks(0, pipeline(2), {"a", "a"}) == lists{{}, {}});
  CHECK(copied_ranks(2, pipeline(2), {"a", "a"}) == lists{{1}, {0}});
  CHECK(copied_ranks(2, pipeline(1), {"a"}) == lists{{}});
}

TEST_CASE("a rank keeps the tensors of the stage that it does not hold already, each once") {
  const std::vector<std::string> hosts{"a", "a", "a"};
  // Rank 0 holds wte (0) and wpe (1); the last stage's copy of wte is the same tensor.
  const auto first = copies_kept(two_layers(1), pipeline(3), hosts, 0);
  REQUIRE(first.size() == 1);
  CHECK(first[0].owner == 2);
  CHECK(first[0].tensors ==
        std::vector<int>{14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27});
  // Rank 1 keeps both ends, and wte of the first of them.
  const auto middle = copies_kept(two_layers(2), pipeline(3), hosts, 1);
  REQUIRE(middle.size() == 2);
  CHECK(middle[0].tensors == std::vector<int>{0, 1});
  CHECK(middle[1].tensors.front() == 14);
  for (int copies = 1; copies <= 2; ++copies) {
    std::vector<int> holders(28, 0);
    for (int rank = 0; rank < 3; ++rank) {
      std::set<int> held;
      const layout shape = pipeline(3);
      const auto r = static_cast<std::size_t>(rank);
      for (const int t : stage_tensor_indices(two_layers(copies).model, shape.unit_cuts[r],
                                              shape.unit_cuts[r + 1]))
        held.insert(t);
      for (const kept_copy& copy : copies_kept(two_layers(copies), shape, hosts, rank)) {
        for (const int t : copy.tensors) CHECK(held.insert(t).second);
      }
      for (const int t : held) ++holders[static_cast<std::size_t>(t)];
    }
    for (const int count : holders) CHECK(count >= copies + 1);
  }
}
