#include "worker/replica_reduction.hpp"

#include <algorithm>
#include <span>
#include <utility>

namespace stagecoach {
namespace {

// Pieces that a replica is ahead with its sends. More hide more of the other's delays, and leave
// less of the caches to each.
constexpr std::size_t lead = 4;
constexpr std::size_t pieces_max = std::size_t{1} << 16;  // as many as a frame's number can name

std::uint64_t piece_number(std::size_t piece, int replica, std::size_t block) {
  return static_cast<std::uint64_t>(piece) << 48 | static_cast<std::uint64_t>(replica) << 32 |
         block;
}

std::vector<gradient_stretch> cut(const std::vector<gradient_stretch>& share,
                                  std::int64_t piece_floats) {
  std::vector<gradient_stretch> pieces;
  for (const auto& [begin, end] : share)
    for (std::int64_t at = begin; at < end; at += piece_floats)
      pieces.push_back({at, std::min(end, at + piece_floats)});
  return pieces;
}

std::span<const std::byte> bytes_of(const float* from, std::int64_t count) {
  return std::as_bytes(std::span(from, static_cast<std::size_t>(count)));
}

}  // namespace

replica_reduction::replica_reduction(reduction_shape shape, link_set& links, backend& device,
                                     std::int64_t piece_floats)
    : shape_(std::move(shape)), links_(links), device_(device) {
  for (auto& share : shape_.shares) {
    std::int64_t floats = piece_floats;
    auto pieces = cut(share, floats);
    while (pieces.size() > pieces_max && pieces.size() > share.size())
      pieces = cut(share, floats *= 2);
    invariant(pieces.size() <= pieces_max, "a frame's number can name each piece of a share");
    share = std::move(pieces);
  }
  std::vector<tree_node> all;
  for (const auto& of_replica : shape_.blocks)
    all.insert(all.end(), of_replica.begin(), of_replica.end());
  if (shape_.is_exact) {
    merges_ = merge_order(all, shape_.leaf_count);
  } else {
    // By replica, one after the other: not by arrival, so that equal layouts give equal bits.
    for (int from = 1; from < static_cast<int>(all.size()); ++from) merges_.push_back({0, from});
  }
}

result<void> replica_reduction::run(std::uint64_t step, const std::vector<float*>& own,
                                    float* root) {
  std::size_t pieces = 0;
  for (const auto& share : shape_.shares) pieces = std::max(pieces, share.size());
  // What a turn waits for, its peers send in their turns up to the same one, so none waits in a
  // circle.
  for (std::size_t turn = 0; turn < pieces + 2 * lead; ++turn) {
    if (auto sent = send_blocks(step, turn, own); !sent) return sent;
    if (turn < lead) continue;
    if (auto done = reduce_piece(step, turn - lead, own, root); !done) return done;
    if (auto sent = send_reduced(step, turn - lead, root); !sent) return sent;
    if (turn < 2 * lead) continue;
    if (auto got = receive_reduced(step, turn - 2 * lead, root); !got) return got;
  }
  return ok();
}

result<void> replica_reduction::send_blocks(std::uint64_t step, std::size_t piece,
                                            const std::vector<float*>& own) {
  for (int k = 0; k < replica_count(); ++k) {
    const auto& theirs = shape_.shares[static_cast<std::size_t>(k)];
    if (k == shape_.replica || piece >= theirs.size()) continue;
    const auto [begin, end] = theirs[piece];
    for (std::size_t i = 0; i < own.size(); ++i) {
      const link_key key{link_tag::leaf_block, step, piece_number(piece, k, i)};
      if (auto sent = links_.send(shape_.ranks[static_cast<std::size_t>(k)], key,
                                  bytes_of(own[i] + begin, end - begin));
          !sent)
        return sent;
    }
  }
  return ok();
}

/// Everyone's blocks in leaf order: ours in place, the others' where the links hold them.
result<void> replica_reduction::reduce_piece(std::uint64_t step, std::size_t piece,
                                             const std::vector<float*>& own, float* root) {
  const auto& mine = shape_.shares[static_cast<std::size_t>(shape_.replica)];
  if (piece >= mine.size()) return ok();
  const auto [begin, end] = mine[piece];
  const std::int64_t count = end - begin;
  std::vector<const float*> values;
  std::vector<float*> writable;  // null: a held frame, which is for reading
  std::vector<held_frame> held;
  for (int r = 0; r < replica_count(); ++r) {
    for (std::size_t i = 0; i < shape_.blocks[static_cast<std::size_t>(r)].size(); ++i) {
      if (r == shape_.replica) {
        values.push_back(own[i] + begin);
        writable.push_back(own[i] + begin);
        continue;
      }
      const link_key key{link_tag::leaf_block, step, piece_number(piece, shape_.replica, i)};
      auto got = links_.receive_held(shape_.ranks[static_cast<std::size_t>(r)], key,
                                     static_cast<std::size_t>(count) * sizeof(float));
      if (!got) return got.err();
      values.push_back(reinterpret_cast<const float*>(got->bytes.data()));
      writable.push_back(nullptr);
      held.push_back(*std::move(got));
    }
  }
  std::size_t scratch_used = 0;
  const auto scratch = [&] {
    if (scratch_used == scratch_.size()) scratch_.emplace_back();
    auto& buffer = scratch_[scratch_used++];
    if (buffer.size() < static_cast<std::size_t>(count))
      buffer.resize(static_cast<std::size_t>(count));
    return buffer.data();
  };
  for (std::size_t i = 0; i < merges_.size(); ++i) {
    const auto into = static_cast<std::size_t>(merges_[i].into);
    const auto from = static_cast<std::size_t>(merges_[i].from);
    float* to = i + 1 == merges_.size()     ? root + begin
                : writable[into] != nullptr ? writable[into]
                : writable[from] != nullptr ? writable[from]
                                            : scratch();
    device_.add(to, values[into], values[from], count);
    values[into] = writable[into] = to;
  }
  return ok();
}

/// To all; or, where the moments are shared out, to the neighbours that keep a copy of them.
result<void> replica_reduction::send_reduced(std::uint64_t step, std::size_t piece,
                                             const float* root) {
  const auto& mine = shape_.shares[static_cast<std::size_t>(shape_.replica)];
  if (piece >= mine.size()) return ok();
  const auto [begin, end] = mine[piece];
  for (int r = 0; r < replica_count(); ++r) {
    if (r == shape_.replica || !shape_.needs(shape_.replica, r)) continue;
    const link_key key{link_tag::reduced_range, step, piece_number(piece, shape_.replica, 0)};
    if (auto sent = links_.send(shape_.ranks[static_cast<std::size_t>(r)], key,
                                bytes_of(root + begin, end - begin));
        !sent)
      return sent;
  }
  return ok();
}

result<void> replica_reduction::receive_reduced(std::uint64_t step, std::size_t piece,
                                                float* root) {
  for (int r = 0; r < replica_count(); ++r) {
    const auto& theirs = shape_.shares[static_cast<std::size_t>(r)];
    if (r == shape_.replica || !shape_.needs(r, shape_.replica) || piece >= theirs.size()) continue;
    const auto [begin, end] = theirs[piece];
    const link_key key{link_tag::reduced_range, step, piece_number(piece, r, 0)};
    const std::span into(root + begin, static_cast<std::size_t>(end - begin));
    if (auto got = links_.receive(shape_.ranks[static_cast<std::size_t>(r)], key,
                                  std::as_writable_bytes(into));
        !got)
      return got;
  }
  return ok();
}

}  // namespace stagecoach
