#include "tools/api_client.hpp"

namespace stagecoach {
namespace {

errc code_of(const std::string& name, int status) {
  for (int i = 0; i <= static_cast<int>(errc::too_large); ++i)
    if (name == to_string(static_cast<errc>(i))) return static_cast<errc>(i);
  switch (status) {
    case 401:
    case 403:
      return errc::unauthorised;
    case 404:
      return errc::not_found;
    case 409:
      return errc::conflict;
    case 413:
      return errc::too_large;
    case 422:
      return errc::unplaceable;
    case 503:
      return errc::unreachable;
    default:
      return errc::unexpected;
  }
}

result<nlohmann::json> read_reply(const http_reply& reply, nlohmann::json* problems) {
  auto body = nlohmann::json::parse(reply.body, nullptr, false);
  if (reply.status >= 200 && reply.status < 300) {
    if (body.is_discarded())
      return error{errc::bad_input, "the coordinator's answer is not JSON; is this its port?"};
    return body;
  }
  error e{code_of({}, reply.status), fmt::format("the coordinator answered {}", reply.status)};
  if (body.is_object() && body.contains("error") && body["error"].is_object()) {
    e.code = code_of(body["error"].value("code", ""), reply.status);
    e.message = body["error"].value("message", e.message);
  }
  if (problems != nullptr && body.is_object() && body.contains("problems"))
    *problems = body["problems"];
  return e;
}

}  // namespace

exit_code exit_code_of(errc code) {
  switch (code) {
    case errc::usage:
      return exit_code::usage;
    case errc::bad_spec:
    case errc::bad_input:
    case errc::too_large:
      return exit_code::bad_spec;
    case errc::unreachable:
      return exit_code::unreachable;
    case errc::not_found:
      return exit_code::not_found;
    case errc::conflict:
      return exit_code::conflict;
    case errc::unplaceable:
      return exit_code::unplaceable;
    case errc::timed_out:
      return exit_code::timed_out;
    case errc::unauthorised:
      return exit_code::unauthorised;
    case errc::cancelled:
      return exit_code::cancelled;
    case errc::unexpected:
    case errc::corrupt:
    case errc::disk_full:
    case errc::io:
      return exit_code::failed;
  }
  return exit_code::failed;
}

std::string api_client::address() const { return fmt::format("{}:{}", server_.host, server_.port); }

result<nlohmann::json> api_client::get(const std::string& path,
                                       std::chrono::milliseconds within) const {
  auto reply = http_call(server_, "GET", "/api/v1" + path, {}, within);
  if (!reply) return reply.err();
  return read_reply(*reply, nullptr);
}

result<nlohmann::json> api_client::post(const std::string& path, const nlohmann::json& body,
                                        nlohmann::json* problems) const {
  auto reply = http_call(server_, "POST", "/api/v1" + path, body.dump(), std::chrono::seconds(120));
  if (!reply) return reply.err();
  return read_reply(*reply, problems);
}

result<std::string> api_client::text(const std::string& path) const {
  auto reply = http_call(server_, "GET", path);
  if (!reply) return reply.err();
  if (reply->status != 200)
    return make_error(code_of({}, reply->status), "{} answered {}", path, reply->status);
  return reply->body;
}

}  // namespace stagecoach
