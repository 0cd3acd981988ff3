#include "worker/feeder.hpp"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "config/log.hpp"
#include "worker/vote.hpp"

namespace stagecoach {

namespace {

constexpr std::size_t vote_bytes_max = 1 << 16;
constexpr std::size_t queue_bytes_floor = 64 << 20;
constexpr std::size_t queued_rounds_max = 8;

void append(std::vector<std::byte>& to, const void* from, std::size_t bytes) {
  const auto* p = static_cast<const std::byte*>(from);
  to.insert(to.end(), p, p + bytes);
}
std::size_t bytes_of(std::int64_t floats) { return static_cast<std::size_t>(floats) * 4; }

}  // namespace

result<std::unique_ptr<feeder>> feeder::start(link_server& links, feed order, int index,
                                              backend& device,
                                              std::function<void(to_coordinator)> emit) {
  auto pieces = feed_pieces(order);
  if (!pieces) return pieces.err();
  std::unique_ptr<feeder> made(
      new feeder(links, std::move(order), index, std::move(*pieces), device, std::move(emit)));
  made->sender_ = std::thread([f = made.get()] { f->open_and_send(); });
  return made;
}

feeder::feeder(link_server& links, feed order, int index, std::vector<feed_piece> pieces,
               backend& device, std::function<void(to_coordinator)> emit)
    : server_(links),
      order_(std::move(order)),
      index_(index),
      pieces_(std::move(pieces)),
      device_(device),
      emit_(std::move(emit)),
      all_(all_tensors(order_.spec.model)) {
  followed_.state = std::make_unique<shadow_state>(device_);
  std::int64_t floats = 0;
  for (const feed_piece& p : pieces_) {
    if (p.from == index_) {
      if (std::find(takers_.begin(), takers_.end(), p.to) == takers_.end()) takers_.push_back(p.to);
      floats += p.count;
    }
    if (p.to != index_) continue;
    if (std::find(givers_.begin(), givers_.end(), p.from) == givers_.end())
      givers_.push_back(p.from);
    last_round_ = std::max(last_round_, p.round);
    if (p.begin == 0) followed_.state->add(all_[static_cast<std::size_t>(p.tensor)]);
  }
  const std::size_t round = bytes_of(floats) + static_cast<std::size_t>(order_.step_bytes_max);
  queue_bytes_max_ = std::max(queue_bytes_floor, queued_rounds_max * round);
}

feeder::~feeder() {
  std::shared_ptr<link_set> set;
  {
    const std::lock_guard lock(mutex_);
    is_ending_ = true;
    set = set_;
  }
  if (set) set->cancel();
  wake_.notify_all();
  // Again until it is heard: the thread may be on its way to dialling.
  for (std::unique_lock lock(mutex_); !has_dialled_;) {
    server_.abandon(links_job());
    dialled_.wait_for(lock, std::chrono::milliseconds(5));
  }
  if (sender_.joinable()) sender_.join();
  if (follower_.joinable()) follower_.join();
}

/// Apart from all jobs: the feed's links live beside those of its job's generation.
job_id feeder::links_job() const { return static_cast<job_id>(beside_jobs | order_.request); }

void feeder::give_up(const std::string& why) {
  bool is_quiet = false;
  {
    const std::lock_guard lock(mutex_);
    if (is_ending_ || std::exchange(is_broken_, true)) return;
    queue_.clear();
    queue_bytes_ = 0;
    is_quiet = is_finishing_;
  }
  moved_.notify_all();
  wake_.notify_all();
  if (is_quiet) return;
  log_event(level::warn, "feed_given_up",
            {{"job", order_.job}, {"request", order_.request}, {"reason", why}});
  fed x;
  x.job = order_.job;
  x.generation = order_.generation;
  x.request = order_.request;
  x.problem = why;
  emit_(x);
}

void feeder::finish() {
  const std::lock_guard lock(mutex_);
  is_finishing_ = true;
}

// ---- giving ----
void feeder::open_and_send() {
  std::vector<link_peer> peers;
  std::string members;
  for (const plan_member& m : order_.participants) {
    peers.push_back({m.name, m.link_host, m.link_port});
    members += m.process + ";";
  }
  std::size_t frame_max = 0;
  // The last round's is the largest, or that of all gradients; this bounds both.
  for (const feed_piece& p : pieces_) {
    const std::int64_t gradients = feed_frame_floats(pieces_, p.from, p.to, ~0ull, true);
    frame_max = std::max(
        frame_max, bytes_of(gradients) + static_cast<std::size_t>(order_.step_bytes_max) + 4096);
  }
  const generation_id identity{order_.generation, XXH3_64bits(members.data(), members.size())};
  auto opened = server_.open(links_job(), identity, index_, peers, frame_max + vote_bytes_max + 64,
                             [this](int, peer_event what, const std::string& why) {
                               if (what == peer_event::lost) give_up("a link closed: " + why);
                             });
  {
    const std::lock_guard lock(mutex_);
    has_dialled_ = true;
  }
  dialled_.notify_all();
  if (!opened) {
    if (opened.err().code != errc::cancelled) give_up(opened.err().message);
    return;
  }
  std::shared_ptr<link_set> set = std::move(*opened);
  {
    const std::lock_guard lock(mutex_);
    if (is_ending_) return set->cancel();
    set_ = set;
  }
  if (!givers_.empty()) follower_ = std::thread([this] { follow(); });
  emit_(feed_ready{order_.job, order_.generation, order_.request});
  for (;;) {
    frame f;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return is_ending_ || is_broken_ || !queue_.empty(); });
      if (is_ending_ || is_broken_) return;
      f = std::move(queue_.front());
      queue_.pop_front();
    }
    auto sent = set->send(f.to, {link_tag::feed, f.round, 0}, f.bytes);
    {
      const std::lock_guard lock(mutex_);
      queue_bytes_ -= std::min(queue_bytes_, f.bytes.size());
    }
    if (!sent) return give_up(sent.err().message);
  }
}

