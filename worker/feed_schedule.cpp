#include "worker/feed_schedule.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "model/parameters.hpp"

namespace stagecoach {

result<std::vector<feed_piece>> feed_pieces(const feed& order) {
  std::map<std::string, tensor_info> known;
  for (tensor_info& t : all_tensors(order.spec.model)) known.emplace(t.name, t);
  const int participants = static_cast<int>(order.participants.size());
  // Whole cache lines, so that every run's arrays begin on one.
  const std::int64_t most = std::max<std::int64_t>(
      16, static_cast<std::int64_t>(std::min<std::uint64_t>(order.step_bytes_max, 1ull << 40)) /
              12 / 16 * 16);
  std::vector<feed_piece> pieces;
  std::map<int, std::pair<std::uint64_t, std::int64_t>> filled;  // by giver: round, floats in it
  std::set<std::pair<int, int>> seen;
  for (const transfer_record& t : order.transfers) {
    const auto found = known.find(t.tensor);
    const auto is_one = [participants](int i) { return i >= 0 && i < participants; };
    if (found == known.end() || !is_one(t.from_rank) || !is_one(t.to_rank) ||
        t.from_rank == t.to_rank || !seen.insert({t.to_rank, found->second.index}).second)
      return make_error(errc::bad_input, "feed {}: {} from {} to {} can't be", order.request,
                        t.tensor, t.from_rank, t.to_rank);
    const std::int64_t count = found->second.count();
    auto& [round, floats] = filled[t.from_rank];
    for (std::int64_t begin = 0; begin < count;) {
      if (floats >= most) {
        ++round;
        floats = 0;
      }
      const std::int64_t run = std::min(count - begin, std::max<std::int64_t>(16, most - floats));
      const std::int64_t whole =
          begin + run == count ? run : std::max<std::int64_t>(16, run / 16 * 16);
      const std::int64_t taken = std::min(whole, count - begin);
      pieces.push_back({t.from_rank, t.to_rank, found->second.index, begin, taken, round});
      begin += taken;
      floats += taken;
    }
  }
  return pieces;
}

std::int64_t feed_frame_floats(const std::vector<feed_piece>& pieces, int from, int to,
                               std::uint64_t round, bool has_gradients) {
  std::int64_t floats = 0;
  for (const feed_piece& p : pieces) {
    if (p.from != from || p.to != to) continue;
    if (p.round == round) floats += 3 * p.count;
    if (p.round < round && has_gradients) floats += p.count;
  }
  return floats;
}

}  // namespace stagecoach
