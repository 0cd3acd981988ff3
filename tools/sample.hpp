// Text from weights, and what `export` and `hash` share with it.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "storage/tokenizer.hpp"
#include "tools/command.hpp"
#include "tools/state_api.hpp"
#include "tools/weights.hpp"

namespace stagecoach {

/// Of a SentencePiece model in an exported folder.
inline constexpr const char* tokenizer_file_name = "tokenizer.model";

void add_sample(command_line c);                           // tools/sample.cpp
void add_state_option(CLI::App* app, std::string& state);  // tools/checkpoints.cpp

/// JOB, JOB@STEP, a folder of Hugging Face or a checkpoint folder. `api`, if not null, keeps the
/// coordinator of `state` alive. Fails: as weight_source does.
result<weight_source> open_weights(const global_flags& flags, const std::string& target,
                                   const std::string& state, std::optional<state_api>* api);

/// "bytes" or "sentencepiece:MODEL". Fails: usage, not_found, bad_input.
result<std::unique_ptr<tokenizer>> open_named_tokenizer(const std::string& text);

/// Bytes to a terminal as they come: an unfinished UTF-8 character waits for its rest; control
/// bytes other than line feed and tab, and bytes that are no UTF-8, come out as \x1b.
class text_stream {
 public:
  /// What can be shown now.
  std::string add(std::string_view bytes);
  /// What was still waiting.
  std::string finish();

 private:
  std::string held_;
};

}  // namespace stagecoach
