#include "model/layer_shares.hpp"

#include <doctest/doctest.h>

#include <algorithm>

using namespace stagecoach;

namespace {

/// Embedding and head are next to nothing beside a layer: what cuts there are, layers decide.
job_spec layered(int layers) {
  job_spec s;
  s.model.n_layer = layers;
  s.model.d_model = 64;
  s.model.n_head = 2;
  s.model.d_ff = 256;
  s.model.vocab_size = 16;
  s.model.context = 16;
  s.batch.global_sequences = 8;
  s.batch.micro_sequences = 1;
  s.batch.sequence_tokens = 16;
  s.batch.leaf_count = 8;
  return s;
}

layout pipeline(std::vector<int> unit_cuts, std::vector<int> leaf_cuts = {0, 8}) {
  layout l;
  l.stage_count = static_cast<int>(unit_cuts.size()) - 1;
  l.replica_count = static_cast<int>(leaf_cuts.size()) - 1;
  l.unit_cuts = std::move(unit_cuts);
  l.leaf_cuts = std::move(leaf_cuts);
  return l;
}

/// What each seat measures if one layer takes layer_us[rank], embedding and head so many layers.
std::vector<seat_pace> seats_of(const layout& l, const std::vector<std::int64_t>& layer_us,
                                double embedding, double head) {
  std::vector<seat_pace> seats;
  for (int rank = 0; rank < l.worker_count(); ++rank) {
    const auto s = static_cast<std::size_t>(rank % l.stage_count);
    const bool is_first = s == 0, is_last = s + 1 == l.unit_cuts.size() - 1;
    const int layers = l.unit_cuts[s + 1] - l.unit_cuts[s] - is_first - is_last;
    const auto us = static_cast<double>(layer_us[static_cast<std::size_t>(rank)]);
    const double all = layers + (is_first ? embedding : 0) + (is_last ? head : 0);
    seats.push_back({static_cast<std::int64_t>(all * us), layers > 0 ? std::int64_t(us) : 0});
  }
  return seats;
}

std::vector<int> cuts(const job_spec& spec, const layout& l, const std::vector<seat_pace>& seats) {
  const auto paces = read_paces(spec, l, seats);
  REQUIRE(paces);
  return choose_cuts(spec, l, *paces).value_or(std::vector<int>{});
}

/// Of all cuts, by trying each: the smallest time of the slowest stage.
double best(const std::vector<double>& weights, const std::vector<double>& us, std::size_t stage,
            std::size_t from, double so_far) {
  if (stage + 1 == us.size()) {
    double sum = 0;
    for (std::size_t u = from; u < weights.size(); ++u) sum += weights[u];
    return std::max(so_far, sum * us[stage]);
  }
  double found = 1e300, sum = 0;
  for (std::size_t end = from + 1; end + (us.size() - stage - 1) <= weights.size(); ++end) {
    sum += weights[end - 1];
    found = std::min(found, best(weights, us, stage + 1, end, std::max(so_far, sum * us[stage])));
  }
  return found;
}

}  // namespace

TEST_CASE("a stage that takes longer for a layer has fewer of them") {
  const job_spec spec = layered(6);
  const layout even = pipeline({0, 4, 8});
  CHECK(layers_of(spec.model, even.unit_cuts) == std::vector<int>{3, 3});
  CHECK(cuts(spec, even, seats_of(even, {100, 100}, 0, 0)) == std::vector<int>{0, 4, 8});
  // By hand: 4 x 100 and 2 x 200; three each would be 600.
  CHECK(cuts(spec, even, seats_of(even, {100, 200}, 0, 0)) == std::vector<int>{0, 5, 8});
  CHECK(cuts(spec, even, seats_of(even, {200, 100}, 0, 0)) == std::vector<int>{0, 3, 8});
  // So slow that the embedding is all it is left with.
  CHECK(cuts(spec, even, seats_of(even, {1000, 100}, 0, 0)) == std::vector<int>{0, 1, 8});
}

