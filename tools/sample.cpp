#include "tools/sample.hpp"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <thread>

#include "config/units.hpp"
#include "model/generate.hpp"
#include "model/plan.hpp"
#include "tools/table.hpp"

namespace stagecoach {

namespace fs = std::filesystem;

namespace {

struct sample_flags {
  std::string target, state, prompt, tokenizer, isa;
  sampling how;
  int threads = 0;
  bool logits = false;
};

/// Bytes that the character starting with this byte has, 0 if no character starts so.
std::size_t announced_bytes(unsigned char first) {
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return 2;
  if (first >= 0xe0 && first <= 0xef) return 3;
  if (first >= 0xf0 && first <= 0xf4) return 4;
  return 0;
}

bool may_grow_into_character(std::string_view tail) {
  const std::size_t need = announced_bytes(static_cast<unsigned char>(tail[0]));
  if (tail.size() >= need) return false;
  return std::all_of(tail.begin() + 1, tail.end(),
                     [](char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; });
}

std::string escaped(unsigned char byte) { return fmt::format("\\x{:02x}", byte); }

result<std::unique_ptr<tokenizer>> tokenizer_of(const weight_source& source,
                                                const sample_flags& own) {
  if (!own.tokenizer.empty()) return open_named_tokenizer(own.tokenizer);
  if (!source.data().tokenizer.empty() && source.data().tokenizer != "none")
    return open_tokenizer(source.data());
  std::error_code ignored;
  const fs::path beside = fs::path(source.origin()) / tokenizer_file_name;
  if (fs::exists(beside, ignored)) return open_sentencepiece(beside);
  if (source.model().vocab_size == 256) return make_byte_tokenizer();
  return make_error(errc::usage,
                    "{} names no tokenizer. fix: --tokenizer bytes or sentencepiece:MODEL",
                    source.origin());
}

// What was generated, as text. One token alone would lose SentencePiece's spaces and characters of
// several tokens, so the whole is decoded and what is new is shown.
class growing_text {
 public:
  explicit growing_text(const tokenizer& with, std::vector<std::int32_t> prompt)
      : with_(with), tokens_(std::move(prompt)) {
    if (auto text = with_.decode(tokens_)) shown_ = text->size();
  }
  std::string add(std::int32_t token) {
    tokens_.push_back(token);
    auto text = with_.decode(tokens_);
    if (!text) return {};  // a padded vocabulary's token has no text
    std::string_view rest = *text;
    // A character of which only some bytes came decodes to U+FFFD: it waits for the next token.
    if (with_.name() != "bytes" && rest.ends_with("\xEF\xBF\xBD") && held_++ < 4) return {};
    held_ = 0;
    if (rest.size() <= shown_) return {};
    rest.remove_prefix(shown_);
    shown_ = text->size();
    return std::string(rest);
  }

