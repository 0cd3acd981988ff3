// The worker's control channel on Boost.Beast: one io thread, callbacks, no coroutine (DESIGN 3).
//
//   waiting --back-off--> connecting --resolve, connect, TLS, upgrade--> open --any end--> waiting
//
// Each attempt is an object of its own; what a dead attempt's handlers still say is not heard,
// since only the present attempt may report.
#include <algorithm>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/websocket.hpp>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "config/byte_stream_beast.hpp"
#include "worker/control_client.hpp"

namespace stagecoach {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
namespace websocket = beast::websocket;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using std::chrono::milliseconds;
using clock = std::chrono::steady_clock;

class attempt;

/// What an attempt reports, on the io thread.
struct attempt_owner {
  virtual ~attempt_owner() = default;
  virtual void attempt_opened(attempt& who) = 0;
  virtual void attempt_received(attempt& who, std::string text) = 0;
  /// Once, at the end; refused: the other side's or our own judgement, not the network's.
  virtual void attempt_ended(attempt& who, const error& why, bool refused) = 0;
};

class attempt : public std::enable_shared_from_this<attempt> {
 public:
  virtual ~attempt() = default;
  // On the io thread:
  virtual void run() = 0;
  virtual void deliver(std::string text) = 0;
  virtual void shut() = 0;                       // what is queued, then a close frame
  virtual void cut(const std::string& why) = 0;  // at once
  // Any thread:
  std::atomic<std::size_t> queued_bytes{0};
  std::atomic<bool> is_cut{false};
};

class connection_attempt final : public attempt {
 public:
  connection_attempt(attempt_owner& owner, const control_client::options& o, asio::io_context& io,
                     byte_stream stream)
      : owner_(owner), options_(o), resolver_(io), deadline_(io), ws_(std::move(stream)) {}

  void run() override {
    deadline_.expires_after(options_.connect_within);
    deadline_.async_wait([self = me()](error_code ec) {
      if (!ec)
        self->cut(fmt::format("no answer within {} ms", self->options_.connect_within.count()));
    });
    error_code ec;
    const auto address = asio::ip::make_address(options_.host, ec);
    if (!ec) return connect(std::vector<tcp::endpoint>{{address, options_.port}});
    resolver_.async_resolve(
        options_.host, std::to_string(options_.port),
        [self = me()](error_code failed, const tcp::resolver::results_type& found) {
          if (failed) return self->end(errc::unreachable, "unknown host: " + failed.message());
          std::vector<tcp::endpoint> endpoints;
          for (const auto& entry : found) endpoints.push_back(entry.endpoint());
          self->connect(std::move(endpoints));
        });
  }

  void deliver(std::string text) override {
    if (!is_open_ || is_closing_) return;
    queue_.push_back(std::move(text));
    if (!is_writing_) write();
  }

  void shut() override {
    if (!is_open_) return cut("stopped");
    if (is_closing_) return;
    is_closing_ = true;
    why_ = "stopped";
    if (!is_writing_) send_close();
  }

  void cut(const std::string& why) override {
    if (has_ended_) return;
    if (why_.empty()) why_ = why;
    is_closing_ = true;
    resolver_.cancel();
    socket().close();
    // A resolver or a connect may take its time to come back; nobody waits for it.
    end(errc::unreachable, why_);
  }

 private:
  std::shared_ptr<connection_attempt> me() {
    return std::static_pointer_cast<connection_attempt>(shared_from_this());
  }
  beast::tcp_stream& socket() { return beast::get_lowest_layer(ws_); }

  void connect(std::vector<tcp::endpoint> endpoints) {
    if (has_ended_) return;
    endpoints_ = std::move(endpoints);
    socket().async_connect(endpoints_, [self = me()](error_code ec, const tcp::endpoint&) {
      if (ec) return self->end(errc::unreachable, ec.message());
      self->on_connected();
    });
  }

  void on_connected() {
    if (has_ended_) return;
    error_code ignored;
    socket().socket().set_option(tcp::no_delay(true), ignored);
    if (ws_.next_layer().is_secure()) {
      SSL* connection = ws_.next_layer().native_tls();
      error_code is_name;
      asio::ip::make_address(options_.host, is_name);
      if (is_name) SSL_set_tlsext_host_name(connection, options_.host.c_str());
      ws_.next_layer().handshake(tls_side::client, [self = me()](error_code ec) {
        if (ec) return self->end_tls(ec);
        self->check_server();
      });
    } else {
      upgrade();
    }
  }

