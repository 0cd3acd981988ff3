// Links over TCP and TLS: the port, who comes in, and what a standing link carries. link_frame has
// the bytes, connection_asio the sockets, peer_line_asio what comes in as a line.
//
// One io thread per server owns every socket, timer and list below ("io thread only"); callers'
// threads touch only what a peer_link or set_state guards by its mutex, and post the rest. That
// thread does no compute but checksums (and TLS), so beats go out while the trainer's threads are
// busy.
//
//   accepted:  handshake -> greeting -> [waiting room until open()] -> reply -> stands
//   dialled:   resolve -> connect -> handshake -> greeting sent -> reply -> stands   (any failure:
//   again) stands:    data and beats both ways -> lost (closed, broken frame) | cancelled
//
// Where both ends take shared memory there is one more turn before a link stands (the offer, see
// link_upgrade_asio); its data then bypass the io thread, which keeps the beats and the end.
//
// A link that stood and broke stays broken: the generation ends with it, and the next one dials
// anew.
#include "worker/link_asio.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>

#include "config/limits.hpp"
#include "config/log.hpp"
#include "worker/connection_asio.hpp"
#include "worker/link_frame.hpp"
#include "worker/link_shm.hpp"
#include "worker/link_upgrade_asio.hpp"
#include "worker/peer_line_asio.hpp"

namespace stagecoach {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using steady = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr std::size_t ungreeted_max = 64;
constexpr std::size_t waiting_max = 256;
constexpr milliseconds greet_within{5000};
constexpr milliseconds attempt_within{
    2000};  // one dial; a lost SYN is retried by the kernel after 1 s
constexpr milliseconds linger_for{300};
constexpr milliseconds backoff_first{10}, backoff_max{200};
constexpr std::size_t staging_bytes = 64 << 10;      // many small frames per read call
constexpr std::size_t direct_read_bytes = 16 << 10;  // payload rests above it bypass the staging
constexpr std::size_t gather_frames_max = 16, gather_bytes_max = 1 << 20;
constexpr std::size_t queue_bytes_floor = std::size_t{256} << 20;
constexpr int refusal_lines_per_second = 20;  // a port scan must not fill the disk with our log

using key_order = std::tuple<link_tag, std::uint64_t, std::uint64_t>;
key_order ordered(link_key key) { return {key.tag, key.step, key.number}; }

std::string text_of(link_key key) {
  return fmt::format("tag {} step {} number {}", static_cast<unsigned>(key.tag), key.step,
                     key.number);
}

/// Bytes without the zero fill of a vector: a frame of 64 MiB would be written twice.
struct raw_bytes {
  std::unique_ptr<std::byte[]> data;
  std::size_t size = 0;
  std::size_t capacity = 0;
};

/// Buffers of one set, used again: a step's frames have the sizes of the step before, and malloc
/// returns large ones to the kernel each time, whose page faults then cost as much as the copy. Any
/// thread.
class buffer_pool {
 public:
  /// data is null when there is no memory for it.
  raw_bytes take(std::size_t size) {
    if (size >= pooled_from) {
      const std::lock_guard lock(mutex_);
      if (auto at = free_.lower_bound(size); at != free_.end() && at->first / 2 <= size) {
        raw_bytes bytes{std::move(at->second), size, at->first};
        kept_ -= at->first;
        free_.erase(at);
        return bytes;
      }
    }
    const std::size_t capacity = std::max<std::size_t>(size, 1);
    return {std::unique_ptr<std::byte[]>(new (std::nothrow) std::byte[capacity]), size, capacity};
  }
  void give(raw_bytes bytes) {
    if (!bytes.data || bytes.capacity < pooled_from || bytes.capacity > kept_max) return;
    const std::lock_guard lock(mutex_);
    // The smallest go first: the large ones are the dear ones.
    while (kept_ + bytes.capacity > kept_max) {
      kept_ -= free_.begin()->first;
      free_.erase(free_.begin());
    }
    kept_ += bytes.capacity;
    free_.emplace(bytes.capacity, std::move(bytes.data));
  }

 private:
  static constexpr std::size_t pooled_from = 64 << 10;
  static constexpr std::size_t kept_max = std::size_t{256} << 20;
  std::mutex mutex_;
  std::multimap<std::size_t, std::unique_ptr<std::byte[]>> free_;  // by capacity
  std::size_t kept_ = 0;
};

/// A sequence of buffers that copies as two pointers; the owner keeps the array until the write is
/// done.
struct buffer_range {
  using value_type = asio::const_buffer;
  using const_iterator = const asio::const_buffer*;
  const_iterator begin() const { return first; }
  const_iterator end() const { return last; }
  const asio::const_buffer* first;
  const asio::const_buffer* last;
};

// ---------------------------------------------------------------------------------------------------------
// State of one generation's links.

/// One peer of a set.
struct peer_link {
  // Guarded by mutex.
  std::mutex mutex;
  std::condition_variable arrived;  // a frame, a failure, a cancel
  std::condition_variable drained;  // room in the outbox
  std::map<key_order, std::deque<raw_bytes>> inbox;
  std::size_t inbox_bytes = 0;
  std::vector<key_order> awaited;  // by receivers in wait, and not arrived yet
  bool paused = false, resume_posted = false;
  std::deque<raw_bytes> outbox;  // header and payload of a frame, contiguous
  std::size_t outbox_bytes = 0;  // with those being written
  bool pump_posted = false;
  bool cancelled = false;
  std::optional<error> failed;
  std::shared_ptr<shm_link> memory;  // null: TCP carries the frames; set once, before open() ends

  // io thread only.
  connection_ptr link;   // stands
  connection_ptr trial;  // being dialled, or accepted and being answered
  bool stands = false;
  milliseconds backoff = backoff_first;
  std::optional<asio::steady_timer> redial;
  steady::time_point trial_since;
  bool trial_greeted = false;
  std::string last_cause = "no connection yet";
  errc last_code = errc::unreachable;
  steady::time_point last_byte;
  bool suspected = false;
  std::vector<raw_bytes> writing;
  std::array<asio::const_buffer, gather_frames_max> gather;
  std::vector<std::byte> staging;
  std::size_t staged_begin = 0, staged_end = 0;
  std::optional<frame_header> header;  // of the frame being read
  bool admitted = false;               // its payload has a buffer, or is being dropped
  bool dropping = false;               // of another identity
  raw_bytes payload;
  std::uint64_t filled = 0;
};

enum class phase { opening, standing, ended };

struct set_state {
  link_identity identity;
  int rank = 0;
  std::vector<link_peer> peers;
  std::vector<std::unique_ptr<peer_link>> links;  // null at our own rank
  std::size_t frame_bytes_max = 0;
  std::size_t queue_bytes_max = 0;
  std::atomic<bool> cancelled{false};
  std::atomic<std::uint64_t> sent{0}, received{0};
  buffer_pool pool;

  // io thread only.
  phase now = phase::opening;
  int standing = 0, in_memory = 0;
  steady::time_point opened_at, deadline;

  std::mutex open_mutex;
  std::condition_variable open_changed;
  bool open_done = false;            // guarded by open_mutex
  std::optional<error> open_failed;  // guarded by open_mutex

  std::mutex event_mutex;  // held while on_event runs, so that a destroyed set is never called back
  std::function<void(int, peer_event, std::string)> on_event;

