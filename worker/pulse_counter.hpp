// Counts what the trainer's thread does, for beats: written by that thread, read by any.
//
// watched_links stands between the trainer and its links, so that every wait for another rank is
// seen, whichever code waits.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "worker/link.hpp"
#include "worker/trainer_pulse.hpp"

namespace stagecoach {

class pulse_counter {
 public:
  void count() { op_.fetch_add(1, std::memory_order_relaxed); }
  trainer_pulse now() const {
    // Not one snapshot: a reader between two stores sees a thread that moves, and asks again.
    return {op_.load(std::memory_order_relaxed), activity_.load(std::memory_order_relaxed),
            waits_for_.load(std::memory_order_relaxed)};
  }

  /// The thread is at this until the end of the scope, then at what it was at before.
  class scope {
   public:
    scope(pulse_counter& of, trainer_activity what, std::uint64_t waits_for = 0)
        : of_(of), activity_(of.activity_), waits_for_(of.waits_for_) {
      of_.set(what, waits_for);
    }
    ~scope() { of_.set(activity_, waits_for_); }
    scope(const scope&) = delete;

   private:
    pulse_counter& of_;
    trainer_activity activity_;
    std::uint64_t waits_for_;
  };

 private:
  void set(trainer_activity what, std::uint64_t waits_for) {
    waits_for_.store(waits_for, std::memory_order_relaxed);
    activity_.store(what, std::memory_order_relaxed);
    count();
  }

  std::atomic<std::uint64_t> op_{0};
  std::atomic<trainer_activity> activity_{trainer_activity::idle};
  std::atomic<std::uint64_t> waits_for_{0};
};

class watched_links final : public link_set {
 public:
  /// workers: worker_id by rank. The counter must outlive this; its thread alone sends and
  /// receives.
  watched_links(std::unique_ptr<link_set> links, std::vector<std::uint64_t> workers,
                pulse_counter& pulse)
      : links_(std::move(links)), workers_(std::move(workers)), pulse_(pulse) {}

  int rank() const override { return links_->rank(); }
  int size() const override { return links_->size(); }
  result<void> send(int to, link_key key, std::span<const std::byte> bytes) override {
    const auto waiting = wait_for(to);  // for room, where the peer reads slowly
    return links_->send(to, key, bytes);
  }
  result<void> receive(int from, link_key key, std::span<std::byte> into) override {
    const auto waiting = wait_for(from);
    return links_->receive(from, key, into);
  }
  result<std::vector<std::byte>> receive_any(int from, link_key key,
                                             std::size_t bytes_max) override {
    const auto waiting = wait_for(from);
    return links_->receive_any(from, key, bytes_max);
  }
  result<held_frame> receive_held(int from, link_key key, std::size_t bytes) override {
    const auto waiting = wait_for(from);
    return links_->receive_held(from, key, bytes);
  }
  link_kind kind(int peer) const override { return links_->kind(peer); }
  void cancel() override { links_->cancel(); }
  std::uint64_t bytes_sent() const override { return links_->bytes_sent(); }
  std::uint64_t bytes_received() const override { return links_->bytes_received(); }

 private:
  pulse_counter::scope wait_for(int rank) {
    return {pulse_, trainer_activity::wait, workers_[static_cast<std::size_t>(rank)]};
  }

  std::unique_ptr<link_set> links_;
  std::vector<std::uint64_t> workers_;
  pulse_counter& pulse_;
};

}  // namespace stagecoach