void feeder::give(const vote_result& vote, const std::function<feed_source(int tensor)>& find) {
  if (takers_.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    if (is_broken_ || is_ending_ || !set_) return;
    const bool is_ordered = (vote.orders & order_bit(order_kind::feed)) != 0 &&
                            std::find(vote.order_ids.begin(), vote.order_ids.end(),
                                      order_.request) != vote.order_ids.end();
    if (!has_begun_ && !is_ordered) return;
    has_begun_ = true;
  }
  const std::vector<std::byte> result = encode_vote(vote);
  std::vector<frame> frames;
  std::size_t bytes = 0;
  for (const int to : takers_) {
    frame f;
    f.to = to;
    f.round = round_;
    const std::int64_t floats = feed_frame_floats(pieces_, index_, to, round_, vote.finite);
    f.bytes.reserve(4 + result.size() + bytes_of(floats));
    const auto length = static_cast<std::uint32_t>(result.size());
    append(f.bytes, &length, sizeof length);
    append(f.bytes, result.data(), result.size());
    for (const feed_piece& p : pieces_) {
      if (p.from != index_ || p.to != to || p.round >= round_ || !vote.finite) continue;
      const feed_source from = find(p.tensor);
      invariant(from.gradient != nullptr, "what is fed has a gradient here");
      append(f.bytes, from.gradient + p.begin, bytes_of(p.count));
    }
    for (const feed_piece& p : pieces_) {
      if (p.from != index_ || p.to != to || p.round != round_) continue;
      const feed_source from = find(p.tensor);
      invariant(from.parameter != nullptr, "what is fed is held here");
      for (const float* array : {from.parameter, from.moment1, from.moment2})
        append(f.bytes, array + p.begin, bytes_of(p.count));
    }
    bytes += f.bytes.size();
    frames.push_back(std::move(f));
  }
  ++round_;
  bool is_full = false;
  {
    const std::lock_guard lock(mutex_);
    if (is_broken_ || is_ending_) return;
    is_full = queue_bytes_ + bytes > queue_bytes_max_;
    if (!is_full) {
      queue_bytes_ += bytes;
      for (frame& f : frames) queue_.push_back(std::move(f));
    }
  }
  if (is_full) return give_up("who is fed does not keep up with the run");
  wake_.notify_all();
}

// ---- following ----
void feeder::follow() {
  std::shared_ptr<link_set> set;
  {
    const std::lock_guard lock(mutex_);
    set = set_;
  }
  for (std::uint64_t round = 0;; ++round) {
    if (auto done = follow_round(*set, round); !done) {
      if (done.err().code != errc::cancelled) give_up(done.err().message);
      return;
    }
    fed x;
    {
      const std::lock_guard lock(state_mutex_);
      if (is_taken_) return;
      x.step = followed_.step;
      if (round >= last_round_) is_whole_ = true;
    }
    moved_.notify_all();
    if (round != last_round_) continue;
    x.job = order_.job;
    x.generation = order_.generation;
    x.request = order_.request;
    emit_(x);
  }
}