  int size() const { return static_cast<int>(peers.size()); }
  peer_link& link(int peer) { return *links[static_cast<std::size_t>(peer)]; }
  std::string peer_text(int peer) const {
    const link_peer& p = peers[static_cast<std::size_t>(peer)];
    return fmt::format("rank {} ({} at {}:{})", peer, p.name.empty() ? "unnamed" : p.name, p.host,
                       p.port);
  }
  std::string owner() const {
    const std::uint64_t id = value(identity.job);
    return identity.is_beside() ? fmt::format("feed {}", id - beside_jobs)
                                : fmt::format("job {}", id);
  }
  error cancelled_error() const {
    return make_error(errc::cancelled, "links of {} generation {} were cancelled", owner(),
                      identity.generation.number);
  }

  /// Wakes every waiter; from any thread.
  void wake_cancelled() {
    cancelled = true;
    for (auto& link : links) {
      if (!link) continue;
      {
        const std::lock_guard lock(link->mutex);
        link->cancelled = true;
        link->inbox.clear();
        link->inbox_bytes = 0;
        link->outbox.clear();
      }
      link->arrived.notify_all();
      link->drained.notify_all();
      if (link->memory) link->memory->end(cancelled_error());
    }
  }
};

using set_ptr = std::shared_ptr<set_state>;

// ---------------------------------------------------------------------------------------------------------
// The io side of a server. Outlives the server while link sets of it are held, so that their
// cancel() can always post; handlers hold a plain pointer to it, since they live inside its
// io_context.

class core {
 public:
  explicit core(const link_server::options& o)
      : options_(o),
        lines_(io, o.name, o.process,
               [this](const connection_ptr& c, const std::string& why) { refuse(c, why); }),
        desk_(io),
        acceptor_(io),
        timer_(io) {}

  asio::io_context io{1};
  std::atomic<std::uint64_t> stale{0}, refused{0};
  std::atomic<std::thread::id> io_thread;

  bool on_io_thread() const { return io_thread.load() == std::this_thread::get_id(); }
  const link_server::options& options() const { return options_; }
  peer_line& lines() { return lines_; }

  result<std::uint16_t> listen() {
    if (!options_.tls.empty()) {
      auto server = make_tls(options_.tls, tls_side::server);
      if (!server) return server.err();
      auto client = make_tls(options_.tls, tls_side::client);
      if (!client) return client.err();
      tls_server_ = *std::move(server);
      tls_client_ = *std::move(client);
      lines_.use(tls_client_.get());
    }
    error_code ec;
    tcp::endpoint at;
    if (auto address = asio::ip::make_address(options_.host, ec); !ec) {
      at = {address, options_.port};
    } else {
      tcp::resolver resolver(io);
      const auto found = resolver.resolve(options_.host, std::to_string(options_.port),
                                          tcp::resolver::passive, ec);
      if (ec || found.empty())
        return make_error(errc::io, "can't find host '{}' to listen for links: {}", options_.host,
                          ec.message());
      at = found.begin()->endpoint();
    }
    const auto failed = [&] {
      return make_error(errc::io,
                        "can't listen for links on {}:{}: {}. fix: another port, or 0 for any free "
                        "one",
                        options_.host, options_.port, ec.message());
    };
    if (acceptor_.open(at.protocol(), ec); ec) return failed();
    ::fcntl(acceptor_.native_handle(), F_SETFD, FD_CLOEXEC);
    acceptor_.set_option(tcp::acceptor::reuse_address(true), ec);
    if (acceptor_.bind(at, ec); ec) return failed();
    if (acceptor_.listen(asio::socket_base::max_listen_connections, ec); ec) return failed();
    if (options_.links != link_choice::tcp)
      if (auto open = desk_.listen(); !open)
        log_event(level::warn, "link_memory_closed", {{"reason", open.err().message}});
    const auto port = acceptor_.local_endpoint(ec).port();
    last_tick_ = steady::now();
    accept();
    tick_later();
    return port;
  }

  // ---- called by posts from other threads

  void begin(const set_ptr& set) {
    set->opened_at = steady::now();
    set->deadline = set->opened_at + options_.connect_within;
    if (shut_down_) return end(set, set->cancelled_error());
    for (const set_ptr& other : std::vector(sets_)) {
      if (other->identity.job != set->identity.job) continue;
      const auto theirs = other->identity.generation, ours = set->identity.generation;
      if (theirs.number < ours.number) {
        // Who opens n+1 has left n: its calls end, its sockets close.
        other->wake_cancelled();
        end(other, other->cancelled_error());
      } else if (theirs != ours || other->rank == set->rank) {
        return end(set, make_error(errc::conflict,
                                   "links of job {} generation {} (plan {:x}) are open; can't open "
                                   "generation {} (plan {:x}) beside them",
                                   value(set->identity.job), theirs.number, theirs.plan_hash,
                                   ours.number, ours.plan_hash));
      }
    }
    sets_.push_back(set);
    for (int peer = set->rank + 1; peer < set->size(); ++peer) dial(set, peer);
    for (auto at = room_.begin(); at != room_.end();) {
      auto entry = at++;
      if (entry->greeting.identity.job != set->identity.job) continue;
      if (!place(entry->link, entry->greeting)) continue;
      room_.erase(entry);
    }
    if (set->size() == 1) stands_all(set);
  }

  void end_cancelled(const set_ptr& set) { end(set, set->cancelled_error()); }

  void abandon(job_id job) {
    for (const set_ptr& set : std::vector(sets_))
      if (set->identity.job == job && set->now == phase::opening) {
        set->wake_cancelled();
        end(set, set->cancelled_error());
      }
  }

  void shut_down() {
    shut_down_ = true;
    error_code ignored;
    acceptor_.close(ignored);
    timer_.cancel();
    for (const set_ptr& set : std::vector(sets_)) {
      set->wake_cancelled();
      end(set, set->cancelled_error());
    }
    for (const auto& c : ungreeted_) c->close();
    for (const auto& c : leaving_) c->close();
    for (const auto& entry : room_) entry.link->close();
    lines_.shut_down();
    desk_.shut_down();
    ungreeted_.clear();
    leaving_.clear();
    room_.clear();
  }

  /// Sends what is queued for a peer, several frames per call.
  void pump(const set_ptr& set, int to) {
    peer_link& p = set->link(to);
    if (!p.link || !p.writing.empty()) return;
    std::size_t total = 0;
    {
      const std::lock_guard lock(p.mutex);
      while (!p.outbox.empty() && p.writing.size() < gather_frames_max &&
             total < gather_bytes_max) {
        total += p.outbox.front().size;
        p.writing.push_back(std::move(p.outbox.front()));
        p.outbox.pop_front();
      }
      if (p.writing.empty()) {
        p.pump_posted = false;
        return;
      }
    }
    for (std::size_t i = 0; i < p.writing.size(); ++i)
      p.gather[i] = {p.writing[i].data.get(), p.writing[i].size};
    const buffer_range frames{p.gather.data(), p.gather.data() + p.writing.size()};
    p.link->write_all(frames, [this, set, to, total, link = p.link](error_code ec, std::size_t) {
      peer_link& p = set->link(to);
      for (raw_bytes& frame : p.writing) set->pool.give(std::move(frame));
      p.writing.clear();
      {
        const std::lock_guard lock(p.mutex);
        p.outbox_bytes -= std::min(total, p.outbox_bytes);
      }
      p.drained.notify_all();
      if (link->closed) return;
      if (ec) return lose(set, to, errc::unreachable, reason_of(ec));
      pump(set, to);
    });
  }

