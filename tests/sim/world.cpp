#include "tests/sim/world.hpp"

#include <fmt/format.h>

namespace stagecoach::sim {

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {  // splitmix64 over both
  std::uint64_t x = a * 0x9e3779b97f4a7c15ull + b + 0x632be59bd9b4e019ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
std::uint64_t hash_name(const std::string& text) {
  std::uint64_t h = 14695981039346656037ull;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return h;
}

using values = std::map<std::string, std::uint64_t>;

std::string hash_of(const values& some) {
  std::uint64_t low = 0, high = 0;
  for (const auto& [name, v] : some) {
    low += mix(v, hash_name(name));
    high += mix(hash_name(name), v);
  }
  return fmt::format("{:016x}{:016x}", high, low);
}

}  // namespace stagecoach::sim
