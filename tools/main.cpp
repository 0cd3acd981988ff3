// stagecoach: one binary, one subcommand per job of a user.
#include <csignal>
#include <cstdio>

#include "config/suggest.hpp"
#include "tools/command.hpp"

using namespace stagecoach;

namespace {

void add_global_flags(CLI::App& app, global_flags& flags) {
  app.add_option("--coordinator", flags.coordinator,
                 "HOST:PORT of the coordinator (STAGECOACH_COORDINATOR)");
  app.add_option("--tls-ca", flags.tls_ca, "CA certificate (STAGECOACH_TLS_CA)")
      ->envname("STAGECOACH_TLS_CA");
  app.add_option("--tls-cert", flags.tls_certificate, "own certificate (STAGECOACH_TLS_CERT)")
      ->envname("STAGECOACH_TLS_CERT");
  app.add_option("--tls-key", flags.tls_key, "own key (STAGECOACH_TLS_KEY)")
      ->envname("STAGECOACH_TLS_KEY");
  app.add_option("--token", flags.token, "read-only bearer token (STAGECOACH_TOKEN)")
      ->envname("STAGECOACH_TOKEN");
  app.add_option("-o,--output", flags.output, "table, wide, json, jsonl, yaml, csv or name")
      ->check(CLI::IsMember({"table", "wide", "json", "jsonl", "yaml", "csv", "name"}));
  app.add_option("--color", flags.color, "auto, always or never")
      ->check(CLI::IsMember({"auto", "always", "never"}));
  app.add_flag("-q,--quiet", flags.quiet, "ids and results only");
  app.add_flag("-v,--verbose", flags.verbose, "more words");
  app.add_flag("--no-headers", flags.no_headers, "tables without the first line");
  app.add_flag("-y,--yes", flags.yes, "answer questions with yes");
}

// Usage and examples first: what a person who asked for help looks for.
class help_text : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override {
    if (mode == CLI::AppFormatMode::Sub) return make_expanded(app);
    std::string footer = make_footer(app);
    while (!footer.empty() && footer.front() == '\n') footer.erase(0, 1);
    return make_usage(app, std::move(name)) + make_description(app) + "\n" + footer +
           make_positionals(app) + make_groups(app, mode) + make_subcommands(app, mode);
  }
};

// `--set a=b FILE`: an option that may be repeated takes one word each time, not all that follow.
void take_one_word_each(CLI::App& app) {
  for (CLI::Option* option : app.get_options())
    if (option->nonpositional() && option->get_expected_min() <= 1) option->allow_extra_args(false);
  for (CLI::App* sub : app.get_subcommands([](CLI::App*) { return true; }))
    take_one_word_each(*sub);
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  CLI::App app{"Stagecoach trains GPT-class transformers on machines that come and go.",
               "stagecoach"};
  app.formatter(std::make_shared<help_text>());
  app.failure_message([](const CLI::App* at, const CLI::Error& e) {
    const CLI::App* chosen = at;
    std::string path = at->get_name();
    while (!chosen->get_subcommands().empty()) {
      chosen = chosen->get_subcommands().front();
      path += " " + chosen->get_name();
    }
    return fmt::format("error: {}\n  see: {} --help\n", e.what(), path);
  });
  app.fallthrough();  // global flags may follow the command
  app.require_subcommand(0, 1);
  app.footer(
      "examples:\n"
      "  stagecoach init > job.yaml && stagecoach train job.yaml --workers 2\n"
      "  stagecoach prove job.yaml --kills 4\n"
      "  stagecoach coordinator --state S &  stagecoach worker --coordinator 127.0.0.1:7070 &\n"
      "  stagecoach submit job.yaml -d && stagecoach status JOB");
  global_flags flags;
  command_run run;
  add_global_flags(app, flags);
  const command_line c{app, flags, run};
  add_train(c);
  add_prove(c);
  add_up(c);
  add_coordinator(c);
  add_worker(c);
  add_job_commands(c);
  add_cluster_commands(c);
  add_checkpoint_commands(c);
  add_replay(c);
  add_trace(c);
  add_file_commands(c);
  add_bench(c);
  take_one_word_each(app);

  if (argc > 1 && argv[1][0] != '-') {
    std::vector<std::string> names;
    for (const CLI::App* sub : app.get_subcommands([](CLI::App*) { return true; }))
      names.push_back(sub->get_name());
    const std::string word = argv[1];
    bool is_known = word == "help";
    for (const CLI::App* sub : app.get_subcommands([](CLI::App*) { return true; }))
      is_known = is_known || sub->check_name(word);
    if (!is_known) {
      const auto near = nearest(word, names);
      std::fprintf(stderr, "error: unknown command \"%s\".%s\n  see: stagecoach --help\n",
                   word.c_str(), near ? (" Did you mean \"" + *near + "\"?").c_str() : "");
      return static_cast<int>(exit_code::usage);
    }
    if (word == "help") {
      const CLI::App* about = &app;
      std::string path = app.get_name();
      for (int i = 2; i < argc; ++i) {
        const auto subs =
            about->get_subcommands([&](const CLI::App* s) { return s->check_name(argv[i]); });
        if (subs.empty()) {
          std::fprintf(stderr, "error: unknown command \"%s\".\n  see: stagecoach --help\n",
                       argv[i]);
          return static_cast<int>(exit_code::usage);
        }
        about = subs.front();
        path += " " + about->get_name();
      }
      std::printf("%s", about->help(about == &app ? "" : path.substr(0, path.rfind(' '))).c_str());
      return 0;
    }
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    // --help and --version are no errors; everything else is one of usage, whatever the library's
    // number.
    const int code = app.exit(e);
    return code == 0 ? 0 : static_cast<int>(exit_code::usage);
  }
  if (!run) {
    std::printf("%s", app.help().c_str());
    return 0;
  }
  return static_cast<int>(run());
}
