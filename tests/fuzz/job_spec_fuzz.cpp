// libFuzzer's door to the job file reader: the text before the first zero byte is the file, each
// one after it an override. Asserts what parse_job_spec promises; the sanitizers watch the rest.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "config/job_spec_yaml.hpp"
#include "config/result.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace stagecoach;
  std::vector<std::string> parts(1);
  for (std::size_t i = 0; i < size; ++i) {
    if (data[i] == 0 && parts.size() < 8)
      parts.emplace_back();
    else
      parts.back() += static_cast<char>(data[i]);
  }
  const std::vector<std::string> overrides(parts.begin() + 1, parts.end());
  const spec_result first = parse_job_spec(parts[0], "fuzz.yaml", overrides);
  invariant(first.spec.has_value() == first.problems.empty(), "a spec, or problems, not both");
  invariant(first.problems.size() <= 100, "the list of problems is bounded");
  const std::string shown = format_problems(first.problems);
  for (const char c : shown)
    invariant(c == '\n' || static_cast<unsigned char>(c) >= 0x20, "problems are printable");
  if (first.spec) {
    const spec_result again = parse_job_spec(write_job_spec_yaml(*first.spec), "resolved.yaml");
    invariant(again.spec && *again.spec == *first.spec, "the resolved form reads back as itself");
  }
  return 0;
}
