// The memory twin of links: threads of one process, for tests and for one-process runs.
//
// Promises what TCP links promise: order, whole frames, cancel() that frees every waiter, and a
// peer that cancelled or went away is `unreachable` once its delivered frames are taken. No
// checksum: no wire.
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "worker/link.hpp"

namespace stagecoach {
namespace {

using key_order = std::tuple<link_tag, std::uint64_t, std::uint64_t>;

key_order ordered(link_key key) { return {key.tag, key.step, key.number}; }

/// What one rank has been sent and has not taken yet, and whether it is still there.
struct mailbox {
  std::mutex mutex;
  std::condition_variable changed;
  // One map per sender: a frame's identity is (from, key), and equal keys queue in order.
  std::vector<std::map<key_order, std::deque<std::vector<std::byte>>>> from;
  std::vector<bool> gone;  // by sender: it cancelled or was destroyed
  bool cancelled = false;
};

struct room {
  explicit room(int size) : boxes(static_cast<std::size_t>(size)) {
    for (mailbox& box : boxes) {
      box.from.resize(boxes.size());
      box.gone.resize(boxes.size());
    }
  }
  std::vector<mailbox> boxes;
};

class memory_links final : public link_set {
 public:
  memory_links(std::shared_ptr<room> shared, int rank) : room_(std::move(shared)), rank_(rank) {}
  ~memory_links() override { cancel(); }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(room_->boxes.size()); }

  result<void> send(int to, link_key key, std::span<const std::byte> bytes) override {
    check_peer(to);
    {
      mailbox& mine = own_box();
      const std::lock_guard lock(mine.mutex);
      if (mine.cancelled) return cancelled_error();
      if (mine.gone[static_cast<std::size_t>(to)]) return gone_error(to);
    }
    std::vector<std::byte> copy(bytes.begin(), bytes.end());
    mailbox& box = room_->boxes[static_cast<std::size_t>(to)];
    {
      const std::lock_guard lock(box.mutex);
      if (box.cancelled) return gone_error(to);
      box.from[static_cast<std::size_t>(rank_)][ordered(key)].push_back(std::move(copy));
    }
    box.changed.notify_all();
    sent_ += bytes.size();
    return ok();
  }

  result<void> receive(int from, link_key key, std::span<std::byte> into) override {
    auto frame = take(from, key);
    if (!frame) return frame.err();
    if (frame->size() != into.size()) return other_size(from, key, frame->size(), into.size());
    if (!into.empty()) std::memcpy(into.data(), frame->data(), into.size());
    return ok();
  }

  result<held_frame> receive_held(int from, link_key key, std::size_t bytes) override {
    auto frame = take(from, key);
    if (!frame) return frame.err();
    if (frame->size() != bytes) return other_size(from, key, frame->size(), bytes);
    auto held = std::make_shared<const std::vector<std::byte>>(*std::move(frame));
    return held_frame{*held, held};
  }

  result<std::vector<std::byte>> receive_any(int from, link_key key,
                                             std::size_t bytes_max) override {
    auto frame = take(from, key);
    if (frame && frame->size() > bytes_max)
      return make_error(
          errc::bad_input,
          "frame from rank {} with tag {} step {} number {} has {} bytes; expected at "
          "most {}. fix: both ranks must run one plan",
          from, static_cast<unsigned>(key.tag), key.step, key.number, frame->size(), bytes_max);
    return frame;
  }

  link_kind kind(int) const override { return link_kind::in_process; }

  void cancel() override {
    {
      mailbox& mine = own_box();
      const std::lock_guard lock(mine.mutex);
      if (mine.cancelled) return;
      mine.cancelled = true;
      mine.from.assign(room_->boxes.size(), {});
    }
    own_box().changed.notify_all();
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank_) continue;
      mailbox& box = room_->boxes[static_cast<std::size_t>(peer)];
      {
        const std::lock_guard lock(box.mutex);
        box.gone[static_cast<std::size_t>(rank_)] = true;
      }
      box.changed.notify_all();
    }
  }

  std::uint64_t bytes_sent() const override { return sent_; }
  std::uint64_t bytes_received() const override { return received_; }

 private:
  mailbox& own_box() const { return room_->boxes[static_cast<std::size_t>(rank_)]; }

  void check_peer(int peer) const {
    invariant(peer >= 0 && peer < size() && peer != rank_,
              "a link leads to another rank of the set");
  }
  error cancelled_error() const {
    return make_error(errc::cancelled, "links of rank {} were cancelled", rank_);
  }
  static error other_size(int from, link_key key, std::size_t bytes, std::size_t expected) {
    return make_error(errc::bad_input,
                      "frame from rank {} with tag {} step {} number {} has {} bytes; expected {}. "
                      "fix: both ranks must run one plan",
                      from, static_cast<unsigned>(key.tag), key.step, key.number, bytes, expected);
  }
  static error gone_error(int peer) {
    return make_error(errc::unreachable, "rank {} is gone: it closed its links", peer);
  }

  result<std::vector<std::byte>> take(int from, link_key key) {
    check_peer(from);
    mailbox& mine = own_box();
    const auto sender = static_cast<std::size_t>(from);
    std::unique_lock lock(mine.mutex);
    for (;;) {
      if (mine.cancelled) return cancelled_error();
      auto& frames = mine.from[sender];
      if (auto found = frames.find(ordered(key)); found != frames.end()) {
        std::vector<std::byte> frame = std::move(found->second.front());
        found->second.pop_front();
        if (found->second.empty()) frames.erase(found);
        received_ += frame.size();
        return frame;
      }
      if (mine.gone[sender]) return gone_error(from);
      mine.changed.wait(lock);
    }
  }

  std::shared_ptr<room> room_;
  int rank_;
  std::atomic<std::uint64_t> sent_{0};
  std::atomic<std::uint64_t> received_{0};
};

}  // namespace

const char* to_string(link_kind kind) {
  switch (kind) {
    case link_kind::in_process:
      return "in_process";
    case link_kind::shared_memory:
      return "shared_memory";
    case link_kind::tcp:
      return "tcp";
  }
  return "unknown";
}

std::vector<std::unique_ptr<link_set>> make_memory_links(int size) {
  invariant(size >= 1, "a set of links has at least one rank");
  auto shared = std::make_shared<room>(size);
  std::vector<std::unique_ptr<link_set>> sets;
  for (int rank = 0; rank < size; ++rank)
    sets.push_back(std::make_unique<memory_links>(shared, rank));
  return sets;
}

}  // namespace stagecoach
