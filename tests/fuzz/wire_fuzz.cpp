// Any bytes as a control message, in both directions. What holds: no crash; what is accepted can be
// said again and then reads as itself; a plan that is accepted fits together.
//
// With libFuzzer define STAGECOACH_LIBFUZZER; without, main() mutates seeds: wire_fuzz [count]
// [seed].
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "coordinator/wire.hpp"

using namespace stagecoach;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

void check_plan(const to_worker& m) {
  const auto* c = std::get_if<commit>(&m);
  if (c == nullptr) return;
  const layout& shape = c->shape.shape;
  require(c->shape.members.size() == static_cast<std::size_t>(shape.worker_count()),
          "a member for every seat");
  require(shape.unit_cuts.back() == unit_count(c->spec.model), "every unit is in a stage");
  (void)plan_hash(c->shape);
}

void try_text(const std::string& text) {
  if (const auto m = decode_to_worker(text)) {
    check_plan(*m);
    const std::string again = encode(*m);
    const auto second = decode_to_worker(again);
    require(second && encode(*second) == again, "what is said reads as itself");
  }
  if (const auto m = decode_to_coordinator(text)) {
    const std::string again = encode(*m);
    const auto second = decode_to_coordinator(again);
    require(second && encode(*second) == again, "what is said reads as itself");
  }
  (void)from_json_text<job_record>(text);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try_text(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}

#ifndef STAGECOACH_LIBFUZZER
int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20'000;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);

  commit c;
  c.spec.model = {"", 2, 8, 2, 32, 16, 8, "random", 1, 0.02};
  c.shape.shape = {2, 1, "1f1b", {0, 2, 4}, {0, 8}};
  c.shape.members.resize(2);
  c.transfers.push_back({"wte.weight", 0, 1});
  c.roll_forward = vote_result{};
  prepared p;
  p.tensors = {"wte.weight"};
  p.last_vote = vote_result{};
  const std::vector<std::string> seeds = {encode(to_worker(c)),
                                          encode(to_worker(welcome{})),
                                          encode(to_worker(prepare{})),
                                          encode(to_coordinator(hello{})),
                                          encode(to_coordinator(p)),
                                          encode(to_coordinator(progress{1, 2, 3, {{}, {}}})),
                                          encode(to_coordinator(part_saved{}))};
  const std::string pieces[] = {
      "[",    "{",       "]",    "}", "\"", "-1",  "1e400", "18446744073709551616",
      "null", "\\ud800", "\xff", ",", ":",  "1.5", "true",  "[[[[[[[["};
  for (std::uint64_t i = 0; i < count; ++i) {
    std::string text = seeds[random() % seeds.size()];
    for (std::uint64_t n = random() % 6; n > 0; --n) {
      const std::size_t at = text.empty() ? 0 : random() % text.size();
      switch (random() % 4) {
        case 0:
          text.erase(at, 1 + random() % 8);
          break;
        case 1:
          text.insert(at, pieces[random() % std::size(pieces)]);
          break;
        case 2:
          if (!text.empty()) text[at] = static_cast<char>(random());
          break;
        default: {  // a number becomes another
          const std::size_t digit = text.find_first_of("0123456789", at);
          if (digit != std::string::npos)
            text.replace(digit, 1, pieces[random() % std::size(pieces)]);
        }
      }
    }
    try_text(text);
  }
  return 0;
}
#endif
