// Sessions of the coordinator's port on Boost.Beast: one io thread, callbacks, no coroutine (DESIGN
// 3).
#include <sys/socket.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/websocket.hpp>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>

#include "config/byte_stream_beast.hpp"
#include "config/log.hpp"
#include "coordinator/gateway.hpp"
#include "coordinator/gateway_rules.hpp"

namespace stagecoach {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
namespace websocket = beast::websocket;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using std::chrono::milliseconds;

std::string to_text(const tcp::endpoint& endpoint) {
  const std::string address = endpoint.address().to_string();
  return endpoint.address().is_v6() ? fmt::format("[{}]:{}", address, endpoint.port())
                                    : fmt::format("{}:{}", address, endpoint.port());
}

/// The way into the io thread for those who may outlive it: a reply that is given after stop()
/// finds the gate shut.
struct io_gate {
  std::mutex mutex;
  asio::io_context* io = nullptr;
  template <class F>
  void post(F&& work) {
    const std::lock_guard lock(mutex);
    if (io != nullptr) asio::post(*io, std::forward<F>(work));
  }
};

/// Refusals are one line each, but a flood of them must not fill the disk.
class log_quota {
 public:
  /// True if a line may be written now; then `missed` is how many were not since the last one.
  bool take(std::uint64_t& missed) {
    const auto now = std::chrono::steady_clock::now();
    if (now - window_ >= std::chrono::seconds(1)) {
      window_ = now;
      left_ = 20;
    }
    if (left_ == 0) {
      ++missed_;
      return false;
    }
    --left_;
    missed = std::exchange(missed_, 0);
    return true;
  }

 private:
  std::chrono::steady_clock::time_point window_{};
  int left_ = 0;
  std::uint64_t missed_ = 0;
};

/// Counts a connection for as long as any session owns it.
struct connection_mark {
  explicit connection_mark(std::shared_ptr<std::atomic<std::size_t>> c) : count(std::move(c)) {
    ++*count;
  }
  ~connection_mark() { --*count; }
  connection_mark(const connection_mark&) = delete;
  connection_mark& operator=(const connection_mark&) = delete;
  std::shared_ptr<std::atomic<std::size_t>> count;
};

class control_channel : public std::enable_shared_from_this<control_channel> {
 public:
  virtual ~control_channel() = default;
  // On the io thread:
  virtual void deliver(std::string text) = 0;
  virtual void shut(std::uint16_t code, const std::string& reason) = 0;
  virtual void cut(const std::string& reason) = 0;
  // Any thread:
  std::atomic<std::size_t> queued_bytes{0};
  std::atomic<bool> is_cut{false};
};

class http_session_base;

/// What all sessions share; lives as long as the io context.
struct gateway_core {
  gateway::options options;
  gateway::callbacks callbacks;
  port_rules rules;
  std::optional<asio::ssl::context> tls;
  std::shared_ptr<io_gate> gate = std::make_shared<io_gate>();
  std::shared_ptr<std::atomic<std::size_t>> connections =
      std::make_shared<std::atomic<std::size_t>>(0);
  std::atomic<std::uint64_t> refused{0};
  log_quota quota;           // io thread
  bool is_stopping = false;  // io thread

  std::mutex mutex;
  std::condition_variable drained;
  std::map<std::uint64_t, std::shared_ptr<control_channel>> channels;  // under mutex
  std::uint64_t last_id = 0;                                           // under mutex
  std::size_t answers_due = 0;                                         // under mutex

  // Last, so that it dies first: with it go the sessions, which use all of the above.
  asio::io_context io{1};

  connection_id admit(std::shared_ptr<control_channel> channel) {
    const std::lock_guard lock(mutex);
    channels.emplace(++last_id, std::move(channel));
    return connection_id{last_id};
  }
  void forget(connection_id id) {
    const std::lock_guard lock(mutex);
    channels.erase(value(id));
    drained.notify_all();
  }
  void answer_due(int change) {
    const std::lock_guard lock(mutex);
    answers_due += static_cast<std::size_t>(change);
    drained.notify_all();
  }
  void log_refused(const char* event, const gateway_peer& peer, const std::string& reason) {
    std::uint64_t missed = 0;
    if (!quota.take(missed)) return;
    if (missed > 0) log_event(level::warn, "refusals_not_logged", {{"count", missed}});
    log_event(level::warn, event,
              {{"peer", peer.address}, {"name", peer.name}, {"reason", reason}});
  }
};

// ---- control channel
// ----------------------------------------------------------------------------------

class control_session final : public control_channel {
 public:
  control_session(gateway_core& core, byte_stream stream, gateway_peer peer,
                  std::shared_ptr<connection_mark> mark)
      : core_(core), ws_(std::move(stream)), peer_(std::move(peer)), mark_(std::move(mark)) {}

