// A feed between real link servers: what is followed is, bit for bit, what is given.
#include "worker/feeder.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <mutex>
#include <set>

#include "model/stage.hpp"
#include "worker/vote.hpp"

using namespace stagecoach;
using namespace std::chrono_literals;

namespace {

job_spec tiny() {
  job_spec spec;
  spec.model = {"tiny", 2, 16, 2, 64, 64, 16, "random", 1234, 0.02};
  spec.batch = {4, 1, 16, 4};
  spec.stop_steps = 100;
  return spec;
}

feed order_of(const std::vector<std::uint16_t>& ports, std::uint64_t step_bytes_max) {
  feed order;
  order.job = 1;
  order.generation = 3;
  order.request = 77;
  order.spec = tiny();
  order.step_bytes_max = step_bytes_max;
  for (std::size_t i = 0; i < ports.size(); ++i) {
    plan_member m;
    m.worker = static_cast<worker_id>(i + 1);
    m.process = fmt::format("{:032x}", i + 1);
    m.name = fmt::format("w{}", i + 1);
    m.link_host = "127.0.0.1";
    m.link_port = ports[i];
    order.participants.push_back(m);
  }
  return order;
}

/// State that is stepped by hand: every element of every tensor has a gradient of its own.
struct hand_run {
  std::unique_ptr<backend> device = make_cpu_backend(1);
  job_spec spec = tiny();
  shadow_state state{*device};
  std::map<int, std::vector<float>> gradients;
  std::uint64_t step = 0;

  hand_run() {
    for (const tensor_info& t : all_tensors(spec.model)) {
      state.add(t);
      initialise(state.parameter(t.name), t, spec.model);
      gradients[t.index].resize(static_cast<std::size_t>(t.count()));
    }
  }
  vote_result advance(std::uint64_t order_id) {
    ++step;
    vote_result v;
    v.step = step;
    v.chain = 1000 + step;
    v.lr = exact_double::of(1e-2);
    v.bias1 = exact_double::of(1 - std::pow(0.9, static_cast<double>(step)));
    v.bias2 = exact_double::of(1 - std::pow(0.95, static_cast<double>(step)));
    v.grad_scale = exact_double::of(1.0);
    v.finite = step % 5 != 0;  // a step that all skip
    if (order_id != 0) {
      v.orders = order_bit(order_kind::feed);
      v.order_ids = {order_id};
    }
    if (!v.finite) return v;
    for (const tensor_info& t : all_tensors(spec.model)) {
      auto& g = gradients[t.index];
      for (std::size_t i = 0; i < g.size(); ++i)
        g[i] = std::sin(static_cast<float>(i + 31 * step + 7 * static_cast<std::size_t>(t.index)));
      state.apply(t, g.data(), scalars_of(v, spec));
    }
    return v;
  }
  feed_source source(int tensor) {
    const std::string name = all_tensors(spec.model)[static_cast<std::size_t>(tensor)].name;
    return {state.parameter(name), state.moment1(name), state.moment2(name),
            gradients.at(tensor).data()};
  }
};

struct listener {
  std::mutex mutex;
  std::set<int> ready;
  int fed_count = 0;
  std::string problem;
  std::function<void(to_coordinator)> ear(int who) {
    return [this, who](const to_coordinator& m) {
      const std::lock_guard lock(mutex);
      if (std::holds_alternative<feed_ready>(m)) ready.insert(who);
      if (const auto* x = std::get_if<fed>(&m)) {
        if (x->problem.empty())
          ++fed_count;
        else
          problem = x->problem;
      }
    };
  }
  template <class F>
  bool wait(F is) {
    for (int i = 0; i < 1000; ++i) {
      {
        const std::lock_guard lock(mutex);
        if (is()) return true;
      }
      std::this_thread::sleep_for(5ms);
    }
    return false;
  }
};

}  // namespace