  /// Goes on reading from a peer whose inbox was full.
  void resume(const set_ptr& set, int from) {
    peer_link& p = set->link(from);
    {
      const std::lock_guard lock(p.mutex);
      p.resume_posted = false;
      if (!p.paused) return;
      p.paused = false;
    }
    p.last_byte = steady::now();
    if (p.link) parse(set, from);
  }

 private:
  struct waiting_greeting {
    link_greeting greeting;
    connection_ptr link;
    steady::time_point deadline;
  };

  // ---- accepting

  void accept() {
    auto c = std::make_shared<connection>(io);
    acceptor_.async_accept(c->socket, [this, c](error_code ec) {
      if (shut_down_ || ec == asio::error::operation_aborted) return;
      if (ec) {
        // Out of descriptors: trying again at once would spin, since the connection stays in the
        // queue.
        log_event(level::warn, "link_accept_failed", {{"reason", reason_of(ec)}});
        accept_pause_.emplace(io, milliseconds(100));
        accept_pause_->async_wait([this](error_code) {
          if (!shut_down_) accept();
        });
        return;
      }
      accepted(c);
      accept();
    });
  }

  void accepted(const connection_ptr& c) {
    c->tune();
    // The oldest makes room: an honest dialler greets within milliseconds, so the oldest is the
    // likeliest to be idle, and a flood of idle connections can't lock honest ones out.
    if (ungreeted_.size() >= ungreeted_max) {
      auto oldest = ungreeted_.front();
      refuse(oldest, fmt::format("over {} connections without a greeting", ungreeted_max));
    }
    ungreeted_.push_back(c);
    if (!tls_server_) return read_greeting(c);
    c->tls.emplace(c->socket, *tls_server_);
    c->tls->async_handshake(asio::ssl::stream_base::server, [this, c](error_code ec) {
      if (c->closed) return;
      if (ec) {
        ++refused;
        log_refusal(c->far, tls_reason(*c, ec));
        c->finish_sending();
        return linger(c);  // Asio has sent the alert that tells the peer why
      }
      const peer_identity who = peer_of(c->tls->native_handle());
      if (who.what != tls_role::worker)
        return refuse(c,
                      fmt::format("certificate of '{}' has role '{}'; links take role 'worker'",
                                  who.name, to_string(who.what)),
                      link_verdict::wrong_role);
      c->certified_name = who.name;
      read_greeting(c);
    });
  }

  void read_greeting(const connection_ptr& c) {
    c->read_all(asio::buffer(c->greeting_buffer.data(), greeting_prelude_bytes),
                [this, c](error_code ec, std::size_t count) {
                  if (c->closed) return;
                  if (ec && count == 0 && !c->tls) return forget(c);  // somebody asked if we live
                  if (ec) return refuse(c, "greeting: " + reason_of(ec));
                  const std::span all(c->greeting_buffer);
                  auto prelude = check_greeting_prelude(all.first<greeting_prelude_bytes>());
                  if (!prelude && prelude.err().code == errc::conflict)
                    return refuse(c, prelude.err().message, link_verdict::wrong_version);
                  if (!prelude) return refuse(c, prelude.err().message);
                  read_greeting_body(c, *prelude);
                });
  }

  void read_greeting_body(const connection_ptr& c, greeting_kind kind) {
    const std::size_t body =
        kind == greeting_kind::link ? greeting_body_bytes : line_greeting_body_bytes;
    c->read_all(asio::buffer(c->greeting_buffer.data() + greeting_prelude_bytes, body),
                [this, c, kind](error_code ec, std::size_t) {
                  if (c->closed) return;
                  if (ec) return refuse(c, "greeting: " + reason_of(ec));
                  if (kind == greeting_kind::line) return greeted_by_line(c);
                  auto greeting =
                      decode_greeting(std::span(c->greeting_buffer).first<greeting_bytes>());
                  if (!greeting) return refuse(c, greeting.err().message, link_verdict::wrong_rank);
                  greeted(c, *greeting);
                });
  }

  void greeted_by_line(const connection_ptr& c) {
    auto greeting = decode_line_greeting(c->greeting_buffer);
    if (!greeting) return refuse(c, greeting.err().message);
    if (greeting->to != options_.process)
      return refuse(c, fmt::format("a line to process {}; this is another", greeting->to),
                    link_verdict::wrong_process);
    if (c->tls && c->certified_name != greeting->name)
      return refuse(c,
                    fmt::format("certificate is of worker '{}'; its line says '{}'",
                                c->certified_name, greeting->name),
                    link_verdict::wrong_name);
    ungreeted_.remove(c);
    lines_.accepted(c, *greeting);
  }

  void greeted(const connection_ptr& c, const link_greeting& greeting) {
    ungreeted_.remove(c);
    // The dialler gave up its former connection if it dials again; that one must not be answered
    // later.
    for (auto at = room_.begin(); at != room_.end();) {
      auto entry = at++;
      const link_greeting& g = entry->greeting;
      if (g.identity == greeting.identity && g.from_rank == greeting.from_rank &&
          g.to_rank == greeting.to_rank) {
        entry->link->close();
        room_.erase(entry);
      }
    }
    if (place(c, greeting)) return;
    if (room_.size() >= waiting_max)
      return refuse(c, fmt::format("over {} greetings wait", waiting_max), link_verdict::busy);
    room_.push_back({greeting, c, steady::now() + options_.connect_within});
    // A dialler is silent until it is answered: readable means that it has gone (or broke the
    // rules). On the bare socket, also under TLS, since a cancelled TLS read could lose bytes.
    c->socket.async_wait(tcp::socket::wait_read, [this, c](error_code ec) {
      if (ec || c->closed) return;
      for (auto at = room_.begin(); at != room_.end(); ++at)
        if (at->link == c) {
          c->close();
          room_.erase(at);
          return;
        }
    });
  }

  /// Answers a greeting whose generation this worker knows, by yes or no; false: it has to wait.
  bool place(const connection_ptr& c, const link_greeting& greeting) {
    for (const set_ptr& set : sets_) {
      if (set->identity.job != greeting.identity.job) continue;
      const auto ours = set->identity.generation, theirs = greeting.identity.generation;
      if (ours.number < theirs.number) continue;  // we will be told of the new one soon
      if (ours != theirs) {
        refuse(c,
               fmt::format("job {} is in generation {} (plan {:x}); greeting is for generation {} "
                           "(plan {:x})",
                           value(set->identity.job), ours.number, ours.plan_hash, theirs.number,
                           theirs.plan_hash),
               link_verdict::wrong_identity);
        return true;
      }
      if (static_cast<int>(greeting.to_rank) != set->rank) {
        if (has_rank(set->identity, static_cast<int>(greeting.to_rank))) continue;
        refuse(c,
               fmt::format("greeting for rank {}; this worker is rank {}", greeting.to_rank,
                           set->rank),
               link_verdict::wrong_rank);
        return true;
      }
      if (static_cast<int>(greeting.size) != set->size()) {
        refuse(c,
               fmt::format("greeting with {} ranks; the plan has {}", greeting.size, set->size()),
               link_verdict::wrong_rank);
        return true;
      }
      welcome(set, greeting, c);
      return true;
    }
    return false;
  }

