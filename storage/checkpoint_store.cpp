#include "storage/checkpoint_store.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <system_error>

#include "storage/file.hpp"

namespace stagecoach {
namespace fs = std::filesystem;

namespace {

void add_unique(std::vector<fs::path>& list, const fs::path& path) {
  const auto normal = path.lexically_normal();
  if (std::find(list.begin(), list.end(), normal) == list.end()) list.push_back(normal);
}

void add_note(std::string& notes, std::string_view note) {
  if (!notes.empty()) notes += "; ";
  notes += note;
}

/// "<name>.<16 hex digits>.tmp", as temporary_name makes them.
bool is_temporary_name(std::string_view name) {
  if (name.size() < 22 || !name.ends_with(".tmp")) return false;
  const auto digits = name.substr(name.size() - 20, 16);
  return name[name.size() - 21] == '.' &&
         digits.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

std::int64_t age_ms(const fs::path& path) {
  std::error_code code;
  const auto written = fs::last_write_time(path, code);
  if (code) return 0;
  return std::chrono::duration_cast<std::chrono::milliseconds>(fs::file_time_type::clock::now() -
                                                               written)
      .count();
}

}  // namespace

const char* to_string(checkpoint_state state) {
  switch (state) {
    case checkpoint_state::verified:
      return "verified";
    case checkpoint_state::elsewhere:
      return "elsewhere";
    case checkpoint_state::bad:
      return "bad";
  }
  return "?";
}

struct checkpoint_store::found_manifests {
  struct one {
    manifest content;
    std::vector<fs::path> paths;
    std::string notes;
  };
  std::vector<one> good;          // newest first
  std::vector<bad_manifest> bad;  // copies that can't be read, whether or not another copy can
};

checkpoint_store::checkpoint_store(std::vector<fs::path> folders) {
  for (const auto& folder : folders) add_unique(folders_, folder);
  invariant(!folders_.empty(), "a checkpoint store has a folder");
}

result<checkpoint_store::found_manifests> checkpoint_store::find_manifests() const {
  found_manifests found;
  std::map<std::pair<std::uint64_t, std::uint64_t>, found_manifests::one> by_order;
  for (const auto& folder : folders_) {
    auto list = list_manifests(folder);
    if (!list) return list.err();
    for (auto& m : list->good) {
      auto& one = by_order[{m.content.incarnation, m.content.seq}];
      if (one.paths.empty())
        one.content = std::move(m.content);
      else if (one.content != m.content)
        add_note(one.notes, fmt::format("{} differs from {} and is not used", m.path.string(),
                                        one.paths.front().string()));
      one.paths.push_back(m.path);
    }
    for (auto& b : list->bad) found.bad.push_back(std::move(b));
  }
  for (auto at = by_order.rbegin(); at != by_order.rend(); ++at)
    found.good.push_back(std::move(at->second));
  for (auto& one : found.good)
    for (const auto& b : found.bad)
      if (b.seq == one.content.seq && b.step == one.content.step)
        add_note(one.notes, fmt::format("a copy of the manifest is damaged: {}", b.reason.message));
  return found;
}

std::vector<fs::path> checkpoint_store::places_of(const manifest_part& part,
                                                  const std::vector<fs::path>& manifests) const {
  std::vector<fs::path> places;
  for (const auto& m : manifests) add_unique(places, m.parent_path() / part.folder / part.file);
  for (const auto& c : part.copies) add_unique(places, fs::path(c.folder) / part.file);
  for (const auto& folder : folders_) {
    add_unique(places, folder / part.folder / part.file);
    add_unique(places, folder / part.file);
  }
  return places;
}

checkpoint_entry checkpoint_store::examine(const manifest& m, const fs::path& manifest_folder,
                                           check_depth depth) const {
  return examine_at(m, {manifest_folder / manifest_file_name(m.seq, m.step)}, depth);
}

checkpoint_entry checkpoint_store::examine_at(const manifest& m, std::vector<fs::path> manifests,
                                              check_depth depth) const {
  checkpoint_entry entry{m, std::move(manifests), {}, checkpoint_state::verified, {}};
  for (const auto& part : m.parts) {
    fs::path usable;
    bool may_be_elsewhere = false;
    std::string problems;
    for (const auto& place : places_of(part, entry.manifests)) {
      auto info = verify_part(place, depth, part.root_hash);
      if (info && info->bytes == part.bytes) {
        usable = place;
        break;
      }
      std::error_code code;
      if (!info && info.err().code == errc::not_found) {
        // A folder that only another host has. Where ours lack the file it is missing, not
        // elsewhere.
        may_be_elsewhere = may_be_elsewhere || !is_inside(place);
        continue;
      }
      add_note(problems, info ? fmt::format("{} has {} bytes, the manifest says {}", place.string(),
                                            info->bytes, part.bytes)
                              : info.err().message);
    }
    if (usable.empty()) {
      const bool is_gone = problems.empty();
      add_note(entry.reason, is_gone
                                 ? fmt::format("part {} is {}", part.file,
                                               may_be_elsewhere ? "not on this host" : "missing")
                                 : problems);
      if (!may_be_elsewhere)
        entry.state = checkpoint_state::bad;
      else if (entry.state == checkpoint_state::verified)
        entry.state = checkpoint_state::elsewhere;
    } else if (!problems.empty()) {
      add_note(entry.reason, fmt::format("another copy is used: {}", problems));
    }
    entry.parts.push_back(usable);
  }
  return entry;
}

result<std::vector<checkpoint_entry>> checkpoint_store::list(check_depth depth) const {
  auto found = find_manifests();
  if (!found) return found.err();
  std::vector<checkpoint_entry> entries;
  std::set<std::pair<std::uint64_t, std::int64_t>> readable;
  for (auto& one : found->good) {
    readable.insert({one.content.seq, one.content.step});
    entries.push_back(examine_at(one.content, one.paths, depth));
    if (!one.notes.empty()) add_note(entries.back().reason, one.notes);
  }
  for (const auto& b : found->bad) {
    if (readable.contains({b.seq, b.step})) continue;
    checkpoint_entry entry;
    entry.content.seq = b.seq;
    entry.content.step = b.step;
    entry.manifests = {b.path};
    entry.reason = b.reason.message;
    entries.push_back(std::move(entry));
  }
  return entries;
}

result<checkpoint_entry> checkpoint_store::verify(std::int64_t step, check_depth depth) const {
  auto found = find_manifests();
  if (!found) return found.err();
  for (const auto& one : found->good)
    if (one.content.step == step) {
      auto entry = examine_at(one.content, one.paths, depth);
      if (!one.notes.empty()) add_note(entry.reason, one.notes);
      return entry;
    }
  for (const auto& b : found->bad)
    if (b.step == step) {
      checkpoint_entry entry;
      entry.content.seq = b.seq;
      entry.content.step = step;
      entry.manifests = {b.path};
      entry.reason = b.reason.message;
      return entry;
    }
  return make_error(errc::not_found, "no checkpoint of step {} in {}", step,
                    folders_.front().string());
}

result<newest_good_checkpoint> checkpoint_store::newest_good(check_depth depth) const {
  auto found = find_manifests();
  if (!found) return found.err();
  newest_good_checkpoint newest;
  const auto skip_bad_over = [&](std::uint64_t seq) {
    // Their incarnation can't be read; the seq in the name tells that they were newer than this
    // one.
    for (const auto& b : found->bad)
      if (b.seq > seq && std::none_of(found->good.begin(), found->good.end(), [&](const auto& g) {
            return g.content.seq == b.seq && g.content.step == b.step;
          }))
        newest.skipped.push_back({b.step, b.seq, b.reason.message});
  };
  for (const auto& one : found->good) {
    auto entry = examine_at(one.content, one.paths, depth);
    if (entry.state == checkpoint_state::verified) {
      if (!one.notes.empty()) add_note(entry.reason, one.notes);
      skip_bad_over(one.content.seq);
      std::stable_sort(newest.skipped.begin(), newest.skipped.end(),
                       [](const auto& a, const auto& b) { return a.seq > b.seq; });
      newest.entry = std::move(entry);
      return newest;
    }
    newest.skipped.push_back({one.content.step, one.content.seq, entry.reason});
  }
  skip_bad_over(0);
  std::string reasons;
  for (const auto& s : newest.skipped)
    add_note(reasons, fmt::format("step {} (seq {}): {}", s.step, s.seq, s.reason));
  return make_error(errc::not_found, "no usable checkpoint in {}{}{}", folders_.front().string(),
                    reasons.empty() ? "" : ": ", reasons);
}

bool checkpoint_store::is_inside(const fs::path& path) const {
  std::error_code code;
  const auto real = fs::weakly_canonical(path.parent_path(), code);
  if (code) return false;
  for (const auto& folder : folders_) {
    const auto root = fs::weakly_canonical(folder, code);
    if (code) continue;
    const auto [end, ignored] = std::mismatch(root.begin(), root.end(), real.begin(), real.end());
    if (end == root.end()) return true;
  }
  return false;
}

result<void> checkpoint_store::delete_checkpoint(std::uint64_t incarnation, std::uint64_t seq) {
  auto found = find_manifests();
  if (!found) return found.err();
  const auto target = std::find_if(found->good.begin(), found->good.end(), [&](const auto& one) {
    return one.content.incarnation == incarnation && one.content.seq == seq;
  });
  if (target == found->good.end())
    return make_error(errc::not_found, "no checkpoint with seq {} of incarnation {} in {}", seq,
                      incarnation, folders_.front().string());
  const auto is_verified = [&](const found_manifests::one& one) {
    return examine_at(one.content, one.paths, check_depth::quick).state ==
           checkpoint_state::verified;
  };
  if (is_verified(*target) &&
      std::none_of(found->good.begin(), found->good.end(), [&](const found_manifests::one& one) {
        return &one != &*target && is_verified(one);
      }))
    return make_error(errc::conflict,
                      "step {} (seq {}) is the only good checkpoint in {}; it stays. fix: save "
                      "another first",
                      target->content.step, seq, folders_.front().string());

  // Manifests first: from here on the checkpoint does not exist, and what is left are orphans.
  std::vector<fs::path> manifests = target->paths;
  for (const auto& b : found->bad)
    if (b.seq == seq && b.step == target->content.step) manifests.push_back(b.path);
  std::set<fs::path> touched;
  for (const auto& path : manifests) {
    if (auto r = remove_file(path); !r) return r;
    touched.insert(path.parent_path());
  }
  for (const auto& folder : touched)
    if (auto r = sync_folder(folder); !r) return r;

  std::set<fs::path> named;
  for (const auto& one : found->good)
    if (&one != &*target)
      for (const auto& part : one.content.parts)
        for (const auto& place : places_of(part, one.paths)) named.insert(place);
  touched.clear();
  for (const auto& part : target->content.parts)
    for (const auto& place : places_of(part, target->paths)) {
      std::error_code code;
      if (named.contains(place) || !is_inside(place) || !fs::exists(place, code)) continue;
      if (auto r = remove_file(place); !r) return r;
      touched.insert(place.parent_path());
    }
  for (const auto& folder : touched)
    if (auto r = sync_folder(folder); !r) return r;
  return ok();
}

result<void> checkpoint_store::delete_damaged_manifests(std::uint64_t seq) {
  auto found = find_manifests();
  if (!found) return found.err();
  for (const auto& b : found->bad) {
    if (b.seq != seq) continue;
    if (auto r = remove_file(b.path); !r) return r;
    if (auto r = sync_folder(b.path.parent_path()); !r) return r;
  }
  return ok();
}

result<std::vector<orphan>> checkpoint_store::sweep_orphans(const sweep_rule& rule, bool remove) {
  auto found = find_manifests();
  if (!found) return found.err();
  std::set<fs::path> named;
  for (const auto& one : found->good)
    for (const auto& part : one.content.parts)
      for (const auto& place : places_of(part, one.paths)) named.insert(place);

  std::vector<orphan> orphans;
  for (const auto& folder : folders_) {
    std::error_code code;
    // Links to folders are not followed: they lead out of the store.
    fs::recursive_directory_iterator at(folder, code);
    if (code == std::errc::no_such_file_or_directory) continue;
    if (code) return errno_error(code.value(), "can't list", folder);
    for (const fs::recursive_directory_iterator end; at != end; at.increment(code)) {
      std::error_code ignored;
      if (at->is_symlink(ignored) || !at->is_regular_file(ignored)) continue;
      const fs::path path = at->path().lexically_normal();
      const auto name = path.filename().string();
      const auto ours = parse_part_file_name(name);
      std::string reason;
      if (is_temporary_name(name)) {
        if (ours && ours->generation < rule.generation)
          reason = fmt::format("temporary file of generation {}", ours->generation);
        else if (!ours && age_ms(path) >= rule.foreign_age_min_ms)
          reason = "old temporary file";
      } else if (ours && ours->generation < rule.generation && found->bad.empty() &&
                 !named.contains(path)) {
        reason = fmt::format("part of generation {} that no manifest names", ours->generation);
      }
      if (!reason.empty()) orphans.push_back({path, at->file_size(ignored), std::move(reason)});
    }
    if (code) return errno_error(code.value(), "can't list", folder);
  }
  std::sort(orphans.begin(), orphans.end(),
            [](const orphan& a, const orphan& b) { return a.path < b.path; });
  orphans.erase(std::unique(orphans.begin(), orphans.end(),
                            [](const orphan& a, const orphan& b) { return a.path == b.path; }),
                orphans.end());
  if (remove)
    for (const auto& o : orphans)
      if (auto r = remove_file(o.path); !r) return r.err();
  return orphans;
}

std::vector<retention_item> choose_deletions(std::vector<retention_item> items,
                                             retention_rule rule) {
  const auto order = [](const retention_item& i) { return std::tie(i.incarnation, i.seq); };
  std::sort(items.begin(), items.end(),
            [&](const auto& a, const auto& b) { return order(a) > order(b); });  // newest first
  std::vector<retention_item> gone;
  std::set<std::int64_t> kept_steps;  // multiples whose newest verified was seen
  int verified_count = 0;
  for (const auto& item : items) {
    bool is_kept = item.pinned || verified_count == 0;  // newer than, or the newest verified
    if (item.verified) {
      ++verified_count;
      is_kept = is_kept || verified_count <= rule.keep_last;
      if (rule.keep_every_steps > 0 && item.step % rule.keep_every_steps == 0)
        is_kept = kept_steps.insert(item.step).second || is_kept;
    }
    if (!is_kept) gone.push_back(item);
  }
  if (verified_count == 0) gone.clear();
  std::reverse(gone.begin(), gone.end());
  return gone;
}

}  // namespace stagecoach
