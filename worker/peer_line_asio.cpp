#include "worker/peer_line_asio.hpp"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <utility>

#include "config/limits.hpp"
#include "config/log.hpp"

namespace stagecoach {

namespace asio = boost::asio;
using boost::system::error_code;
using std::chrono::milliseconds;

namespace {

// A message without a receipt for that long: a prepare that nobody answers is void after 2 s too.
constexpr milliseconds patience{2000};
constexpr milliseconds attempt_within{1000};  // one dial, with handshake and greeting
constexpr milliseconds backoff_first{10}, backoff_max{200};
constexpr milliseconds idle_outgoing{30'000}, idle_incoming{120'000};  // the dialler hangs up first
constexpr std::size_t queued_count_max = 1024;
constexpr std::size_t queued_bytes_max = std::size_t{32} << 20;  // 8 of the largest messages
constexpr std::size_t text_piece_bytes = 64 << 10;
constexpr std::size_t peers_max = limits::worker_count_max;
// A question is asked again after a third of its time: a SYN that was lost comes again only after
// a second.
constexpr int asks_per_question = 3;

void set_greeting(connection& c, const line_greeting& greeting) {
  c.greeting_buffer = encode(greeting);
}

}  // namespace

const char* to_string(peer_verdict verdict) {
  switch (verdict) {
    case peer_verdict::alive:
      return "alive";
    case peer_verdict::gone:
      return "gone";
    case peer_verdict::silent:
      return "silent";
  }
  return "silent";
}

struct peer_lines::outgoing {
  struct message {
    std::uint64_t number = 0;
    std::shared_ptr<const std::string> frame;  // a receipt may come before the write is done
    steady::time_point queued;
  };

  peer_address to;
  std::deque<message> queue;  // the first `sent_count` are on their way
  std::size_t sent_count = 0;
  std::size_t bytes = 0;
  connection_ptr trial, link;
  steady::time_point trial_since, used;
  std::optional<asio::steady_timer> redial;
  milliseconds backoff = backoff_first;
  bool is_writing = false;
  std::array<std::byte, line_frame_bytes> receipt{};
  std::string last_cause = "no connection yet";
};

struct peer_lines::incoming {
  connection_ptr link;
  process_id from;
  std::string name;
  steady::time_point heard;
  std::array<std::byte, line_frame_bytes> header_bytes{};
  line_frame header;
  std::string text;
  bool owes_receipt = false, is_writing = false;
  std::array<std::byte, line_frame_bytes> receipt{};
};

struct peer_lines::question {
  question(asio::io_context& io) : timer(io) {}