  bool has_rank(const link_identity& identity, int rank) const {
    return std::any_of(sets_.begin(), sets_.end(), [&](const set_ptr& set) {
      return set->identity == identity && set->rank == rank;
    });
  }

  void welcome(const set_ptr& set, const link_greeting& greeting, const connection_ptr& c) {
    const int from = static_cast<int>(greeting.from_rank);
    peer_link& p = set->link(from);
    const std::string& expected = set->peers[static_cast<std::size_t>(from)].name;
    if (c->tls && !expected.empty() && c->certified_name != expected)
      return refuse(c,
                    fmt::format("certificate is of worker '{}'; rank {} is worker '{}'",
                                c->certified_name, from, expected),
                    link_verdict::wrong_name);
    if (p.stands || p.trial)
      return refuse(c, fmt::format("rank {} is linked already", from), link_verdict::duplicate);
    error_code ignored;
    c->socket.cancel(ignored);  // the waiting room's watch
    p.trial = c;
    p.trial_since = steady::now();
    p.trial_greeted = true;
    const bool is_memory = greeting.takes_memory && desk_.is_open();
    c->reply_buffer = encode(link_reply{link_protocol_version, link_verdict::welcome, is_memory});
    c->write_all(asio::buffer(c->reply_buffer),
                 [this, set, from, c, is_memory](error_code ec, std::size_t) {
                   if (is_abandoned(*set, from, c)) return;
                   if (ec) return failed_welcome(set, from, c, reason_of(ec));
                   if (is_memory) return offer_memory(set, from, c);
                   if (options_.links == link_choice::shared_memory)
                     return failed_welcome(set, from, c, "it does not take shared memory");
                   stands(set, from, c, nullptr);
                 });
  }

  bool is_abandoned(set_state& set, int from, const connection_ptr& c) const {
    return c->closed || set.link(from).trial != c;
  }

  /// The dialler may dial again.
  void failed_welcome(const set_ptr& set, int from, const connection_ptr& c,
                      const std::string& why) {
    peer_link& p = set->link(from);
    p.trial.reset();
    p.last_cause = why;
    c->close();
  }

  void offer_memory(const set_ptr& set, int from, const connection_ptr& c) {
    const memory_offer offer = desk_.offer(shm_link::payload_bytes(memory_options(*set)));
    c->offer_buffer = encode(offer);
    c->write_all(asio::buffer(c->offer_buffer), [this, set, from, c, offer](error_code ec,
                                                                            std::size_t) {
      if (ec && !is_abandoned(*set, from, c)) failed_welcome(set, from, c, reason_of(ec));
      if (ec || c->closed) return void(desk_.take(offer));
      c->read_all(asio::buffer(c->reply_buffer), [this, set, from, c, offer](error_code ec,
                                                                             std::size_t) {
        auto memory = desk_.take(offer);
        if (is_abandoned(*set, from, c)) return;
        if (ec) return failed_welcome(set, from, c, reason_of(ec));
        const auto answer = decode_reply(c->reply_buffer);
        if (!answer) return failed_welcome(set, from, c, answer.err().message);
        if (answer->is_memory && !memory)
          return failed_welcome(set, from, c, "it answers for shared memory that it never fetched");
        if (!answer->is_memory && options_.links == link_choice::shared_memory)
          return failed_welcome(set, from, c, "it can't reach our shared memory");
        if (!answer->is_memory) return stands(set, from, c, nullptr);
        stands(set, from, c, std::make_shared<shm_link>(memory_options(*set), *std::move(memory)));
      });
    });
  }

  void forget(const connection_ptr& c) {
    ungreeted_.remove(c);
    c->close();
  }

  /// Closes a connection that may not come in, and says so; with a verdict the dialler learns why.
  void refuse(const connection_ptr& c, const std::string& reason,
              std::optional<link_verdict> verdict = {}) {
    ++refused;
    log_refusal(c->far, reason);
    ungreeted_.remove(c);
    if (!verdict) return c->close();
    c->reply_buffer = encode(link_reply{link_protocol_version, *verdict});
    c->write_all(asio::buffer(c->reply_buffer),
                 [c](error_code, std::size_t) { c->finish_sending(); });
    linger(c);
  }

  /// Closes a little later: a socket closed over unread bytes sends a reset, and that can overtake
  /// our last words on their way to the peer's reader.
  void linger(const connection_ptr& c) {
    ungreeted_.remove(c);
    if (leaving_.size() >= waiting_max) {
      leaving_.front()->close();
      leaving_.pop_front();
    }
    c->since = steady::now();
    leaving_.push_back(c);
  }

  void log_refusal(const std::string& from, const std::string& reason) {
    const auto now = steady::now();
    if (now - refusal_second_ >= std::chrono::seconds(1)) {
      if (refusal_lines_ > refusal_lines_per_second)
        log_event(level::warn, "link_refusals_unlogged",
                  {{"count", refusal_lines_ - refusal_lines_per_second}});
      refusal_second_ = now;
      refusal_lines_ = 0;
    }
    if (++refusal_lines_ <= refusal_lines_per_second)
      log_event(level::warn, "link_refused", {{"from", from}, {"reason", reason}});
  }

  // ---- dialling

  void dial(const set_ptr& set, int to) {
    peer_link& p = set->link(to);
    if (set->now != phase::opening || p.stands) return;
    const link_peer& peer = set->peers[static_cast<std::size_t>(to)];
    auto c = std::make_shared<connection>(io);
    p.trial = c;
    p.trial_since = steady::now();
    p.trial_greeted = false;
    stagecoach::dial(io, c, peer.host, peer.port, tls_client_.get(), peer.name,
                     [this, set, to, c](const std::optional<dial_failure>& failure) {
                       if (failure) return failed_dial(set, to, c, failure->code, failure->cause);
                       send_greeting(set, to, c);
                     });
  }

  void send_greeting(const set_ptr& set, int to, const connection_ptr& c) {
    const auto greeting = encode(link_greeting{
        set->identity, static_cast<std::uint32_t>(set->rank), static_cast<std::uint32_t>(to),
        static_cast<std::uint32_t>(set->size()), options_.links != link_choice::tcp});
    std::copy(greeting.begin(), greeting.end(), c->greeting_buffer.begin());
    const auto bytes = asio::buffer(c->greeting_buffer.data(), greeting.size());
    c->write_all(bytes, [this, set, to, c](error_code ec, std::size_t) {
      if (c->closed) return;
      if (ec) return failed_dial(set, to, c, errc::unreachable, reason_of(ec));
      // From here the peer may let us wait until it opens the generation.
      set->link(to).trial_greeted = true;
      c->read_all(asio::buffer(c->reply_buffer), [this, set, to, c](error_code ec, std::size_t) {
        if (c->closed) return;
        if (ec)  // in TLS 1.3 the acceptor's word about our certificate arrives only here
          return failed_dial(set, to, c, is_tls_error(ec) ? errc::unauthorised : errc::unreachable,
                             is_tls_error(ec) ? tls_reason(*c, ec) : reason_of(ec));
        auto reply = decode_reply(c->reply_buffer);
        if (!reply) return failed_dial(set, to, c, errc::bad_input, reply.err().message);
        if (reply->verdict == link_verdict::welcome) {
          if (reply->is_memory) return read_offer(set, to, c);
          if (options_.links == link_choice::shared_memory)
            return failed_dial(set, to, c, errc::unreachable, "it offers no shared memory");
          return stands(set, to, c, nullptr);
        }
        // Busy and duplicate (its end of our former try is not noticed yet) pass; the others stay.
        const bool passes =
            reply->verdict == link_verdict::busy || reply->verdict == link_verdict::duplicate;
        const bool unauthorised = reply->verdict == link_verdict::wrong_role ||
                                  reply->verdict == link_verdict::wrong_name;
        failed_dial(set, to, c,
                    passes         ? errc::unreachable
                    : unauthorised ? errc::unauthorised
                                   : errc::conflict,
                    fmt::format("refused: {}", explain(reply->verdict)));
      });
    });
  }

