// Commands that need no coordinator: init presets data certs version.
#include <dnnl_version.h>
#include <openssl/opensslv.h>
#include <rocksdb/version.h>

#include <cstdio>
#include <ctime>
#include <filesystem>

#include "config/job_spec_yaml.hpp"
#include "config/presets.hpp"
#include "config/suggest.hpp"
#include "config/units.hpp"
#include "coordinator/api.hpp"
#include "coordinator/messages.hpp"
#include "kernels/backend.hpp"
#include "model/plan.hpp"
#include "storage/dataset.hpp"
#include "tools/certs.hpp"
#include "tools/command.hpp"
#include "tools/follow.hpp"
#include "tools/sample.hpp"
#include "tools/table.hpp"

namespace stagecoach {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// ---- init, presets
// ---------------------------------------------------------------------------------------
struct init_flags {
  std::string preset = "shakespeare", data, name;
};

void replace_first(std::string& text, const std::string& what, const std::string& with) {
  if (const auto at = text.find(what); at != std::string::npos) text.replace(at, what.size(), with);
}

exit_code run_init(const global_flags& flags, const init_flags& own) {
  const preset* found = find_preset(own.preset);
  if (found == nullptr) {
    const auto near = nearest(own.preset, preset_names());
    return complain(
        flags,
        make_error(errc::usage, "no preset is called \"{}\".{} list them: stagecoach presets",
                   own.preset, near ? fmt::format(" Did you mean \"{}\"?", *near) : ""));
  }
  std::string yaml = starter_job_yaml(*found);
  if (!own.data.empty()) {
    const bool is_text = yaml.find("train: input.txt") != std::string::npos;
    if (own.data.find_first_of("\"\\\n") != std::string::npos)
      return complain(flags,
                      make_error(errc::usage, "--data {}: write this path into the file by hand",
                                 stagecoach::quoted(own.data)));
    if (is_text)
      replace_first(yaml, "train: input.txt", "train: \"" + own.data + "\"");
    else
      replace_first(yaml, "path: train.bin", "path: \"" + own.data + "\"");
  }
  if (!own.name.empty()) {
    const auto at = yaml.find("\nname: ");
    const auto end = yaml.find_first_of(" \n", at + 7);
    invariant(at != std::string::npos, "a starter file has a name");
    yaml.replace(at + 7, end - at - 7, own.name);
    if (auto parsed = parse_job_spec(yaml, "job.yaml"); !parsed.spec)
      return complain(flags, make_error(errc::usage, "--name {}: {}", stagecoach::quoted(own.name),
                                        parsed.problems.front().message));
  }
  std::fputs(yaml.c_str(), stdout);
  if (!flags.quiet && own.data.empty())
    std::fprintf(stderr,
                 "next: put your data's path under data.train, then stagecoach train job.yaml\n");
  return exit_code::success;
}

exit_code run_presets(const global_flags& flags) {
  json rows = json::array();
  for (const preset& p : presets())
    rows.push_back({{"name", p.name},
                    {"parameters", parameter_count(p.model)},
                    {"n_layer", p.model.n_layer},
                    {"d_model", p.model.d_model},
                    {"n_head", p.model.n_head},
                    {"vocab_size", p.model.vocab_size},
                    {"context", p.model.context},
                    {"about", p.about}});
  print_table(flags,
              {{"NAME", "name"},
               {"PARAMETERS", "parameters"},
               {"LAYERS", "n_layer"},
               {"WIDTH", "d_model"},
               {"HEADS", "n_head"},
               {"VOCAB", "vocab_size"},
               {"CONTEXT", "context"},
               {"ABOUT", "about", true}},
              rows, [](const json& row, const std::string& key) {
                return key == "parameters" ? format_grouped(row[key].get<std::int64_t>())
                                           : plain(row, key);
              });
  return exit_code::success;
}

// ---- data
// ------------------------------------------------------------------------------------------------
struct data_flags {
  std::string file, out, format, tokenizer;
};

exit_code run_inspect(const global_flags& flags, const data_flags& own) {
  std::unique_ptr<tokenizer> words;
  if (!own.tokenizer.empty()) {
    auto opened = open_named_tokenizer(own.tokenizer);
    if (!opened) return complain(flags, opened.err());
    words = std::move(*opened);
  }
  auto found = inspect_data(own.file, own.format, words.get());
  if (!found) return complain(flags, found.err());
  const bool is_text = found->layout.format == "text";
  json out = {{"file", own.file},
              {"format", found->layout.format},
              {"bytes", found->bytes},
              {"hash", found->hash},
              {"tokens", found->layout.count},
              {"token_bytes", is_text ? json(nullptr) : json(found->layout.token_bytes)},
              {"tokenizer", is_text ? json(words ? words->name() : "bytes") : json(nullptr)},
              {"max_token", found->max_token},
              {"max_position", found->max_position},
              {"first_tokens", found->first_tokens}};
  if (print_object(flags, out)) return exit_code::success;
  std::printf("%s\n", own.file.c_str());
  std::printf(
      "Format    %s%s\n", found->layout.format.c_str(),
      is_text
          ? fmt::format(", counted with tokenizer {}", out["tokenizer"].get<std::string>()).c_str()
          : fmt::format(", {} bytes per token", found->layout.token_bytes).c_str());
  std::printf("Size      %s bytes, %s tokens\n",
              format_grouped(static_cast<std::int64_t>(found->bytes)).c_str(),
              format_grouped(found->layout.count).c_str());
  std::printf("Hash      %s\n", found->hash.c_str());
  if (found->max_token >= 0)
    std::printf("Largest   token %lld at %s: the model's vocab_size must be at least %lld\n",
                static_cast<long long>(found->max_token),
                format_grouped(found->max_position).c_str(),
                static_cast<long long>(found->max_token) + 1);
  std::printf("First     %s\n", joined(found->first_tokens).c_str());
  if (words || is_text) {
    const auto bytes = make_byte_tokenizer();
    if (auto text = (words ? *words : *bytes).decode(found->first_tokens)) {
      text_stream stream;
      std::string shown = stream.add(*text) + stream.finish();
      for (std::size_t at = 0; (at = shown.find('\n', at)) != std::string::npos; at += 2)
        shown.replace(at, 1, "\\n");
      std::printf("Text      %s\n", shown.c_str());
    }
  }
  return exit_code::success;
}

exit_code run_tokenize(const global_flags& flags, const data_flags& own) {
  auto words = open_named_tokenizer(own.tokenizer);
  if (!words) return complain(flags, words.err());
  std::error_code ignored;
  if (fs::exists(own.out, ignored) && !flags.yes)
    return complain(
        flags,
        make_error(errc::conflict, "{} is there already. fix: another name, or --yes to replace it",
                   own.out));
  auto count = tokenize_file(own.file, **words, own.out);
  if (!count) return complain(flags, count.err());
  if (print_object(flags, {{"file", own.out},
                           {"format", "llmc"},
                           {"tokens", *count},
                           {"vocab_size", (*words)->vocab_size()}}))
    return exit_code::success;
  if (!flags.quiet) {
    std::printf("%s: %s tokens, format llmc, vocabulary %lld\n", own.out.c_str(),
                format_grouped(*count).c_str(), static_cast<long long>((*words)->vocab_size()));
    std::printf("in a job:  data: {tokenizer: none, train: [{path: %s, format: llmc}]}\n",
                own.out.c_str());
  }
  return exit_code::success;
}

// ---- certs
// -----------------------------------------------------------------------------------------------
struct certs_flags {
  std::string folder, role, name, file;
  std::vector<std::string> hosts;
  int days = 365, ca_days = 3650;
};

exit_code run_certs_init(const global_flags& flags, const certs_flags& own) {
  if (auto made = make_ca(own.folder, own.ca_days, flags.yes); !made)
    return complain(flags, made.err());
  const fs::path folder = own.folder;
  if (print_object(flags, {{"ca", folder / "ca.crt"}, {"key", folder / "ca.key"}}))
    return exit_code::success;
  if (!flags.quiet)
    std::printf(
        "made %s and %s (keep the key where nobody else reads it)\n"
        "next: stagecoach certs make %s --role coordinator --name head --host HOST\n",
        (folder / "ca.crt").c_str(), (folder / "ca.key").c_str(), own.folder.c_str());
  return exit_code::success;
}

exit_code run_certs_make(const global_flags& flags, const certs_flags& own) {
  certificate_request request;
  request.what = role_from_string(own.role);
  request.name = own.name;
  request.hosts = own.hosts;
  request.days = own.days;
  request.overwrite = flags.yes;
  auto made = make_certificate(own.folder, request);
  if (!made) return complain(flags, made.err());
  if (print_object(flags,
                   {{"ca", made->ca}, {"certificate", made->certificate}, {"key", made->key}}))
    return exit_code::success;
  if (!flags.quiet)
    std::printf("made %s and %s\nuse them:  --tls-ca %s --tls-cert %s --tls-key %s\n",
                made->certificate.c_str(), made->key.c_str(), made->ca.c_str(),
                made->certificate.c_str(), made->key.c_str());
  return exit_code::success;
}

exit_code run_certs_show(const global_flags& flags, const certs_flags& own) {
  auto facts = read_certificate(own.file);
  if (!facts) return complain(flags, facts.err());
  const std::time_t ends = static_cast<std::time_t>(facts->not_after);
  std::tm parts{};
  gmtime_r(&ends, &parts);
  const std::string until =
      fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z", parts.tm_year + 1900, parts.tm_mon + 1,
                  parts.tm_mday, parts.tm_hour, parts.tm_min, parts.tm_sec);
  const std::string role = facts->is_ca ? "ca" : to_string(facts->what);
  if (print_object(flags, {{"file", own.file},
                           {"role", role},
                           {"name", facts->name},
                           {"issuer", facts->issuer},
                           {"hosts", facts->hosts},
                           {"not_after", until},
                           {"is_ca", facts->is_ca},
                           {"is_expired", facts->is_expired}}))
    return exit_code::success;
  std::printf("%s\nRole      %s\nName      %s\nIssuer    %s\nHosts     %s\nUntil     %s%s\n",
              own.file.c_str(), role.empty() ? "none: not one of ours" : role.c_str(),
              facts->name.c_str(), facts->issuer.c_str(),
              facts->hosts.empty() ? "-" : joined(facts->hosts).c_str(), until.c_str(),
              facts->is_expired ? "  EXPIRED" : "");
  return exit_code::success;
}