  void run(http::request<http::string_body> request) {
    request_ = std::move(request);
    beast::get_lowest_layer(ws_).expires_never();  // the WebSocket's own deadlines from here on
    websocket::stream_base::timeout deadlines{};
    deadlines.handshake_timeout = core_.options.request_within;
    deadlines.idle_timeout = core_.options.control_idle;
    deadlines.keep_alive_pings = true;
    ws_.set_option(deadlines);
    ws_.set_option(websocket::stream_base::decorator([](websocket::response_type& response) {
      response.set(http::field::server, "stagecoach");
    }));
    ws_.read_message_max(core_.options.message_bytes_max);
    ws_.auto_fragment(false);
    ws_.text(true);
    ws_.async_accept(request_, [self = me()](error_code ec) { self->on_accepted(ec); });
  }

  void deliver(std::string text) override {
    if (is_closing_ || !is_open_) return;
    queue_.push_back(std::move(text));
    if (!is_writing_) write();
  }

  void shut(std::uint16_t code, const std::string& reason) override {
    if (is_closing_ || !is_open_) return;
    is_closing_ = true;
    if (why_.empty()) why_ = fmt::format("closed by the coordinator: {}", reason);
    // A control frame carries 125 bytes, two of them the code.
    close_reason_ =
        websocket::close_reason(static_cast<websocket::close_code>(code), reason.substr(0, 120));
    if (!is_writing_) send_close();
  }

  void cut(const std::string& reason) override {
    if (!is_open_) return;
    if (why_.empty()) why_ = reason;
    is_closing_ = true;
    beast::get_lowest_layer(ws_).close();
  }

 private:
  std::shared_ptr<control_session> me() {
    return std::static_pointer_cast<control_session>(shared_from_this());
  }

  void on_accepted(error_code ec) {
    if (ec) {
      core_.log_refused("control_refused", peer_, ec.message());
      return;
    }
    id_ = core_.admit(shared_from_this());
    is_open_ = true;
    if (core_.is_stopping) {
      // Stop has already walked the channels: it would wait for this one in vain.
      why_ = "gateway stops";
      is_closing_ = true;
      is_open_ = false;
      core_.forget(id_);
      return;
    }
    if (core_.callbacks.on_open) core_.callbacks.on_open(id_, peer_);
    read();
  }

  void read() {
    ws_.async_read(buffer_, [self = me()](error_code ec, std::size_t) { self->on_read(ec); });
  }

  void on_read(error_code ec) {
    if (ec) return finish(ec);
    if (!ws_.got_text()) {
      shut(websocket::close_code::unknown_data, "text frames only");
    } else if (!is_closing_) {
      std::string text(static_cast<const char*>(buffer_.cdata().data()), buffer_.size());
      if (core_.callbacks.on_message) {
        try {
          core_.callbacks.on_message(id_, std::move(text));
        } catch (const std::exception& e) {
          log_event(level::error, "control_handler_failed",
                    {{"peer", peer_.address}, {"what", e.what()}});
          shut(websocket::close_code::internal_error, "internal error");
        }
      }
    }
    buffer_.consume(buffer_.size());
    if (buffer_.capacity() > (1u << 20)) buffer_.shrink_to_fit();
    read();
  }

  void write() {
    is_writing_ = true;
    ws_.async_write(asio::buffer(queue_.front()),
                    [self = me()](error_code ec, std::size_t) { self->on_written(ec); });
  }

  void on_written(error_code ec) {
    is_writing_ = false;
    queued_bytes -= queue_.front().size();
    queue_.pop_front();
    if (ec) {
      // The reader sees the same end, and may still be reading the close frame that says why:
      // closing the socket here would take that from it.
      is_closing_ = true;
      return;
    }
    if (!queue_.empty()) return write();
    if (is_closing_) send_close();
  }