  void read_offer(const set_ptr& set, int to, const connection_ptr& c) {
    c->read_all(asio::buffer(c->offer_buffer), [this, set, to, c](error_code ec, std::size_t) {
      if (c->closed) return;
      if (ec) return failed_dial(set, to, c, errc::unreachable, reason_of(ec));
      const auto offer = decode_offer(c->offer_buffer);
      if (!offer) return failed_dial(set, to, c, errc::bad_input, offer.err().message);
      fetch_memory(io, *offer, shm_link::payload_bytes(memory_options(*set)),
                   [this, set, to, c](result<shm_pair> memory) {
                     if (!c->closed) answer_offer(set, to, c, std::move(memory));
                   });
    });
  }

  void answer_offer(const set_ptr& set, int to, const connection_ptr& c, result<shm_pair> memory) {
    if (!memory && options_.links == link_choice::shared_memory)
      return failed_dial(set, to, c, errc::unreachable, "shared memory: " + memory.err().message);
    // No such socket here: the peer is on another host, which is no news.
    if (!memory)
      log_event(memory.err().code == errc::unreachable ? level::debug : level::warn,
                "link_without_memory",
                {whose(*set), {"rank", set->rank}, {"peer", to}, {"reason", memory.err().message}});
    std::shared_ptr<shm_link> link;
    if (memory) link = std::make_shared<shm_link>(memory_options(*set), *std::move(memory));
    c->reply_buffer =
        encode(link_reply{link_protocol_version, link_verdict::welcome, link != nullptr});
    c->write_all(asio::buffer(c->reply_buffer),
                 [this, set, to, c, link](error_code ec, std::size_t) {
                   if (c->closed) return;
                   if (ec) return failed_dial(set, to, c, errc::unreachable, reason_of(ec));
                   stands(set, to, c, link);
                 });
  }

  /// As much under way as TCP has: the sender's queue, and the receiver's when it waits for more.
  shm_link::options memory_options(const set_state& set) {
    return {set.identity, set.frame_bytes_max, 3 * set.queue_bytes_max, &stale};
  }

  /// Unreachable is tried again until the set's deadline; anything else would only fail again.
  void failed_dial(const set_ptr& set, int to, const connection_ptr& c, errc code,
                   const std::string& cause) {
    c->close();
    peer_link& p = set->link(to);
    if (set->now != phase::opening || p.trial != c) return;
    p.trial.reset();
    p.last_cause = cause;
    p.last_code = code;
    if (code != errc::unreachable) return end(set, unlinked(*set, to));
    p.redial.emplace(io, p.backoff);
    p.backoff = std::min(p.backoff * 2, backoff_max);
    p.redial->async_wait([this, set, to](error_code ec) {
      if (!ec) dial(set, to);
    });
  }

  error unlinked(set_state& set, int peer) {
    const peer_link& p = set.link(peer);
    const auto waited = std::chrono::duration_cast<milliseconds>(steady::now() - set.opened_at);
    return make_error(p.last_code == errc::unauthorised ? errc::unauthorised : errc::unreachable,
                      "no link to {} of {} generation {} after {} ms: {}", set.peer_text(peer),
                      set.owner(), set.identity.generation.number, waited.count(), p.last_cause);
  }

  // ---- standing

  void stands(const set_ptr& set, int peer, const connection_ptr& c,
              std::shared_ptr<shm_link> memory) {
    if (set->now == phase::ended) return c->close();
    peer_link& p = set->link(peer);
    p.trial.reset();
    if (memory) ++set->in_memory;
    {
      const std::lock_guard lock(p.mutex);
      p.memory = std::move(memory);
    }
    p.link = c;
    p.stands = true;
    p.last_byte = steady::now();
    p.staging.resize(staging_bytes);
    ++set->standing;
    read_more(set, peer);
    pump(set, peer);
    if (set->standing == set->size() - 1) stands_all(set);
  }

  void stands_all(const set_ptr& set) {
    if (set->now != phase::opening) return;
    set->now = phase::standing;
    log_event(
        level::debug, "links_opened",
        {whose(*set),
         {"generation", set->identity.generation.number},
         {"rank", set->rank},
         {"size", set->size()},
         {"in_shared_memory", set->in_memory},
         {"ms", std::chrono::duration_cast<milliseconds>(steady::now() - set->opened_at).count()}});
    {
      const std::lock_guard lock(set->open_mutex);
      set->open_done = true;
    }
    set->open_changed.notify_all();
  }

  /// Closes all sockets of a set and takes it off the list; an open() in progress returns `why`.
  void end(const set_ptr& set, error why) {
    if (set->now == phase::ended) return;
    set->now = phase::ended;
    for (auto& link : set->links) {
      if (!link) continue;
      if (link->redial) link->redial->cancel();
      if (link->trial) link->trial->close();
      if (link->link) link->link->close();
      link->trial.reset();
      link->link.reset();
    }
    sets_.erase(std::remove(sets_.begin(), sets_.end(), set), sets_.end());
    {
      const std::lock_guard lock(set->open_mutex);
      if (!set->open_done) {
        set->open_done = true;
        set->open_failed = std::move(why);
      }
    }
    set->open_changed.notify_all();
  }

  void emit(const set_ptr& set, int peer, peer_event what, const std::string& why) {
    const std::lock_guard lock(set->event_mutex);
    if (set->cancelled || !set->on_event) return;
    set->on_event(peer, what, why);
  }

  static log_field whose(const set_state& set) {
    const std::uint64_t id = value(set.identity.job);
    return set.identity.is_beside() ? log_field{"feed", id - beside_jobs} : log_field{"job", id};
  }

 public:
  static error lost_error(const set_state& set, int peer, errc code, const std::string& why) {
    return make_error(code, "lost {}: {}", set.peer_text(peer), why);
  }