result<void> feeder::follow_round(link_set& set, std::uint64_t round) {
  std::vector<std::vector<std::byte>> frames;
  for (const int from : givers_) {
    const std::size_t most =
        4 + vote_bytes_max + bytes_of(feed_frame_floats(pieces_, from, index_, round, true));
    auto got = set.receive_any(from, {link_tag::feed, round, 0}, most);
    if (!got) return got.err();
    frames.push_back(std::move(*got));
  }
  // All of a round or nothing: whoever takes the state finds it at one step.
  const std::lock_guard lock(state_mutex_);
  if (is_taken_) return error{errc::cancelled, "taken"};
  std::optional<vote_result> vote;
  for (std::size_t i = 0; i < frames.size(); ++i) {
    if (auto read = read_frame(frames[i], givers_[i], round, vote); !read) {
      is_taken_ = true;  // half applied: of no step
      return read;
    }
  }
  if (round > 0 && vote->step != followed_.step + 1) {
    is_taken_ = true;
    return make_error(errc::conflict, "fed step {} after step {}", vote->step, followed_.step);
  }
  followed_.step = vote->step;
  followed_.chain = vote->chain;
  followed_.last_vote = std::move(vote);
  return ok();
}

result<void> feeder::read_frame(const std::vector<std::byte>& bytes, int from, std::uint64_t round,
                                std::optional<vote_result>& vote) {
  std::uint32_t length = 0;
  if (bytes.size() >= sizeof length) std::memcpy(&length, bytes.data(), sizeof length);
  const std::size_t head = sizeof length + length;
  if (length == 0 || length > vote_bytes_max || bytes.size() < head)
    return error{errc::bad_input, "a frame of a feed has no vote"};
  auto decoded = decode_vote({bytes.data() + sizeof length, length});
  if (!decoded) return decoded.err();
  if (vote && (vote->step != decoded->step || vote->chain != decoded->chain))
    return make_error(errc::conflict, "fed steps {} and {} at once", vote->step, decoded->step);
  const std::size_t floats =
      bytes_of(feed_frame_floats(pieces_, from, index_, round, decoded->finite));
  if (bytes.size() != head + floats)
    return make_error(errc::bad_input, "a frame of a feed has {} bytes; expected {}", bytes.size(),
                      head + floats);
  const adamw_scalars scalars = scalars_of(*decoded, order_.spec);
  std::size_t at = head;
  // Copied out first: what follows the vote need not lie where a float may.
  std::vector<float> run;
  const auto next = [&](float* to, std::int64_t count) {
    std::memcpy(to, bytes.data() + at, bytes_of(count));
    at += bytes_of(count);
  };
  for (const feed_piece& p : pieces_) {
    if (p.from != from || p.to != index_ || p.round >= round || !decoded->finite) continue;
    run.resize(static_cast<std::size_t>(p.count));
    next(run.data(), p.count);
    followed_.state->apply(all_[static_cast<std::size_t>(p.tensor)], run.data(), scalars, p.begin,
                           p.count);
  }
  for (const feed_piece& p : pieces_) {
    if (p.from != from || p.to != index_ || p.round != round) continue;
    const std::string& name = all_[static_cast<std::size_t>(p.tensor)].name;
    next(followed_.state->parameter(name) + p.begin, p.count);
    next(followed_.state->moment1(name) + p.begin, p.count);
    next(followed_.state->moment2(name) + p.begin, p.count);
  }
  vote = std::move(*decoded);
  return ok();
}

std::optional<fed_state> feeder::take(std::uint64_t step, std::chrono::milliseconds patience) {
  if (givers_.empty()) return std::nullopt;
  std::unique_lock lock(state_mutex_);
  if (step != 0) {
    moved_.wait_for(lock, patience, [this, step] {
      if (is_taken_ || (is_whole_ && followed_.step >= step)) return true;
      const std::lock_guard inner(mutex_);
      return is_broken_;
    });
  }
  if (is_taken_ || !is_whole_) {
    is_taken_ = true;
    return std::nullopt;
  }
  is_taken_ = true;
  return std::move(followed_);
}

}  // namespace stagecoach