TEST_CASE("the schedule gives every element once, in pieces of about the wanted size") {
  feed order = order_of({1, 2, 3}, 12'000);
  for (const tensor_info& t : all_tensors(order.spec.model)) {
    order.transfers.push_back({t.name, t.index % 2, 2});
  }
  const auto pieces = feed_pieces(order);
  REQUIRE(pieces);
  std::map<int, std::int64_t> given;
  std::map<std::pair<int, std::uint64_t>, std::int64_t> by_round;
  for (const feed_piece& p : *pieces) {
    CHECK(p.begin == given[p.tensor]);
    given[p.tensor] += p.count;
    by_round[{p.from, p.round}] += 12 * p.count;
  }
  for (const tensor_info& t : all_tensors(order.spec.model)) CHECK(given[t.index] == t.count());
  for (const auto& [at, bytes] : by_round) CHECK(bytes <= 12'000 + 12 * 16);
  order.transfers.push_back({"wte.weight", 1, 2});
  CHECK(feed_pieces(order).err().code == errc::bad_input);  // twice
  order.transfers = {{"wte.weight", 0, 3}};
  CHECK(feed_pieces(order).err().code == errc::bad_input);  // nobody
}

TEST_CASE("what two givers feed is at each step what they hold, skipped steps too") {
  std::vector<std::unique_ptr<link_server>> servers;
  std::vector<std::uint16_t> ports;
  for (int i = 0; i < 3; ++i) {
    servers.push_back(std::move(*link_server::start({})));
    ports.push_back(servers.back()->port());
  }
  feed order = order_of(ports, 3'000);
  const auto all = all_tensors(order.spec.model);
  for (const tensor_info& t : all) order.transfers.push_back({t.name, t.index % 2, 2});
  hand_run run;
  auto device = make_cpu_backend(1);
  listener heard;
  std::vector<std::unique_ptr<feeder>> parts;
  for (int i = 0; i < 3; ++i) {
    auto made =
        feeder::start(*servers[static_cast<std::size_t>(i)], order, i, *device, heard.ear(i));
    REQUIRE(made);
    parts.push_back(std::move(*made));
  }
  REQUIRE(heard.wait([&] { return heard.ready.size() == 3; }));
  const auto find = [&run](int tensor) { return run.source(tensor); };
  std::uint64_t rounds = 0;
  const auto pieces = feed_pieces(order);
  REQUIRE(pieces);
  for (const feed_piece& p : *pieces) rounds = std::max(rounds, p.round);
  CHECK(rounds > 10);
  for (std::uint64_t i = 0; i < rounds + 8; ++i) {
    const vote_result v = run.advance(i == 3 ? 77 : 0);  // steps before the order are none of it
    for (auto& part : parts) part->give(v, find);
  }
  REQUIRE(heard.wait([&] { return heard.fed_count == 1; }));
  CHECK_FALSE(parts[0]->take(run.step, 1s));  // it is given nothing
  auto taken = parts[2]->take(run.step, 5s);
  REQUIRE(taken);
  CHECK(taken->step == run.step);
  CHECK(taken->chain == 1000 + run.step);
  CHECK(to_string(taken->state->state_hash()) == to_string(run.state.state_hash()));
  CHECK(heard.problem.empty());
}

TEST_CASE("a giver that ends is noticed by who it feeds; what is not whole is not taken") {
  auto first = std::move(*link_server::start({}));
  auto second = std::move(*link_server::start({}));
  feed order = order_of({first->port(), second->port()}, 3'000);
  for (const tensor_info& t : all_tensors(order.spec.model))
    order.transfers.push_back({t.name, 0, 1});
  hand_run run;
  auto device = make_cpu_backend(1);
  listener heard;
  auto giver = std::move(*feeder::start(*first, order, 0, *device, heard.ear(0)));
  auto taker = std::move(*feeder::start(*second, order, 1, *device, heard.ear(1)));
  REQUIRE(heard.wait([&] { return heard.ready.size() == 2; }));
  giver->give(run.advance(77), [&run](int tensor) { return run.source(tensor); });
  giver.reset();
  REQUIRE(heard.wait([&] { return !heard.problem.empty(); }));
  CHECK_FALSE(taker->take(0, 0ms));
}
