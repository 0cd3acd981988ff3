#include "config/suggest.hpp"

#include <doctest/doctest.h>

using namespace stagecoach;

TEST_CASE("edit distance counts inserts, deletes, replacements and swaps") {
  CHECK(edit_distance("", "") == 0);
  CHECK(edit_distance("abc", "") == 3);
  CHECK(edit_distance("kitten", "sitting") == 3);
  CHECK(edit_distance("form", "from") == 1);
  CHECK(edit_distance("wait-for-min", "WAIT_FOR_MIN") == 0);
}

TEST_CASE("the nearest candidate is suggested, and nothing if all are far") {
  const std::vector<std::string> keys = {"batch", "model", "optimizer", "stop"};
  CHECK(nearest("optimiser", keys) == "optimizer");
  CHECK(nearest("modle", keys) == "model");
  CHECK(nearest("stpo", keys) == "stop");
  CHECK_FALSE(nearest("zebra", keys));
  CHECK_FALSE(nearest("", keys));
  CHECK_FALSE(nearest("b", {"a"}));
  CHECK_FALSE(nearest(std::string(100'000, 'x'), keys));
}