  peer_address to;
  milliseconds within{};
  steady::time_point due;  // of the timer
  int asked = 0;
  bool is_answered = false, has_slept = false;
  std::list<connection_ptr> tries;
  asio::steady_timer timer;
  std::string last_cause;
  std::function<void(peer_verdict, std::string)> done;
};

peer_lines::peer_lines(asio::io_context& io, std::string name, process_id process,
                       std::function<void(const connection_ptr&, const std::string&)> refuse)
    : io_(io), name_(std::move(name)), process_(std::move(process)), refuse_(std::move(refuse)) {}

peer_lines::~peer_lines() = default;

// ---- any thread

void peer_lines::listen(
    std::function<void(const process_id&, const std::string&, std::string)> on_message,
    verdict_sink on_unreachable) {
  const std::lock_guard lock(sink_mutex_);
  on_message_ = std::move(on_message);
  on_unreachable_ = std::move(on_unreachable);
}

void peer_lines::send(const peer_address& to, std::string text) {
  asio::post(io_, [this, to, text = std::move(text)]() mutable { queue(to, std::move(text)); });
}

void peer_lines::ask_alive(const peer_address& to, milliseconds within,
                           std::function<void(peer_verdict, std::string)> done) {
  asio::post(io_, [this, to, within, done = std::move(done)]() mutable {
    auto q = std::make_shared<question>(io_);
    q->to = to;
    q->within = std::clamp(within, milliseconds(10), milliseconds(60'000));
    q->done = std::move(done);
    if (is_shut_down_) return;
    questions_.push_back(q);
    if (!is_process(to.process))
      return answer(q, peer_verdict::silent, fmt::format("'{}' is no process id", to.process));
    ask(q);
  });
}

// ---- questions

void peer_lines::ask(const question_ptr& q) {
  if (q->is_answered) return;
  const auto pause = q->within / asks_per_question;
  if (++q->asked <= asks_per_question) {
    auto c = std::make_shared<connection>(io_);
    q->tries.push_back(c);
    greet(c, q->to, [this, q, c](peer_verdict verdict, const std::string& why) {
      c->close();
      q->last_cause = why;
      // What may pass is asked again when its time comes.
      if (verdict != peer_verdict::silent) answer(q, verdict, why);
    });
  }
  q->due = steady::now() + pause;
  q->timer.expires_at(q->due);
  q->timer.async_wait([this, q](error_code ec) {
    if (ec || q->is_answered) return;
    // We stood still ourselves: answers may lie in the sockets unread. Once only.
    if (steady::now() - q->due > q->within / asks_per_question &&
        !std::exchange(q->has_slept, true))
      q->asked = 0;
    if (q->asked < asks_per_question) return ask(q);
    std::string why = fmt::format("no answer for {} ms", q->within.count());
    if (!q->last_cause.empty()) why += ", last: " + q->last_cause;
    answer(q, peer_verdict::silent, why);
  });
}

void peer_lines::answer(const question_ptr& q, peer_verdict verdict, const std::string& why) {
  if (std::exchange(q->is_answered, true)) return;
  q->timer.cancel();
  for (const connection_ptr& c : q->tries) c->close();
  q->tries.clear();
  questions_.remove(q);
  q->done(verdict, why);
}

void peer_lines::greet(const connection_ptr& c, const peer_address& to,
                       std::function<void(peer_verdict, std::string)> done) {
  dial(io_, c, to.host, to.port, tls_, to.name,
       [this, c, process = to.process,
        done = std::move(done)](const std::optional<dial_failure>& failure) {
         if (failure) {
           const bool is_gone = failure->is_refused || failure->is_other_name;
           return done(is_gone ? peer_verdict::gone : peer_verdict::silent, failure->cause);
         }
         set_greeting(*c, {process_, process, name_});
         c->write_all(asio::buffer(c->greeting_buffer), [c, done](error_code ec, std::size_t) {
           if (c->closed) return;
           if (ec) return done(peer_verdict::silent, reason_of(ec));
           c->read_all(asio::buffer(c->reply_buffer), [c, done](error_code ec, std::size_t) {
             if (c->closed) return;
             // In TLS 1.3 the acceptor's word about our certificate arrives only here.
             if (ec)
               return done(peer_verdict::silent,
                           is_tls_error(ec) ? tls_reason(*c, ec) : reason_of(ec));
             const auto reply = decode_reply(c->reply_buffer);
             if (!reply) return done(peer_verdict::silent, reply.err().message);
             if (reply->verdict == link_verdict::welcome) return done(peer_verdict::alive, "");
             done(reply->verdict == link_verdict::wrong_process ? peer_verdict::gone
                                                                : peer_verdict::silent,
                  explain(reply->verdict));
           });
         });
       });
}

// ---- outgoing

void peer_lines::queue(const peer_address& to, std::string text) {
  if (is_shut_down_) return;
  if (!is_process(to.process))
    return tell_unreachable(to, peer_verdict::silent,
                            fmt::format("'{}' is no process id", to.process));
  if (text.size() > static_cast<std::size_t>(limits::control_message_bytes_max))
    return tell_unreachable(to, peer_verdict::alive,
                            fmt::format("message of {} bytes; the limit is {} (config/limits.hpp)",
                                        text.size(), limits::control_message_bytes_max));
  outgoing_ptr& slot = outgoing_[to.process];
  if (!slot) slot = std::make_shared<outgoing>();
  const outgoing_ptr o = slot;
  o->to = to;
  o->used = steady::now();
  const std::uint64_t number = next_number_++;
  const std::span bytes(reinterpret_cast<const std::byte*>(text.data()), text.size());
  const auto header =
      encode(line_frame{line_kind::message, number, text.size(), payload_checksum(bytes)});
  auto frame = std::make_shared<std::string>();
  frame->reserve(header.size() + text.size());
  frame->append(reinterpret_cast<const char*>(header.data()), header.size()).append(text);
  o->bytes += frame->size();
  o->queue.push_back({number, std::move(frame), o->used});
  if (o->queue.size() > queued_count_max || o->bytes > queued_bytes_max)
    return give_up(o, peer_verdict::silent,
                   fmt::format("{} messages with {} bytes wait for it", o->queue.size(), o->bytes));
  if (o->link) return pump(o);
  if (!o->trial && !o->redial) dial_out(o);
}

void peer_lines::dial_out(const outgoing_ptr& o) {
  auto c = std::make_shared<connection>(io_);
  o->trial = c;
  o->trial_since = steady::now();
  greet(c, o->to, [this, o, c](peer_verdict verdict, const std::string& why) {
    if (o->trial != c) return;
    if (verdict == peer_verdict::alive) return stands(o, c);
    if (verdict == peer_verdict::gone) return give_up(o, verdict, why);
    broke(o, c, why);
  });
}

void peer_lines::stands(const outgoing_ptr& o, const connection_ptr& c) {
  o->trial.reset();
  o->link = c;
  o->backoff = backoff_first;
  o->sent_count = 0;
  o->is_writing = false;
  read_receipt(o, c);
  pump(o);
}

void peer_lines::pump(const outgoing_ptr& o) {
  if (o->is_writing || !o->link || o->sent_count >= o->queue.size()) return;
  o->is_writing = true;
  const auto frame = o->queue[o->sent_count++].frame;
  o->link->write_all(asio::buffer(*frame),
                     [this, o, frame, c = o->link](error_code ec, std::size_t) {
                       if (c->closed || o->link != c) return;
                       if (ec) return broke(o, c, reason_of(ec));
                       o->is_writing = false;
                       pump(o);
                     });
}

void peer_lines::read_receipt(const outgoing_ptr& o, const connection_ptr& c) {
  c->read_all(asio::buffer(o->receipt), [this, o, c](error_code ec, std::size_t) {
    if (c->closed || o->link != c) return;
    if (ec) return broke(o, c, reason_of(ec));
    const auto receipt = decode_line_frame(o->receipt);
    if (!receipt || receipt->kind != line_kind::arrived)
      return broke(o, c, receipt ? "a message where a receipt belongs" : receipt.err().message);
    // It may have come over the connection before, and not be sent on this one yet.
    while (!o->queue.empty() && o->queue.front().number <= receipt->number) {
      o->bytes -= o->queue.front().frame->size();
      o->queue.pop_front();
      if (o->sent_count > 0) --o->sent_count;
    }
    o->used = steady::now();
    read_receipt(o, c);
  });
}

/// The connection is no more; what has no receipt goes over the next one.
void peer_lines::broke(const outgoing_ptr& o, const connection_ptr& c, const std::string& cause) {
  c->close();
  if (o->trial != c && o->link != c) return;
  o->trial.reset();
  o->link.reset();
  o->sent_count = 0;
  o->is_writing = false;
  o->last_cause = cause;
  if (o->queue.empty()) {
    outgoing_.erase(o->to.process);
    return;
  }
  o->redial.emplace(io_, o->backoff);
  o->backoff = std::min(o->backoff * 2, backoff_max);
  o->redial->async_wait([this, o](error_code ec) {
    if (ec) return;
    o->redial.reset();
    dial_out(o);
  });
}

void peer_lines::give_up(const outgoing_ptr& o, peer_verdict verdict, const std::string& why) {
  if (o->trial) o->trial->close();
  if (o->link) o->link->close();
  o->trial.reset();
  o->link.reset();
  if (o->redial) o->redial->cancel();
  const bool has_lost = !o->queue.empty();
  o->queue.clear();
  outgoing_.erase(o->to.process);
  if (has_lost) tell_unreachable(o->to, verdict, why);
}

void peer_lines::tell_unreachable(const peer_address& to, peer_verdict verdict,
                                  const std::string& why) {
  log_event(level::warn, "line_given_up",
            {{"peer", to.name},
             {"process", to.process},
             {"verdict", to_string(verdict)},
             {"reason", why}});
  verdict_sink sink;
  {
    const std::lock_guard lock(sink_mutex_);
    sink = on_unreachable_;
  }
  if (sink) sink(to, verdict, why);
}

// ---- incoming

void peer_lines::accepted(const connection_ptr& c, const line_greeting& greeting) {
  if (incoming_.size() >= peers_max) leave(incoming_.front());
  auto in = std::make_shared<incoming>();
  in->link = c;
  in->from = greeting.from;
  in->name = greeting.name;
  in->heard = steady::now();
  incoming_.push_back(in);
  c->reply_buffer = encode(link_reply{});
  c->write_all(asio::buffer(c->reply_buffer), [this, in](error_code ec, std::size_t) {
    if (in->link->closed) return;
    if (ec) return leave(in);
    read_header(in);
  });
}

void peer_lines::read_header(const incoming_ptr& in) {
  in->link->read_all(asio::buffer(in->header_bytes), [this, in](error_code ec, std::size_t) {
    if (in->link->closed) return;
    if (ec) return leave(in);  // it hung up
    const auto header = decode_line_frame(in->header_bytes);
    if (!header || header->kind != line_kind::message) {
      refuse_(in->link, header ? "a receipt where a message belongs" : header.err().message);
      return leave(in);
    }
    in->header = *header;
    in->text.clear();
    read_text(in);
  });
}

/// Piece by piece: memory is taken as bytes come, not as a header announces them.
void peer_lines::read_text(const incoming_ptr& in) {
  const std::size_t filled = in->text.size();
  const std::size_t piece = std::min<std::size_t>(in->header.length - filled, text_piece_bytes);
  if (piece == 0) return arrived(in);
  in->text.resize(filled + piece);
  in->link->read_all(asio::buffer(in->text.data() + filled, piece),
                     [this, in](error_code ec, std::size_t) {
                       if (in->link->closed) return;
                       if (ec) return leave(in);
                       read_text(in);
                     });
}

void peer_lines::arrived(const incoming_ptr& in) {
  const std::span bytes(reinterpret_cast<const std::byte*>(in->text.data()), in->text.size());
  if (payload_checksum(bytes) != in->header.checksum) {
    refuse_(in->link, "checksum of a message differs from its bytes");
    return leave(in);
  }
  in->heard = steady::now();
  incoming_.remove(in);
  incoming_.push_back(in);
  if (seen_.size() >= peers_max && seen_.count(in->from) == 0)
    seen_.erase(std::min_element(seen_.begin(), seen_.end(), [](const auto& a, const auto& b) {
      return a.second.at < b.second.at;
    }));
  seen& last = seen_[in->from];
  const bool is_new = in->header.number > last.number;
  last = {std::max(last.number, in->header.number), in->heard};
  in->owes_receipt = true;
  if (is_new) {
    std::function<void(const process_id&, const std::string&, std::string)> sink;
    {
      const std::lock_guard lock(sink_mutex_);
      sink = on_message_;
    }
    if (sink) sink(in->from, in->name, std::move(in->text));
  }
  in->text = {};
  send_receipt(in);
  read_header(in);
}

void peer_lines::send_receipt(const incoming_ptr& in) {
  if (in->is_writing || !std::exchange(in->owes_receipt, false)) return;
  in->is_writing = true;
  in->receipt = encode(line_frame{line_kind::arrived, seen_[in->from].number});
  in->link->write_all(asio::buffer(in->receipt), [this, in](error_code ec, std::size_t) {
    if (in->link->closed) return;
    if (ec) return leave(in);
    in->is_writing = false;
    send_receipt(in);
  });
}

void peer_lines::leave(const incoming_ptr& in) {
  in->link->close();
  incoming_.remove(in);
}

// ---- time

void peer_lines::tick(steady::time_point now, bool has_slept) {
  std::vector<outgoing_ptr> list;
  for (const auto& [process, o] : outgoing_) list.push_back(o);
  for (const outgoing_ptr& o : list) {
    if (has_slept) {
      for (auto& message : o->queue) message.queued = now;
      o->trial_since = now;
    }
    if (!o->queue.empty() && now - o->queue.front().queued > patience) {
      give_up(o, peer_verdict::silent,
              fmt::format("no receipt for {} ms, last: {}", patience.count(), o->last_cause));
    } else if (o->trial && now - o->trial_since > attempt_within) {
      broke(o, o->trial, "no answer to the connection");
    } else if (o->queue.empty() && now - o->used > idle_outgoing) {
      give_up(o, peer_verdict::alive, "");
    }
  }
  while (!incoming_.empty() && now - incoming_.front()->heard > idle_incoming)
    leave(incoming_.front());
}

void peer_lines::shut_down() {
  is_shut_down_ = true;
  for (const auto& [process, o] : outgoing_) {
    if (o->trial) o->trial->close();
    if (o->link) o->link->close();
    if (o->redial) o->redial->cancel();
  }
  for (const question_ptr& q : questions_) {
    q->is_answered = true;
    q->timer.cancel();
    for (const connection_ptr& c : q->tries) c->close();
  }
  for (const incoming_ptr& in : incoming_) in->link->close();
  outgoing_.clear();
  questions_.clear();
  incoming_.clear();
}

}  // namespace stagecoach
