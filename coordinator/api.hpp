// The API of docs/api.md: a request and what is known become an answer or something to do.
//
// Pure: reads the machine and the history, touches no disk, socket or clock. Who may ask (roles,
// token, Host header) was decided by the gateway.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "coordinator/checkpoint_keeper.hpp"
#include "coordinator/cluster_machine.hpp"
#include "coordinator/gateway.hpp"
#include "coordinator/run_history.hpp"
#include "coordinator/submission.hpp"
#include "coordinator/trace_desk.hpp"
#include "coordinator/vote_log.hpp"

namespace stagecoach {

inline constexpr const char* program_version = "0.1.0";

struct api_state {
  const cluster_machine& machine;
  const run_history& history;
  const trace_desk& traces;
  std::int64_t unix_ms = 0;
  std::string store_problem;  // empty: the store takes writes
  std::uint64_t refused_handshakes = 0;
  std::size_t connections = 0;
  std::size_t mailbox_messages = 0;
};

// ---- what a request asks for, where it isn't answered at once
// ------------------------------------------
struct api_submit {
  submission_request request;
};
struct api_plan {
  submission_request request;
};
/// List, verify: the disk is looked at.
struct api_checkpoints {
  job_id job{};
  std::optional<std::uint64_t> step;  // only that one
  check_depth depth = check_depth::quick;
};
struct api_manifest {
  job_id job{};
  std::uint64_t step = 0;
};
/// Rows of the vote log, from the store.
struct api_log {
  job_id job{};
  std::uint64_t from = 1, to = 0;
};
struct api_generations {
  job_id job{};
};
/// Begin a trace: of the steps first .. last, or of the next ones.
struct api_trace {
  job_id job{};
  std::uint64_t first = 0, last = 0;
};
/// An event for the machine; the shell gives it a reply id.
struct api_event {
  event what;
};
using api_outcome = std::variant<http_response, api_submit, api_plan, api_checkpoints, api_manifest,
                                 api_log, api_generations, api_trace, api_event>;

/// Rows of one answer of the vote log.
inline constexpr std::size_t log_rows_max = 10'000;

api_outcome route(const http_request& request, const api_state& state);

// ---- answers to what was not answered at once
// -----------------------------------------------------------
http_response error_answer(const error& e);
http_response problems_answer(const std::vector<spec_problem>& problems);
http_response submitted_answer(const actions::reply_value& value, const submission& checked);
/// To pause, resume, cancel, save, drain, undrain: {"id","state"} where a job is meant.
http_response accepted_answer(const actions::reply_value& value, const cluster_machine& machine);
/// index: what the machine knows of them by step; for what stands in no manifest.
http_response checkpoints_answer(const std::vector<checkpoint_entry>& entries, check_depth depth,
                                 const std::map<std::uint64_t, checkpoint_record>& index);
http_response log_answer(const vote_log& log);
/// Without the instructions where only what has come is asked for.
http_response trace_answer(const trace& t, bool with_spans = true);
http_response generations_answer(const std::vector<generation_record>& list);
http_response manifest_answer(const checkpoint_keeper& keeper, const job_place& job,
                              const checkpoint_entry& entry);

int http_status(errc code);

/// Static files of the page at "/": nullptr if there is none of that path.
struct page_file {
  const char* path;
  const char* content_type;
  const char* content;
};
const page_file* find_page_file(const std::string& path);

}  // namespace stagecoach