// ---- version
// ---------------------------------------------------------------------------------------------
exit_code run_version(const global_flags& flags) {
  const json out = {
      {"version", program_version},
      {"protocol", protocol_version},
      {"compiler", fmt::format("GCC {}", __VERSION__)},
      {"device_class", make_cpu_backend(1)->name()},
      {"libraries",
       {{"onednn",
         fmt::format("{}.{}.{}", DNNL_VERSION_MAJOR, DNNL_VERSION_MINOR, DNNL_VERSION_PATCH)},
        {"caf", STAGECOACH_CAF_VERSION},
        {"boost", STAGECOACH_BOOST_VERSION},
        {"rocksdb", fmt::format("{}.{}.{}", ROCKSDB_MAJOR, ROCKSDB_MINOR, ROCKSDB_PATCH)},
        {"openssl", OPENSSL_VERSION_STR},
        {"cli11", CLI11_VERSION}}}};
  if (print_object(flags, out)) return exit_code::success;
  if (flags.quiet) {
    std::printf("%s\n", program_version);
    return exit_code::success;
  }
  std::printf("stagecoach %s, protocol %d, device class %s, %s\n", program_version,
              protocol_version, out["device_class"].get<std::string>().c_str(),
              out["compiler"].get<std::string>().c_str());
  for (const auto& [name, version] : out["libraries"].items())
    std::printf("  %-8s %s\n", name.c_str(), version.get<std::string>().c_str());
  return exit_code::success;
}