  void send_close() {
    if (!ws_.is_open()) return;
    ws_.async_close(close_reason_, [self = me()](error_code) {});
  }

  void finish(error_code ec) {
    if (!is_open_) return;
    is_open_ = false;
    if (why_.empty()) {
      if (ec == websocket::error::closed) {
        const auto& said = ws_.reason();
        why_ = fmt::format("closed by the peer: {} {}", static_cast<int>(said.code),
                           std::string_view(said.reason.data(), said.reason.size()));
      } else if (ec == beast::error::timeout) {
        why_ = fmt::format("no sign of life for {} ms", core_.options.control_idle.count());
      } else if (ec == websocket::error::message_too_big) {
        why_ = fmt::format("message over the limit of {} bytes", core_.options.message_bytes_max);
      } else if (ec == asio::error::eof || ec == asio::ssl::error::stream_truncated) {
        why_ = "connection closed by the peer";
      } else {
        why_ = ec.message();
      }
    }
    if (core_.callbacks.on_close) core_.callbacks.on_close(id_, why_);
    core_.forget(id_);
  }

  gateway_core& core_;
  websocket::stream<byte_stream> ws_;
  gateway_peer peer_;
  std::shared_ptr<connection_mark> mark_;
  http::request<http::string_body> request_;
  beast::flat_buffer buffer_;
  std::deque<std::string> queue_;
  connection_id id_{};
  websocket::close_reason close_reason_;
  std::string why_;
  bool is_open_ = false;
  bool is_writing_ = false;
  bool is_closing_ = false;
};

// ---- HTTP
// ---------------------------------------------------------------------------------------------

class http_session_base : public std::enable_shared_from_this<http_session_base> {
 public:
  virtual ~http_session_base() = default;
  virtual void answer(std::uint64_t request_number, http_response response) = 0;  // io thread
};

/// One request's way back. Weak towards the session: a handler may keep a reply longer than the
/// gateway lives, and a socket must not outlive its io context.
struct reply_slot {
  reply_slot(std::shared_ptr<io_gate> g, std::weak_ptr<http_session_base> s, std::uint64_t n)
      : gate(std::move(g)), session(std::move(s)), number(n) {}
  ~reply_slot() {
    give(error_response(500, "unexpected", "the request was dropped without an answer"));
  }
  reply_slot(const reply_slot&) = delete;
  reply_slot& operator=(const reply_slot&) = delete;

  void give(http_response response) {
    if (is_given.exchange(true)) return;
    gate->post([session = session, number = number, response = std::move(response)]() mutable {
      if (auto alive = session.lock()) alive->answer(number, std::move(response));
    });
  }

  std::shared_ptr<io_gate> gate;
  std::weak_ptr<http_session_base> session;
  std::uint64_t number;
  std::atomic<bool> is_given{false};
};

class http_session final : public http_session_base {
 public:
  http_session(gateway_core& core, byte_stream stream, gateway_peer peer,
               std::shared_ptr<connection_mark> mark)
      : core_(core),
        stream_(std::move(stream)),
        timer_(core.io),
        peer_(std::move(peer)),
        mark_(std::move(mark)),
        buffer_(core.options.header_bytes_max + (64u << 10)) {}

  ~http_session() override {
    if (is_answer_due_) core_.answer_due(-1);
  }

  void run() {
    if (stream_.is_secure()) {
      socket().expires_after(core_.options.request_within);
      stream_.handshake(tls_side::server, [self = me()](error_code ec) { self->on_handshake(ec); });
    } else {
      read_head();
    }
  }

  void answer(std::uint64_t request_number, http_response response) override {
    if (request_number != number_ || !is_waiting_) return;
    is_waiting_ = false;
    timer_.cancel();
    respond(std::move(response), false);
  }

 private:
  std::shared_ptr<http_session> me() {
    return std::static_pointer_cast<http_session>(shared_from_this());
  }
  beast::tcp_stream& socket() { return beast::get_lowest_layer(stream_); }

