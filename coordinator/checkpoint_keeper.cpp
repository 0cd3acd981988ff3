#include "coordinator/checkpoint_keeper.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <system_error>

#include "coordinator/cluster_machine.hpp"
#include "coordinator/wire.hpp"
#include "storage/file.hpp"
#include "storage/hash.hpp"
#include "storage/manifest.hpp"

namespace stagecoach {
namespace fs = std::filesystem;

std::string job_identity(const job_spec& spec) { return content_hash(to_json_text(spec)); }

namespace {

std::string extra_of(const manifest& m, const std::string& name) {
  const auto found = m.extra.find(name);
  return found == m.extra.end() ? std::string() : found->second;
}

std::uint64_t bits_of(const manifest& m, const std::string& name) {
  const auto text = extra_of(m, name);
  if (text.size() != 16) return 0;
  std::uint64_t bits = 0;
  for (const char c : text)
    bits = bits << 4 |
           static_cast<std::uint64_t>(c >= 'a' && c <= 'f' ? c - 'a' + 10 : (c - '0') & 15);
  return bits;
}

std::string part_key(const char* what, std::size_t part) {
  return fmt::format("{}.{}", what, part);
}

/// The same save: what a manifest says of it apart from who wrote it and when.
bool is_same_save(const manifest& a, const manifest& b) {
  if (a.job != b.job || a.step != b.step || a.seq != b.seq || a.weights_hash != b.weights_hash)
    return false;
  return std::equal(a.parts.begin(), a.parts.end(), b.parts.begin(), b.parts.end(),
                    [](const manifest_part& x, const manifest_part& y) {
                      return x.file == y.file && x.bytes == y.bytes && x.root_hash == y.root_hash;
                    });
}

bool is_one_of(const std::vector<std::uint64_t>& list, std::uint64_t one) {
  return std::find(list.begin(), list.end(), one) != list.end();
}

/// Known to be bad, or of a generation that went on from what is not trusted.
bool is_excluded(const distrust& d, const manifest& m) {
  const bool is_after = static_cast<std::uint64_t>(m.step) > d.step;
  return is_one_of(d.bad_saves, m.seq) || (m.generation < d.fence && is_after);
}

std::vector<fs::path> folders_of(const job_place& job) {
  std::vector<fs::path> folders{job.folder};
  if (!job.copies.empty()) folders.push_back(job.copies);
  return folders;
}

std::string describe(const skipped_checkpoint& s) {
  return fmt::format("checkpoint of step {} (seq {}) is not usable: {}", s.step, s.seq, s.reason);
}

}  // namespace

checkpoint_store checkpoint_keeper::store_of(const job_place& job) const {
  return checkpoint_store(folders_of(job));
}

std::string checkpoint_keeper::folder_of(const job_place& job, const checkpoint_entry& entry,
                                         std::size_t part) const {
  if (part < entry.parts.size() && !entry.parts[part].empty())
    return entry.parts[part].parent_path().string();
  const fs::path folder = entry.content.parts[part].folder;
  if (folder.is_absolute()) return folder.string();
  return (job.folder / folder).lexically_normal().string();
}

checkpoint_found checkpoint_keeper::find(const job_place& job,
                                         const actions::find_checkpoint& wanted) const {
  checkpoint_found answer;
  answer.job = job.id;
  answer.request = wanted.request;
  const auto store = store_of(job);
  // Listed quickly first: only the one that is taken is read whole.
  auto entries = store.list(check_depth::quick);
  if (!entries) {
    answer.notes.push_back(entries.err().message);
    return answer;
  }
  const auto identity = job_identity(job.spec);
  for (auto& entry : *entries) {
    const auto step = static_cast<std::uint64_t>(entry.content.step);
    const auto skip = [&](const std::string& why) {
      answer.notes.push_back(describe({entry.content.step, entry.content.seq, why}));
    };
    if (step > wanted.step_max) continue;
    if (is_excluded(wanted.distrusted, entry.content)) {
      skip("its weights may be corrupt, says the record");
      continue;
    }
    if (entry.state == checkpoint_state::bad) {
      skip(entry.reason);
      continue;
    }
    // A newer program may write the same spec in more words; the moment of the submission tells,
    // too.
    const bool is_this_job =
        entry.content.job_identity == identity ||
        (job.submitted_unix_ms != 0 &&
         extra_of(entry.content, "submitted_unix_ms") == std::to_string(job.submitted_unix_ms));
    if (!is_this_job) {
      skip(fmt::format("it is of another job ({}), or its job file was changed",
                       entry.content.job_name));
      continue;
    }
    if (entry.state == checkpoint_state::verified && !entry.manifests.empty()) {
      // Examined and not looked up by step: two saves may have one step.
      auto deep =
          store.examine(entry.content, entry.manifests.front().parent_path(), check_depth::deep);
      if (deep.state == checkpoint_state::bad) {
        skip(deep.reason);
        continue;
      }
      entry.parts = std::move(deep.parts);
    }
    checkpoint_facts facts;
    const auto& m = entry.content;
    facts.step = step;
    facts.seq = m.seq;
    facts.chain = bits_of(m, "chain");
    facts.loss.bits = bits_of(m, "loss");
    facts.weights_hash = m.weights_hash;
    facts.generation = m.generation;
    for (std::size_t i = 0; i < m.parts.size(); ++i) {
      part_record part;
      part.file = m.parts[i].file;
      part.folder = folder_of(job, entry, i);
      part.bytes = m.parts[i].bytes;
      part.root_hash = m.parts[i].root_hash;
      part.tensors = m.parts[i].tensors;
      part.host = extra_of(m, part_key("host", i));
      part.weights_hash = extra_of(m, part_key("weights", i));
      part.state_hash = extra_of(m, part_key("state", i));
      facts.parts.push_back(std::move(part));
    }
    answer.newest = std::move(facts);
    break;
  }
  return answer;
}

manifest_written checkpoint_keeper::write(const job_place& job,
                                          const actions::write_manifest& wanted) const {
  manifest_written answer{job.id, wanted.step, false, {}};
  const auto& folder = job.folder;
  manifest m;
  m.job = job.id;
  m.job_name = job.spec.name;
  m.job_identity = job_identity(job.spec);
  m.step = static_cast<std::int64_t>(wanted.step);
  m.seq = wanted.seq;
  m.generation = wanted.generation;
  m.plan_hash = job.plan_hash;
  m.incarnation = job.incarnation;
  m.weights_hash = wanted.weights_hash;
  m.layout = job.layout;
  m.created_unix_ms = job.unix_ms;
  m.extra["chain"] = hex16(wanted.chain);
  m.extra["loss"] = hex16(wanted.loss.bits);
  m.extra["submitted_unix_ms"] = std::to_string(job.submitted_unix_ms);
  if (wanted.is_final) m.extra["final"] = "true";
  for (const auto& from : wanted.parts) {
    const auto same = std::find_if(m.parts.begin(), m.parts.end(),
                                   [&](const manifest_part& p) { return p.file == from.file; });
    if (same != m.parts.end()) {  // another place of one file
      same->copies.push_back({from.host, from.folder});
      continue;
    }
    manifest_part part;
    part.file = from.file;
    // Relative where the part lies beside its manifest, so that the folder may move as a whole.
    std::error_code code;
    const bool is_beside = fs::path(from.folder).lexically_normal() == folder.lexically_normal() &&
                           fs::exists(folder / from.file, code);
    if (!is_beside) part.folder = from.folder;
    part.bytes = from.bytes;
    part.root_hash = from.root_hash;
    part.tensors = from.tensors;
    const auto i = m.parts.size();
    m.extra[part_key("host", i)] = from.host;
    m.extra[part_key("weights", i)] = from.weights_hash;
    m.extra[part_key("state", i)] = from.state_hash;
    m.bytes += from.bytes;
    m.parts.push_back(std::move(part));
  }
  // Written before a restart: its words stay, or the two copies would differ.
  for (const auto& place : folders_of(job)) {
    auto there = read_manifest(place / manifest_file_name(m.seq, m.step));
    if (there && is_same_save(*there, m)) {
      m = *there;
      break;
    }
  }
  for (const auto& place : folders_of(job))
    if (auto written = write_manifest(place, m); !written) {
      answer.problem = written.err().message;
      return answer;
    }
  answer.is_ok = true;
  return answer;
}

checkpoints_retired checkpoint_keeper::retire(const job_place& job,
                                              const actions::retire_checkpoints& wanted,
                                              std::vector<std::string>& problems) const {
  checkpoints_retired answer;
  answer.job = job.id;
  auto store = store_of(job);
  auto entries = store.list(check_depth::quick);
  if (!entries) {
    problems.push_back(entries.err().message);
    return answer;
  }
  std::vector<retention_item> items;
  std::uint64_t newest_generation = 0;
  for (const auto& entry : *entries) {
    const bool is_usable =
        entry.state != checkpoint_state::bad && !is_excluded(wanted.distrusted, entry.content);
    items.push_back({entry.content.step, entry.content.incarnation, entry.content.seq, is_usable,
                     is_usable && is_one_of(wanted.kept_steps,
                                            static_cast<std::uint64_t>(entry.content.step))});
    if (is_usable) newest_generation = std::max(newest_generation, entry.content.generation);
  }
  std::set<std::pair<std::uint64_t, std::uint64_t>> gone;
  for (const auto& item : choose_deletions(items, {wanted.keep_last, wanted.keep_every_steps})) {
    auto deleted = store.delete_checkpoint(item.incarnation, item.seq);
    if (deleted)
      gone.insert({item.incarnation, item.seq});
    else
      problems.push_back(deleted.err().message);
  }
  for (const auto& item : items) {
    if (!gone.contains({item.incarnation, item.seq})) continue;
    const bool is_step_left = std::any_of(items.begin(), items.end(), [&](const auto& other) {
      return other.step == item.step && !gone.contains({other.incarnation, other.seq});
    });
    if (!is_step_left) answer.steps.push_back(static_cast<std::uint64_t>(item.step));
  }
  std::sort(answer.steps.begin(), answer.steps.end());
  if (newest_generation > 0) {
    auto swept = store.sweep_orphans({.generation = newest_generation}, true);
    if (!swept) problems.push_back(swept.err().message);
  }
  return answer;
}

result<std::vector<checkpoint_entry>> checkpoint_keeper::list(const job_place& job,
                                                              check_depth depth) const {
  return store_of(job).list(depth);
}

result<checkpoint_entry> checkpoint_keeper::verify(const job_place& job, std::uint64_t step,
                                                   check_depth depth) const {
  return store_of(job).verify(static_cast<std::int64_t>(step), depth);
}

}  // namespace stagecoach