void add_data(command_line c) {
  CLI::App* data = c.app.add_subcommand("data", "look at data files, turn text into tokens");
  data->footer(
      "examples:\n"
      "  stagecoach data inspect corpus.txt\n"
      "  stagecoach data tokenize corpus.txt corpus.bin --tokenizer sentencepiece:ko.model");
  data->require_subcommand(1);
  {
    auto own = std::make_shared<data_flags>();
    CLI::App* app = data->add_subcommand("inspect", "format, size, hash, largest token of a file");
    app->footer(
        "examples:\n"
        "  stagecoach data inspect corpus.txt\n"
        "  stagecoach data inspect train.bin --format llmc -o json");
    app->add_option("FILE", own->file, "text or token file")->required();
    app->add_option("--format", own->format, "text, llmc or nanogpt (default: guessed)")
        ->check(CLI::IsMember({"text", "llmc", "nanogpt"}));
    app->add_option("--tokenizer", own->tokenizer, "bytes or sentencepiece:MODEL");
    app->callback([c, own] { c.run = [c, own] { return run_inspect(c.flags, *own); }; });
  }
  {
    auto own = std::make_shared<data_flags>();
    CLI::App* app = data->add_subcommand("tokenize", "text to a token file of llm.c's format");
    app->footer(
        "examples:\n"
        "  stagecoach data tokenize corpus.txt corpus.bin --tokenizer bytes\n"
        "  stagecoach data tokenize corpus.txt corpus.bin --tokenizer sentencepiece:ko.model");
    app->add_option("IN", own->file, "UTF-8 text")->required();
    app->add_option("OUT", own->out, "token file")->required();
    app->add_option("--tokenizer", own->tokenizer, "bytes or sentencepiece:MODEL")->required();
    app->callback([c, own] { c.run = [c, own] { return run_tokenize(c.flags, *own); }; });
  }
}