  void on_handshake(error_code ec) {
    if (ec) {
      ++core_.refused;
      core_.log_refused(
          "tls_refused", peer_,
          ec == beast::error::timeout
              ? fmt::format("no handshake within {} ms", core_.options.request_within.count())
              : tls_failure(stream_.native_tls(), ec.message()));
      return drain();  // so that the alert arrives: a reset would overtake it
    }
    const peer_identity who = peer_of(stream_.native_tls());
    peer_.name = who.name;
    peer_.what = who.what;
    read_head();
  }

  // Between requests a client may rest for `keep_alive`; once a byte has come, the deadline is
  // short.
  void wait_for_next() {
    if (core_.is_stopping) return close_gently();
    if (buffer_.size() > 0) return read_head();
    socket().expires_after(core_.options.keep_alive);
    stream_.async_read_some(buffer_.prepare(4096), [self = me()](error_code ec, std::size_t bytes) {
      if (ec) return self->close_gently();
      self->buffer_.commit(bytes);
      self->read_head();
    });
  }

  void read_head() {
    head_ = {};
    parser_.emplace();
    parser_->header_limit(static_cast<std::uint32_t>(core_.options.header_bytes_max));
    parser_->body_limit(core_.options.body_bytes_max);
    socket().expires_after(core_.options.request_within);
    http::async_read_header(stream_, buffer_, *parser_, [self = me()](error_code ec, std::size_t) {
      if (ec) return self->on_bad_request(ec);
      self->on_head();
    });
  }

  void on_bad_request(error_code ec) {
    if (ec == http::error::end_of_stream) return close_gently();
    if (ec == http::error::header_limit || ec == http::error::buffer_overflow)
      return refuse_with(
          431, "too_large",
          fmt::format("request header over {} bytes", core_.options.header_bytes_max));
    if (ec == http::error::body_limit)
      return refuse_with(413, "too_large",
                         fmt::format("request body over {} bytes", core_.options.body_bytes_max));
    if (ec == http::error::partial_message || ec == beast::error::timeout) return drain();
    if (ec.category() == make_error_code(http::error::bad_version).category())
      return refuse_with(400, "bad_input", "no HTTP/1.1 request: " + ec.message());
  }

  void refuse_with(int status, const std::string& code, const std::string& message) {
    refuse_with(error_response(status, code, message));
  }

  void refuse_with(http_response response) {
    const std::string why = refusal_text(response);
    const std::string asked =
        head_.method.empty() ? std::string("?") : head_.method + " " + head_.target.substr(0, 200);
    core_.log_refused("request_refused", peer_,
                      fmt::format("status {} to {}: {}", response.status, asked, why));
    respond(std::move(response), true);
  }

  void on_head() {
    const auto& request = parser_->get();
    const auto text = [&request](http::field name) { return std::string(request[name]); };
    head_.method = std::string(request.method_string());
    head_.target = std::string(request.target());
    head_.host = text(http::field::host);
    head_.origin = text(http::field::origin);
    head_.authorization = text(http::field::authorization);
    std::string type = text(http::field::content_type);
    type = type.substr(0, type.find(';'));
    while (!type.empty() && type.back() == ' ') type.pop_back();
    for (char& c : type)
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    head_.content_type = std::move(type);
    head_.is_upgrade = websocket::is_upgrade(request);
    peer_.has_token = false;

    target_ = parse_target(head_.target);
    if (!target_) return refuse_with(400, "bad_input", "malformed request target");
    if (auto refusal = refuse(core_.rules, head_, target_->path, peer_))
      return refuse_with(std::move(*refusal));
    if (target_->path == control_path) return on_control();
    if (head_.is_upgrade)
      return refuse_with(404, "not_found", "a WebSocket opens on /control only");
    if (beast::iequals(request[http::field::expect], "100-continue")) return invite_body();
    read_body();
  }

  void on_control() {
    if (!head_.is_upgrade) {
      auto response = error_response(426, "usage", "/control is a WebSocket: expected an upgrade");
      response.headers.emplace_back("Upgrade", "websocket");
      return refuse_with(std::move(response));
    }
    // Bytes behind the head would be frames of a client that did not wait for our yes.
    if (buffer_.size() > 0) return refuse_with(400, "bad_input", "bytes after the upgrade request");
    std::make_shared<control_session>(core_, std::move(stream_), peer_, mark_)
        ->run(parser_->release());
  }

