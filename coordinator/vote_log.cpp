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

}  // namespace stagecoach
