// The vote on the weights: who holds what, who is outvoted, what can't be told.
#include "worker/vote.hpp"

#include <doctest/doctest.h>

using namespace stagecoach;

namespace {

ballot of_rank(int rank, std::vector<std::pair<std::uint32_t, tensor_hash>> weights) {
  ballot b;
  b.step = 8;
  b.rank = rank;
  b.weights = std::move(weights);
  return b;
}

std::vector<int> ranks_of(const weights_dispute& d) {
  std::vector<int> ranks;
  for (const auto& s : d.suspects) ranks.push_back(s.rank);
  return ranks;
}

const tensor_hash wte{1, 100}, mine{2, 200}, other{3, 300}, bad{77, 7};

}  // namespace

TEST_CASE("replicas that hold the same bits have no dispute") {
  CHECK(!find_dispute({of_rank(0, {{0, wte}, {1, mine}})}));
  CHECK(!find_dispute({of_rank(0, {{0, wte}, {1, mine}}), of_rank(1, {{0, wte}, {1, mine}})}));
}

TEST_CASE("three replicas: the minority is named") {
  const auto d = find_dispute({of_rank(0, {{0, wte}, {1, mine}}), of_rank(1, {{0, wte}, {1, bad}}),
                               of_rank(2, {{0, wte}, {1, mine}})});
  REQUIRE(d);
  CHECK(d->step == 7);  // the state before the step that is voted on
  CHECK(d->is_certain);
  CHECK(d->tensors == std::vector<std::uint32_t>{1});
  CHECK(ranks_of(*d) == std::vector<int>{1});
}

TEST_CASE("two replicas: both are suspects, each with the hash of the model if it is right") {
  const auto d =
      find_dispute({of_rank(0, {{0, wte}, {1, mine}}), of_rank(1, {{0, wte}, {1, bad}})});
  REQUIRE(d);
  CHECK(!d->is_certain);
  CHECK(ranks_of(*d) == std::vector<int>{0, 1});
  // By hand: low words 1 + 2 and 1 + 77, high words 100 + 200 and 100 + 7.
  CHECK(d->suspects[0].weights_hash == to_string(tensor_hash{3, 300}));
  CHECK(d->suspects[1].weights_hash == to_string(tensor_hash{78, 107}));
}

TEST_CASE("the tied matrix of two stages: one pipeline alone finds it, two replicas tell whose") {
  // Stage 0 holds tensors 0 and 1, stage 1 holds 2 and a copy of 0.
  const auto one =
      find_dispute({of_rank(0, {{0, wte}, {1, mine}}), of_rank(1, {{0, bad}, {2, other}})});
  REQUIRE(one);
  CHECK(!one->is_certain);
  CHECK(ranks_of(*one) == std::vector<int>{0, 1});
  const auto two =
      find_dispute({of_rank(0, {{0, wte}, {1, mine}}), of_rank(1, {{0, wte}, {2, other}}),
                    of_rank(2, {{0, wte}, {1, mine}}), of_rank(3, {{0, bad}, {2, other}})});
  REQUIRE(two);
  CHECK(two->is_certain);
  CHECK(ranks_of(*two) == std::vector<int>{3});
}

TEST_CASE("who is outvoted on one tensor explains a tie on another") {
  // Rank 3 is wrong in the tied matrix, where three stand against it, and in tensor 2, where one
  // does.
  const auto d =
      find_dispute({of_rank(0, {{0, wte}, {1, mine}}), of_rank(1, {{0, wte}, {2, other}}),
                    of_rank(2, {{0, wte}, {1, mine}}), of_rank(3, {{0, bad}, {2, bad}})});
  REQUIRE(d);
  CHECK(d->is_certain);
  CHECK(d->tensors == std::vector<std::uint32_t>{0, 2});
  CHECK(ranks_of(*d) == std::vector<int>{3});
}

TEST_CASE("no majority of four: all are suspects") {
  const auto d = find_dispute({of_rank(0, {{1, mine}}), of_rank(1, {{1, bad}}),
                               of_rank(2, {{1, mine}}), of_rank(3, {{1, bad}})});
  REQUIRE(d);
  CHECK(!d->is_certain);
  CHECK(ranks_of(*d) == std::vector<int>{0, 1, 2, 3});
}

TEST_CASE("ballots and results come back from their bytes, and short ones are refused") {
  ballot b = of_rank(3, {{0, wte}, {4, mine}});
  b.plan_hash = 11;
  b.chain = 12;
  b.squares = {{0, 1.5}, {4, 2.5}};
  b.losses = {{7, 0.25}};
  const auto bytes = encode_ballot(b);
  const auto back = decode_ballot(bytes);
  REQUIRE(back.has_value());
  CHECK(back->weights == b.weights);
  CHECK(back->squares == b.squares);
  CHECK(back->losses == b.losses);
  vote_result v;
  v.step = 9;
  v.chain = 13;
  v.order_ids = {1, 2};
  v.weights_hash = to_string(wte);
  const auto result_bytes = encode_vote(v);
  const auto vote = decode_vote(result_bytes);
  REQUIRE(vote.has_value());
  CHECK(*vote == v);
  for (std::size_t n = 0; n < bytes.size(); ++n)
    CHECK(!decode_ballot(std::span(bytes).first(n)).has_value());
  for (std::size_t n = 0; n < result_bytes.size(); ++n)
    CHECK(!decode_vote(std::span(result_bytes).first(n)).has_value());
}