  void invite_body() {
    go_on_ = http::response<http::empty_body>(http::status::continue_, 11);
    http::async_write(stream_, go_on_, [self = me()](error_code ec, std::size_t) {
      if (!ec) self->read_body();
    });
  }

  void read_body() {
    http::async_read(stream_, buffer_, *parser_, [self = me()](error_code ec, std::size_t) {
      if (ec) return self->on_bad_request(ec);
      self->dispatch();
    });
  }

  void dispatch() {
    http_request request;
    auto message = parser_->release();
    keeps_alive_ = message.keep_alive();
    request.method = head_.method == "HEAD" ? "GET" : head_.method;
    request.path = std::move(target_->path);
    request.query = std::move(target_->query);
    request.content_type = head_.content_type;
    request.accept = std::string(message[http::field::accept]);
    request.body = std::move(message.body());
    request.peer = peer_;
    is_waiting_ = true;
    is_answer_due_ = true;
    core_.answer_due(+1);
    socket().expires_never();
    timer_.expires_after(core_.options.reply_within);
    // This wait is also what keeps the session alive: the reply knows it only weakly.
    timer_.async_wait([self = me(), number = ++number_](error_code ec) {
      if (ec || number != self->number_ || !self->is_waiting_) return;
      self->is_waiting_ = false;
      self->respond(error_response(504, "timed_out", "no answer in time"), true);
    });
    auto slot = std::make_shared<reply_slot>(core_.gate, weak_from_this(), number_);
    try {
      if (core_.callbacks.on_request)
        core_.callbacks.on_request(std::move(request), [slot](http_response response) {
          slot->give(std::move(response));
        });
    } catch (const std::exception& e) {
      log_event(level::error, "request_handler_failed",
                {{"target", head_.target}, {"what", e.what()}});
      slot->give(error_response(500, "unexpected", "internal error; see the coordinator's log"));
    }
  }

  void respond(http_response response, bool then_close) {
    // A refusal may come before the body was read; then what follows on the socket is no request.
    if (!is_answer_due_) {
      is_answer_due_ = true;
      core_.answer_due(+1);
      keeps_alive_ = false;
    }
    out_ = {};
    out_.version(11);
    out_.result(static_cast<unsigned>(response.status));
    out_.set(http::field::server, "stagecoach");
    out_.set(http::field::content_type, response.content_type);
    out_.set("X-Content-Type-Options", "nosniff");
    out_.set(http::field::cache_control, "no-store");
    for (const auto& [name, text] : response.headers) out_.set(name, text);
    out_.keep_alive(keeps_alive_ && !then_close && !core_.is_stopping);
    const bool bodiless =
        head_.method == "HEAD" || response.status == 204 || response.status == 304;
    if (response.status != 204) out_.content_length(response.body.size());
    if (!bodiless) out_.body() = std::move(response.body);
    socket().expires_after(core_.options.write_within);
    auto done = [self = me()](error_code ec, std::size_t) { self->on_responded(ec); };
    if (bodiless) {
      serializer_.emplace(out_);
      http::async_write_header(stream_, *serializer_, std::move(done));
    } else {
      http::async_write(stream_, out_, std::move(done));
    }
  }

  void on_responded(error_code ec) {
    is_answer_due_ = false;
    core_.answer_due(-1);
    if (ec) return;
    if (out_.keep_alive()) return wait_for_next();
    if (parser_ && !parser_->is_done()) return drain();  // unread body
    close_gently();
  }

  // A socket closed with unread bytes is reset, and the reset destroys the answer on its way; so
  // take what still comes, for a bounded time and amount.
  void drain() {
    error_code ignored;
    socket().socket().shutdown(tcp::socket::shutdown_send, ignored);
    socket().expires_after(milliseconds(1000));
    drained_bytes_ = 0;
    scrap_.resize(64u << 10);
    drain_more();
  }

  void drain_more() {
    // Asio's socket and not the TLS layer: nothing of it is wanted.
    socket().async_read_some(asio::buffer(scrap_), [self = me()](error_code ec, std::size_t bytes) {
      self->drained_bytes_ += bytes;
      if (ec || self->drained_bytes_ > (16u << 20)) return;
      self->drain_more();
    });
  }

