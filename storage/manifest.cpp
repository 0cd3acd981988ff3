#include "storage/manifest.hpp"

#include <algorithm>
#include <cstdio>
#include <set>
#include <system_error>

#include "config/limits.hpp"
#include "storage/file.hpp"
#include "storage/hash.hpp"
#include "storage/json_text.hpp"

namespace stagecoach {
namespace fs = std::filesystem;
using json = nlohmann::json;

namespace {

constexpr std::string_view trailer_mark = "xxh3-128:";
constexpr std::size_t hash_digits = 32;
constexpr std::size_t trailer_bytes = trailer_mark.size() + hash_digits + 1;

// A part's folder must stay under the manifest's, unless it says an absolute place.
bool is_folder_text(const std::string& text) {
  if (text.size() > 4096 || text.find('\0') != std::string::npos) return false;
  for (const auto& piece : fs::path(text))
    if (piece == "..") return false;
  return true;
}

bool is_hash(const std::string& text) {
  return text.size() == hash_digits &&
         text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

result<void> check_fields(const manifest& m, std::string_view what) {
  const auto bad = [&](std::string_view why) {
    return make_error(errc::bad_input, "{}: {}", what, why);
  };
  if (m.step < 0 || m.step > limits::step_count_max)
    return bad(fmt::format("step {}, expected 0 to {}", m.step, limits::step_count_max));
  std::set<std::string_view> files;
  for (const auto& p : m.parts) {
    if (!is_plain_name(p.file)) return bad("a part's file is no plain file name");
    if (!files.insert(p.file).second) return bad(fmt::format("the part {} is there twice", p.file));
    if (!is_folder_text(p.folder))
      return bad(fmt::format("the folder of part {} has '..' or is too long", p.file));
    if (!is_hash(p.root_hash))
      return bad(fmt::format("the root hash of part {} is not 32 hex digits", p.file));
    for (const auto& c : p.copies)
      if (!is_folder_text(c.folder))
        return bad(fmt::format("the folder of a copy of part {} has '..' or is too long", p.file));
  }
  return ok();
}

json to_json(const manifest& m) {
  json parts = json::array();
  for (const auto& p : m.parts) {
    json copies = json::array();
    for (const auto& c : p.copies) copies.push_back({{"folder", c.folder}, {"worker", c.worker}});
    parts.push_back({{"bytes", p.bytes},
                     {"copies", copies},
                     {"file", p.file},
                     {"folder", p.folder},
                     {"root_hash", p.root_hash},
                     {"tensors", p.tensors}});
  }
  return {{"version", manifest_version},
          {"job", value(m.job)},
          {"job_name", m.job_name},
          {"job_identity", m.job_identity},
          {"step", m.step},
          {"seq", m.seq},
          {"generation", m.generation},
          // Text: readers in other languages keep 53 bits of a number.
          {"plan_hash", hex16(m.plan_hash)},
          {"incarnation", m.incarnation},
          {"weights_hash", m.weights_hash},
          {"state_hash", m.state_hash},
          {"layout", m.layout},
          {"bytes", m.bytes},
          {"created_unix_ms", m.created_unix_ms},
          {"parts", parts},
          {"extra", m.extra}};
}

std::uint64_t unsigned_of(const json& j, const char* key) {
  const auto& field = j.at(key);
  // get<> would turn a fraction or a negative number into something else without a word.
  if (!field.is_number_unsigned())
    throw json::other_error::create(1, fmt::format("{} is not a whole number from 0", key), &j);
  return field.get<std::uint64_t>();
}

std::int64_t signed_of(const json& j, const char* key) {
  const auto& field = j.at(key);
  if (!field.is_number_integer() ||
      (field.is_number_unsigned() && field.get<std::uint64_t>() > INT64_MAX))
    throw json::other_error::create(1, fmt::format("{} is not a whole number", key), &j);
  return field.get<std::int64_t>();
}

manifest from_json(const json& j) {
  manifest m;
  m.job = job_id{unsigned_of(j, "job")};
  m.job_name = j.at("job_name").get<std::string>();
  m.job_identity = j.at("job_identity").get<std::string>();
  m.step = signed_of(j, "step");
  m.seq = unsigned_of(j, "seq");
  m.generation = unsigned_of(j, "generation");
  const auto plan = j.at("plan_hash").get<std::string>();
  if (plan.size() != 16 || plan.find_first_not_of("0123456789abcdef") != std::string::npos)
    throw json::other_error::create(1, "plan_hash is not 16 hex digits", &j);
  m.plan_hash = std::stoull(plan, nullptr, 16);
  m.incarnation = unsigned_of(j, "incarnation");
  m.weights_hash = j.at("weights_hash").get<std::string>();
  m.state_hash = j.at("state_hash").get<std::string>();
  m.layout = j.at("layout").get<std::string>();
  m.bytes = unsigned_of(j, "bytes");
  m.created_unix_ms = signed_of(j, "created_unix_ms");
  for (const auto& p : j.at("parts")) {
    manifest_part part;
    part.file = p.at("file").get<std::string>();
    part.folder = p.at("folder").get<std::string>();
    part.bytes = unsigned_of(p, "bytes");
    part.root_hash = p.at("root_hash").get<std::string>();
    part.tensors = p.at("tensors").get<std::vector<std::string>>();
    for (const auto& c : p.at("copies"))
      part.copies.push_back({c.at("worker").get<std::string>(), c.at("folder").get<std::string>()});
    m.parts.push_back(std::move(part));
  }
  m.extra = j.at("extra").get<std::map<std::string, std::string>>();
  return m;
}

}  // namespace

bool is_newer(const manifest& a, const manifest& b) {
  return std::tie(a.incarnation, a.seq) > std::tie(b.incarnation, b.seq);
}

std::string manifest_file_name(std::uint64_t seq, std::int64_t step) {
  return fmt::format("manifest-{:012}-step-{:012}.json", seq, step);
}

result<std::string> format_manifest(const manifest& m) {
  if (auto r = check_fields(m, "manifest"); !r) return r.err();
  try {
    std::string text = to_json(m).dump(1) + "\n";
    text += fmt::format("{}{}\n", trailer_mark, content_hash(text));
    if (text.size() > static_cast<std::size_t>(limits::manifest_bytes_max))
      return make_error(errc::too_large, "a manifest of {} bytes; the limit is {}", text.size(),
                        limits::manifest_bytes_max);
    return text;
  } catch (const json::exception& e) {
    return make_error(errc::bad_input, "a text in the manifest is not UTF-8: {}", e.what());
  }
}

result<manifest> parse_manifest(std::string_view text, std::string_view what) {
  if (text.size() > static_cast<std::size_t>(limits::manifest_bytes_max))
    return make_error(errc::too_large, "{}: {} bytes; the limit of a manifest is {}", what,
                      text.size(), limits::manifest_bytes_max);
  const auto corrupt = [&](std::string_view why) {
    return make_error(errc::corrupt, "{}: {}", what, why);
  };
  if (text.size() < trailer_bytes) return corrupt("torn: too short for a manifest");
  const auto body = text.substr(0, text.size() - trailer_bytes);
  const auto trailer = text.substr(body.size());
  if (!trailer.starts_with(trailer_mark) || !trailer.ends_with('\n'))
    return corrupt("torn or damaged: its last line is not the hash of the text");
  const auto expected = trailer.substr(trailer_mark.size(), hash_digits);
  const auto found = content_hash(body);
  if (found != expected)
    return corrupt(
        fmt::format("damaged: its text has the hash {}, its last line says {}", found, expected));
  auto parsed = parse_json(body, what);
  if (!parsed) return parsed.err();
  try {
    const auto version = signed_of(*parsed, "version");
    if (version != manifest_version)
      return make_error(errc::bad_input,
                        "{}: manifest version {}, this program reads version {}. fix: use the "
                        "program that wrote it",
                        what, version, manifest_version);
    manifest m = from_json(*parsed);
    if (auto r = check_fields(m, what); !r) return r.err();
    return m;
  } catch (const json::exception& e) {
    return make_error(errc::bad_input, "{}: {}", what, e.what());
  }
}

result<fs::path> write_manifest(const fs::path& folder, const manifest& m) {
  auto text = format_manifest(m);
  if (!text) return text.err();
  if (auto r = make_folders(folder); !r) return r.err();
  const fs::path path = folder / manifest_file_name(m.seq, m.step);
  if (auto there = read_manifest(path); there) {
    if (*there == m) {
      // Written before; the folder's fsync may be what was missing then.
      if (auto r = sync_folder(folder); !r) return r.err();
      return path;
    }
    return make_error(
        errc::conflict,
        "{} is there with other content (incarnation {}, ours is {}). fix: a seq is used "
        "once; take a larger one",
        path.string(), there->incarnation, m.incarnation);
  }
  if (auto r = write_file_durably(path, *text); !r) return r.err();
  return path;
}

result<manifest> read_manifest(const fs::path& path) {
  auto text = read_whole_file(path, limits::manifest_bytes_max);
  if (!text) return text.err();
  return parse_manifest(*text, path.string());
}

result<manifest_list> list_manifests(const fs::path& folder) {
  manifest_list list;
  std::error_code code;
  fs::directory_iterator at(folder, code);
  if (code == std::errc::no_such_file_or_directory) return list;
  if (code) return errno_error(code.value(), "can't list", folder);
  for (const fs::directory_iterator end; at != end; at.increment(code)) {
    const auto name = at->path().filename().string();
    unsigned long long seq = 0;
    long long step = 0;
    if (std::sscanf(name.c_str(), "manifest-%20llu-step-%19lld", &seq, &step) != 2 ||
        name != manifest_file_name(seq, step))
      continue;
    auto content = read_manifest(at->path());
    // The name is not covered by the hash: a file under another's name must not shadow it.
    if (content && (content->seq != seq || content->step != step))
      content = make_error(errc::corrupt, "{} holds the manifest of seq {} step {}",
                           at->path().string(), content->seq, content->step);
    if (content)
      list.good.push_back({at->path(), std::move(*content)});
    else if (content.err().code != errc::not_found)  // removed while we looked
      list.bad.push_back({at->path(), seq, step, content.err()});
  }
  if (code) return errno_error(code.value(), "can't list", folder);
  std::sort(list.good.begin(), list.good.end(),
            [](const auto& a, const auto& b) { return is_newer(a.content, b.content); });
  std::sort(list.bad.begin(), list.bad.end(),
            [](const auto& a, const auto& b) { return a.seq > b.seq; });
  return list;
}

}  // namespace stagecoach
