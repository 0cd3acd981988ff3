// One worker's part in a feed: gives state that it holds, follows state that it is given.
//
// Links of its own and threads of its own: neither dialling nor a slow taker ever holds up a step.
// The trainer calls give() after each applied step; what is given is copied and sent later, and
// where a taker does not keep up the feed is given up, not the run. A taker replays the optimizer
// on every gradient, so what it has always stands at one step. Says feed_ready and fed by itself.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "coordinator/messages.hpp"
#include "kernels/backend.hpp"
#include "model/shadow.hpp"
#include "worker/feed_schedule.hpp"
#include "worker/link_asio.hpp"

namespace stagecoach {

/// One tensor at the step just applied; gradient: reduced, of that step.
struct feed_source {
  const float *parameter = nullptr, *moment1 = nullptr, *moment2 = nullptr, *gradient = nullptr;
};

/// State of one step that a taker has whole.
struct fed_state {
  std::uint64_t step = 0, chain = 0;
  std::optional<vote_result> last_vote;
  std::unique_ptr<shadow_state> state;
};

class feeder {
 public:
  /// device: for replaying, used by no other thread meanwhile; outlives what take() gives.
  /// links outlives this. Fails: bad_input (the order does not fit together).
  static result<std::unique_ptr<feeder>> start(link_server& links, feed order, int index,
                                               backend& device,
                                               std::function<void(to_coordinator)> emit);
  ~feeder();  // closes its links
  feeder(const feeder&) = delete;

  std::uint64_t job() const { return order_.job; }
  std::uint64_t request() const { return order_.request; }

  /// After each applied step; find: by global tensor index. Never waits.
  void give(const vote_result& vote, const std::function<feed_source(int tensor)>& find);

  /// A switch begins: that links close from here on is no problem of the feed.
  void finish();

  /// Ends the following: what it holds, once that stands at `step` (0: as it is) or time is up.
  /// None: it is not whole, or was taken.
  std::optional<fed_state> take(std::uint64_t step, std::chrono::milliseconds patience);

 private:
  feeder(link_server& links, feed order, int index, std::vector<feed_piece> pieces, backend& device,
         std::function<void(to_coordinator)> emit);
  struct frame {
    int to = 0;
    std::uint64_t round = 0;
    std::vector<std::byte> bytes;
  };
  void open_and_send();
  void follow();
  result<void> follow_round(link_set& set, std::uint64_t round);
  result<void> read_frame(const std::vector<std::byte>& bytes, int from, std::uint64_t round,
                          std::optional<vote_result>& vote);
  void give_up(const std::string& why);
  job_id links_job() const;

  link_server& server_;
  const feed order_;
  const int index_;
  const std::vector<feed_piece> pieces_;
  backend& device_;
  const std::function<void(to_coordinator)> emit_;
  std::vector<tensor_info> all_;
  std::vector<int> givers_, takers_;  // of and from this one
  std::uint64_t last_round_ = 0;      // of the pieces that it is given
  std::size_t queue_bytes_max_ = 0;

  std::mutex mutex_;  // guards the lines below
  std::condition_variable wake_, dialled_;
  std::shared_ptr<link_set> set_;
  std::deque<frame> queue_;
  std::size_t queue_bytes_ = 0;
  bool is_ending_ = false, is_broken_ = false, has_begun_ = false, is_finishing_ = false;
  bool has_dialled_ = false;
  std::uint64_t round_ = 0;  // next that is given

  std::mutex state_mutex_;  // guards what is followed; a round is applied under it
  std::condition_variable moved_;
  fed_state followed_;
  bool is_whole_ = false, is_taken_ = false;

  std::thread sender_, follower_;
};

}  // namespace stagecoach
