#include "kernels/cpu/instruction_set.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <dnnl.hpp>
#include <mutex>
#include <optional>

#include "config/result.hpp"

namespace stagecoach {
namespace {

// Not an error value: make_cpu_backend returns a backend, and a caller that may choose has asked
// config.
[[noreturn]] void stop(const std::string& message) {
  fmt::print(stderr, "{}\n", message);
  std::abort();
}

instruction_set parse(const std::string& name, const char* where) {
  if (name == "avx2") return instruction_set::avx2;
  if (name == "avx512") return instruction_set::avx512;
  stop(fmt::format("{}: found instruction set '{}', expected avx2 or avx512. fix: name one of them",
                   where, name));
}

}  // namespace

const char* to_string(instruction_set set) {
  return set == instruction_set::avx2 ? "avx2" : "avx512";
}

instruction_set settle_instruction_set(const std::string& wanted) {
  static std::mutex mutex;
  static std::optional<instruction_set> settled;
  const std::lock_guard lock(mutex);

  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    stop(
        "cpu backend: this CPU has no AVX2 and FMA, which are the least it needs. fix: run on "
        "another host");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  instruction_set set = has_avx512 ? instruction_set::avx512 : instruction_set::avx2;
  if (!wanted.empty()) {
    set = parse(wanted, "cpu backend");
    if (set == instruction_set::avx512 && !has_avx512)
      stop("cpu backend: avx512 was asked for, and this CPU has AVX2 at most. fix: ask for avx2");
  }
  const char* cap = std::getenv("STAGECOACH_MAX_ISA");
  if (cap != nullptr && *cap != '\0' && parse(cap, "STAGECOACH_MAX_ISA") == instruction_set::avx2)
    set = instruction_set::avx2;

  if (settled) {
    if (!wanted.empty() && *settled != set)
      stop(fmt::format(
          "cpu backend: {} was asked for, but this process already computes with {}. fix: one "
          "instruction set per process",
          to_string(set), to_string(*settled)));
    return *settled;
  }
  // Both sets are set and not only the lower one: a newer CPU would take yet another path, and one
  // device class is one path (DESIGN 4).
  const auto status = dnnl::set_max_cpu_isa(
      set == instruction_set::avx2 ? dnnl::cpu_isa::avx2 : dnnl::cpu_isa::avx512_core);
  if (status != dnnl::status::success)
    stop(fmt::format(
        "cpu backend: oneDNN was used before its instruction set could be settled (status "
        "{}). fix: make the backend before any other use of oneDNN",
        static_cast<int>(status)));
  settled = set;
  return set;
}

}  // namespace stagecoach