  void check_server() {
    if (ws_.next_layer().is_secure()) {
      const SSL* connection = ws_.next_layer().native_tls();
      const peer_identity server = peer_of(connection);
      if (server.what != tls_role::coordinator)
        return end(errc::unauthorised,
                   fmt::format("certificate \"{}\" at {}:{} has role \"{}\", expected coordinator. "
                               "fix: check the address",
                               server.name, options_.host, options_.port, to_string(server.what)),
                   true);
      if (!peer_has_host(connection, options_.host))
        return end(errc::unauthorised,
                   fmt::format("certificate \"{}\" is not for host {}. fix: make the coordinator's "
                               "certificate with that host among its names",
                               server.name, options_.host),
                   true);
    }
    upgrade();
  }

  void upgrade() {
    if (has_ended_) return;
    websocket::stream_base::timeout deadlines{};
    deadlines.handshake_timeout = options_.connect_within;
    deadlines.idle_timeout = options_.idle;
    deadlines.keep_alive_pings = true;
    ws_.set_option(deadlines);
    ws_.read_message_max(options_.message_bytes_max);
    ws_.auto_fragment(false);
    ws_.text(true);
    const bool is_v6 = options_.host.find(':') != std::string::npos && options_.host.front() != '[';
    const std::string host = is_v6 ? fmt::format("[{}]:{}", options_.host, options_.port)
                                   : fmt::format("{}:{}", options_.host, options_.port);
    ws_.async_handshake(response_, host, options_.path,
                        [self = me()](error_code ec) { self->on_upgraded(ec); });
  }

  void on_upgraded(error_code ec) {
    if (has_ended_) return;
    if (ec == websocket::error::upgrade_declined) {
      const unsigned status = response_.result_int();
      const bool refused = status == 401 || status == 403 || status == 421;
      return end(refused ? errc::unauthorised : errc::unreachable,
                 fmt::format("coordinator answered {} to the upgrade: {}", status,
                             response_.body().substr(0, 1000)),
                 refused);
    }
    if (ec) return end_tls(ec);
    deadline_.cancel();
    is_open_ = true;
    owner_.attempt_opened(*this);
    read();
  }

  void read() {
    ws_.async_read(buffer_, [self = me()](error_code ec, std::size_t) { self->on_read(ec); });
  }

  void on_read(error_code ec) {
    if (has_ended_) return;
    if (ec) {
      if (ec == websocket::error::closed) {
        const auto& said = ws_.reason();
        return end(errc::unreachable,
                   fmt::format("closed by the coordinator: {} {}", static_cast<int>(said.code),
                               std::string_view(said.reason.data(), said.reason.size())));
      }
      return end_tls(ec);
    }
    if (ws_.got_text() && !is_closing_)
      owner_.attempt_received(
          *this, std::string(static_cast<const char*>(buffer_.cdata().data()), buffer_.size()));
    buffer_.consume(buffer_.size());
    if (buffer_.capacity() > (1u << 20)) buffer_.shrink_to_fit();
    read();
  }

  void write() {
    is_writing_ = true;
    ws_.async_write(asio::buffer(queue_.front()), [self = me()](error_code ec, std::size_t) {
      self->is_writing_ = false;
      self->queued_bytes -= self->queue_.front().size();
      self->queue_.pop_front();
      if (ec) {
        // The reader sees the same end, and may still be reading the close frame that says why:
        // closing the socket here would take that from it.
        self->is_closing_ = true;
        return;
      }
      if (!self->queue_.empty()) return self->write();
      if (self->is_closing_) self->send_close();
    });
  }

  void send_close() {
    if (!ws_.is_open()) return;
    ws_.async_close(websocket::close_code::normal, [self = me()](error_code) {});
  }

