#include "coordinator/state_folder.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <system_error>

#include "config/limits.hpp"
#include "coordinator/cluster_machine.hpp"
#include "coordinator/wire.hpp"
#include "storage/file.hpp"
#include "storage/json_text.hpp"
#include "storage/kv_rocksdb.hpp"
#include "storage/manifest.hpp"

namespace stagecoach {
namespace fs = std::filesystem;

fs::path state_paths::job_file(job_id id) const {
  return jobs_folder() / (to_string(id) + ".json");
}

fs::path state_paths::manifests_folder(job_id id) const {
  return state_ / "manifests" / to_string(id);
}

fs::path state_paths::checkpoint_root(const job_spec& spec) const {
  return spec.checkpoint.store.empty() ? state_ / "checkpoints" : fs::path(spec.checkpoint.store);
}

fs::path state_paths::checkpoint_folder(job_id id, const job_spec& spec) const {
  const auto name = to_string(id) + "-" + spec.name;
  if (spec.checkpoint.store.empty()) return checkpoint_root(spec) / name;
  return checkpoint_root(spec) / (name + "-" + store_id_.substr(0, 8));
}

namespace {

constexpr std::string_view job_area = "job/";
constexpr std::string_view generation_area = "/generation/";
// A job's row holds its file as text (1 MiB at most) and once more resolved.
constexpr std::int64_t copy_bytes_max = 64 << 20;

std::uint64_t hex_at(std::string_view key, std::size_t begin) {
  std::uint64_t number = 0;
  for (const char c : key.substr(begin, 16))
    number = number << 4 |
             static_cast<std::uint64_t>(c >= 'a' && c <= 'f' ? c - 'a' + 10 : (c - '0') & 15);
  return number;
}

std::string new_store_id() {
  std::random_device entropy;
  std::string text;
  for (int i = 0; i < 4; ++i) text += fmt::format("{:08x}", entropy());
  return text;
}

bool is_copied(std::string_view key) {
  return key.starts_with(job_area) || key.starts_with("worker/") || key == keys::meta();
}

/// All rows of the areas that the machines are made of.
result<std::vector<store_row>> read_rows(const kv& store) {
  std::vector<store_row> rows;
  for (const char* area : {"meta/", "worker/", "job/", "ckpt/", "event/"}) {
    auto scanned = store.scan(area, [&rows](std::string_view key, std::string_view value) {
      rows.emplace_back(key, value);
      return true;
    });
    if (!scanned) return scanned.err();
  }
  return rows;
}

/// {"rows": {key: value}}; values are JSON themselves.
std::vector<store_row> read_copy(const fs::path& file, std::vector<std::string>& notes) {
  std::vector<store_row> rows;
  auto text = read_whole_file(file, copy_bytes_max);
  if (!text) {
    if (text.err().code != errc::not_found) notes.push_back(text.err().message);
    return rows;
  }
  auto json = parse_json(*text, file.string());
  const bool is_ours =
      json && json->is_object() && json->contains("rows") && json->at("rows").is_object();
  if (!is_ours) {
    notes.push_back(fmt::format("{}: not a copy of records ({}); skipped", file.string(),
                                json ? "no \"rows\"" : json.err().message));
    return rows;
  }
  for (const auto& item : json->at("rows").items())
    if (is_copied(item.key())) rows.emplace_back(item.key(), item.value().dump());
  return rows;
}

std::uint64_t bits_of(const manifest& m, const char* name) {
  const auto found = m.extra.find(name);
  return found == m.extra.end() || found->second.size() != 16 ? 0 : hex_at(found->second, 0);
}

void put(std::map<std::string, std::string>& rows, std::string key, std::string value) {
  rows[std::move(key)] = std::move(value);
}

}  // namespace

// ---- second copies
// ---------------------------------------------------------------------------------
record_copies::record_copies(state_paths paths, const std::vector<store_row>& rows)
    : paths_(std::move(paths)) {
  for (const auto& [key, value] : rows) take(kv_write::put(key, value));
  changed_.clear();
}

fs::path record_copies::file_of(std::string_view key) const {
  if (key.starts_with("worker/") || key == keys::meta()) return paths_.cluster_file();
  if (key.starts_with(job_area) && key.size() >= job_area.size() + 16)
    return paths_.job_file(job_id{hex_at(key, job_area.size())});
  return {};
}

void record_copies::take(const kv_write& row) {
  const auto path = file_of(row.key);
  if (path.empty()) return;
  auto& rows = files_[path];
  // The newest generation is enough to find the running workers again; a job may have thousands.
  if (row.key.find(generation_area) != std::string::npos)
    std::erase_if(rows, [&](const auto& r) {
      return r.first.find(generation_area) != std::string::npos && r.first < row.key;
    });
  if (row.what == kv_write::kind::erase)
    rows.erase(row.key);
  else
    rows[row.key] = row.value;
  changed_.insert(path);
}

result<void> record_copies::apply(const std::vector<kv_write>& rows) {
  for (const auto& row : rows) take(row);
  return write_changed();
}

result<void> record_copies::write_all() {
  for (const auto& [path, rows] : files_) changed_.insert(path);
  return write_changed();
}

result<void> record_copies::write_changed() {
  while (!changed_.empty()) {
    const auto path = *changed_.begin();
    nlohmann::json json{{"rows", nlohmann::json::object()}};
    for (const auto& [key, value] : files_[path]) {
      auto parsed = parse_json(value, key);
      if (parsed) json["rows"][key] = std::move(*parsed);
    }
    if (auto made = make_folders(path.parent_path()); !made) return made;
    auto written = write_file_durably(
        path, json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
    if (!written) return written;
    changed_.erase(path);
  }
  return ok();
}

// ---- rebuilding
// ------------------------------------------------------------------------------------
std::vector<store_row> rows_from_copies(const state_paths& paths, std::vector<std::string>& notes) {
  std::map<std::string, std::string> rows;
  for (auto& [key, value] : read_copy(paths.cluster_file(), notes)) put(rows, key, value);
  std::error_code code;
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(paths.jobs_folder(), code))
    if (entry.path().extension() == ".json") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (const auto& file : files)
    for (auto& [key, value] : read_copy(file, notes)) put(rows, key, value);

  meta_record meta;
  if (const auto found = rows.find(keys::meta()); found != rows.end())
    if (auto read = from_json_text<meta_record>(found->second)) meta = *read;

  std::vector<job_record> jobs;
  for (const auto& [key, value] : rows) {
    if (key.starts_with("worker/"))
      meta.next_worker = std::max(meta.next_worker, hex_at(key, 7) + 1);
    if (!key.starts_with(job_area) || !key.ends_with("/record")) continue;
    auto job = from_json_text<job_record>(value, static_cast<std::size_t>(copy_bytes_max));
    if (job)
      jobs.push_back(std::move(*job));
    else
      notes.push_back(fmt::format("{}: {}; skipped", key, job.err().message));
  }
  for (auto& job : jobs) {
    meta.next_job = std::max(meta.next_job, value(job.id) + 1);
    std::map<std::uint64_t, manifest> newest;  // by step
    for (const auto& folder :
         {paths.checkpoint_folder(job.id, job.spec), paths.manifests_folder(job.id)}) {
      auto list = list_manifests(folder);
      if (!list) {
        notes.push_back(list.err().message);
        continue;
      }
      for (const auto& bad : list->bad)
        notes.push_back(fmt::format("{}: {}; skipped", bad.path.string(), bad.reason.message));
      for (const auto& good : list->good) {
        if (good.content.job != job.id) continue;
        auto& kept = newest[static_cast<std::uint64_t>(good.content.step)];
        if (kept.seq == 0 || is_newer(good.content, kept)) kept = good.content;
      }
    }
    for (const auto& [step, m] : newest) {
      meta.incarnation = std::max(meta.incarnation, m.incarnation);
      job.generation = std::max(job.generation, m.generation);
      job.step = std::max(job.step, step);
      checkpoint_record record;
      record.job = job.id;
      record.step = step;
      record.seq = m.seq;
      record.chain = bits_of(m, "chain");
      record.loss.bits = bits_of(m, "loss");
      record.weights_hash = m.weights_hash;
      record.part_count = static_cast<int>(m.parts.size());
      record.bytes = m.bytes;
      record.unix_ms = m.created_unix_ms;
      put(rows, keys::checkpoint(job.id, step), to_json_text(record));
    }
    put(rows, keys::job(job.id), to_json_text(job));
  }
  if (!rows.empty()) put(rows, keys::meta(), to_json_text(meta));
  return {rows.begin(), rows.end()};
}

namespace {

/// After damage: rows of the second copies win, since they are written after the index says durable
/// and before anyone acts; checkpoints that the index lost come back, those it has stay.
result<void> fill_from_copies(opened_state& opened) {
  auto copies = rows_from_copies(opened.paths, opened.notes);
  auto present = read_rows(*opened.store);
  if (!present) return present.err();
  std::map<std::string, std::string> have(present->begin(), present->end());
  std::vector<kv_write> writes;
  std::size_t jobs = 0, checkpoints = 0;
  for (auto& [key, text] : copies) {
    const auto found = have.find(key);
    const bool is_checkpoint = key.starts_with("ckpt/");
    if (found != have.end() && (is_checkpoint || found->second == text)) continue;
    if (key == keys::meta() && found != have.end()) {
      auto a = from_json_text<meta_record>(found->second);
      auto b = from_json_text<meta_record>(text);
      if (a && b)
        text = to_json_text(meta_record{std::max(a->incarnation, b->incarnation),
                                        std::max(a->next_worker, b->next_worker),
                                        std::max(a->next_job, b->next_job)});
    }
    jobs += key.ends_with("/record") ? 1 : 0;
    checkpoints += is_checkpoint ? 1 : 0;
    writes.push_back(kv_write::put(key, text));
  }
  if (writes.empty()) return ok();
  if (auto written = opened.store->write(writes, durability::synced); !written) return written;
  opened.notes.push_back(
      fmt::format("index filled from the copies beside it: {} job record(s), {} checkpoint(s)",
                  jobs, checkpoints));
  return ok();
}

/// The id is what tells a first start from a lost index.
result<bool> read_or_make_store_id(const fs::path& file, std::string& id) {
  auto text = read_whole_file(file, 4096);
  if (text) {
    id = *text;
    while (!id.empty() && (id.back() == '\n' || id.back() == ' ')) id.pop_back();
    if (id.size() == 32) return false;
    return make_error(errc::corrupt,
                      "{}: expected 32 hex digits, found {} bytes. fix: restore the file; it names "
                      "the store in checkpoint folders",
                      file.string(), text->size());
  }
  if (text.err().code != errc::not_found) return text.err();
  id = new_store_id();
  auto written = write_file_durably(file, id + "\n");
  if (!written) return written.err();
  return true;
}

}  // namespace

result<opened_state> open_state(const fs::path& state) {
  std::error_code code;
  if (fs::exists(state, code) && !fs::is_directory(state, code))
    return make_error(errc::usage, "the state folder {} is a file. fix: --state with a folder",
                      state.string());
  if (auto made = make_folders(state); !made) return made.err();
  const auto absolute = fs::canonical(state, code);
  if (code) return make_error(errc::io, "{}: {}", state.string(), code.message());

  opened_state opened;
  std::string store_id;
  const state_paths places(absolute, {});
  auto is_new = read_or_make_store_id(places.store_id_file(), store_id);
  if (!is_new) return is_new.err();
  opened.paths = state_paths(absolute, store_id);

  kv_recovery recovery;
  auto store = open_kv_rocksdb(opened.paths.index(), {.create_if_missing = false}, &recovery);
  bool is_rebuilt = false;
  if (!store && store.err().code == errc::corrupt) {
    auto aside = set_aside_kv_rocksdb(opened.paths.index());
    if (!aside) return aside.err();
    opened.notes.push_back(fmt::format("index can't be opened ({}); moved to {}",
                                       store.err().message, aside->string()));
    is_rebuilt = true;
  } else if (!store && store.err().code == errc::not_found) {
    is_rebuilt = !*is_new || fs::exists(opened.paths.jobs_folder(), code);
    if (is_rebuilt) opened.notes.push_back("index is gone");
  } else if (!store) {
    return store.err();
  }
  if (!store) {
    store = open_kv_rocksdb(opened.paths.index(), {.create_if_missing = true});
    if (!store) return store.err();
  }
  opened.store = std::move(*store);
  if (recovery.recovered) opened.notes.push_back(recovery.note);
  opened.is_recovered = recovery.recovered || is_rebuilt;

  if (opened.is_recovered)
    if (auto filled = fill_from_copies(opened); !filled) return filled.err();
  auto rows = read_rows(*opened.store);
  if (!rows) return rows.err();
  opened.rows = std::move(*rows);
  return opened;
}

}  // namespace stagecoach
