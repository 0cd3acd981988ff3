// job.yaml: text to a resolved job_spec, with all problems at once, and back.
//
// Pure: no disk, no clock, no machine. The same text and overrides give the same spec everywhere,
// since what is resolved here (microbatch size, leaf count, step counts) decides the bits (DESIGN
// 4). Whether data files exist, their sizes and hashes are found out at submit, by others.
//
// Codes, stable for scripts:
//   E001 not YAML, not text             E002 unknown key              E003 duplicate key
//   E004 not supported in this version  E005 required key is missing  E006 wrong kind of value
//   E007 value can't be understood      E008 over a limit             E009 YAML alias, anchor or
//   tag E010 bad override E101 unknown preset                 E102 out of range             E104
//   d_model / n_head E105 too many parameters            E106 sequence > context       E107
//   vocab_size < tokenizer's E110 data format against tokenizer  E111 validation set           E120
//   batch.global / sequence E121 batch.global / micro           E122 leaves no power of two   E123
//   leaves / microbatches E130 schedule or stop contradicts itself E201 more stages than units E202
//   more replicas than leaves E203 layers                         E204 mode auto against explicit
//   E205 layout against workers E210 workers min > max
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config/job_spec.hpp"
#include "config/presets.hpp"

namespace stagecoach {

/// One thing wrong with a spec. line and column are one-based, column in code points; 0 where the
/// problem has no place in a file (an override, a file as a whole).
struct spec_problem {
  std::string file;
  int line = 0;
  int column = 0;
  std::string code;     // "E104"
  std::string path;     // "model.d_model"; empty: the whole file
  std::string message;  // what was found and what was expected
  std::string fix;      // may be empty
  std::string source_line;
  bool operator==(const spec_problem&) const = default;
};

/// spec is set exactly if there are no problems.
struct spec_result {
  std::optional<job_spec> spec;
  std::vector<spec_problem> problems;  // by line, then column; at most 100
};

/// Reads and resolves one job file. overrides are "path=value" with the value as YAML, applied in
/// order
/// ("batch.micro=8", "model.init={seed: 7}", "data.train.0.path=b.txt").
spec_result parse_job_spec(std::string_view text, const std::string& file_name,
                           const std::vector<std::string>& overrides = {});

/// Compiler style: place, code, message, source line with a mark, fix, and a last line with the
/// count. Ends with a line feed; empty if there are no problems. Safe to print on a terminal.
std::string format_problems(const std::vector<spec_problem>& problems);

/// The resolved form: every field written out; parse_job_spec gives back an equal spec (for a spec
/// that itself came from parse_job_spec, with or without the sizes and hashes filled in at submit).
std::string write_job_spec_yaml(const job_spec& spec);

/// A commented job file to begin with, for `stagecoach init`. It parses. Byte presets train on a
/// text file, the others on token files.
std::string starter_job_yaml(const preset& p);

/// `micro: auto`: the largest power of two that divides global_sequences with at most 4,096 tokens
/// per microbatch and at least max(4, 2 * workers_max) microbatches per step; 1 where none does. If
/// some smaller power of two makes `leaves: auto` balanced from workers_min to workers_max (its
/// leaves are whole microbatches), the largest of those.
std::int64_t resolve_micro_sequences(std::int64_t global_sequences, std::int64_t sequence_tokens,
                                     int workers_min, int workers_max);

}  // namespace stagecoach
