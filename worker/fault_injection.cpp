#include "worker/fault_injection.hpp"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <thread>

#include "config/log.hpp"

namespace stagecoach {

result<injected_fault> parse_fault(std::string_view text) {
  const auto wrong = [text] {
    return make_error(errc::usage,
                      "--inject {}: expected flip@STEP, flip@STEP:TENSOR or stall@STEP. fix: "
                      "--inject flip@40",
                      text);
  };
  injected_fault fault;
  const auto at = text.find('@');
  const std::string_view kind = text.substr(0, at);
  if (at == std::string_view::npos || (kind != "flip" && kind != "stall")) return wrong();
  fault.what = kind == "flip" ? injected_fault::kind::flip : injected_fault::kind::stall;
  const std::string_view rest = text.substr(at + 1);
  const auto colon = rest.find(':');
  const std::string_view digits = rest.substr(0, colon);
  const auto [end, code] =
      std::from_chars(digits.data(), digits.data() + digits.size(), fault.step);
  if (code != std::errc() || end != digits.data() + digits.size() || fault.step == 0)
    return wrong();
  if (colon != std::string_view::npos) {
    fault.tensor = rest.substr(colon + 1);
    if (fault.tensor.empty() || fault.what == injected_fault::kind::stall) return wrong();
  }
  return fault;
}

bool fault_injection::take(injected_fault::kind what, std::uint64_t step, injected_fault& out) {
  const auto found = std::find_if(faults_.begin(), faults_.end(), [&](const injected_fault& f) {
    return f.what == what && f.step == step;
  });
  if (found == faults_.end()) return false;
  out = std::move(*found);
  faults_.erase(found);
  return true;
}

void fault_injection::after_apply(std::uint64_t step, stage& model) {
  injected_fault fault;
  while (take(injected_fault::kind::flip, step, fault)) {
    if (fault.tensor.empty()) fault.tensor = model.tensors().front().name;
    const auto& all = model.tensors();
    const auto info = std::find_if(all.begin(), all.end(),
                                   [&](const tensor_info& t) { return t.name == fault.tensor; });
    if (info == all.end()) {
      log_event(level::warn, "fault_not_injected",
                {{"step", step}, {"tensor", fault.tensor}, {"reason", "not held here"}});
      continue;
    }
    constexpr std::uint32_t high_mantissa_bit = 1u << 22;
    const std::int64_t element = info->count() / 2;
    float* at = model.parameter(fault.tensor) + element;
    std::uint32_t bits = 0;
    std::memcpy(&bits, at, sizeof bits);
    bits ^= high_mantissa_bit;
    std::memcpy(at, &bits, sizeof bits);
    log_event(level::warn, "fault_injected",
              {{"fault", "flip"}, {"step", step}, {"tensor", fault.tensor}, {"element", element}});
  }
}

void fault_injection::within_compute(std::uint64_t step) {
  injected_fault fault;
  if (!take(injected_fault::kind::stall, step, fault)) return;
  log_event(level::warn, "fault_injected", {{"fault", "stall"}, {"step", step}});
  // No condition variable, no flag: a thread that is stuck in a driver does not answer either.
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

}  // namespace stagecoach
