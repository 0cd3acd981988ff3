#include "config/result.hpp"

#include <cstdio>
#include <cstdlib>

namespace stagecoach {

const char* to_string(errc code) {
  switch (code) {
    case errc::unexpected:
      return "unexpected";
    case errc::usage:
      return "usage";
    case errc::bad_spec:
      return "bad_spec";
    case errc::bad_input:
      return "bad_input";
    case errc::not_found:
      return "not_found";
    case errc::corrupt:
      return "corrupt";
    case errc::conflict:
      return "conflict";
    case errc::unplaceable:
      return "unplaceable";
    case errc::timed_out:
      return "timed_out";
    case errc::unreachable:
      return "unreachable";
    case errc::unauthorised:
      return "unauthorised";
    case errc::disk_full:
      return "disk_full";
    case errc::io:
      return "io";
    case errc::cancelled:
      return "cancelled";
    case errc::too_large:
      return "too_large";
  }
  return "unexpected";
}

void invariant_failed(const char* condition, const char* promise, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: broken invariant: %s (%s)\n", file, line, promise, condition);
  std::fflush(stderr);
  std::abort();
}

}  // namespace stagecoach
