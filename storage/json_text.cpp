#include "storage/json_text.hpp"

#include <set>
#include <vector>

namespace stagecoach {
namespace {

// Thrown through the parser's callback, which has no other way to stop it; caught in this file.
struct parse_stopped {
  errc code;
  std::string reason;
};

class bounded_reader {
 public:
  explicit bounded_reader(json_bounds bounds) : bounds_(bounds) {}

  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using ev = nlohmann::json::parse_event_t;
    switch (event) {
      case ev::object_start:
        check_depth(depth);
        keys_.emplace_back();
        break;
      case ev::object_end:
        keys_.pop_back();
        break;
      case ev::array_start:
        check_depth(depth);
        break;
      case ev::key:
        count();
        if (!keys_.back().insert(parsed.get_ref<const std::string&>()).second)
          throw parse_stopped{
              errc::bad_input,
              fmt::format("the key {} stands twice",
                          parsed.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace))};
        break;
      case ev::array_end:
        break;
      case ev::value:
        count();
        break;
    }
    return true;
  }

 private:
  void check_depth(int depth) {
    count();
    if (depth >= bounds_.depth_max)
      throw parse_stopped{errc::bad_input, fmt::format("nested deeper than {}", bounds_.depth_max)};
  }
  void count() {
    if (++value_count_ > bounds_.value_count_max)
      throw parse_stopped{errc::too_large,
                          fmt::format("more than {} values", bounds_.value_count_max)};
  }

  json_bounds bounds_;
  std::size_t value_count_ = 0;
  std::vector<std::set<std::string>> keys_;  // of each open object
};

}  // namespace

result<nlohmann::json> parse_json(std::string_view text, std::string_view what,
                                  json_bounds bounds) {
  try {
    bounded_reader reader(bounds);
    return nlohmann::json::parse(text.begin(), text.end(), std::ref(reader));
  } catch (const parse_stopped& stop) {
    return make_error(stop.code, "{}: {}", what, stop.reason);
  } catch (const nlohmann::json::exception& e) {
    return make_error(errc::bad_input, "{} is not JSON: {}", what, e.what());
  }
}

}  // namespace stagecoach