 private:
  const tokenizer& with_;
  std::vector<std::int32_t> tokens_;
  std::size_t shown_ = 0;
  int held_ = 0;
};

/// What another program that opened the export should get: the interchange's proof.
exit_code print_logits(const global_flags& flags, stage& whole, const model_spec& m,
                       const weight_source& source, const std::vector<std::int32_t>& prompt) {
  const auto window = static_cast<std::size_t>(whole.batch().sequence_tokens);
  const std::size_t seen = std::min(window, prompt.size());
  std::vector<std::int32_t> rows(window, 0);
  std::copy(prompt.end() - static_cast<std::ptrdiff_t>(seen), prompt.end(), rows.begin());
  std::vector<float> logits(static_cast<std::size_t>(m.vocab_size));
  whole.logits(rows.data(), static_cast<std::int64_t>(seen) - 1, logits.data());
  global_flags as_json = flags;
  if (!flags.is_json() && flags.output != "yaml") as_json.output = "jsonl";
  print_object(as_json,
               {{"origin", source.origin()}, {"prompt_tokens", prompt}, {"logits", logits}});
  return exit_code::success;
}

exit_code run_sample(const global_flags& flags, const sample_flags& own) {
  std::optional<state_api> api;
  auto source = open_weights(flags, own.target, own.state, &api);
  if (!source) return complain(flags, source.err());
  const model_spec& m = source->model();
  if (m.n_head == 0)
    return complain(flags, make_error(errc::usage,
                                      "{} does not say how many heads the model has. fix: sample "
                                      "the job (--state DIR), or export it first",
                                      source->origin()));
  auto words = tokenizer_of(*source, own);
  if (!words) return complain(flags, words.err());
  std::string prompt = own.prompt;
  if (prompt == "-") prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  auto tokens = (*words)->encode(prompt.empty() ? "\n" : prompt);
  if (!tokens) return complain(flags, tokens.err());
  if (tokens->empty())
    return complain(flags, make_error(errc::usage, "the prompt has no token. fix: --prompt TEXT"));
  for (const std::int32_t token : *tokens)
    if (token >= m.vocab_size)
      return complain(flags,
                      make_error(errc::bad_input,
                                 "token {} of the prompt is outside the model's vocabulary of {}; "
                                 "is this the model's tokenizer?",
                                 token, m.vocab_size));

  const auto wanted = static_cast<std::int64_t>(tokens->size()) + own.how.max_new_tokens;
  batch_spec batch;
  batch.global_sequences = batch.micro_sequences = batch.leaf_count = 1;
  // Positions beyond what was trained on have their initial values; what is not used costs time.
  const std::int64_t trained =
      std::min(m.context, std::max<std::int64_t>(source->sequence_tokens(), 1));
  batch.sequence_tokens = std::min(trained, std::max<std::int64_t>(wanted, 16));
  // A window that slides draws every token at its last position, and a model's very last positions
  // learn last (seen: 2.4 nats at 127 of 128 where all before had 1.7). Stay clear of them.
  if (!own.logits && wanted > trained) batch.sequence_tokens = trained - trained / 8;
  const int threads = own.threads > 0
                          ? own.threads
                          : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const auto device = make_cpu_backend(threads, own.isa);
  stage whole(m, batch, 0, unit_count(m), 1, *device);
  for (const tensor_info& t : whole.tensors())
    if (auto got = source->read(t, whole.parameter(t.name)); !got)
      return complain(flags, got.err());

  if (own.logits) return print_logits(flags, whole, m, *source, *tokens);
  watch_interrupts();
  const bool streams = !flags.is_json() && flags.output != "yaml";
  std::string text;
  std::vector<std::int32_t> drawn;
  text_stream out;
  const auto show = [&](const std::string& piece) {
    text += piece;
    if (!streams) return;
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  };
  if (streams && !flags.quiet) std::fputs((out.add(prompt) + out.finish()).c_str(), stdout);
  growing_text so_far(**words, *tokens);
  generate(whole, m, *device, *tokens, own.how, [&](std::int32_t token) {
    drawn.push_back(token);
    show(out.add(so_far.add(token)));
    return !is_interrupted();
  });
  show(out.finish());
  if (streams) {
    std::printf("\n");
  } else {
    print_object(flags, {{"origin", source->origin()},
                         {"prompt", prompt},
                         {"text", text},
                         {"tokens", drawn},
                         {"seed", own.how.seed},
                         {"temperature", own.how.temperature},
                         {"top_k", own.how.top_k}});
  }
  return is_interrupted() ? exit_code::interrupted : exit_code::success;
}

}  // namespace

std::string text_stream::add(std::string_view bytes) {
  held_ += bytes;
  std::string out;
  std::size_t at = 0;
  while (at < held_.size()) {
    const auto byte = static_cast<unsigned char>(held_[at]);
    const std::size_t length = utf8_length(held_, at);
    if (length == 0) {
      if (may_grow_into_character(std::string_view(held_).substr(at))) break;
      out += escaped(byte);
      ++at;
      continue;
    }
    // C1 controls (U+0080 to U+009F) steer a terminal as escape sequences do.
    const bool is_c1 =
        length == 2 && byte == 0xc2 && static_cast<unsigned char>(held_[at + 1]) < 0xa0;
    const bool is_control =
        length == 1 && (byte < 0x20 || byte == 0x7f) && byte != '\n' && byte != '\t';
    if (is_c1 || is_control)
      for (std::size_t i = 0; i < length; ++i)
        out += escaped(static_cast<unsigned char>(held_[at + i]));
    else
      out.append(held_, at, length);
    at += length;
  }
  held_.erase(0, at);
  return out;
}

std::string text_stream::finish() {
  std::string out;
  for (const char c : held_) out += escaped(static_cast<unsigned char>(c));
  held_.clear();
  return out;
}

result<std::unique_ptr<tokenizer>> open_named_tokenizer(const std::string& text) {
  if (text == "bytes") return make_byte_tokenizer();
  const std::string kind = "sentencepiece:";
  if (text.rfind(kind, 0) == 0 && text.size() > kind.size())
    return open_sentencepiece(text.substr(kind.size()));
  return make_error(errc::usage, "tokenizer \"{}\" is not known. fix: bytes or sentencepiece:MODEL",
                    text);
}

result<weight_source> open_weights(const global_flags& flags, const std::string& target,
                                   const std::string& state, std::optional<state_api>* api) {
  if (is_folder_target(target)) {
    std::error_code ignored;
    if (!fs::is_directory(target, ignored))
      return make_error(errc::not_found, "there is no folder {}", target);
    if (fs::exists(fs::path(target) / "config.json", ignored))
      return weight_source::of_hf_folder(target);
    return weight_source::of_checkpoint_folder(target, std::nullopt);
  }
  auto parsed = parse_target(target);
  if (!parsed) return parsed.err();
  auto opened = state_api::open(flags, state);
  if (!opened) return opened.err();
  auto source = weight_source::of_job(opened->api(), *parsed);
  if (api != nullptr) api->emplace(std::move(*opened));
  return source;
}

void add_sample(command_line c) {
  auto own = std::make_shared<sample_flags>();
  CLI::App* app = c.app.add_subcommand("sample", "text from a job's checkpoint or a folder");
  app->footer(
      "examples:\n"
      "  stagecoach sample my-job --prompt \"The \"\n"
      "  stagecoach sample my-job@300 --temperature 0 --tokens 50\n"
      "  stagecoach sample ./exported --prompt \"Hello\" --seed 7\n"
      "  stagecoach sample my-job --state stagecoach-state       after `train`");
  app->add_option("JOB|DIR", own->target, "JOB, JOB@STEP, or a folder in Hugging Face's form")
      ->required();
  app->add_option("--prompt", own->prompt, "text to continue (- is stdin; default: a new line)");
  app->add_option("--tokens", own->how.max_new_tokens, "how many tokens")
      ->check(CLI::Range(1, 1'000'000));
  app->add_option("--temperature", own->how.temperature, "0 takes the likeliest (default 0.8)")
      ->check(CLI::Range(0.0, 100.0));
  app->add_option("--top-k", own->how.top_k, "draw among the K likeliest; 0: all (default 40)")
      ->check(CLI::Range(0, 1 << 22));
  app->add_option("--seed", own->how.seed, "of the draws (default 1)");
  app->add_option("--tokenizer", own->tokenizer,
                  "bytes or sentencepiece:MODEL (default: the job's)");
  app->add_option("--threads", own->threads, "compute threads (default: all cores)")
      ->check(CLI::Range(1, 1024));
  app->add_flag("--logits", own->logits, "only print the logits after the prompt, as JSON");
  add_state_option(app, own->state);
  app->callback([c, own] { c.run = [c, own] { return run_sample(c.flags, *own); }; });
}

}  // namespace stagecoach