  /// A standing link broke. What it delivered can still be received.
  void lose(const set_ptr& set, int peer, errc code, const std::string& why) {
    peer_link& p = set->link(peer);
    if (set->now == phase::ended || !p.link) return;
    p.link->close();
    p.link.reset();
    const error e = lost_error(*set, peer, code, why);
    {
      const std::lock_guard lock(p.mutex);
      p.failed = e;
      p.outbox.clear();
    }
    p.arrived.notify_all();
    p.drained.notify_all();
    if (p.memory) p.memory->end(e);
    if (set->cancelled) return;  // we leave too: no news
    log_event(set->identity.is_beside() ? level::debug : level::warn, "link_lost",
              {whose(*set),
               {"generation", set->identity.generation.number},
               {"rank", set->rank},
               {"peer", peer},
               {"reason", why}});
    if (set->now == phase::opening)
      end(set, make_error(errc::unreachable, "lost {} while links were opening: {}",
                          set->peer_text(peer), why));
    else
      emit(set, peer, peer_event::lost, why);
  }

 private:
  // ---- reading

  void read_more(const set_ptr& set, int from) {
    peer_link& p = set->link(from);
    const std::uint64_t rest = p.admitted && !p.dropping ? p.header->length - p.filled : 0;
    const bool direct = rest > direct_read_bytes && p.staged_begin == p.staged_end;
    asio::mutable_buffer into;
    if (direct) {
      into = {p.payload.data.get() + p.filled, rest};
    } else {
      if (p.staged_begin > 0) {
        std::memmove(p.staging.data(), p.staging.data() + p.staged_begin,
                     p.staged_end - p.staged_begin);
        p.staged_end -= p.staged_begin;
        p.staged_begin = 0;
      }
      into = {p.staging.data() + p.staged_end, p.staging.size() - p.staged_end};
    }
    // Piecewise, not read_all: every byte that arrives is a sign of life.
    p.link->read_some(into, [this, set, from, direct, link = p.link](error_code ec, std::size_t n) {
      if (link->closed) return;
      peer_link& p = set->link(from);
      if (ec) return lose(set, from, errc::unreachable, reason_of(ec));
      p.last_byte = steady::now();
      if (p.suspected) {
        p.suspected = false;
        emit(set, from, peer_event::recovered, "it sends again");
        if (link->closed) return;
      }
      if (direct)
        p.filled += n;
      else
        p.staged_end += n;
      parse(set, from);
    });
  }

  /// Takes what was read apart into frames, then reads on.
  void parse(const set_ptr& set, int from) {
    peer_link& p = set->link(from);
    for (;;) {
      std::size_t staged = p.staged_end - p.staged_begin;
      if (!p.header) {
        if (staged < frame_header_bytes) break;
        auto header = decode_frame(std::span<const std::byte, frame_header_bytes>(
                                       p.staging.data() + p.staged_begin, frame_header_bytes),
                                   set->frame_bytes_max);
        if (!header) return lose(set, from, header.err().code, header.err().message);
        p.staged_begin += frame_header_bytes;
        if (header->identity != set->identity) ++stale;
        if (header->kind == frame_kind::beat) continue;
        p.header = *header;
        p.dropping = header->identity != set->identity;
        p.admitted = p.dropping;
        p.filled = 0;
        continue;
      }
      if (!p.admitted) {
        switch (admit(*set, p)) {
          case admission::later:
            return;  // resume() comes back here
          case admission::never:
            return lose(set, from, errc::too_large,
                        fmt::format("over {} bytes arrived that nobody asked for. fix: both ranks "
                                    "must run one plan",
                                    2 * set->queue_bytes_max));
          case admission::now:
            break;
        }
        p.payload = set->pool.take(p.header->length);
        if (!p.payload.data)
          return lose(set, from, errc::too_large,
                      fmt::format("no memory for a frame of {} bytes", p.header->length));
        p.admitted = true;
      }
      staged = p.staged_end - p.staged_begin;
      const std::size_t part = std::min<std::uint64_t>(staged, p.header->length - p.filled);
      if (part > 0) {
        if (!p.dropping)
          std::memcpy(p.payload.data.get() + p.filled, p.staging.data() + p.staged_begin, part);
        p.staged_begin += part;
        p.filled += part;
      }
      if (p.filled < p.header->length) break;
      if (!p.dropping && !deliver(set, from)) return;
      p.header.reset();
      p.admitted = p.dropping = false;
    }
    read_more(set, from);
  }

  enum class admission { now, later, never };

  admission admit(set_state& set, peer_link& p) {
    const std::lock_guard lock(p.mutex);
    const std::size_t after = p.inbox_bytes + p.header->length;
    if (p.inbox_bytes == 0 || after <= set.queue_bytes_max) return admission::now;
    // Somebody waits for a frame that is behind these: reading on is the only way to it.
    if (!p.awaited.empty())
      return after <= 2 * set.queue_bytes_max ? admission::now : admission::never;
    p.paused = true;
    return admission::later;
  }

  bool deliver(const set_ptr& set, int from) {
    peer_link& p = set->link(from);
    if (payload_checksum({p.payload.data.get(), p.payload.size}) != p.header->checksum) {
      lose(set, from, errc::corrupt,
           fmt::format("checksum of the frame with {} ({} bytes) differs from its bytes",
                       text_of(p.header->key), p.header->length));
      return false;
    }
    set->received += p.payload.size;
    {
      const std::lock_guard lock(p.mutex);
      if (p.cancelled) return true;
      p.inbox_bytes += p.payload.size;
      const key_order key = ordered(p.header->key);
      p.inbox[key].push_back(std::move(p.payload));
      // At once, not when the receiver has woken: until then we would read on past a full inbox.
      if (auto at = std::find(p.awaited.begin(), p.awaited.end(), key); at != p.awaited.end())
        p.awaited.erase(at);
    }
    p.payload = {};
    p.arrived.notify_all();
    return true;
  }

  // ---- time

  void tick_later() {
    timer_.expires_after(options_.beat);
    timer_.async_wait([this](error_code ec) {
      if (ec || shut_down_) return;
      tick();
      tick_later();
    });
  }

  void tick() {
    const auto now = steady::now();
    // We ourselves stood still (SIGSTOP, a swamped host): what the peers sent meanwhile waits
    // unread in the sockets, so their silence is our own.
    const bool stood_still = now - last_tick_ > options_.suspect_after / 2;
    last_tick_ = now;
    lines_.tick(now, stood_still);
    desk_.tick(now);
    for (const set_ptr& set : std::vector(sets_)) {
      if (set->now == phase::opening && now >= set->deadline) {
        for (int peer = 0; peer < set->size(); ++peer)
          if (peer != set->rank && !set->link(peer).stands) {
            end(set, unlinked(*set, peer));
            break;
          }
        continue;
      }
      for (int peer = 0; peer < set->size() && set->now != phase::ended; ++peer)
        if (peer != set->rank) tick_peer(set, peer, now, stood_still);
    }
    for (auto at = room_.begin(); at != room_.end();) {
      auto entry = at++;
      if (now < entry->deadline) continue;
      const auto c = entry->link;
      const auto identity = entry->greeting.identity;
      room_.erase(entry);
      refuse(c,
             fmt::format("generation {} of job {} was not opened within {} ms",
                         identity.generation.number, value(identity.job),
                         options_.connect_within.count()),
             link_verdict::not_opened);
    }
    const auto patience = std::min(greet_within, options_.connect_within);
    for (const connection_ptr& c : std::list(ungreeted_))
      if (now - c->since > patience)
        refuse(c, fmt::format("no greeting within {} ms", patience.count()));
    while (!leaving_.empty() && now - leaving_.front()->since > linger_for) {
      leaving_.front()->close();
      leaving_.pop_front();
    }
  }