  void close_gently() {
    if (stream_.is_secure()) {
      socket().expires_after(milliseconds(1000));
      stream_.shutdown([self = me()](error_code) {});
    } else {
      error_code ignored;
      socket().socket().shutdown(tcp::socket::shutdown_both, ignored);
    }
  }

  gateway_core& core_;
  byte_stream stream_;
  asio::steady_timer timer_;
  gateway_peer peer_;
  std::shared_ptr<connection_mark> mark_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  request_head head_;
  std::optional<parsed_target> target_;
  http::response<http::empty_body> go_on_;
  http::response<http::string_body> out_;
  std::optional<http::response_serializer<http::string_body>> serializer_;
  std::string scrap_;
  std::size_t drained_bytes_ = 0;
  std::uint64_t number_ = 0;
  bool is_waiting_ = false;
  bool is_answer_due_ = false;
  bool keeps_alive_ = false;
};

// ---- the port
// -----------------------------------------------------------------------------------------

class gateway_beast final : public gateway {
 public:
  gateway_beast(const options& o, callbacks c) : acceptor_(core_.io), pause_(core_.io) {
    core_.options = o;
    core_.callbacks = std::move(c);
    core_.gate->io = &core_.io;
  }
  ~gateway_beast() override { stop(); }

  result<void> open() {
    const options& o = core_.options;
    if (!o.token.empty() && o.tls.empty())
      return make_error(errc::usage,
                        "a bearer token needs TLS: without it anyone on the way reads it. "
                        "fix: give certificates, or leave the token out");
    error_code ec;
    auto address = asio::ip::make_address(o.host, ec);
    if (ec) {
      ec.clear();
      tcp::resolver resolver(core_.io);
      const auto found = resolver.resolve(o.host, std::to_string(o.port), ec);
      if (ec || found.empty())
        return make_error(errc::usage,
                          "can't listen on \"{}\": {}. fix: a host name or address of this machine",
                          o.host, ec.message());
      address = found.begin()->endpoint().address();
      for (const auto& entry :
           found)  // "localhost": 127.0.0.1 before ::1, since clients try that first
        if (entry.endpoint().address().is_v4()) {
          address = entry.endpoint().address();
          break;
        }
    }
    const bool is_loopback = address.is_loopback();
    if (o.tls.empty() && !is_loopback) {
      if (!o.insecure)
        return make_error(
            errc::usage,
            "refused to listen on {} without TLS: anyone who reaches this port could run jobs. "
            "fix: give certificates (see `stagecoach certs`), listen on 127.0.0.1, or say "
            "--insecure on a network you trust",
            o.host);
      log_event(level::warn, "insecure_port", {{"host", o.host}});
    }
    if (!o.tls.empty()) {
      auto made = make_tls_context(o.tls, tls_side::server, false);
      if (!made) return made.err();
      core_.tls.emplace(*made);
    }
    core_.rules.is_tls = core_.tls.has_value();
    core_.rules.is_loopback = is_loopback;
    core_.rules.token = o.token;

    const tcp::endpoint endpoint(address, o.port);
    acceptor_.open(endpoint.protocol(), ec);
    if (!ec) acceptor_.set_option(asio::socket_base::reuse_address(true), ec);
    if (!ec) acceptor_.bind(endpoint, ec);
    if (!ec) acceptor_.listen(asio::socket_base::max_listen_connections, ec);
    if (ec == asio::error::address_in_use)
      return make_error(
          errc::conflict,
          "port {} on {} is in use. fix: stop the other program, or choose another port", o.port,
          o.host);
    if (ec)
      return make_error(errc::io, "can't listen on {} port {}: {}", o.host, o.port, ec.message());
    port_ = acceptor_.local_endpoint().port();
    accept();
    thread_ = std::thread([this] { core_.io.run(); });
    return ok();
  }

  std::uint16_t port() const override { return port_; }

  bool send(connection_id connection, std::string text) override {
    std::shared_ptr<control_channel> channel = find(connection);
    if (!channel || channel->is_cut) return false;
    const std::size_t behind = channel->queued_bytes += text.size();
    if (behind > core_.options.queue_bytes_max) {
      if (!channel->is_cut.exchange(true))
        asio::post(core_.io, [channel, behind] {
          channel->cut(fmt::format("too far behind: {} bytes unread", behind));
        });
      return false;
    }
    asio::post(core_.io,
               [channel, text = std::move(text)]() mutable { channel->deliver(std::move(text)); });
    return true;
  }