TEST_CASE("what the head takes is measured, and stays where it is") {
  const job_spec spec = layered(6);
  const layout even = pipeline({0, 4, 8});
  // 5 layers' time on one side; 1 layer and a head of 4 on the other.
  CHECK(cuts(spec, even, seats_of(even, {100, 100}, 0, 4)) == std::vector<int>{0, 6, 8});
  // A stage that is the head alone has no layer to be measured by: its flops tell how slow it is.
  const layout edge = pipeline({0, 7, 8});
  const auto seats = seats_of(edge, {100, 100}, 0, 4);
  CHECK(seats[1].layer_us == 0);
  const auto paces = read_paces(spec, edge, seats);
  REQUIRE(paces);
  CHECK(predicted_leaf_us(*paces, edge, 1) == doctest::Approx(400));
  CHECK(predicted_leaf_us(*paces, edge, 0) == doctest::Approx(600));
}

TEST_CASE("no other cuts end sooner than by one in a hundred") {
  std::uint32_t x = 2024;
  const auto draw = [&x](int from, int to) {
    x = x * 1664525u + 1013904223u;
    return from + static_cast<int>((x >> 8) % static_cast<std::uint32_t>(to - from + 1));
  };
  for (int i = 0; i < 200; ++i) {
    const job_spec spec = layered(draw(3, 8));
    const int stages = draw(2, 4);
    const layout even = pipeline(partition_units(spec, stages));
    std::vector<std::int64_t> us;
    for (int s = 0; s < stages; ++s) us.push_back(draw(100, 900));
    const auto paces = read_paces(spec, even, seats_of(even, us, draw(1, 3), draw(1, 3)));
    REQUIRE(paces);
    const auto chosen = choose_cuts(spec, even, *paces);
    REQUIRE(chosen);
    double slowest = 0;
    layout l = even;
    l.unit_cuts = *chosen;
    CHECK(check_layout(spec,
                       [&] {
                         layout named = l;
                         named.schedule = "1f1b";
                         return named;
                       }())
              .has_value());
    for (int s = 0; s < stages; ++s) slowest = std::max(slowest, predicted_leaf_us(*paces, l, s));
    CHECK(slowest <= best(paces->weights, paces->layer_us, 0, 0, 0) * 1.01 * (1 + 1e-12));
  }
}

TEST_CASE("of cuts that are as good the nearest are chosen") {
  const job_spec spec = layered(4);
  // Stage 1 can't be done before 1,000; the others have room to spare wherever they are cut.
  const layout now = pipeline({0, 2, 3, 6});
  CHECK(cuts(spec, now, seats_of(now, {100, 1000, 100}, 0, 0)) == now.unit_cuts);
}

TEST_CASE("nobody is given more layers than its memory holds") {
  const job_spec spec = layered(6);
  const layout even = pipeline({0, 4, 8});
  auto seats = seats_of(even, {100, 1000}, 0, 0);
  CHECK(cuts(spec, even, seats) == std::vector<int>{0, 7, 8});
  layout five = even;
  five.unit_cuts = {0, 6, 8};
  seats[0].memory_bytes = static_cast<std::uint64_t>(predict_memory(spec, five, 0, 0).total());
  CHECK(cuts(spec, even, seats) == std::vector<int>{0, 6, 8});
  seats[0].memory_bytes = 1;
  CHECK(cuts(spec, even, seats).empty());
}

TEST_CASE("of two replicas the one that holds the step up longest counts, with its leaves") {
  const job_spec spec = layered(6);
  const layout l = pipeline({0, 4, 8}, {0, 6, 8});
  // Stage 0: 6 leaves x 100 against 2 x 200; stage 1: 6 x 100 against 2 x 600.
  CHECK(cuts(spec, l, seats_of(l, {100, 100, 200, 600}, 0, 0)) == std::vector<int>{0, 5, 8});
}