  // An error of the TLS layer after our side had finished is the server's verdict on our
  // certificate: with TLS 1.3 it comes with the first read.
  void end_tls(error_code ec) {
    if (ws_.next_layer().is_secure()) {
      if (ec.category() == asio::error::get_ssl_category())
        return end(errc::unauthorised,
                   "TLS: " + tls_failure(ws_.next_layer().native_tls(), ec.message()), true);
    }
    if (ec == beast::error::timeout)
      return end(errc::unreachable,
                 fmt::format("no sign of life for {} ms", options_.idle.count()));
    if (ec == asio::error::eof || ec == asio::ssl::error::stream_truncated ||
        ec == http::error::end_of_stream)
      return end(errc::unreachable, "connection closed by the coordinator");
    end(errc::unreachable, ec.message());
  }

  void end(errc code, const std::string& why, bool refused = false) {
    if (has_ended_) return;
    has_ended_ = true;
    deadline_.cancel();
    is_open_ = false;
    // Not the graceful way: an attempt that failed has nobody to say goodbye to.
    socket().close();
    owner_.attempt_ended(*this, error{code, why_.empty() ? why : why_}, refused);
  }

  attempt_owner& owner_;
  const control_client::options& options_;
  tcp::resolver resolver_;
  asio::steady_timer deadline_;
  websocket::stream<byte_stream> ws_;
  std::vector<tcp::endpoint> endpoints_;
  websocket::response_type response_;
  beast::flat_buffer buffer_;
  std::deque<std::string> queue_;
  std::string why_;
  bool is_open_ = false;
  bool is_writing_ = false;
  bool is_closing_ = false;
  bool has_ended_ = false;
};

class control_client_beast final : public control_client, public attempt_owner {
 public:
  control_client_beast(const options& o, callbacks c)
      : options_(o),
        callbacks_(std::move(c)),
        random_(o.seed),
        pause_(io_),
        work_(io_.get_executor()) {}
  ~control_client_beast() override { stop(); }

  result<void> open() {
    if (!options_.tls.empty()) {
      auto made = make_tls_context(options_.tls, tls_side::client);
      if (!made) return made.err();
      tls_.emplace(*made);
    }
    next_back_off_ = options_.back_off_min;
    asio::post(io_, [this] { connect(); });
    thread_ = std::thread([this] { io_.run(); });
    return ok();
  }

  bool send(std::string text) override {
    std::shared_ptr<attempt> channel;
    {
      const std::lock_guard lock(mutex_);
      channel = standing_;
    }
    if (!channel || channel->is_cut) return false;
    if ((channel->queued_bytes += text.size()) > options_.queue_bytes_max) {
      if (!channel->is_cut.exchange(true))
        asio::post(io_, [channel] { channel->cut("the coordinator reads too slowly"); });
      return false;
    }
    asio::post(io_,
               [channel, text = std::move(text)]() mutable { channel->deliver(std::move(text)); });
    return true;
  }

  bool is_open() const override {
    const std::lock_guard lock(mutex_);
    return standing_ != nullptr;
  }

  void every(milliseconds period, std::function<void()> what) override {
    invariant(period.count() > 0, "a period is positive");
    asio::post(io_, [this, period, what = std::move(what)]() mutable {
      tickers_.push_back(
          std::make_unique<ticker>(ticker{asio::steady_timer(io_), period, std::move(what)}));
      ticker& made = *tickers_.back();
      made.timer.expires_after(period);
      wait(made);
    });
  }

  void reconnect(const std::string& why) override {
    asio::post(io_, [this, why] {
      next_back_off_ = milliseconds(0);
      if (current_) {
        current_->cut(why);
      } else {
        pause_.cancel();  // its handler connects
      }
    });
  }

  void stop() override {
    if (!thread_.joinable()) return;
    invariant(std::this_thread::get_id() != thread_.get_id(),
              "stop() is not called from a callback");
    asio::post(io_, [this] {
      is_stopping_ = true;
      pause_.cancel();
      for (auto& t : tickers_) t->timer.cancel();
      if (current_) current_->shut();
      settle();
    });
    {
      std::unique_lock lock(mutex_);
      stopped_.wait_for(lock, milliseconds(1000), [this] { return has_settled_; });
    }
    io_.stop();
    thread_.join();
    // Before the io context dies: an attempt owns sockets and timers of it.
    current_ = nullptr;
    const std::lock_guard lock(mutex_);
    standing_ = nullptr;
  }