void add_certs(command_line c) {
  CLI::App* certs = c.app.add_subcommand("certs", "make the cluster's CA and certificates");
  certs->footer(
      "examples:\n"
      "  stagecoach certs init ./certs\n"
      "  stagecoach certs make ./certs --role coordinator --name head --host 10.0.0.10\n"
      "  stagecoach certs make ./certs --role worker --name w1 --host 10.0.0.11\n"
      "  stagecoach certs show ./certs/w1.crt");
  certs->require_subcommand(1);
  {
    auto own = std::make_shared<certs_flags>();
    CLI::App* app = certs->add_subcommand("init", "make the CA");
    app->footer(
        "examples:\n  stagecoach certs init ./certs\n  stagecoach certs init ./certs --days 730");
    app->add_option("DIR", own->folder, "folder of the CA")->required();
    app->add_option("--days", own->ca_days, "how long it is good (default 3650)")
        ->check(CLI::Range(1, 36500));
    app->callback([c, own] { c.run = [c, own] { return run_certs_init(c.flags, *own); }; });
  }
  {
    auto own = std::make_shared<certs_flags>();
    CLI::App* app = certs->add_subcommand("make", "make a certificate with a role");
    app->footer(
        "examples:\n"
        "  stagecoach certs make ./certs --role worker --name w1 --host 10.0.0.11 --host w1.lan\n"
        "  stagecoach certs make ./certs --role operator --name alice --days 90\n"
        "roles: coordinator, worker, operator (may change jobs), reader (may look)");
    app->add_option("DIR", own->folder, "folder of the CA")->required();
    app->add_option("--role", own->role, "coordinator, worker, operator or reader")
        ->required()
        ->check(CLI::IsMember({"coordinator", "worker", "operator", "reader"}));
    app->add_option("--name", own->name, "its name, and its files' (a worker's is its --name)")
        ->required();
    app->add_option("--host", own->hosts, "host name or IP address of its port (repeatable)");
    app->add_option("--days", own->days, "how long it is good (default 365)")
        ->check(CLI::Range(-3650, 36500));
    app->callback([c, own] { c.run = [c, own] { return run_certs_make(c.flags, *own); }; });
  }
  {
    auto own = std::make_shared<certs_flags>();
    CLI::App* app = certs->add_subcommand("show", "what a certificate says");
    app->footer(
        "examples:\n  stagecoach certs show ./certs/w1.crt\n  stagecoach certs show w1.crt -o "
        "json");
    app->add_option("FILE", own->file, "a certificate (PEM)")->required();
    app->callback([c, own] { c.run = [c, own] { return run_certs_show(c.flags, *own); }; });
  }
}

}  // namespace

void add_file_commands(command_line c) {
  {
    auto own = std::make_shared<init_flags>();
    CLI::App* app = c.app.add_subcommand("init", "print a commented job file to begin with");
    app->footer(
        "examples:\n"
        "  stagecoach init > job.yaml\n"
        "  stagecoach init tiny --data book.txt --name my-book > job.yaml\n"
        "  stagecoach init gpt2 > job.yaml                 all names: stagecoach presets");
    app->add_option("PRESET", own->preset, "shape of the model (default shakespeare)");
    app->add_option("--data", own->data, "training file to put in");
    app->add_option("--name", own->name, "name of the job");
    app->callback([c, own] { c.run = [c, own] { return run_init(c.flags, *own); }; });
  }
  {
    CLI::App* app = c.app.add_subcommand("presets", "list the model shapes that a job may name");
    app->footer("examples:\n  stagecoach presets\n  stagecoach presets -o wide");
    app->callback([c] { c.run = [c] { return run_presets(c.flags); }; });
  }
  add_data(c);
  add_certs(c);
  CLI::App* version = c.app.add_subcommand("version", "version of this program and its libraries");
  version->footer("examples:\n  stagecoach version\n  stagecoach version -o json");
  version->callback([c] { c.run = [c] { return run_version(c.flags); }; });
}

}  // namespace stagecoach
