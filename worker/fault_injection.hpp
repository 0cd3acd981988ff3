// Faults on purpose, for tests: a bit that flips in memory, a trainer that hangs.
//
// Given on the command line of one worker; nothing else knows, as with a cosmic ray. Each acts
// once: a step that is done again after a recovery is done without it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "config/result.hpp"
#include "model/stage.hpp"

namespace stagecoach {

struct injected_fault {
  enum class kind {
    flip,   // after `step` was applied, the highest mantissa bit of the tensor's middle element
    stall,  // in the middle of `step`'s compute the trainer's thread sleeps for ever
  };
  kind what = kind::flip;
  std::uint64_t step = 0;
  std::string tensor;  // flip only; empty: the first that the stage holds
};

/// "flip@STEP", "flip@STEP:TENSOR", "stall@STEP". Fails: usage.
result<injected_fault> parse_fault(std::string_view text);

class fault_injection {
 public:
  fault_injection() = default;
  explicit fault_injection(std::vector<injected_fault> faults) : faults_(std::move(faults)) {}

  bool is_empty() const { return faults_.empty(); }
  /// Acts on what is planned for the moment after `step` was applied to `model`.
  void after_apply(std::uint64_t step, stage& model);
  /// Does not return where a stall is planned for `step`: only SIGKILL ends it.
  void within_compute(std::uint64_t step);

 private:
  bool take(injected_fault::kind what, std::uint64_t step, injected_fault& out);
  std::vector<injected_fault> faults_;
};

}  // namespace stagecoach
