#include "model/plan.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>

#include "model/schedule.hpp"

using namespace stagecoach;

namespace {

job_spec gpt2() {
  job_spec spec;
  spec.model = {"gpt2", 12, 768, 12, 3072, 50257, 1024, "random"};
  spec.batch = {64, 4, 1024, 16};
  spec.elasticity.workers_min = 1;
  spec.elasticity.workers_max = 16;
  return spec;
}

job_spec tiny(int n_layer, int leaf_count) {
  job_spec spec;
  spec.model = {"", n_layer, 64, 4, 256, 256, 64, "random"};
  spec.batch = {2 * 4 * leaf_count, 4, 64, leaf_count};  // two microbatches per leaf
  spec.elasticity.workers_min = 1;
  spec.elasticity.workers_max = 16;
  return spec;
}

job_spec explicit_job(int stages, int replicas, const std::string& on_loss) {
  job_spec spec = tiny(4, 8);
  spec.parallelism.is_explicit = true;
  spec.parallelism.stages = stages;
  spec.parallelism.replicas = replicas;
  spec.elasticity.workers_max = stages * replicas;
  spec.elasticity.on_loss = on_loss;
  return spec;
}

double stage_cost(const job_spec& spec, int begin, int end) {
  double cost = 0;
  for (int u = begin; u < end; ++u) cost += unit_cost(spec.model, spec.batch.sequence_tokens, u);
  return cost;
}

double bottleneck(const job_spec& spec, const std::vector<int>& cuts) {
  double worst = 0;
  for (std::size_t s = 0; s + 1 < cuts.size(); ++s)
    worst = std::max(worst, stage_cost(spec, cuts[s], cuts[s + 1]));
  return worst;
}

// Smallest bottleneck over all partitions, by trying each.
double best_bottleneck(const job_spec& spec, int begin, int stages) {
  const int units = unit_count(spec.model);
  if (stages == 1) return stage_cost(spec, begin, units);
  double best = 1e300;
  for (int end = begin + 1; units - end >= stages - 1; ++end)
    best = std::min(best,
                    std::max(stage_cost(spec, begin, end), best_bottleneck(spec, end, stages - 1)));
  return best;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void check_valid(const job_spec& spec, const layout& shape, int workers) {
  CHECK(shape.worker_count() <= workers);
  CHECK(shape.worker_count() >= 1);
  CHECK(check_layout(spec, shape));
  std::vector<int> units(static_cast<std::size_t>(unit_count(spec.model)));
  REQUIRE(shape.unit_cuts.size() == static_cast<std::size_t>(shape.stage_count) + 1);
  for (int s = 0; s < shape.stage_count; ++s) {
    const int begin = shape.unit_cuts[static_cast<std::size_t>(s)];
    const int end = shape.unit_cuts[static_cast<std::size_t>(s) + 1];
    CHECK(begin < end);
    for (int u = begin; u < end; ++u) ++units.at(static_cast<std::size_t>(u));
  }
  for (int count : units) CHECK(count == 1);
  std::vector<int> leaves(static_cast<std::size_t>(spec.batch.leaf_count));
  REQUIRE(shape.leaf_cuts.size() == static_cast<std::size_t>(shape.replica_count) + 1);
  for (int r = 0; r < shape.replica_count; ++r) {
    const int begin = shape.leaf_cuts[static_cast<std::size_t>(r)];
    const int end = shape.leaf_cuts[static_cast<std::size_t>(r) + 1];
    CHECK(begin < end);
    for (int l = begin; l < end; ++l) ++leaves.at(static_cast<std::size_t>(l));
  }
  for (int count : leaves) CHECK(count == 1);
}

plan sample_plan() {
  plan p;
  p.job = job_id{12};
  p.generation = 3;
  p.shape = {2, 1, "1f1b", {0, 3, 6}, {0, 8}};
  p.members = {{worker_id{1}, "aa", "w1", "127.0.0.1", 7001},
               {worker_id{2}, "bb", "w2", "127.0.0.1", 7002}};
  return p;
}

}  // namespace

TEST_CASE("parameter counts are the published ones") {
  CHECK(parameter_count(gpt2().model) == 124'439'808);
  // OpenAI's GPT-2 sizes as Hugging Face's GPT2LMHeadModel counts them.
  CHECK(parameter_count({"", 24, 1024, 16, 4096, 50257, 1024, ""}) == 354'823'168);
  CHECK(parameter_count({"", 36, 1280, 20, 5120, 50257, 1024, ""}) == 774'030'080);
  CHECK(parameter_count({"", 48, 1600, 25, 6400, 50257, 1024, ""}) == 1'557'611'200);
}

TEST_CASE("units have names, and their parameters count the tied matrix twice") {
  const model_spec m = gpt2().model;
  CHECK(unit_count(m) == 14);
  CHECK(unit_name(m, 0) == "embed");
  CHECK(unit_name(m, 1) == "h.0");
  CHECK(unit_name(m, 12) == "h.11");
  CHECK(unit_name(m, 13) == "head");
  std::int64_t sum = 0;
  for (int u = 0; u < unit_count(m); ++u) sum += unit_parameter_count(m, u);
  CHECK(sum == 124'439'808 + 50257 * 768);
  CHECK(unit_parameter_count(m, 1) == 7'087'872);
}

TEST_CASE("unit costs are flops of a token") {
  const model_spec m = gpt2().model;
  // By hand: 6 * 12 C^2 + 6 C T with C 768, T 1024, and 6 V C.
  CHECK(unit_cost(m, 1024, 5) == 72.0 * 768 * 768 + 6.0 * 768 * 1024);
  CHECK(unit_cost(m, 1024, 13) == 6.0 * 50257 * 768);
  CHECK(unit_cost(m, 1024, 0) < 0.01 * unit_cost(m, 1024, 5));
}

TEST_CASE("every worker count has a valid layout, the same each time") {
  std::vector<job_spec> specs{gpt2(),      tiny(1, 1), tiny(1, 8),  tiny(2, 4),
                              tiny(4, 16), tiny(6, 8), tiny(12, 2), tiny(30, 32)};
  specs.push_back(explicit_job(2, 2, "shrink"));
  specs.push_back(explicit_job(4, 3, "replace"));
  specs.push_back(explicit_job(1, 6, "replace"));
  specs.push_back(explicit_job(6, 1, "shrink"));
  for (std::size_t i = 0; i < specs.size(); ++i)
    for (int workers = 1; workers <= 16; ++workers) {
      CAPTURE(i);
      CAPTURE(workers);
      auto shape = choose_layout(specs[i], workers);
      REQUIRE(shape);
      check_valid(specs[i], *shape, workers);
      auto again = choose_layout(specs[i], workers);
      REQUIRE(again);
      CHECK(*shape == *again);
    }
}

TEST_CASE("a worker count that divides the leaves leaves no worker idle") {
  for (int workers : {1, 2, 4, 8, 16}) {
    auto shape = choose_layout(gpt2(), workers);
    REQUIRE(shape);
    CHECK(shape->worker_count() == workers);
  }
}

TEST_CASE("with a single leaf the workers become stages") {
  auto shape = choose_layout(tiny(6, 1), 2);
  REQUIRE(shape);
  CHECK(shape->replica_count == 1);
}

TEST_CASE("an explicit layout is taken as given") {
  job_spec spec = explicit_job(3, 2, "wait");
  auto shape = choose_layout(spec, 9);
  REQUIRE(shape);
  CHECK(shape->stage_count == 3);
  CHECK(shape->replica_count == 2);
  check_valid(spec, *shape, 6);

  spec.parallelism.layers = {0, 3, 1};
  shape = choose_layout(spec, 6);
  REQUIRE(shape);
  CHECK(shape->unit_cuts == std::vector<int>{0, 1, 4, 6});
  spec.parallelism.layers = {2, 2, 0};
  shape = choose_layout(spec, 6);
  REQUIRE(shape);
  CHECK(shape->unit_cuts == std::vector<int>{0, 3, 5, 6});
}

TEST_CASE("an explicit layout with too few workers waits or shrinks as the job says") {
  auto waits = choose_layout(explicit_job(2, 2, "wait"), 3);
  REQUIRE(!waits);
  CHECK(waits.err().code == errc::unplaceable);
  CHECK(contains(waits.err().message, "2 stages x 2 replicas need 4 workers, 3 given"));

  for (const char* on_loss : {"replace", "shrink"}) {
    auto shrinks = choose_layout(explicit_job(2, 2, on_loss), 3);
    REQUIRE(shrinks);
    CHECK(shrinks->worker_count() <= 3);
  }

  job_spec least = explicit_job(2, 2, "shrink");
  least.elasticity.workers_min = 3;
  CHECK(choose_layout(least, 3));
  auto below = choose_layout(least, 2);
  REQUIRE(!below);
  CHECK(below.err().code == errc::unplaceable);
  CHECK(contains(below.err().message, "minimum of 3"));
}

TEST_CASE("jobs that no layout can serve are refused with the number that is wrong") {
  const auto refused = [](job_spec spec, const std::string& part) {
    auto shape = choose_layout(spec, 64);
    REQUIRE(!shape);
    CHECK(shape.err().code == errc::bad_spec);
    CHECK_MESSAGE(contains(shape.err().message, part), shape.err().message);
  };
  refused(explicit_job(7, 1, "shrink"), "parallelism.stages is 7; expected 1 to 6");
  refused(explicit_job(1, 9, "shrink"), "parallelism.replicas is 9; expected 1 to 8");
  refused(explicit_job(0, 1, "shrink"), "parallelism.stages is 0");
  for (const std::vector<int>& layers :
       {std::vector<int>{4}, {1, 2}, {2, 3}, {-1, 5}, {5, -1}, {1, 1, 2}}) {
    job_spec spec = explicit_job(2, 1, "shrink");
    spec.parallelism.layers = layers;
    refused(spec, "parallelism.layers");
  }
  job_spec empty_middle = explicit_job(3, 1, "shrink");
  empty_middle.parallelism.layers = {2, 0, 2};
  refused(empty_middle, "parallelism.layers [2, 0, 2]");
  job_spec leaves = tiny(2, 4);
  leaves.batch.leaf_count = 3;
  refused(leaves, "batch.leaves is 3");
  leaves.batch.leaf_count = 16;
  refused(leaves, "batch.leaves is 16");
  job_spec batch = tiny(2, 4);
  batch.batch.micro_sequences = 0;
  refused(batch, "batch");
  job_spec schedule = tiny(2, 4);
  schedule.parallelism.schedule = std::string("chimera");
  refused(schedule, "chimera");
  auto nobody = choose_layout(tiny(2, 4), 0);
  REQUIRE(!nobody);
  CHECK(nobody.err().code == errc::unplaceable);
}

TEST_CASE("the partition's bottleneck is the smallest there is") {
  for (int n_layer = 1; n_layer <= 9; ++n_layer)
    for (std::int64_t vocab : {256, 3000, 50257}) {
      job_spec spec = tiny(n_layer, 4);
      spec.model.vocab_size = vocab;
      for (int stages = 1; stages <= std::min(unit_count(spec.model), 6); ++stages) {
        CAPTURE(n_layer);
        CAPTURE(vocab);
        CAPTURE(stages);
        const std::vector<int> cuts = partition_units(spec, stages);
        CHECK(cuts.size() == static_cast<std::size_t>(stages) + 1);
        CHECK(bottleneck(spec, cuts) == best_bottleneck(spec, 0, stages));
      }
    }
}

TEST_CASE("stages beside the bottleneck are even too") {
  // Head of 50,257 x 64 outweighs all blocks, so any cut of the blocks has the same bottleneck.
  job_spec spec = tiny(8, 4);
  spec.model.vocab_size = 50257;
  const std::vector<int> cuts = partition_units(spec, 3);
  CHECK(cuts == std::vector<int>{0, 5, 9, 10});
}

TEST_CASE("leaves are dealt out evenly and in order") {
  CHECK(partition_leaves(8, 3) == std::vector<int>{0, 2, 5, 8});
  for (int leaves : {1, 2, 8, 32, 1024})
    for (int replicas = 1; replicas <= std::min(leaves, 40); ++replicas) {
      const std::vector<int> cuts = partition_leaves(leaves, replicas);
      int least = leaves, most = 0;
      for (std::size_t r = 0; r + 1 < cuts.size(); ++r) {
        least = std::min(least, cuts[r + 1] - cuts[r]);
        most = std::max(most, cuts[r + 1] - cuts[r]);
      }
      CHECK(cuts.front() == 0);
      CHECK(cuts.back() == leaves);
      CHECK(least >= 1);
      CHECK(most - least <= 1);
    }
}

TEST_CASE("a layout of another job is refused") {
  const job_spec spec = tiny(4, 8);
  layout shape{2, 2, "1f1b", {0, 3, 6}, {0, 4, 8}};
  CHECK(check_layout(spec, shape));
  const std::vector<std::function<void(layout&)>> damages{[](layout& l) { l.unit_cuts = {0, 3, 5}; },
                                                          [](layout& l) { l.unit_cuts = {0, 6, 6}; },
                                                          [](layout& l) { l.unit_cuts = {1, 3, 6}; },
                                                          [](layout& l) { l.unit_cuts = {0, 6}; },
                                                          [](layout& l) { l.unit_cuts = {}; },
                                                          [](layout& l) { l.leaf_cuts = {0, 4, 7}; },
                                                          [](layout& l) { l.leaf_cuts = {0, 0, 8}; },
                                                          [](layout& l) { l.leaf_cuts = {0, 9, 8}; },
                                                          [](layout& l) { l.stage_count = 0; },
                                                          [](layout& l) { l.stage_count = -1; },
                                                          [](layout& l) { l.stage_count = 1 << 30; },
                                                          [](layout& l) { l.replica_count = 1; },
                                                          [](layout& l) { l.replica_count = 1 << 30; },
                                                          [](layout& l) { l.schedule = std::string("x"); }};
  for (std::size_t i = 0; i < damages.size(); ++i) {
    layout damaged = shape;
    damages[i](damaged);
    auto refused = check_layout(spec, damaged);
    CAPTURE(i);
    REQUIRE(!refused);
    CHECK(refused.err().code == errc::bad_input);
  }
}

TEST_CASE("a plan's hash tells every field apart and is never zero") {
  const plan base = sample_plan();
  CHECK(plan_hash(base) != 0);
  CHECK(plan_hash(base) == plan_hash(sample_plan()));
  CHECK(identity(base) == generation_id{3, plan_hash(base)});
  const std::vector<std::function<void(plan&)>> changes{
      [](plan& p) { p.job = job_id{13}; }, [](plan& p) { p.generation = 4; },
      [](plan& p) { p.shape.schedule = std::string("gpipe"); },
      [](plan& p) {
        p.shape.unit_cuts = {0, 4, 6};
      },
      [](plan& p) {
        p.shape.leaf_cuts = {0, 16};
      },
      [](plan& p) { std::swap(p.shape.stage_count, p.shape.replica_count); },
      [](plan& p) { std::swap(p.members[0], p.members[1]); },
      [](plan& p) { p.members[0].worker = worker_id{9}; },
      [](plan& p) { p.members[0].process = std::string("ab"); },
      [](plan& p) { p.members[1].name = std::string("w3"); },
      [](plan& p) { p.members[1].link_host = std::string("127.0.0.2"); },
      [](plan& p) { p.members[1].link_port = 7003; }, [](plan& p) { p.members.pop_back(); },
      // The same characters, cut elsewhere.
      [](plan& p) {
        p.members[0].process = std::string("aaw"), p.members[0].name = std::string("1");
      }};
  std::vector<std::uint64_t> hashes{plan_hash(base)};
  for (const auto& change : changes) {
    plan changed = base;
    change(changed);
    hashes.push_back(plan_hash(changed));
  }
  std::sort(hashes.begin(), hashes.end());
  CHECK(std::adjacent_find(hashes.begin(), hashes.end()) == hashes.end());
}

TEST_CASE("memory of a tiny model, worked out by hand") {
  job_spec spec;
  spec.model = {"", 2, 4, 2, 16, 10, 8, "random"};  // C 4, H 2, F 16, V 10, context 8
  spec.batch = {8, 2, 3, 4};                        // M = 6 rows; 4 microbatches, 4 leaves
  // Embedding 40 + 32, each block 12*16 + 13*4 = 244, head 40 + 8; the tied 40 held once: 568.
  REQUIRE(parameter_count(spec.model) == 568);

  SUBCASE("one worker") {
    const layout one{1, 1, "1f1b", {0, 4}, {0, 4}};
    const stage_memory m = predict_memory(spec, one, 0, 0);
    CHECK(m.weights == 4 * 568);
    CHECK(m.optimizer == 8 * 568);
    // Two gradients of the tied matrix: 608; log2(4) + 1 leaf buffers and the kept one.
    CHECK(m.gradients == 4 * 608 * 4);
    // A row is 1; twice 9*4 + 16 + 2*16 + 4 + 2; 4*4 + 10 + 5.
    CHECK(m.activations == 4 * 6 * (1 + 2 * 90 + 31));
    CHECK(m.buffers == 0);
    CHECK(m.total() == 2272 + 4544 + 9728 + 5088);
  }
  SUBCASE("one worker under gpipe keeps all four microbatches") {
    const layout one{1, 1, "gpipe", {0, 4}, {0, 4}};
    CHECK(predict_memory(spec, one, 0, 0).activations == 4 * 5088);
  }
  SUBCASE("two stages of two replicas") {
    const layout four{2, 2, "1f1b", {0, 2, 4}, {0, 2, 4}};
    const stage_memory first = predict_memory(spec, four, 0, 1);
    CHECK(first.weights == 4 * 316);
    CHECK(first.optimizer == 8 * 316);
    CHECK(first.gradients == 4 * 316 * 3);
    CHECK(first.activations == 4 * 2 * 6 * (1 + 90 + 4));
    // One neighbour, 4 buffers of 24 floats; one block of the other replica for half of 316; the
    // tied matrix's gradient.
    CHECK(first.buffers == 4 * (4 * 24 + 158 + 40));
    const stage_memory last = predict_memory(spec, four, 1, 0);
    CHECK(last.weights == 4 * 292);
    CHECK(last.activations == 4 * 1 * 6 * (90 + 31));
    CHECK(last.buffers == 4 * (4 * 24 + 146 + 40));
  }
  SUBCASE("a range that is not aligned holds more leaf buffers") {
    spec.batch = {16, 2, 3, 8};
    const layout three{1, 3, "1f1b", {0, 4}, {0, 1, 7, 8}};
    // Leaves 1 to 6: after 1, 2+3 and 4+5 are whole, 6 makes a fourth; and the kept one.
    CHECK(predict_memory(spec, three, 0, 1).gradients == 4 * 608 * 5);
    CHECK(predict_memory(spec, three, 0, 0).gradients == 4 * 608 * 2);
  }
}

TEST_CASE("predicted activations are those that the schedule's replay counts") {
  for (const char* schedule : {"gpipe", "1f1b", "zb-h1"})
    for (int stages = 1; stages <= 6; ++stages)
      for (int replicas : {1, 2, 3, 8}) {
        const job_spec spec = tiny(4, 8);
        layout shape{stages, replicas, schedule, partition_units(spec, stages),
                     partition_leaves(8, replicas)};
        const int microbatches = 2 * (shape.leaf_cuts[1] - shape.leaf_cuts[0]);
        auto table = make_schedule(schedule, stages, microbatches);
        REQUIRE(table);
        auto facts = check_schedule(*table, microbatches);
        REQUIRE(facts);
        for (int s = 0; s < stages; ++s) {
          job_spec single = spec;
          single.batch.global_sequences = single.batch.micro_sequences;
          single.batch.leaf_count = 1;
          const layout alone{stages, 1, "gpipe", shape.unit_cuts, {0, 1}};
          const std::int64_t once = predict_memory(single, alone, s, 0).activations;
          CHECK(predict_memory(spec, shape, s, 0).activations ==
                once * facts->live_microbatches_max[static_cast<std::size_t>(s)]);
        }
      }
}
