#include "coordinator/trace_desk.hpp"

#include <fmt/format.h>

#include <cstddef>

namespace stagecoach {

std::vector<std::string> trace::missing() const {
  std::vector<std::string> words;
  for (const auto& [id, m] : members) {
    std::string steps;
    for (std::uint64_t s = first; s <= last; ++s)
      if (m.steps.count(s) == 0) steps += fmt::format("{}{}", steps.empty() ? "" : ", ", s);
    if (!steps.empty()) words.push_back(fmt::format("{}: steps {}", m.name, steps));
  }
  return words;
}

result<trace_desk::messages> trace_desk::begin(job_id job, std::uint64_t first, std::uint64_t last,
                                               const std::vector<member_view>& members, int stages,
                                               std::uint64_t step_now) {
  if (first < 1 || last < first || last - first >= steps_max)
    return make_error(errc::usage, "steps {}:{}; expected FIRST:LAST, {} steps at most", first,
                      last, steps_max);
  if (first <= step_now)
    return make_error(errc::usage,
                      "step {} has passed, the job is at step {}: what was done is not recorded. "
                      "fix: steps that are to come, or --next N",
                      first, step_now);
  trace t;
  t.request = next_request_;
  t.first = first;
  t.last = last;
  for (const member_view& m : members) {
    if (m.stage < 0) continue;  // a joiner
    t.members[m.worker] = {m.name, m.host, m.replica * stages + m.stage, m.stage, m.replica, 0,
                           -1,     {}};
  }
  if (t.members.empty())
    return make_error(errc::conflict, "the job has no workers now; nothing can be traced");
  if (t.members.size() * (last - first + 1) > parts_max)
    return make_error(errc::usage, "{} steps of {} workers; {} in all at most. fix: fewer steps",
                      last - first + 1, t.members.size(), parts_max);
  messages out;
  for (const auto& [id, m] : t.members) {
    out.emplace_back(id, trace_steps{static_cast<std::uint64_t>(job), t.request, first, last});
    out.emplace_back(id, clock_question{1, 0});
  }
  ++next_request_;
  traces_[job] = std::move(t);
  return out;
}

trace_desk::messages trace_desk::take(worker_id from, const clock_answer& x, std::int64_t now_ns) {
  const std::int64_t way_ns = now_ns - x.asked_ns;
  if (way_ns < 0) return {};
  for (auto& [job, t] : traces_) {
    const auto found = t.members.find(from);
    if (found == t.members.end()) continue;
    trace::member& m = found->second;
    if (m.error_ns >= 0 && way_ns / 2 >= m.error_ns) continue;
    m.error_ns = way_ns / 2;
    m.offset_ns = x.worker_ns - (x.asked_ns + way_ns / 2);
  }
  if (x.number >= questions) return {};
  return {{from, clock_question{x.number + 1, 0}}};
}

void trace_desk::take(worker_id from, const traced& x) {
  const auto found = traces_.find(static_cast<job_id>(x.job));
  if (found == traces_.end() || found->second.request != x.request) return;
  trace& t = found->second;
  const auto member = t.members.find(from);
  if (member == t.members.end() || x.step < t.first || x.step > t.last) return;
  std::size_t held = x.spans.size() / 4;
  for (const auto& [id, m] : t.members)
    for (const auto& [step, one] : m.steps) held += one.spans.size() / 4;
  traced kept = x;
  if (held > spans_max) {
    kept.spans.clear();
    kept.is_cut = true;
  }
  member->second.steps[x.step] = std::move(kept);
}

const trace* trace_desk::find(job_id job) const {
  const auto found = traces_.find(job);
  return found == traces_.end() ? nullptr : &found->second;
}

}  // namespace stagecoach
