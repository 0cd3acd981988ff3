#include "coordinator/wire.hpp"
#include "coordinator/wire_fields.hpp"
#include "worker/peer_messages.hpp"

namespace stagecoach {

namespace {

// A control message inside, as text: its own reader checks it.
template <class T>
std::string wrap(const char* type, const T& message) {
  nlohmann::json j;
  j["type"] = type;
  j["from"] = message.from;
  j["message"] = encode(message.message);
  return wire::dump(j);
}

template <class T>
std::string typed(const char* type, const T& message) {
  nlohmann::json j = wire::to_json_value(message);
  j["type"] = type;
  return wire::dump(j);
}

std::string text_of(const nlohmann::json& j, const char* name) {
  const auto found = j.find(name);
  return found != j.end() && found->is_string() ? found->get<std::string>() : std::string();
}

}  // namespace

std::string encode(const peer_message& message) {
  if (const auto* x = std::get_if<canvass>(&message)) return typed("canvass", *x);
  if (const auto* x = std::get_if<canvassed>(&message)) return typed("canvassed", *x);
  if (const auto* x = std::get_if<deputy_order>(&message)) return wrap("order", *x);
  return wrap("report", std::get<deputy_report>(message));
}

result<peer_message> decode_peer_message(std::string_view text) {
  // A message within a message has its quotes escaped, so it may be up to twice as long.
  const auto j = wire::parse_bounded(text, 2 * limits::control_message_bytes_max);
  if (!j) return j.err();
  const std::string type = text_of(*j, "type");
  if (type == "canvass") {
    auto x = wire::from_json_value<canvass>(*j);
    if (!x) return x.err();
    return peer_message(std::move(*x));
  }
  if (type == "canvassed") {
    auto x = wire::from_json_value<canvassed>(*j);
    if (!x) return x.err();
    const bool is_known = x->why >= 0 && x->why <= static_cast<int>(refusal::follows_another);
    const auto is_phase_of = [](int phase) {
      return phase >= 0 && phase <= static_cast<int>(worker_phase::finished);
    };
    const bool is_phase = is_phase_of(x->greeting.phase) && is_phase_of(x->pulse.phase) &&
                          x->pulse.activity >= 0 &&
                          x->pulse.activity <= static_cast<int>(trainer_activity::evaluate);
    if (!is_known || !is_phase) {
      return make_error(errc::bad_input, "canvassed: a refusal or phase that is not known");
    }
    return peer_message(std::move(*x));
  }
  if (type == "order") {
    auto inner = decode_to_worker(text_of(*j, "message"));
    if (!inner) return inner.err();
    return peer_message(deputy_order{text_of(*j, "from"), std::move(*inner)});
  }
  if (type == "report") {
    auto inner = decode_to_coordinator(text_of(*j, "message"));
    if (!inner) return inner.err();
    return peer_message(deputy_report{text_of(*j, "from"), std::move(*inner)});
  }
  return make_error(errc::bad_input, "peer message of unknown type \"{}\"", type.substr(0, 40));
}

}  // namespace stagecoach
