#include "coordinator/trace_desk.hpp"

#include <doctest/doctest.h>

using namespace stagecoach;

namespace {

const job_id job{7};
const worker_id first_worker{1}, second_worker{2}, joiner{3};

std::vector<member_view> two_stages() {
  std::vector<member_view> members(3);
  members[0] = {first_worker, "w1", "a", 0, 0, "running", 10};
  members[1] = {second_worker, "w2", "b", 1, 0, "running", 10};
  members[2] = {joiner, "w3", "b", -1, -1, "joining", 0};
  return members;
}

traced part(std::uint64_t request, std::uint64_t step) {
  traced x;
  x.job = value(job);
  x.request = request;
  x.step = step;
  x.spans = {1, 0, 0, 100};
  return x;
}

}  // namespace

TEST_CASE("a trace asks its members and is whole when each has told each step") {
  trace_desk desk;
  auto orders = desk.begin(job, 12, 13, two_stages(), 2, 10);
  REQUIRE(orders);
  REQUIRE(orders->size() == 4);  // the order and a clock's question each; none for who joins
  const trace* t = desk.find(job);
  REQUIRE(t != nullptr);
  CHECK(t->members.at(second_worker).rank == 1);
  CHECK(t->missing() == std::vector<std::string>{"w1: steps 12, 13", "w2: steps 12, 13"});
  desk.take(first_worker, part(t->request, 12));
  desk.take(first_worker, part(t->request, 13));
  desk.take(second_worker, part(t->request, 13));
  CHECK(t->missing() == std::vector<std::string>{"w2: steps 12"});
  desk.take(second_worker, part(t->request, 12));
  CHECK(t->missing().empty());

  SUBCASE("what nobody asked for is dropped") {
    desk.take(second_worker, part(t->request, 14));
    desk.take(joiner, part(t->request, 12));
    desk.take(second_worker, part(t->request + 1, 12));
    CHECK(t->members.at(second_worker).steps.size() == 2);
    CHECK(t->members.count(joiner) == 0);
  }
  SUBCASE("a new trace takes its place, and parts of the old one come too late") {
    const auto old = t->request;
    REQUIRE(desk.begin(job, 20, 20, two_stages(), 2, 15));
    desk.take(first_worker, part(old, 20));
    CHECK(desk.find(job)->missing().size() == 2);
  }
}

TEST_CASE("clocks are laid on each other by the answer that came back soonest") {
  trace_desk desk;
  REQUIRE(desk.begin(job, 12, 12, two_stages(), 2, 10));
  const trace::member& m = desk.find(job)->members.at(first_worker);
  CHECK(m.error_ns == -1);
  // Its clock is 5,000 ahead; the first answer was slow on its way back.
  auto more = desk.take(first_worker, clock_answer{1, 1'000, 6'100}, 2'000);
  REQUIRE(more.size() == 1);
  CHECK(more[0].first == first_worker);
  CHECK(std::get<clock_question>(more[0].second).number == 2);
  CHECK(m.offset_ns == 6'100 - 1'500);
  CHECK(m.error_ns == 500);
  desk.take(first_worker, clock_answer{2, 3'000, 8'050}, 3'100);
  CHECK(m.offset_ns == 5'000);
  CHECK(m.error_ns == 50);
  desk.take(first_worker, clock_answer{3, 4'000, 9'400}, 4'800);  // worse: changes nothing
  CHECK(m.offset_ns == 5'000);
  desk.take(first_worker, clock_answer{3, 9'000, 9'400}, 4'800);  // from the future
  CHECK(m.error_ns == 50);
  CHECK(desk.take(first_worker, clock_answer{trace_desk::questions, 5'000, 10'010}, 5'020).empty());
}

TEST_CASE("steps that have passed, and too many of them, are refused") {
  trace_desk desk;
  CHECK(desk.begin(job, 10, 12, two_stages(), 2, 10).err().message.find("has passed") !=
        std::string::npos);
  CHECK(!desk.begin(job, 0, 12, two_stages(), 2, 0));
  CHECK(!desk.begin(job, 13, 12, two_stages(), 2, 0));
  CHECK(!desk.begin(job, 1, 1 + trace_desk::steps_max, two_stages(), 2, 0));
  CHECK(desk.begin(job, 1, trace_desk::steps_max, two_stages(), 2, 0));
  CHECK(desk.begin(job, 12, 12, {}, 2, 10).err().code == errc::conflict);
}
