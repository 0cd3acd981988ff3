#include "model/tensor_names.hpp"

#include <doctest/doctest.h>

#include "model/parameters.hpp"
#include "model/plan.hpp"

using namespace stagecoach;

TEST_CASE("the coordinator's list of tensors is the model's") {
  model_spec m;
  m.n_layer = 3;
  m.d_model = 8;
  m.n_head = 2;
  m.d_ff = 32;
  m.vocab_size = 16;
  m.context = 4;
  const auto ours = all_tensor_sizes(m);
  const auto theirs = all_tensors(m);
  REQUIRE(ours.size() == theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i) {
    CHECK(ours[i].name == theirs[i].name);
    CHECK(ours[i].count == theirs[i].count());
    CHECK(ours[i].unit == theirs[i].unit);
  }
  for (int begin = 0; begin < unit_count(m); ++begin) {
    for (int end = begin + 1; end <= unit_count(m); ++end) {
      std::vector<std::string> names;
      for (const tensor_info& t : stage_tensors(m, begin, end)) names.push_back(t.name);
      CHECK(stage_tensor_names(m, begin, end) == names);
    }
  }
}

TEST_CASE("adding hashes as text is adding them as numbers") {
  const float a[3] = {1, 2, 3};
  tensor_hash x = hash_tensor("a", a, 3), y = hash_tensor("b", a, 2);
  const std::string sum = add_tensor_hashes({to_string(x), to_string(y)});
  x += y;
  CHECK(sum == to_string(x));
}