  void close(connection_id connection, std::uint16_t code, const std::string& reason) override {
    if (auto channel = find(connection))
      asio::post(core_.io, [channel, code, reason] { channel->shut(code, reason); });
  }

  void stop() override {
    if (!thread_.joinable()) return;
    invariant(std::this_thread::get_id() != thread_.get_id(),
              "stop() is not called from a callback");
    asio::post(core_.io, [this] {
      core_.is_stopping = true;
      error_code ignored;
      acceptor_.close(ignored);
      for (auto& channel : all_channels())
        channel->shut(websocket::close_code::going_away, "stops");
    });
    {
      std::unique_lock lock(core_.mutex);
      // Time for answers and close frames on their way; a peer that does not answer is not waited
      // for.
      core_.drained.wait_for(lock, milliseconds(500),
                             [this] { return core_.channels.empty() && core_.answers_due == 0; });
    }
    asio::post(core_.io, [this] {
      for (auto& channel : all_channels()) channel->cut("gateway stops");
    });
    {
      std::unique_lock lock(core_.mutex);
      core_.drained.wait_for(lock, milliseconds(200), [this] { return core_.channels.empty(); });
    }
    {
      const std::lock_guard lock(core_.gate->mutex);
      core_.gate->io = nullptr;
    }
    core_.io.stop();
    thread_.join();
    const std::lock_guard lock(core_.mutex);
    core_.channels.clear();
  }

  std::uint64_t refused_handshakes() const override { return core_.refused; }
  std::size_t connection_count() const override { return *core_.connections; }

 private:
  std::shared_ptr<control_channel> find(connection_id connection) {
    const std::lock_guard lock(core_.mutex);
    const auto found = core_.channels.find(value(connection));
    return found == core_.channels.end() ? nullptr : found->second;
  }

  std::vector<std::shared_ptr<control_channel>> all_channels() {
    const std::lock_guard lock(core_.mutex);
    std::vector<std::shared_ptr<control_channel>> all;
    for (const auto& [id, channel] : core_.channels) all.push_back(channel);
    return all;
  }

  void accept() {
    acceptor_.async_accept([this](error_code ec, tcp::socket socket) {
      if (core_.is_stopping || ec == asio::error::operation_aborted) return;
      if (ec) {
        // Out of descriptors: accept would fail at once again, and spin.
        std::uint64_t missed = 0;
        if (core_.quota.take(missed))
          log_event(level::warn, "accept_failed", {{"reason", ec.message()}});
        pause_.expires_after(milliseconds(100));
        return pause_.async_wait([this](error_code stopped) {
          if (!stopped) accept();
        });
      }
      admit(std::move(socket));
      accept();
    });
  }

  void admit(tcp::socket socket) {
    error_code ec;
    const tcp::endpoint remote = socket.remote_endpoint(ec);
    if (ec) return;  // gone already
    gateway_peer peer;
    peer.address = to_text(remote);
    peer.is_tls = core_.tls.has_value();
    if (*core_.connections >= core_.options.connection_count_max) {
      core_.log_refused(
          "connection_refused", peer,
          fmt::format("{} connections open, the most allowed", core_.options.connection_count_max));
      return;
    }
    socket.set_option(tcp::no_delay(true), ec);
    auto mark = std::make_shared<connection_mark>(core_.connections);
    std::make_shared<http_session>(
        core_, byte_stream(std::move(socket), core_.tls ? &*core_.tls : nullptr), std::move(peer),
        std::move(mark))
        ->run();
  }

  gateway_core core_;
  tcp::acceptor acceptor_;
  asio::steady_timer pause_;
  std::thread thread_;
  std::uint16_t port_ = 0;
};

}  // namespace

result<std::unique_ptr<gateway>> gateway::start(const options& o, callbacks c) {
  auto made = std::make_unique<gateway_beast>(o, std::move(c));
  if (auto opened = made->open(); !opened) return opened.err();
  return std::unique_ptr<gateway>(std::move(made));
}

}  // namespace stagecoach
