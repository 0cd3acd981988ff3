// How many leaves a step's microbatches form, and how evenly they fall on replicas (DESIGN 4).
//
// The leaf count decides bits, so it is resolved once, at submit, from the job file alone. Knows no
// layout and no worker that happens to be attached.
#pragma once

#include <cstdint>

namespace stagecoach {

/// leaves: auto. The smallest power of two that divides microbatch_count, is at least workers_max
/// (as many replicas as workers may come), and has a load balance of at least 0.90 at every replica
/// count in [workers_min, workers_max]. Where none exists: the largest power of two that divides
/// microbatch_count. Arguments below 1 count as 1.
std::int64_t resolve_leaf_count(std::int64_t microbatch_count, int workers_min, int workers_max);

/// Does resolve_leaf_count reach 0.90 at every replica count? It does not where the microbatches of
/// a step, of which leaves are made, are too few or not divided by a large enough power of two: 64
/// are needed from 1 to 8 workers, 128 from 1 to 16.
bool are_leaves_balanced(std::int64_t microbatch_count, int workers_min, int workers_max);

/// Share of the time that replicas compute when leaf_count leaves are dealt out as evenly as
/// possible: (L / N) / ceil(L / N), in (0, 1]. 8 leaves on 7 replicas: 0.571. Arguments below 1
/// count as 1.
double leaf_balance(std::int64_t leaf_count, int replicas);

}  // namespace stagecoach