  void tick_peer(const set_ptr& set, int peer, steady::time_point now, bool stood_still) {
    peer_link& p = set->link(peer);
    if (p.trial && !p.trial_greeted && now - p.trial_since > attempt_within)
      return failed_dial(set, peer, p.trial, errc::unreachable, "no answer to the connection");
    if (!p.link) return;
    bool paused, idle;
    {
      const std::lock_guard lock(p.mutex);
      paused = p.paused;
      idle = p.outbox.empty() && p.writing.empty();
      if (idle) {
        raw_bytes beat = set->pool.take(frame_header_bytes);
        if (beat.data) {
          const auto header = encode(frame_header{frame_kind::beat, set->identity});
          std::memcpy(beat.data.get(), header.data(), header.size());
          p.outbox_bytes += beat.size;
          p.outbox.push_back(std::move(beat));
        }
      }
    }
    if (idle) pump(set, peer);
    if (paused || stood_still) p.last_byte = now;  // the silence is ours
    if (!p.suspected && now - p.last_byte >= options_.suspect_after) {
      p.suspected = true;
      const auto silent = std::chrono::duration_cast<milliseconds>(now - p.last_byte).count();
      log_event(set->identity.is_beside() ? level::debug : level::warn, "link_suspected",
                {whose(*set),
                 {"generation", set->identity.generation.number},
                 {"rank", set->rank},
                 {"peer", peer},
                 {"silent_ms", silent}});
      emit(set, peer, peer_event::suspected, fmt::format("no byte for {} ms", silent));
    }
  }

  // Order of members: everything that touches io is destroyed before it (io is declared first,
  // public).
  link_server::options options_;
  std::unique_ptr<asio::ssl::context> tls_server_, tls_client_;  // null: no TLS
  peer_lines lines_;
  memory_desk desk_;  // closed: links are TCP
  tcp::acceptor acceptor_;
  asio::steady_timer timer_;
  std::optional<asio::steady_timer> accept_pause_;
  std::list<connection_ptr> ungreeted_;  // oldest first
  std::list<connection_ptr> leaving_;    // being told why they are refused
  std::list<waiting_greeting> room_;
  std::vector<set_ptr> sets_;
  steady::time_point last_tick_;
  steady::time_point refusal_second_;
  int refusal_lines_ = 0;
  bool shut_down_ = false;
};

// ---------------------------------------------------------------------------------------------------------
// What callers hold.

class asio_links final : public link_set {
 public:
  asio_links(std::shared_ptr<core> c, set_ptr set) : core_(std::move(c)), set_(std::move(set)) {}

  ~asio_links() override {
    cancel();
    // After this no event comes any more; unless an event is what destroys us.
    if (!core_->on_io_thread()) {
      const std::lock_guard lock(set_->event_mutex);
      set_->on_event = nullptr;
    }
  }

  int rank() const override { return set_->rank; }
  int size() const override { return set_->size(); }

  result<void> send(int to, link_key key, std::span<const std::byte> bytes) override {
    check_peer(to);
    peer_link& p = set_->link(to);
    if (bytes.size() > set_->frame_bytes_max)
      return make_error(errc::too_large,
                        "frame of {} bytes with {}; the largest of this plan is {}", bytes.size(),
                        text_of(key), set_->frame_bytes_max);
    if (p.memory) {
      auto sent = p.memory->send(key, bytes);
      if (!sent) return broken(to, sent.err());
      set_->sent += bytes.size();
      return ok();
    }
    {
      const std::lock_guard lock(p.mutex);
      if (p.cancelled) return set_->cancelled_error();
      if (p.failed) return *p.failed;
    }
    raw_bytes frame = set_->pool.take(frame_header_bytes + bytes.size());
    if (!frame.data)
      return make_error(errc::too_large, "no memory to send a frame of {} bytes", bytes.size());
    const auto header = encode(
        frame_header{frame_kind::data, set_->identity, key, bytes.size(), payload_checksum(bytes)});
    std::memcpy(frame.data.get(), header.data(), header.size());
    if (!bytes.empty()) std::memcpy(frame.data.get() + header.size(), bytes.data(), bytes.size());
    bool post = false;
    {
      std::unique_lock lock(p.mutex);
      p.drained.wait(lock, [&] {
        return p.cancelled || p.failed || p.outbox_bytes == 0 ||
               p.outbox_bytes + frame.size <= set_->queue_bytes_max;
      });
      if (p.cancelled) return set_->cancelled_error();
      if (p.failed) return *p.failed;
      p.outbox_bytes += frame.size;
      p.outbox.push_back(std::move(frame));
      post = !std::exchange(p.pump_posted, true);
    }
    set_->sent += bytes.size();
    if (post) asio::post(core_->io, [c = core_.get(), set = set_, to] { c->pump(set, to); });
    return ok();
  }

  result<void> receive(int from, link_key key, std::span<std::byte> into) override {
    if (shm_link* memory = memory_of(from)) {
      auto frame = memory->take(key);
      if (!frame) return broken(from, frame.err());
      if (frame->bytes.size() != into.size())
        return other_size(from, key, frame->bytes.size(), "", into.size());
      return copy_out(from, *frame, into.data());
    }
    auto frame = take(from, key);
    if (!frame) return frame.err();
    if (frame->size != into.size()) return other_size(from, key, frame->size, "", into.size());
    if (!into.empty()) std::memcpy(into.data(), frame->data.get(), into.size());
    set_->pool.give(*std::move(frame));
    return ok();
  }

  result<std::vector<std::byte>> receive_any(int from, link_key key,
                                             std::size_t bytes_max) override {
    if (shm_link* memory = memory_of(from)) {
      auto frame = memory->take(key);
      if (!frame) return broken(from, frame.err());
      if (frame->bytes.size() > bytes_max)
        return other_size(from, key, frame->bytes.size(), "at most ", bytes_max);
      std::vector<std::byte> bytes(frame->bytes.size());
      if (auto copied = copy_out(from, *frame, bytes.data()); !copied) return copied.err();
      return bytes;
    }
    auto frame = take(from, key);
    if (!frame) return frame.err();
    if (frame->size > bytes_max) return other_size(from, key, frame->size, "at most ", bytes_max);
    std::vector<std::byte> bytes(frame->data.get(), frame->data.get() + frame->size);
    set_->pool.give(*std::move(frame));
    return bytes;
  }

  result<held_frame> receive_held(int from, link_key key, std::size_t bytes) override {
    if (shm_link* memory = memory_of(from)) {
      auto frame = memory->take(key);
      if (!frame) return broken(from, frame.err());
      if (frame->bytes.size() != bytes)
        return other_size(from, key, frame->bytes.size(), "", bytes);
      if (payload_checksum(frame->bytes) != frame->checksum) return corrupt(from, *frame);
      set_->received += bytes;
      return held_frame{frame->bytes, std::move(frame->held)};
    }
    auto frame = take(from, key);
    if (!frame) return frame.err();
    if (frame->size != bytes) return other_size(from, key, frame->size, "", bytes);
    const std::byte* begin = frame->data.get();
    auto back = [set = set_, kept = std::make_shared<raw_bytes>(*std::move(frame))](const void*) {
      set->pool.give(std::move(*kept));
    };
    return held_frame{{begin, bytes}, std::shared_ptr<const void>(begin, std::move(back))};
  }