namespace {

constexpr balance_rules quick{1.3, 1.1, 0.10, 2, 2'000, 0};

/// Ten looks, a second and a step apart, at one layout and pace.
std::optional<layer_change> watched(layer_watch& w, const job_spec& spec, const layout& l,
                                    const std::vector<std::int64_t>& layer_us) {
  w.restart(0);
  std::optional<layer_change> change;
  for (int s = 1; s <= 10; ++s)
    change = w.look(s * 1'000, static_cast<std::uint64_t>(s), spec, l, seats_of(l, layer_us, 0, 0));
  return change;
}

}  // namespace

TEST_CASE("layers move after 20 steps, five seconds and the cool-down") {
  const job_spec spec = layered(6);
  const layout even = pipeline({0, 4, 8});
  const auto level = seats_of(even, {100, 100}, 0, 0), slow = seats_of(even, {100, 200}, 0, 0);
  layer_watch w;
  w.restart(0);
  for (int s = 0; s < 40; ++s)
    CHECK_FALSE(w.look(s * 1'000, static_cast<std::uint64_t>(s), spec, even, level));
  CHECK_FALSE(w.look(40'000, 40, spec, even, slow));
  CHECK_FALSE(w.look(41'000, 60, spec, even, slow));  // 20 steps, but one second
  CHECK_FALSE(w.look(46'000, 59, spec, even, slow));
  const auto change = w.look(47'000, 60, spec, even, slow);
  REQUIRE(change);
  CHECK(change->rank == 1);
  CHECK(change->ratio == doctest::Approx(2));
  CHECK(change->unit_cuts == std::vector<int>{0, 5, 8});
  CHECK(change->gain == doctest::Approx(1 - 400.0 / 600));
  SUBCASE("in a young generation nothing moves") {
    w.restart(47'000);
    CHECK_FALSE(w.look(48'000, 80, spec, even, slow));
    CHECK_FALSE(w.look(76'000, 800, spec, even, slow));
    CHECK(w.look(77'000, 820, spec, even, slow));
  }
  SUBCASE("a moment in line starts the count anew") {
    CHECK_FALSE(w.look(48'000, 61, spec, even, level));
    CHECK_FALSE(w.look(49'000, 90, spec, even, slow));
    CHECK_FALSE(w.look(53'000, 120, spec, even, slow));
  }
}

TEST_CASE("between slow and even no layer moves, in either direction") {
  const job_spec spec = layered(10);
  const layout even = pipeline({0, 6, 12}), moved = pipeline({0, 8, 12});
  layer_watch w(quick);
  CHECK_FALSE(watched(w, spec, even, {100, 125}));
  CHECK(watched(w, spec, even, {100, 150})->unit_cuts == std::vector<int>{0, 7, 12});
  CHECK_FALSE(watched(w, spec, moved, {100, 120}));
  CHECK(watched(w, spec, moved, {100, 105})->unit_cuts == std::vector<int>{0, 6, 12});
}

TEST_CASE("a move of layers that gains less than a tenth is not made") {
  const job_spec spec = layered(3);
  layer_watch w(quick);
  // 2 x 100 and 1 x 190: the best there is.
  CHECK_FALSE(watched(w, spec, pipeline({0, 3, 5}), {100, 190}));
  // 1 x 100 and 2 x 140 against 2 x 100 and 1 x 140.
  CHECK(watched(w, spec, pipeline({0, 2, 5}), {100, 140}));
}

TEST_CASE("what leaves alone can bring moves no layers") {
  const job_spec spec = layered(4);
  const layout l = pipeline({0, 3, 6}, {0, 4, 8});
  layer_watch w(quick);
  // One replica is slow as a whole: a cut that helps it hinders the other.
  CHECK_FALSE(watched(w, spec, l, {100, 100, 200, 200}));
  // The same stage is slow in both.
  CHECK(watched(w, spec, l, {300, 100, 300, 100})->unit_cuts == std::vector<int>{0, 2, 6});
}

TEST_CASE("layers stay where the job's file puts them, or a time is not known") {
  job_spec spec = layered(6);
  const layout even = pipeline({0, 4, 8});
  layer_watch w(quick);
  auto seats = seats_of(even, {100, 300}, 0, 0);
  CHECK(watched(w, spec, even, {100, 300}));
  seats[0].leaf_us = 0;
  CHECK_FALSE(w.look(20'000, 30, spec, even, seats));
  CHECK_FALSE(w.look(21'000, 60, spec, even, {}));
  spec.parallelism.layers = {3, 3};
  CHECK_FALSE(watched(w, spec, even, {100, 300}));
}
