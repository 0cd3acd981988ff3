// The sum of one stage's gradient over its replicas, by the tree over leaves.
//
// Each replica reduces a share of the flat gradient: it gets every other's leaf blocks of it, adds
// them by the full binary tree over leaf index together with its own (DESIGN section 4), and gives
// the result to who needs it. Bits depend neither on timing nor on how the shares are cut. Shares
// travel in pieces that fit a cache, a few under way at a time: the receiver adds what the sender
// has just written, and no end waits for a whole share.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "config/result.hpp"
#include "kernels/backend.hpp"
#include "model/leaf_tree.hpp"
#include "worker/link.hpp"

namespace stagecoach {

/// Of a flat gradient, in floats.
struct gradient_stretch {
  std::int64_t begin = 0, end = 0;
};

struct reduction_shape {
  int replica = 0;                                    // ours
  std::vector<int> ranks;                             // by replica, in the set of links
  std::vector<std::vector<gradient_stretch>> shares;  // by replica: what it reduces
  std::vector<std::vector<tree_node>> blocks;         // by replica: what it brings, in leaf order
  std::int64_t leaf_count = 0;
  bool is_exact = true;  // false: by replica instead of by leaf; each brings one block
  /// Of two replicas: the second gets what the first reduced.
  std::function<bool(int from, int to)> needs;
};

class replica_reduction {
 public:
  /// links and device must outlive this. piece_floats: largest piece, for tests.
  replica_reduction(reduction_shape shape, link_set& links, backend& device,
                    std::int64_t piece_floats = std::int64_t{1} << 18);

  /// own: our blocks, whole gradients, which are overwritten. root: gets the sum, of our share and
  /// of those that we need; it is none of own. All replicas call it for the same step.
  /// Fails: as the links do.
  result<void> run(std::uint64_t step, const std::vector<float*>& own, float* root);

 private:
  result<void> send_blocks(std::uint64_t step, std::size_t piece, const std::vector<float*>& own);
  result<void> reduce_piece(std::uint64_t step, std::size_t piece, const std::vector<float*>& own,
                            float* root);
  result<void> send_reduced(std::uint64_t step, std::size_t piece, const float* root);
  result<void> receive_reduced(std::uint64_t step, std::size_t piece, float* root);
  int replica_count() const { return static_cast<int>(shape_.ranks.size()); }

  reduction_shape shape_;  // shares cut into pieces
  std::vector<merge> merges_;
  link_set& links_;
  backend& device_;
  std::vector<std::vector<float>> scratch_;  // a piece each
};

}  // namespace stagecoach