  link_kind kind(int peer) const override {
    check_peer(peer);
    return set_->link(peer).memory ? link_kind::shared_memory : link_kind::tcp;
  }

  void cancel() override {
    if (ended_.exchange(true)) return;
    set_->wake_cancelled();
    asio::post(core_->io, [c = core_.get(), set = set_] { c->end_cancelled(set); });
  }

  std::uint64_t bytes_sent() const override { return set_->sent; }
  std::uint64_t bytes_received() const override { return set_->received; }

 private:
  void check_peer(int peer) const {
    invariant(peer >= 0 && peer < set_->size() && peer != set_->rank,
              "a link leads to another rank of the set");
  }

  shm_link* memory_of(int peer) const {
    check_peer(peer);
    return set_->link(peer).memory.get();
  }

  static error other_size(int from, link_key key, std::size_t bytes, const char* bound,
                          std::size_t expected) {
    return make_error(
        errc::bad_input,
        "frame from rank {} with {} has {} bytes; expected {}{}. fix: both ranks must "
        "run one plan",
        from, text_of(key), bytes, bound, expected);
  }

  result<void> copy_out(int from, const shm_link::frame& frame, std::byte* into) {
    if (copy_with_checksum(into, frame.bytes.data(), frame.bytes.size()) != frame.checksum)
      return corrupt(from, frame);
    set_->received += frame.bytes.size();
    return ok();
  }

  error corrupt(int from, const shm_link::frame& frame) {
    return lose(from, errc::corrupt,
                fmt::format("checksum of the frame with {} ({} bytes) differs from its bytes",
                            text_of(frame.key), frame.bytes.size()));
  }

  /// A call on shared memory failed: because the link had ended, or because the peer broke its
  /// rules and the link ends now.
  error broken(int peer, const error& why) {
    if (why.code == errc::cancelled) return why;
    const auto itself = set_->link(peer).memory->broken();
    return itself ? lose(peer, itself->code, itself->message) : why;
  }

  error lose(int peer, errc code, const std::string& why) {
    asio::post(core_->io,
               [c = core_.get(), set = set_, peer, code, why] { c->lose(set, peer, code, why); });
    return core::lost_error(*set_, peer, code, why);
  }

  result<raw_bytes> take(int from, link_key key) {
    check_peer(from);
    peer_link& p = set_->link(from);
    std::unique_lock lock(p.mutex);
    const auto resume_if_paused = [&] {
      if (!p.paused || p.resume_posted) return;
      p.resume_posted = true;
      asio::post(core_->io, [c = core_.get(), set = set_, from] { c->resume(set, from); });
    };
    for (;;) {
      if (p.cancelled) return set_->cancelled_error();
      if (auto found = p.inbox.find(ordered(key)); found != p.inbox.end()) {
        raw_bytes frame = std::move(found->second.front());
        found->second.pop_front();
        if (found->second.empty()) p.inbox.erase(found);
        p.inbox_bytes -= frame.size;
        if (p.inbox_bytes <= set_->queue_bytes_max / 2) resume_if_paused();
        return frame;
      }
      if (p.failed) return *p.failed;
      p.awaited.push_back(ordered(key));
      resume_if_paused();
      p.arrived.wait(lock);
      if (auto at = std::find(p.awaited.begin(), p.awaited.end(), ordered(key));
          at != p.awaited.end())
        p.awaited.erase(at);
    }
  }

  std::shared_ptr<core> core_;
  set_ptr set_;
  std::atomic<bool> ended_{false};
};

class asio_link_server final : public link_server {
 public:
  explicit asio_link_server(const options& o) : core_(std::make_shared<core>(o)) {}

  result<void> begin() {
    auto port = core_->listen();
    if (!port) return port.err();
    port_ = *port;
    // Signals are for the main thread; a new thread inherits this mask.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([c = core_.get()] {
      c->io_thread = std::this_thread::get_id();
      c->io.run();
    });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return ok();
  }

  ~asio_link_server() override {
    invariant(!core_->on_io_thread(), "a link server is not destroyed from its own event");
    if (!thread_.joinable()) return;
    asio::post(core_->io, [c = core_.get()] {
      c->shut_down();
      c->io.stop();
    });
    thread_.join();
  }

  std::uint16_t port() const override { return port_; }

  result<std::unique_ptr<link_set>> open(
      job_id job, generation_id generation, int rank, const std::vector<link_peer>& peers,
      std::size_t frame_bytes_max,
      std::function<void(int peer, peer_event what, std::string why)> on_event) override {
    invariant(!core_->on_io_thread(), "open() waits, so it is not called from an event");
    if (peers.empty() || peers.size() > static_cast<std::size_t>(limits::worker_count_max) ||
        rank < 0 || static_cast<std::size_t>(rank) >= peers.size())
      return make_error(errc::bad_input, "links for rank {} of {}; expected a rank of 1 to {}",
                        rank, peers.size(), limits::worker_count_max);
    if (frame_bytes_max > static_cast<std::size_t>(limits::link_frame_bytes_max))
      return make_error(errc::too_large,
                        "frames of up to {} bytes; the limit is {} (config/limits.hpp). fix: a "
                        "smaller microbatch or more stages",
                        frame_bytes_max, limits::link_frame_bytes_max);
    auto set = std::make_shared<set_state>();
    set->identity = {job, generation};
    set->rank = rank;
    set->peers = peers;
    set->frame_bytes_max = frame_bytes_max;
    const std::size_t given = core_->options().queue_bytes_max;
    set->queue_bytes_max = given ? given : std::max(queue_bytes_floor, 64 * frame_bytes_max);
    set->on_event = std::move(on_event);
    for (std::size_t peer = 0; peer < peers.size(); ++peer)
      set->links.push_back(peer == static_cast<std::size_t>(rank) ? nullptr
                                                                  : std::make_unique<peer_link>());
    asio::post(core_->io, [c = core_.get(), set] { c->begin(set); });
    {
      std::unique_lock lock(set->open_mutex);
      set->open_changed.wait(lock, [&] { return set->open_done; });
      if (set->open_failed) return *set->open_failed;
    }
    return std::unique_ptr<link_set>(std::make_unique<asio_links>(core_, set));
  }

  peer_line& line() override { return core_->lines(); }

  void abandon(job_id job) override {
    asio::post(core_->io, [c = core_.get(), job] { c->abandon(job); });
  }

  std::uint64_t stale_frames() const override { return core_->stale; }
  std::uint64_t refused_connections() const override { return core_->refused; }

 private:
  std::shared_ptr<core> core_;
  std::thread thread_;
  std::uint16_t port_ = 0;
};

}  // namespace

result<std::unique_ptr<link_server>> link_server::start(const options& o) {
  if (!o.process.empty() && (!is_process(o.process) || !is_worker_name(o.name)))
    return make_error(errc::usage,
                      "worker name '{}' of {} bytes. fix: a printable name of at most {} bytes",
                      o.name, o.name.size(), limits::name_bytes_max);
  auto server = std::make_unique<asio_link_server>(o);
  if (auto begun = server->begin(); !begun) return begun.err();
  return std::unique_ptr<link_server>(std::move(server));
}

}  // namespace stagecoach
