#include "coordinator/wire.hpp"

#include <array>

#include "coordinator/wire_fields.hpp"

namespace stagecoach {

namespace {

template <class T>
struct tag {};

// The names on the wire; frozen with protocol_version.
constexpr const char* name_of(tag<hello>) { return "hello"; }
constexpr const char* name_of(tag<beat>) { return "beat"; }
constexpr const char* name_of(tag<prepared>) { return "prepared"; }
constexpr const char* name_of(tag<ready>) { return "ready"; }
constexpr const char* name_of(tag<failed>) { return "failed"; }
constexpr const char* name_of(tag<progress>) { return "progress"; }
constexpr const char* name_of(tag<evaluated>) { return "evaluated"; }
constexpr const char* name_of(tag<part_saved>) { return "part_saved"; }
constexpr const char* name_of(tag<held>) { return "held"; }
constexpr const char* name_of(tag<finished>) { return "finished"; }
constexpr const char* name_of(tag<peer_report>) { return "peer_report"; }
constexpr const char* name_of(tag<log_line>) { return "log_line"; }
constexpr const char* name_of(tag<goodbye>) { return "goodbye"; }
constexpr const char* name_of(tag<welcome>) { return "welcome"; }
constexpr const char* name_of(tag<refused>) { return "refused"; }
constexpr const char* name_of(tag<prepare>) { return "prepare"; }
constexpr const char* name_of(tag<commit>) { return "commit"; }
constexpr const char* name_of(tag<run_stage>) { return "run_stage"; }
constexpr const char* name_of(tag<give_order>) { return "give_order"; }
constexpr const char* name_of(tag<resume_stage>) { return "resume_stage"; }
constexpr const char* name_of(tag<checkpoint_durable>) { return "checkpoint_durable"; }
constexpr const char* name_of(tag<stop_stage>) { return "stop_stage"; }
constexpr const char* name_of(tag<plan_report>) { return "plan_report"; }
constexpr const char* name_of(tag<feed_ready>) { return "feed_ready"; }
constexpr const char* name_of(tag<fed>) { return "fed"; }
constexpr const char* name_of(tag<probed>) { return "probed"; }
constexpr const char* name_of(tag<audited>) { return "audited"; }
constexpr const char* name_of(tag<traced>) { return "traced"; }
constexpr const char* name_of(tag<clock_answer>) { return "clock_answer"; }
constexpr const char* name_of(tag<trace_steps>) { return "trace_steps"; }
constexpr const char* name_of(tag<clock_question>) { return "clock_question"; }
constexpr const char* name_of(tag<feed>) { return "feed"; }
constexpr const char* name_of(tag<stop_feed>) { return "stop_feed"; }
constexpr const char* name_of(tag<probe>) { return "probe"; }
constexpr const char* name_of(tag<audit>) { return "audit"; }
constexpr const char* name_of(tag<stop_audit>) { return "stop_audit"; }

constexpr int worker_phase_count = static_cast<int>(worker_phase::finished) + 1;
constexpr int order_kind_count = static_cast<int>(order_kind::feed) + 1;
constexpr int activity_count = static_cast<int>(trainer_activity::evaluate) + 1;

// ---- what a field list can't say: numbers that must fit each other ----
std::string check_phase(int phase) {
  if (phase >= 0 && phase < worker_phase_count) return {};
  return fmt::format("phase: {} is not one of the {} known values", phase, worker_phase_count);
}

bool are_cuts(const std::vector<int>& cuts, int part_count) {
  if (cuts.size() != static_cast<std::size_t>(part_count) + 1 || cuts.front() != 0) return false;
  for (std::size_t i = 1; i < cuts.size(); ++i) {
    if (cuts[i] <= cuts[i - 1]) return false;
  }
  return true;
}

std::string check(const plan& p) {
  const layout& shape = p.shape;
  if (shape.stage_count < 1 || shape.stage_count > limits::stage_count_max) {
    return fmt::format("plan.layout.stages: {} is not in [1, {}]", shape.stage_count,
                       limits::stage_count_max);
  }
  if (shape.replica_count < 1 || shape.replica_count > limits::replica_count_max) {
    return fmt::format("plan.layout.replicas: {} is not in [1, {}]", shape.replica_count,
                       limits::replica_count_max);
  }
  if (shape.worker_count() > limits::worker_count_max ||
      p.members.size() != static_cast<std::size_t>(shape.worker_count())) {
    return fmt::format("plan.members: {} of them for {} x {} stages and replicas; the limit is {}",
                       p.members.size(), shape.stage_count, shape.replica_count,
                       limits::worker_count_max);
  }
  if (!are_cuts(shape.unit_cuts, shape.stage_count)) {
    return "plan.layout.unit_cuts: not a rising list from 0 with one entry more than stages";
  }
  if (!are_cuts(shape.leaf_cuts, shape.replica_count)) {
    return "plan.layout.leaf_cuts: not a rising list from 0 with one entry more than replicas";
  }
  return {};
}

std::string check(const model_spec& m) {
  const auto is_in = [](std::int64_t x, std::int64_t max) { return x >= 1 && x <= max; };
  if (!is_in(m.n_layer, limits::layer_count_max)) return "spec.model.n_layer: out of range";
  if (!is_in(m.d_model, limits::d_model_max)) return "spec.model.d_model: out of range";
  if (!is_in(m.n_head, m.d_model)) return "spec.model.n_head: out of range";
  if (!is_in(m.d_ff, limits::d_model_max * 16)) return "spec.model.d_ff: out of range";
  if (!is_in(m.vocab_size, limits::vocab_size_max)) return "spec.model.vocab_size: out of range";
  if (!is_in(m.context, limits::context_max)) return "spec.model.context: out of range";
  return {};
}

template <class T>
std::string check(const T&) {
  return {};
}
std::string check(const hello& m) { return check_phase(m.phase); }
std::string check(const beat& m) {
  if (m.activity >= 0 && m.activity < activity_count) return check_phase(m.phase);
  return fmt::format("activity: {} is not one of the {} known values", m.activity, activity_count);
}
std::string check(const plan_report& m) { return check(m.shape); }
std::string check(const feed& m) {
  const auto count = static_cast<int>(m.participants.size());
  if (count < 2 || count > limits::worker_count_max) {
    return fmt::format("participants: {} is not in [2, {}]", count, limits::worker_count_max);
  }
  for (const transfer_record& t : m.transfers) {
    if (t.from_rank < 0 || t.from_rank >= count || t.to_rank < 0 || t.to_rank >= count ||
        t.from_rank == t.to_rank) {
      return fmt::format("transfers: {} goes from {} to {}; there are {} participants", t.tensor,
                         t.from_rank, t.to_rank, count);
    }
  }
  return check(m.spec.model);
}
std::string check(const audit& m) { return check(m.spec.model); }
std::string check(const traced& m) {
  if (m.spans.size() % 4 == 0 && m.spans.size() / 4 <= traced_spans_max) return {};
  return fmt::format("spans: {} numbers; expected four each for at most {}", m.spans.size(),
                     traced_spans_max);
}
std::string check(const give_order& m) {
  if (m.with >> order_kind_count != 0) return fmt::format("with: {} has unknown orders", m.with);
  if (m.kind >= 0 && m.kind < order_kind_count) return {};
  return fmt::format("kind: {} is not one of the {} known orders", m.kind, order_kind_count);
}
std::string check(const part_saved& m) {
  if (m.part_count >= 1 && m.part_count <= limits::worker_count_max) return {};
  return fmt::format("part_count: {} is not in [1, {}]", m.part_count, limits::worker_count_max);
}
std::string check(const commit& m) {
  std::string problem = check(m.shape);
  if (problem.empty()) problem = check(m.spec.model);
  const int ranks = m.shape.shape.worker_count();
  for (const transfer_record& t : m.transfers) {
    if (!problem.empty()) break;
    if (t.from_rank < 0 || t.from_rank >= ranks || t.to_rank < 0 || t.to_rank >= ranks) {
      problem = fmt::format("transfers: {} goes from rank {} to {}; the plan has {}", t.tensor,
                            t.from_rank, t.to_rank, ranks);
    }
  }
  if (problem.empty() && unit_count(m.spec.model) != m.shape.shape.unit_cuts.back()) {
    problem = fmt::format("plan.layout.unit_cuts: end at {}; the model has {} units",
                          m.shape.shape.unit_cuts.back(), unit_count(m.spec.model));
  }
  const auto are_times = [ranks](const std::vector<std::int64_t>& list, std::int64_t least) {
    return (list.empty() || static_cast<int>(list.size()) == ranks) &&
           std::all_of(list.begin(), list.end(), [least](std::int64_t us) { return us >= least; });
  };
  if (problem.empty() && !are_times(m.leaf_us, 1)) {
    problem = fmt::format("leaf_us: {} entries; expected none or a time for each of the {} ranks",
                          m.leaf_us.size(), ranks);
  }
  if (problem.empty() && !are_times(m.layer_us, 0)) {
    problem = fmt::format("layer_us: {} entries; expected none or a time for each of the {} ranks",
                          m.layer_us.size(), ranks);
  }
  return problem;
}

template <class Variant>
std::string encode_any(const Variant& message) {
  return std::visit(
      []<class T>(const T& m) {
        nlohmann::json j = wire::to_json_value(m);
        j["type"] = name_of(tag<T>{});
        return wire::dump(j);
      },
      message);
}

template <class T, class Variant>
bool try_decode(const std::string& type, const nlohmann::json& j, result<Variant>& to) {
  if (type != name_of(tag<T>{})) return false;
  result<T> message = wire::from_json_value<T>(j);
  if (!message) {
    to = make_error(message.err().code, "{}: {}", type, message.err().message);
    return true;
  }
  if (const std::string problem = check(*message); !problem.empty()) {
    to = make_error(errc::bad_input, "{}: {}", type, problem);
    return true;
  }
  to = Variant(std::move(*message));
  return true;
}

template <class... T>
result<std::variant<T...>> decode_any(std::string_view text, tag<std::variant<T...>>) {
  using variant = std::variant<T...>;
  const auto j = wire::parse_bounded(text, limits::control_message_bytes_max);
  if (!j) return j.err();
  const auto type = j->find("type");
  if (type == j->end() || !type->is_string()) {
    return make_error(errc::bad_input, "a message without a text field \"type\"");
  }
  const std::string name = type->template get<std::string>();
  result<variant> message =
      make_error(errc::bad_input, "message of unknown type \"{}\"", name.substr(0, 40));
  (void)(try_decode<T>(name, *j, message) || ...);
  return message;
}

template <class Variant>
const char* name_of_any(const Variant& message) {
  return std::visit([]<class T>(const T&) { return name_of(tag<T>{}); }, message);
}

}  // namespace

std::string encode(const to_worker& message) { return encode_any(message); }
std::string encode(const to_coordinator& message) { return encode_any(message); }
const char* type_name(const to_worker& message) { return name_of_any(message); }
const char* type_name(const to_coordinator& message) { return name_of_any(message); }

result<to_worker> decode_to_worker(std::string_view text) {
  return decode_any(text, tag<to_worker>{});
}
result<to_coordinator> decode_to_coordinator(std::string_view text) {
  return decode_any(text, tag<to_coordinator>{});
}

template <class T>
std::string to_json_text(const T& from) {
  return wire::dump(wire::to_json_value(from));
}

template <class T>
result<T> from_json_text(std::string_view text, std::size_t bytes_max) {
  const auto j = wire::parse_bounded(text, bytes_max);
  if (!j) return j.err();
  return wire::from_json_value<T>(*j);
}

#define STAGECOACH_WIRE(type)                     \
  template std::string to_json_text(const type&); \
  template result<type> from_json_text<type>(std::string_view, std::size_t);
STAGECOACH_WIRE(job_spec)
STAGECOACH_WIRE(plan)
STAGECOACH_WIRE(layout)
STAGECOACH_WIRE(part_record)
STAGECOACH_WIRE(step_report)
STAGECOACH_WIRE(vote_result)
STAGECOACH_WIRE(hello)
STAGECOACH_WIRE(meta_record)
STAGECOACH_WIRE(worker_record)
STAGECOACH_WIRE(job_record)
STAGECOACH_WIRE(generation_record)
STAGECOACH_WIRE(checkpoint_record)
STAGECOACH_WIRE(event_record)
#undef STAGECOACH_WIRE

}  // namespace stagecoach
