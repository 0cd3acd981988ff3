#include "model/schedule.hpp"

#include <doctest/doctest.h>

#include <algorithm>

using namespace stagecoach;

namespace {

schedule_table make(const std::string& schedule, int stages, int microbatches) {
  auto table = make_schedule(schedule, stages, microbatches);
  REQUIRE(table);
  return *table;
}

std::string text(const std::vector<instruction>& list) {
  static const char* const names[] = {"ra", "F", "sa", "rg", "B", "sg", "W", "reduce", "step"};
  std::string line;
  for (const instruction& i : list) {
    if (!line.empty()) line += ' ';
    line += names[static_cast<int>(i.what)];
    if (i.what < op::reduce) line += std::to_string(i.microbatch);
  }
  return line;
}

// The refusal of a table, empty if it is accepted.
std::string refusal(const schedule_table& table, int microbatches) {
  auto facts = check_schedule(table, microbatches);
  if (facts) return "";
  CHECK(facts.err().code == errc::bad_spec);
  return facts.err().message;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::size_t place(const std::vector<instruction>& list, instruction what) {
  const auto found = std::find(list.begin(), list.end(), what);
  REQUIRE(found != list.end());
  return static_cast<std::size_t>(found - list.begin());
}

void drop(std::vector<instruction>& list, instruction what) {
  list.erase(list.begin() + static_cast<std::ptrdiff_t>(place(list, what)));
}

}  // namespace

TEST_CASE("1f1b of two stages, as drawn by hand") {
  const schedule_table table = make("1f1b", 2, 3);
  CHECK(text(table[0]) == "F0 sa0 F1 sa1 rg0 B0 W0 F2 sa2 rg1 B1 W1 rg2 B2 W2 reduce step");
  CHECK(text(table[1]) == "ra0 F0 B0 sg0 W0 ra1 F1 B1 sg1 W1 ra2 F2 B2 sg2 W2 reduce step");
}

TEST_CASE("gpipe of two stages, as drawn by hand") {
  const schedule_table table = make("gpipe", 2, 2);
  CHECK(text(table[0]) == "F0 sa0 F1 sa1 rg0 B0 W0 rg1 B1 W1 reduce step");
  CHECK(text(table[1]) == "ra0 F0 ra1 F1 B0 sg0 W0 B1 sg1 W1 reduce step");
}

TEST_CASE("zb-h1 of two stages, as drawn by hand") {
  const schedule_table table = make("zb-h1", 2, 3);
  CHECK(text(table[0]) == "F0 sa0 F1 sa1 rg0 B0 W0 F2 sa2 rg1 B1 W1 rg2 B2 W2 reduce step");
  CHECK(text(table[1]) == "ra0 F0 B0 sg0 ra1 F1 B1 sg1 W0 ra2 F2 B2 sg2 W1 W2 reduce step");
}

TEST_CASE("zb-h1 cuts the bubble of 1f1b, as published and as another simulator has it") {
  // Makespans without a link, F = B = W: 3m + (p-1)(F+B-W) (Qi et al. 2023, table 2).
  for (int p = 1; p <= 8; ++p)
    for (int m = 2 * p; m <= 32; m += 5) {
      CAPTURE(p);
      CAPTURE(m);
      auto zb = check_schedule(make("zb-h1", p, m), m);
      REQUIRE(zb);
      CHECK(zb->makespan == doctest::Approx(3.0 * m + (p - 1)));
    }
  // Bubbles in per cent with a link of 0.05, from a simulator written apart from this one.
  const struct {
    int p, m;
    double link, bubble;
  } rows[] = {{4, 8, 0.05, 13.0},
              {4, 16, 0.05, 7.0},
              {4, 32, 0.05, 3.6},
              {8, 32, 0.05, 8.0},
              {4, 16, 0.5, 15.8}};
  for (const auto& row : rows) {
    const std::vector<stage_times> equal(static_cast<std::size_t>(row.p));
    auto facts = check_schedule(make("zb-h1", row.p, row.m), row.m, equal, row.link);
    REQUIRE(facts);
    CHECK(std::abs(facts->bubble * 100 - row.bubble) < 0.06);
  }
}

TEST_CASE("a single stage sends nothing") {
  CHECK(text(make("zb-h1", 1, 2)[0]) == "F0 B0 W0 F1 B1 W1 reduce step");
  CHECK(text(make("gpipe", 1, 2)[0]) == "F0 F1 B0 W0 B1 W1 reduce step");
  CHECK(text(make("1f1b", 1, 2)[0]) == "F0 B0 W0 F1 B1 W1 reduce step");
}

TEST_CASE("every table passes, and keeps the activations that its schedule is known for") {
  for (int stages = 1; stages <= 8; ++stages)
    for (int microbatches = 1; microbatches <= 16; ++microbatches)
      for (const std::string schedule : {"gpipe", "1f1b", "zb-h1"}) {
        CAPTURE(schedule);
        CAPTURE(stages);
        CAPTURE(microbatches);
        auto facts = check_schedule(make(schedule, stages, microbatches), microbatches);
        REQUIRE(facts);
        for (int s = 0; s < stages; ++s) {
          const int kept = schedule == "gpipe"  ? microbatches
                           : schedule == "1f1b" ? std::min(stages - s, microbatches)
                                                : std::min(stages, microbatches);
          CHECK(facts->live_microbatches_max[static_cast<std::size_t>(s)] == kept);
          CHECK(live_microbatches(schedule, stages, s, microbatches) == kept);
        }
      }
}

TEST_CASE("the bubble of equal stages is (p-1)/(m+p-1)") {
  // Huang et al. 2019 (GPipe) and Narayanan et al. 2021, with backward as one piece: the weight
  // gradient's time counted in backward_input.
  for (int p = 1; p <= 8; ++p)
    for (int m = 1; m <= 16; ++m)
      for (const char* schedule : {"gpipe", "1f1b"}) {
        const std::vector<stage_times> times(static_cast<std::size_t>(p), {1.0, 1.0, 0.0});
        auto facts = check_schedule(make(schedule, p, m), m, times);
        REQUIRE(facts);
        CAPTURE(schedule);
        CAPTURE(p);
        CAPTURE(m);
        CHECK(facts->bubble == doctest::Approx(double(p - 1) / (m + p - 1)));
        CHECK(facts->makespan == doctest::Approx(2.0 * (m + p - 1)));
      }
}

TEST_CASE("a gradient that leaves before the weight gradient shortens the drain") {
  for (int p = 1; p <= 6; ++p)
    for (int m = 1; m <= 12; ++m) {
      auto gpipe = check_schedule(make("gpipe", p, m), m);
      REQUIRE(gpipe);
      // Fill with m forwards behind it; then p-1 input gradients until the first stage starts its
      // m backwards.
      CHECK(gpipe->makespan == doctest::Approx((m + p - 1) + (p - 1) + 2.0 * m));
      auto one = check_schedule(make("1f1b", p, m), m);
      REQUIRE(one);
      CHECK(one->makespan <= 3.0 * (m + p - 1) + 1e-9);
      CHECK(one->makespan >= 3.0 * m);
    }
}

TEST_CASE("a slow link and a slow stage are felt") {
  // One microbatch through two stages: F, link, F, B, link, then B and W of the first stage.
  auto facts = check_schedule(make("1f1b", 2, 1), 1, {{1, 2, 3}, {10, 20, 30}}, 0.5);
  REQUIRE(facts);
  CHECK(facts->makespan == doctest::Approx(1 + 0.5 + 10 + 20 + 30));
  auto slow_first = check_schedule(make("1f1b", 2, 1), 1, {{10, 20, 30}, {1, 2, 3}}, 0.5);
  REQUIRE(slow_first);
  CHECK(slow_first->makespan == doctest::Approx(10 + 0.5 + 1 + 2 + 0.5 + 20 + 30));
  CHECK(slow_first->bubble == doctest::Approx(1 - 60 / 64.0));
}

TEST_CASE("planted errors are found") {
  schedule_table table = make("1f1b", 2, 3);
  REQUIRE(refusal(table, 3) == "");

  SUBCASE("weight gradients swapped") {
    auto& list = table[0];
    std::swap(list[place(list, {op::backward_weight, 0})],
              list[place(list, {op::backward_weight, 1})]);
    CHECK(contains(refusal(table, 3), "stage 0"));
    CHECK(contains(refusal(table, 3), "expected microbatch 0 (microbatch order)"));
  }
  SUBCASE("weight gradients out of order although their inputs are there") {
    table = {{{op::forward, 0},
              {op::forward, 1},
              {op::backward_input, 0},
              {op::backward_input, 1},
              {op::backward_weight, 1},
              {op::backward_weight, 0},
              {op::reduce},
              {op::step}}};
    CHECK(contains(refusal(table, 2), "instruction 4 (backward_weight 1)"));
  }
  SUBCASE("a dropped activation send") {
    drop(table[0], {op::send_activation, 2});
    CHECK(contains(refusal(table, 3), "stage"));
  }
  SUBCASE("a dropped gradient send") {
    drop(table[1], {op::send_gradient, 2});
    CHECK(contains(refusal(table, 3), "never sent: stage 1 ends without it"));
  }
  SUBCASE("a dropped receive") {
    drop(table[1], {op::receive_activation, 1});
    CHECK(contains(refusal(table, 3), "its activation was not received before"));
  }
  SUBCASE("sends in another order than receives") {
    auto& list = table[0];
    std::swap(list[place(list, {op::send_activation, 0})],
              list[place(list, {op::forward, 1})]);  // F0 F1 sa0 sa1
    std::swap(list[2], list[3]);                     // F0 F1 sa1 sa0
    CHECK(contains(refusal(table, 3), "the channel delivers microbatch 1 next"));
  }
  SUBCASE("a second send that nobody receives") {
    table = make("gpipe", 2, 1);
    table[1].insert(table[1].end() - 2, {op::send_gradient, 0});
    CHECK(contains(refusal(table, 1), "a second send"));
  }
  SUBCASE("a send that nobody receives") {
    drop(table[0], {op::receive_gradient, 2});
    CHECK(contains(refusal(table, 3), "output gradient was not received"));
  }
  SUBCASE("a deadlock") {
    // The first stage wants gradient 0 before it sends activation 1; the last wants activation 1
    // before it makes gradient 0.
    table[0] = {{op::forward, 0},
                {op::send_activation, 0},
                {op::receive_gradient, 0},
                {op::backward_input, 0},
                {op::backward_weight, 0},
                {op::forward, 1},
                {op::send_activation, 1},
                {op::receive_gradient, 1},
                {op::backward_input, 1},
                {op::backward_weight, 1},
                {op::reduce},
                {op::step}};
    table[1] = make("gpipe", 2, 2)[1];
    const std::string message = refusal(table, 2);
    CHECK(contains(message, "deadlock"));
    CHECK(contains(message, "stage 0 at instruction 2 (receive_gradient 0)"));
    CHECK(contains(message, "stage 1 at instruction 2 (receive_activation 1)"));
  }
  SUBCASE("a table for fewer microbatches") {
    CHECK(contains(refusal(table, 4), "3 of 4 microbatches"));
  }
  SUBCASE("a table for more microbatches") {
    CHECK(contains(refusal(table, 2), "microbatch 2 of 2"));
  }
  SUBCASE("no reduce") {
    drop(table[0], {op::reduce});
    CHECK(contains(refusal(table, 3), "comes before reduce"));
  }
  SUBCASE("no step") {
    drop(table[1], {op::step});
    CHECK(contains(refusal(table, 3), "no step at its end"));
  }
  SUBCASE("a stage without instructions") {
    table[1].clear();
    CHECK(refusal(table, 3) != "");
  }
  SUBCASE("a send over the last stage") {
    table[1].insert(table[1].begin() + 2, {op::send_activation, 0});
    CHECK(contains(refusal(table, 3), "the last stage has nobody to send to"));
  }
  SUBCASE("no stage, too many stages, times of another size") {
    CHECK(refusal({}, 3) != "");
    CHECK(refusal(schedule_table(65), 3) != "");
    CHECK(!check_schedule(table, 3, {{1, 1, 1}}));
  }
}

TEST_CASE("dropping, doubling or exchanging any one instruction is found") {
  // Exchanges of neighbours that are harmless (a send and an independent computation) are not
  // errors.
  for (const char* schedule : {"gpipe", "1f1b", "zb-h1", "zb:4.1,3.0,1.2"}) {
    const schedule_table good = make(schedule, 3, 4);
    for (std::size_t s = 0; s < good.size(); ++s)
      for (std::size_t i = 0; i < good[s].size(); ++i) {
        CAPTURE(schedule);
        CAPTURE(s);
        CAPTURE(i);
        schedule_table dropped = good;
        dropped[s].erase(dropped[s].begin() + static_cast<std::ptrdiff_t>(i));
        CHECK(refusal(dropped, 4) != "");
        schedule_table doubled = good;
        doubled[s].insert(doubled[s].begin() + static_cast<std::ptrdiff_t>(i), good[s][i]);
        CHECK(refusal(doubled, 4) != "");
        for (std::size_t j = i + 1; j < good[s].size(); ++j) {
          if (good[s][i].what != good[s][j].what) continue;
          schedule_table exchanged = good;
          std::swap(exchanged[s][i], exchanged[s][j]);
          CHECK(refusal(exchanged, 4) != "");
        }
      }
  }
}

TEST_CASE("a late weight gradient shows as more live activations than 1f1b claims") {
  schedule_table table = {{{op::forward, 0},
                           {op::backward_input, 0},
                           {op::forward, 1},
                           {op::backward_input, 1},
                           {op::backward_weight, 0},
                           {op::backward_weight, 1},
                           {op::reduce},
                           {op::step}}};
  auto facts = check_schedule(table, 2);
  REQUIRE(facts);
  CHECK(facts->live_microbatches_max == std::vector<int>{2});
  auto claimed = check_schedule(make("1f1b", 1, 2), 2);
  REQUIRE(claimed);
  CHECK(claimed->live_microbatches_max == std::vector<int>{1});
}

TEST_CASE("a member of the family is its rhythm, stage by stage") {
  CHECK(text(make("zb:2.0,1.1", 2, 3)[0]) == text(make("zb-h1", 2, 3)[0]));
  CHECK(text(make("zb:2.0,1.1", 2, 3)[1]) == text(make("zb-h1", 2, 3)[1]));
  CHECK(make("zb:3.0,2.0,1.0", 3, 5) == make("1f1b", 3, 5));
  CHECK(schedule_name({{2, 0}, {1, 1}}) == "zb:2.0,1.1");
  for (int w = 1; w <= 4; ++w)
    for (int d = 0; d <= 3; ++d)
      for (int m = 1; m <= 6; ++m) {
        const std::string name = schedule_name({{w, d}});
        auto facts = check_schedule(make(name, 1, m), m);
        REQUIRE(facts);
        CHECK(facts->live_microbatches_max[0] == live_microbatches(name, 1, 0, m));
      }
  for (const char* wrong : {"zb:", "zb:2", "zb:2.", "zb:.1", "zb:2.0", "zb:2.0,1.1,",
                            "zb:2.0,1.1,1.1", "zb:0.0,1.0", "zb:2.-1,1.0", "zb:2.0 ,1.0",
                            "zb:9999999999.0,1.0", "zb:2.0,1.1x", "zb", "zb:2000000.0,1.0"}) {
    CAPTURE(wrong);
    CHECK(!check_schedule_name(wrong, 2));
    CHECK(!make_schedule(wrong, 2, 4));
  }
}

TEST_CASE("the search finds zb-h1 or better within what may be kept") {
  const auto bubble = [](const std::string& name, const std::vector<stage_times>& times, int m,
                         double link) {
    auto facts = check_schedule(make(name, static_cast<int>(times.size()), m), m, times, link);
    REQUIRE(facts);
    return facts->makespan;
  };
  const auto scaled = [](std::initializer_list<double> by) {
    std::vector<stage_times> times;
    for (const double x : by) times.push_back({x, x, x});
    return times;
  };
  const std::vector<std::vector<stage_times>> cases{
      scaled({1, 1, 1, 1}),
      scaled({1, 1, 1, 1.5}),
      scaled({0.9, 1.1, 0.8, 1.2}),
      scaled({1, 1, 1.5, 1}),
      {{1, 1.3, 0.8}, {2, 2.5, 1.2}, {1, 1, 1}, {1.5, 2, 2}}};
  for (const auto& times : cases)
    for (const double link : {0.05, 0.5}) {
      CAPTURE(link);
      auto found = search_schedule(16, times, link, {4, 4, 4, 4});
      REQUIRE(found);
      CAPTURE(found->name);
      CHECK(found->facts.makespan <= bubble("zb-h1", times, 16, link) + 1e-9);
      CHECK(found->facts.makespan == doctest::Approx(bubble(found->name, times, 16, link)));
      for (int s = 0; s < 4; ++s) CHECK(live_microbatches(found->name, 4, s, 16) <= 4);
      // Twice the memory lets it hide a slow link.
      auto roomy = search_schedule(16, times, link, {8, 8, 8, 8});
      REQUIRE(roomy);
      CHECK(roomy->facts.makespan <= found->facts.makespan + 1e-9);
      // As little memory as 1F1B takes gives 1F1B at the least.
      auto tight = search_schedule(16, times, link, {4, 3, 2, 1});
      REQUIRE(tight);
      CHECK(tight->facts.makespan <= bubble("1f1b", times, 16, link) + 1e-9);
    }
  auto slow_link = search_schedule(16, scaled({1, 1, 1, 1}), 0.5, {8, 8, 8, 8});
  REQUIRE(slow_link);
  CHECK(slow_link->facts.makespan < 0.95 * bubble("zb-h1", scaled({1, 1, 1, 1}), 16, 0.5));
  auto least = search_schedule(4, scaled({1, 1}), 0, {1, 1});
  REQUIRE(least);
  CHECK(least->name == "zb:1.0,1.0");
  CHECK(!search_schedule(4, scaled({1, 1}), 0, {1}));
  CHECK(!search_schedule(4, scaled({1, 1}), 0, {1, 0}));
  CHECK(!search_schedule(0, scaled({1, 1}), 0, {1, 1}));
}

TEST_CASE("an impossible schedule is refused by name") {
  auto unknown = make_schedule("chimera", 2, 4);
  REQUIRE(!unknown);
  CHECK(contains(unknown.err().message, "chimera"));
  CHECK(!make_schedule("1f1b", 0, 4));
  CHECK(!make_schedule("1f1b", 65, 4));
  CHECK(!make_schedule("1f1b", 2, 0));
  CHECK(!make_schedule("1f1b", 2, 1 << 30));
}