 private:
  struct ticker {
    asio::steady_timer timer;
    milliseconds period;
    std::function<void()> what;
  };

  void wait(ticker& t) {
    t.timer.async_wait([this, &t](error_code ec) {
      if (ec || is_stopping_) return;
      t.what();
      // Fixed rate, but no burst of missed beats after the process was frozen.
      const auto now = clock::now();
      auto next = t.timer.expiry() + t.period;
      if (next <= now) next = now + t.period;
      t.timer.expires_at(next);
      wait(t);
    });
  }

  void connect() {
    if (is_stopping_ || current_) return;
    current_ = std::make_shared<connection_attempt>(
        *this, options_, io_, byte_stream(tcp::socket(io_), tls_ ? &*tls_ : nullptr));
    current_->run();
  }

  void attempt_opened(attempt& who) override {
    if (&who != current_.get()) return;
    opened_at_ = clock::now();
    was_open_ = true;
    last_refusal_.clear();
    {
      const std::lock_guard lock(mutex_);
      standing_ = current_;
    }
    if (callbacks_.on_open) callbacks_.on_open();
  }

  void attempt_received(attempt& who, std::string text) override {
    if (&who == current_.get() && callbacks_.on_message) callbacks_.on_message(std::move(text));
  }

  void attempt_ended(attempt& who, const error& why, bool refused) override {
    if (&who != current_.get()) return;
    {
      const std::lock_guard lock(mutex_);
      standing_ = nullptr;
    }
    const std::shared_ptr<attempt> keep = std::move(current_);  // it is still on the call stack
    current_ = nullptr;
    const bool was_open = std::exchange(was_open_, false);
    // A channel that lived starts over from the shortest pause; one that is thrown out at once does
    // not.
    if (was_open && clock::now() - opened_at_ >= options_.back_off_max)
      next_back_off_ = std::min(next_back_off_, options_.back_off_min);
    if (refused) next_back_off_ = options_.back_off_max;
    if (!is_stopping_) schedule();
    if (was_open && callbacks_.on_close) callbacks_.on_close(why.message);
    if (refused && !is_stopping_ && why.message != last_refusal_) {
      last_refusal_ = why.message;
      if (callbacks_.on_refused) callbacks_.on_refused(why);
    }
    settle();
  }

  void schedule() {
    // Half fixed, half random: a thousand workers must not come back in one burst.
    std::uniform_real_distribution<double> share(0.5, 1.0);
    const auto pause = milliseconds(
        static_cast<std::int64_t>(static_cast<double>(next_back_off_.count()) * share(random_)));
    next_back_off_ = std::clamp(next_back_off_ * 2, options_.back_off_min, options_.back_off_max);
    pause_.expires_after(pause);
    pause_.async_wait([this](error_code) { connect(); });
  }

  void settle() {
    if (!is_stopping_ || current_) return;
    const std::lock_guard lock(mutex_);
    has_settled_ = true;
    stopped_.notify_all();
  }

  const options options_;
  const callbacks callbacks_;
  std::optional<asio::ssl::context> tls_;
  // On the io thread:
  std::mt19937_64 random_;
  std::shared_ptr<attempt> current_;
  milliseconds next_back_off_{100};
  clock::time_point opened_at_{};
  bool was_open_ = false;
  bool is_stopping_ = false;
  std::string last_refusal_;

  mutable std::mutex mutex_;
  std::condition_variable stopped_;
  std::shared_ptr<attempt> standing_;  // under mutex_
  bool has_settled_ = false;           // under mutex_
  std::thread thread_;

  // After what its handlers use, so that it dies before.
  asio::io_context io_{1};
  std::vector<std::unique_ptr<ticker>> tickers_;
  asio::steady_timer pause_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
};

}  // namespace

result<std::unique_ptr<control_client>> control_client::start(const options& o, callbacks c) {
  auto made = std::make_unique<control_client_beast>(o, std::move(c));
  if (auto opened = made->open(); !opened) return opened.err();
  return std::unique_ptr<control_client>(std::move(made));
}

}  // namespace stagecoach
