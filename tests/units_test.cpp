#include "config/units.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

using namespace stagecoach;

namespace {

std::int64_t count_of(const char* text) {
  const auto r = parse_count(text);
  INFO(text);
  REQUIRE(r);
  return *r;
}

bool is_refused(const char* text) { return !parse_count(text); }

}  // namespace

TEST_CASE("counts are read as people write them") {
  CHECK(count_of("0") == 0);
  CHECK(count_of("512") == 512);
  CHECK(count_of("1_000") == 1000);
  CHECK(count_of("512Ki") == 524288);
  CHECK(count_of("1Mi") == 1048576);
  CHECK(count_of("32B") == 32'000'000'000);
  CHECK(count_of("375M") == 375'000'000);
  CHECK(count_of("1.5M") == 1'500'000);
  CHECK(count_of("0.5Ki") == 512);
  CHECK(count_of("1e6") == 1'000'000);
  CHECK(count_of("2T") == 2'000'000'000'000);
  CHECK(count_of("-3") == -3);
  CHECK(count_of("9223372036854775807") == INT64_MAX);
  CHECK(count_of("1000000000000000000") == 1'000'000'000'000'000'000);
}

TEST_CASE("what could mean something else is refused as a count") {
  for (const char* text :
       {"",
        " ",
        "010",
        "00",
        "1__0",
        "_1",
        "1_",
        "0x10",
        "0b1",
        "1.5",
        "1e-1",
        "no",
        "NaN",
        "inf",
        "1 000",
        "1,000",
        "512ki",
        "9223372036854775808",
        "1e30",
        "9e18B",
        "1e999999999999",
        "99999999999999999999999999999999999999999999999999999999999999999999999999",
        "--1",
        "."}) {
    INFO(text);
    CHECK(is_refused(text));
  }
  CHECK(parse_count("010").err().message ==
        "\"010\" starts with 0, which YAML readers take for octal. fix: write 10");
}

TEST_CASE("reals are decimal, finite and free of the locale") {
  CHECK(*parse_real("6.0e-4") == 6e-4);
  CHECK(*parse_real("6e-4") == 6e-4);
  CHECK(*parse_real("1e-08") == 1e-8);
  CHECK(*parse_real(".5") == 0.5);
  CHECK(*parse_real("1.") == 1.0);
  CHECK(*parse_real("-2") == -2.0);
  CHECK(*parse_real("0.1") == 0.1);
  for (const char* text : {"inf", "nan", "0x1p3", "1e999", "1,5", "01.5", "1K", "", "e5", "1e"})
    CHECK_FALSE(parse_real(text));
}

TEST_CASE("the shortest text of a double reads back as the same double") {
  std::uint64_t state = 1;
  for (int i = 0; i < 2000; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const double x =
        std::ldexp(static_cast<double>(state >> 11), static_cast<int>(state % 120) - 100);
    const auto back = parse_real(fmt::format("{}", x));
    REQUIRE(back);
    CHECK(*back == x);
  }
}

TEST_CASE("durations have units and add up") {
  CHECK(*parse_duration_ms("10m") == 600'000);
  CHECK(*parse_duration_ms("1h30m") == 5'400'000);
  CHECK(*parse_duration_ms("250ms") == 250);
  CHECK(*parse_duration_ms("1.5s") == 1500);
  CHECK(*parse_duration_ms("2d") == 172'800'000);
  for (const char* text : {"10", "", "m", "10 m", "10x", "-1s", "999999999999999d"})
    CHECK_FALSE(parse_duration_ms(text));
  for (const std::int64_t ms : {0LL, 1LL, 999LL, 1000LL, 90'000LL, 600'000LL, 5'400'000LL})
    CHECK(*parse_duration_ms(format_duration_ms(ms)) == ms);
}

TEST_CASE("quantities and ranges") {
  CHECK(*parse_quantity("512Ki tokens") == quantity{524288, "tokens"});
  CHECK(*parse_quantity("1 step") == quantity{1, "steps"});
  CHECK(*parse_quantity("64") == quantity{64, ""});
  CHECK(*parse_range("4..8") == count_range{4, 8});
  CHECK(*parse_range("4") == count_range{4, 4});
  for (const char* text : {"4..", "..8", "4...8", "4-8", "a..b"}) CHECK_FALSE(parse_range(text));
  CHECK(format_grouped(61035) == "61,035");
  CHECK(format_grouped(-1234567) == "-1,234,567");
  CHECK(format_grouped(999) == "999");
}

TEST_CASE("quoted text can't move a terminal's cursor") {
  CHECK(quoted("a\x1b[2J") == "\"a\\x1b[2J\"");
  CHECK(quoted("\xff") == "\"\\xff\"");
  CHECK(quoted("\xC2\x9B") == "\"\\xc2\\x9b\"");
  CHECK(quoted("이름") == "\"이름\"");
  CHECK(quoted(std::string(1000, 'x')).size() < 100);
}
