#include "coordinator/vote_log.hpp"

#include <algorithm>
#include <optional>
#include <string>

#include "coordinator/run_history.hpp"
#include "coordinator/wire.hpp"

namespace stagecoach {

result<vote_log> read_vote_log(const kv& store, job_id job, std::uint64_t from, std::uint64_t to,
                               std::size_t rows_max) {
  vote_log log;
  std::optional<error> problem;
  std::uint64_t next = std::max<std::uint64_t>(1, from);
  const std::string first = keys::series(job, next);
  const std::string prefix = first.substr(0, first.size() - 16);
  auto scanned = store.scan(
      prefix,
      [&](std::string_view key, std::string_view text) {
        auto row = from_json_text<step_report>(std::string(text));
        if (!row) {
          problem = make_error(errc::corrupt, "row {} of the vote log can't be read: {}", key,
                               row.err().message);
          return false;
        }
        if (row->step > to) return false;
        if (log.rows.size() >= rows_max) {
          log.is_cut = true;
          return false;
        }
        if (row->step > next) log.gaps.emplace_back(next, row->step - 1);
        next = row->step + 1;
        log.rows.push_back(std::move(*row));
        return true;
      },
      first);
  if (!scanned) return scanned.err();
  if (problem) return *problem;
  return log;
}

result<std::vector<generation_record>> read_generations(const kv& store, job_id job) {
  std::vector<generation_record> list;
  const std::string first = keys::generation(job, 0);
  auto scanned =
      store.scan(first.substr(0, first.size() - 16), [&](std::string_view, std::string_view text) {
        auto row = from_json_text<generation_record>(std::string(text));
        if (row) list.push_back(std::move(*row));
        return true;
      });
  if (!scanned) return scanned.err();
  return list;
}

namespace {

result<std::vector<part_record>> parts_at(const checkpoint_keeper& keeper, const job_place& job,
                                          std::uint64_t step) {
  auto entry = keeper.verify(job, step, check_depth::quick);
  if (!entry) return entry.err();
  if (entry->state == checkpoint_state::bad)
    return make_error(errc::corrupt, "the checkpoint of step {} is not usable: {}", step,
                      entry->reason);
  std::vector<part_record> parts;
  for (std::size_t i = 0; i < entry->content.parts.size(); ++i) {
    const manifest_part& from = entry->content.parts[i];
    part_record part;
    part.file = from.file;
    part.folder = keeper.folder_of(job, *entry, i);
    part.bytes = from.bytes;
    part.root_hash = from.root_hash;
    part.tensors = from.tensors;
    parts.push_back(std::move(part));
  }
  return parts;
}

}  // namespace

result<audit> gather_window(const kv& store, const checkpoint_keeper& keeper, const job_place& job,
                            std::uint64_t from, std::uint64_t to) {
  auto log = read_vote_log(store, job.id, std::max<std::uint64_t>(1, from), to + 1, to - from + 2);
  if (!log) return log.err();
  const bool is_whole = log->gaps.empty() && !log->rows.empty() && log->rows.back().step >= to;
  if (!is_whole)
    return make_error(errc::not_found, "the vote log lacks rows of steps {} to {}",
                      log->gaps.empty() ? to : log->gaps.front().first, to);
  audit a;
  a.job = value(job.id);
  a.spec = job.spec;
  a.step = from;
  a.last = to;
  if (from > 0) {
    a.chain = log->rows.front().chain;
    log->rows.erase(log->rows.begin());
    auto parts = parts_at(keeper, job, from);
    if (!parts) return parts.err();
    a.parts = std::move(*parts);
  }
  a.log = std::move(log->rows);
  auto after = parts_at(keeper, job, to);
  if (!after) return after.err();
  a.after = std::move(*after);
  auto generations = read_generations(store, job.id);
  if (!generations) return generations.err();
  for (const generation_record& g : *generations) {
    // What it began with was computed before it; what an older one made later was done again.
    while (!a.layouts.empty() && a.layouts.back().first_step > g.step) a.layouts.pop_back();
    a.layouts.push_back({g.step + 1, g.shape.shape});
  }
  // Those of the window: the one in force at its beginning, and later ones.
  while (a.layouts.size() > 1 && a.layouts[1].first_step <= from + 1)
    a.layouts.erase(a.layouts.begin());
  while (!a.layouts.empty() && a.layouts.back().first_step > to + 1) a.layouts.pop_back();
  return a;
}

}  // namespace stagecoach
