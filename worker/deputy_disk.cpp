#include "worker/deputy_disk.hpp"

#include <chrono>
#include <type_traits>

#include "config/log.hpp"
#include "storage/file.hpp"

namespace stagecoach {

void deputy_disk::carry_out(const worker_actions::store& x) {
  job_place place;
  place.id = x.place.job;
  place.spec = x.place.spec;
  place.incarnation = x.place.incarnation;
  place.plan_hash = x.place.plan_hash;
  place.layout = x.place.layout;
  place.folder = x.place.folder;
  place.unix_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                      std::chrono::system_clock::now().time_since_epoch())
                      .count();
  thread_.post([this, place, what = x.what] {
    std::visit(
        [&]<class T>(const T& wanted) {
          worker_events::stored done;
          if constexpr (std::is_same_v<T, actions::find_checkpoint>) {
            done.answer = keeper_.find(place, wanted);
          } else if constexpr (std::is_same_v<T, actions::write_manifest>) {
            done.answer = keeper_.write(place, wanted);
          } else {
            std::vector<std::string> problems;
            done.answer = keeper_.retire(place, wanted, problems);
            for (const std::string& p : problems)
              log_event(level::warn, "retention_problem", {{"text", p}});
          }
          answer_(worker_event{std::move(done)});
        },
        what);
  });
}

void deputy_disk::carry_out(const worker_actions::make_tie_break& x) {
  thread_.post([this, x] {
    const bool is_ours = take_tie_break(x.folder, x.file, x.content);
    answer_(worker_event{worker_events::tie_break_made{x.generation, is_ours}});
  });
}

bool take_tie_break(const std::filesystem::path& folder, const std::string& file,
                    const std::string& content) {
  const auto path = folder / file;
  if (const auto made = create_file(path)) {
    return write_exactly(*made, path, content.data(), content.size(), 0).has_value() &&
           sync_file(*made, path).has_value() && sync_folder(folder).has_value();
  }
  const auto there = read_whole_file(path, 4096);
  return there && *there == content;
}

}  // namespace stagecoach
