// The port, the control client and the HTTP client against each other and against raw sockets.
#include "coordinator/gateway.hpp"

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "config/log.hpp"
#include "coordinator/gateway_rules.hpp"
#include "tools/certs.hpp"
#include "tools/http_client.hpp"
#include "worker/control_client.hpp"

using namespace stagecoach;
using namespace std::chrono_literals;

namespace {

/// Waits for what another thread does; the bound is for a broken build only.
template <class F>
bool wait_until(F&& holds, std::chrono::milliseconds within = 8s) {
  const auto end = std::chrono::steady_clock::now() + within;
  while (std::chrono::steady_clock::now() < end) {
    if (holds()) return true;
    std::this_thread::sleep_for(2ms);
  }
  return holds();
}

/// A gateway whose handler echoes, and whose control channels are recorded.
struct echo_port {
  explicit echo_port(gateway::options o = {}) {
    gateway::callbacks c;
    c.on_request = [this](http_request request, http_reply_function reply) {
      ++requests;
      if (request.path == "/later") {
        std::thread([reply] {
          std::this_thread::sleep_for(20ms);
          reply({.body = "later"});
        }).detach();
        return;
      }
      if (request.path == "/dropped") return;
      if (request.path == "/throws") throw std::runtime_error("boom");
      if (request.path == "/never") {
        const std::lock_guard lock(mutex);
        kept.push_back(reply);
        return;
      }
      if (request.path == "/big") return reply({.body = std::string(8u << 20, 'x')});
      reply({.content_type = "text/plain",
             .body = request.method + " " + request.path + " " + request.query_or("q", "-") + " " +
                     request.body + " " + request.peer.name + " " + to_string(request.peer.what)});
    };
    c.on_open = [this](connection_id id, const gateway_peer& peer) {
      const std::lock_guard lock(mutex);
      opened.push_back(id);
      peers.push_back(peer);
    };
    c.on_message = [this](connection_id id, std::string text) {
      if (text == "close me") return port->close(id, 1008, "as you wish");
      if (text == "flood me") return;
      port->send(id, "echo " + text);
    };
    c.on_close = [this](connection_id id, const std::string& why) {
      const std::lock_guard lock(mutex);
      closed.push_back({id, why});
    };
    auto started = gateway::start(o, std::move(c));
    if (!started) FAIL(started.err().message);
    port = std::move(*started);
  }
  std::size_t open_count() {
    const std::lock_guard lock(mutex);
    return opened.size();
  }
  std::size_t closed_count() {
    const std::lock_guard lock(mutex);
    return closed.size();
  }
  connection_id opened_id(std::size_t index) {
    const std::lock_guard lock(mutex);
    return opened.at(index);
  }
  std::string closed_why(std::size_t index) {
    const std::lock_guard lock(mutex);
    return closed.at(index).second;
  }
  http_server server() const { return {.host = "127.0.0.1", .port = port->port()}; }

  std::mutex mutex;
  std::vector<connection_id> opened;
  std::vector<gateway_peer> peers;
  std::vector<std::pair<connection_id, std::string>> closed;
  std::vector<http_reply_function> kept;
  std::atomic<int> requests{0};
  std::unique_ptr<gateway> port;  // last: its callbacks use the rest
};

/// A worker's end that records what it hears.
struct listener {
  explicit listener(control_client::options o) {
    control_client::callbacks c;
    c.on_open = [this] { ++opens; };
    c.on_message = [this](std::string text) {
      const std::lock_guard lock(mutex);
      messages.push_back(std::move(text));
    };
    c.on_close = [this](const std::string& why) {
      const std::lock_guard lock(mutex);
      closes.push_back(why);
    };
    c.on_refused = [this](const error& why) {
      const std::lock_guard lock(mutex);
      refusals.push_back(why.message);
    };
    o.back_off_min = 20ms;
    o.back_off_max = 200ms;
    auto started = control_client::start(o, std::move(c));
    if (!started) FAIL(started.err().message);
    client = std::move(*started);
  }
  std::vector<std::string> heard() {
    const std::lock_guard lock(mutex);
    return messages;
  }
  std::vector<std::string> refused() {
    const std::lock_guard lock(mutex);
    return refusals;
  }
  std::vector<std::string> closed() {
    const std::lock_guard lock(mutex);
    return closes;
  }

  std::mutex mutex;
  std::vector<std::string> messages, closes, refusals;
  std::atomic<int> opens{0};
  std::unique_ptr<control_client> client;
};

/// A socket without manners.
class raw_socket {
 public:
  explicit raw_socket(std::uint16_t port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(::connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0);
    const timeval patience{8, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  }
  ~raw_socket() { ::close(fd_); }
  raw_socket(const raw_socket&) = delete;
  raw_socket& operator=(const raw_socket&) = delete;
  void send(const std::string& bytes) {
    std::size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t n = ::send(fd_, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
      if (n <= 0) return;
      done += static_cast<std::size_t>(n);
    }
  }
  /// Everything up to the other side's end, or up to a text.
  std::string read(const std::string& until = {}) {
    std::string all;
    char part[4096];
    while (until.empty() || all.find(until) == std::string::npos) {
      const ssize_t n = ::recv(fd_, part, sizeof(part), 0);
      if (n <= 0) break;
      all.append(part, static_cast<std::size_t>(n));
    }
    return all;
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

int status_of(const std::string& raw) {
  return raw.size() > 12 && raw.rfind("HTTP/1.1 ", 0) == 0 ? std::stoi(raw.substr(9, 3)) : 0;
}

int raw_status(std::uint16_t port, const std::string& request) {
  raw_socket socket(port);
  socket.send(request);
  return status_of(socket.read());
}

void check_alive(const echo_port& echo) {
  const auto reply = http_call(echo.server(), "GET", "/alive");
  if (!reply) FAIL(reply.err().message);
  CHECK(reply->status == 200);
}

std::string upgrade_request(const std::string& extra = {}) {
  return "GET /control HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
         "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" +
         extra + "\r\n";
}

struct temp_folder {
  temp_folder() {
    static int count = 0;
    path = std::filesystem::temp_directory_path() /
           ("gateway_test." + std::to_string(::getpid()) + "." + std::to_string(count++));
  }
  ~temp_folder() { std::filesystem::remove_all(path); }
  std::filesystem::path path;
};

}  // namespace

// ---- rules, without a network
// -------------------------------------------------------------------------

TEST_CASE("a target is split, decoded, or refused") {
  const auto plain = parse_target("/api/v1/jobs/j%2D1?since=3&q=a+b%21&flag&q=last");
  REQUIRE(plain);
  CHECK(plain->path == "/api/v1/jobs/j-1");
  CHECK(plain->query.at("since") == "3");
  CHECK(plain->query.at("q") == "last");
  CHECK(plain->query.at("flag").empty());
  for (const char* bad : {"", "x", "http://h/", "/%", "/%4", "/%zz", "/a%00b", "/?a=%0a"}) {
    CAPTURE(bad);
    CHECK_FALSE(parse_target(bad));
  }
}

TEST_CASE("a Host header is cut into name and port") {
  CHECK(host_name_of("localhost:7070") == "localhost");
  CHECK(host_name_of("[::1]:7070") == "::1");
  CHECK(host_name_of("[::1]") == "::1");
  CHECK(host_name_of("127.0.0.1") == "127.0.0.1");
  CHECK(host_name_of("localhost:x").empty());
  CHECK(host_name_of("[::1").empty());
  CHECK(host_name_of("::1").empty());
}

// ---- plain HTTP
// ---------------------------------------------------------------------------------------

TEST_CASE("a request makes the round trip, answered at once or later by another thread") {
  echo_port echo;
  const auto get = http_call(echo.server(), "GET", "/a%20b?q=%C3%A9");
  REQUIRE(get);
  CHECK(get->status == 200);
  CHECK(get->body == "GET /a b \xC3\xA9   ");
  const auto post = http_call(echo.server(), "POST", "/p", R"({"x":1})");
  REQUIRE(post);
  CHECK(post->body == R"(POST /p - {"x":1}  )");
  const auto later = http_call(echo.server(), "GET", "/later");
  REQUIRE(later);
  CHECK(later->body == "later");
  const auto big = http_call(echo.server(), "GET", "/big");
  REQUIRE(big);
  CHECK(big->body.size() == 8u << 20);
}

TEST_CASE("one connection serves several requests, and HEAD has no body") {
  echo_port echo;
  raw_socket socket(echo.port->port());
  for (int i = 0; i < 3; ++i) {
    socket.send("GET /again HTTP/1.1\r\nHost: localhost\r\n\r\n");
    CHECK(socket.read("GET /again").find("200 OK") != std::string::npos);
  }
  raw_socket head(echo.port->port());
  head.send("HEAD /h HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
  const std::string answer = head.read();
  CHECK(status_of(answer) == 200);
  CHECK(answer.substr(answer.size() - 4) == "\r\n\r\n");
}

TEST_CASE("a handler that drops its request, throws, or never answers costs only that request") {
  gateway::options o;
  o.reply_within = 100ms;
  echo_port echo(o);
  const auto dropped = http_call(echo.server(), "GET", "/dropped");
  REQUIRE(dropped);
  CHECK(dropped->status == 500);
  const auto thrown = http_call(echo.server(), "GET", "/throws");
  REQUIRE(thrown);
  CHECK(thrown->status == 500);
  const auto never = http_call(echo.server(), "GET", "/never");
  REQUIRE(never);
  CHECK(never->status == 504);
  check_alive(echo);
  // A reply that comes after the client and even after the gateway went is nobody's harm.
  const auto late = echo.kept.at(0);
  echo.port->stop();
  late({.body = "too late"});
}

TEST_CASE("clients in parallel get their own answers") {
  echo_port echo;
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&echo, &right, t] {
      for (int i = 0; i < 20; ++i) {
        const std::string body = std::to_string(t * 1000 + i);
        const auto reply = http_call(echo.server(), "POST", "/n", body);
        if (reply && reply->body == "POST /n - " + body + "  ") ++right;
      }
    });
  for (auto& t : threads) t.join();
  CHECK(right == 160);
}

TEST_CASE("an oversized body or header is refused with 413 or 431, and the server lives") {
  echo_port echo;
  const auto body =
      http_call(echo.server(), "POST", "/p", std::string(limits::http_body_bytes_max + 1, ' '));
  if (!body) FAIL(body.err().message);
  CHECK(body->status == 413);
  raw_socket chunked(echo.port->port());
  chunked.send(
      "POST /p HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 3; ++i) chunked.send("100000\r\n" + std::string(1 << 20, 'x') + "\r\n");
  CHECK(status_of(chunked.read()) == 413);
  CHECK(raw_status(echo.port->port(), "GET / HTTP/1.1\r\nHost: localhost\r\nX: " +
                                          std::string(limits::http_header_bytes_max, 'x') +
                                          "\r\n\r\n") == 431);
  CHECK(echo.requests == 0);
  check_alive(echo);
}

TEST_CASE("garbage bytes are answered with 400 or an end, and the server lives") {
  echo_port echo;
  CHECK(raw_status(echo.port->port(), "\x16\x03\x01\x02garbage\r\n\r\n") == 400);
  CHECK(raw_status(echo.port->port(), "GET\r\n\r\n") == 400);
  CHECK(raw_status(echo.port->port(), "GET / HTTP/9.9\r\n\r\n") == 400);
  CHECK(raw_status(echo.port->port(), "GET /%zz HTTP/1.1\r\nHost: localhost\r\n\r\n") == 400);
  std::uint64_t state = 12345;
  for (int round = 0; round < 50; ++round) {
    std::string noise;
    for (int i = 0; i < 300; ++i) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      noise.push_back(static_cast<char>(state >> 56));
    }
    raw_socket socket(echo.port->port());
    socket.send(noise);
    ::shutdown(socket.fd(), SHUT_WR);
    socket.read();
  }
  CHECK(echo.requests == 0);
  check_alive(echo);
}

TEST_CASE("without TLS only JSON bodies, loopback hosts and loopback origins pass") {
  echo_port echo;
  const auto ask = [&echo](const std::string& method, const std::string& headers) {
    return raw_status(echo.port->port(), method + " /x HTTP/1.1\r\n" + headers +
                                             "Content-Length: 2\r\nConnection: close\r\n\r\n{}");
  };
  const std::string json = "Content-Type: application/json\r\n";
  CHECK(ask("POST", "Host: localhost:1\r\n" + json) == 200);
  CHECK(ask("POST", "Host: [::1]:1\r\nContent-Type: Application/JSON; charset=utf-8\r\n") == 200);
  CHECK(ask("POST", "Host: localhost\r\nContent-Type: text/plain\r\n") == 415);
  CHECK(ask("POST", "Host: localhost\r\n") == 415);
  CHECK(ask("DELETE", "Host: localhost\r\n") == 415);
  CHECK(ask("POST", "Host: evil.example\r\n" + json) == 421);
  CHECK(ask("POST", "Host: localhost.evil.example\r\n" + json) == 421);
  CHECK(ask("POST", json) == 421);
  CHECK(ask("POST", "Host: localhost\r\nOrigin: http://evil.example\r\n" + json) == 403);
  CHECK(ask("POST", "Host: localhost\r\nOrigin: null\r\n" + json) == 403);
  CHECK(ask("GET", "Host: localhost\r\nOrigin: http://localhost.evil.example\r\n") == 403);
  CHECK(ask("POST", "Host: localhost\r\nOrigin: http://localhost:3000\r\n" + json) == 200);
  CHECK(ask("OPTIONS", "Host: localhost\r\n") == 405);
  CHECK(raw_status(echo.port->port(), upgrade_request("Origin: http://localhost\r\n")) == 403);
  CHECK(raw_status(echo.port->port(), "GET /control HTTP/1.1\r\nHost: localhost\r\n\r\n") == 426);
}

TEST_CASE("a client that dribbles its request is cut off, others are served meanwhile") {
  gateway::options o;
  o.request_within = 300ms;
  echo_port echo(o);
  raw_socket slow(echo.port->port());
  const auto begin = std::chrono::steady_clock::now();
  std::thread dribble([&slow] {
    for (int i = 0; i < 30; ++i) {
      slow.send("G");
      std::this_thread::sleep_for(50ms);
    }
  });
  check_alive(echo);
  slow.read();  // ends when the gateway hangs up
  CHECK(std::chrono::steady_clock::now() - begin < 4s);
  dribble.join();
  CHECK(wait_until([&echo] { return echo.port->connection_count() == 0; }));
}

TEST_CASE("more connections than allowed are refused, and the place is free again after") {
  gateway::options o;
  o.connection_count_max = 4;
  echo_port echo(o);
  {
    std::vector<std::unique_ptr<raw_socket>> crowd;
    for (int i = 0; i < 4; ++i) crowd.push_back(std::make_unique<raw_socket>(echo.port->port()));
    REQUIRE(wait_until([&echo] { return echo.port->connection_count() == 4; }));
    CHECK_FALSE(http_call(echo.server(), "GET", "/"));
  }
  REQUIRE(wait_until([&echo] { return echo.port->connection_count() == 0; }));
  check_alive(echo);
}

TEST_CASE("ports that would be open to strangers, taken, or senseless are refused with the fix") {
  const auto start = [](gateway::options o) { return gateway::start(o, {}); };
  gateway::options wide;
  wide.host = "0.0.0.0";
  const auto refused = start(wide);
  REQUIRE_FALSE(refused);
  CHECK(refused.err().code == errc::usage);
  CHECK(refused.err().message.find("--insecure") != std::string::npos);
  wide.insecure = true;
  CHECK(start(wide));

  echo_port echo;
  gateway::options taken;
  taken.port = echo.port->port();
  const auto conflict = start(taken);
  REQUIRE_FALSE(conflict);
  CHECK(conflict.err().code == errc::conflict);

  gateway::options token;
  token.token = "secret";
  CHECK_FALSE(start(token));
  gateway::options nowhere;
  nowhere.host = "no such host";
  CHECK_FALSE(start(nowhere));
}

TEST_CASE("the HTTP client tells a refused connection, silence and a stranger apart") {
  std::uint16_t free_port = 0;
  {
    echo_port gone;
    free_port = gone.port->port();
  }
  const auto refused = http_call({.host = "127.0.0.1", .port = free_port}, "GET", "/");
  REQUIRE_FALSE(refused);
  CHECK(refused.err().code == errc::unreachable);
  echo_port echo;
  const auto slow = http_call(echo.server(), "GET", "/never", {}, 100ms);
  REQUIRE_FALSE(slow);
  CHECK(slow.err().code == errc::timed_out);
  const auto unknown = http_call({.host = "no-such-host.invalid", .port = 1}, "GET", "/", {}, 5s);
  REQUIRE_FALSE(unknown);
  CHECK(http_call(echo.server(), "GET", "no slash").err().code == errc::usage);
  CHECK(percent_encode("a b/\xC3\xA9~") == "a%20b%2F%C3%A9~");
}

// ---- the control channel
// ------------------------------------------------------------------------------

TEST_CASE("messages of 200 KB go both ways, in order") {
  echo_port echo;
  listener worker({.port = echo.port->port()});
  REQUIRE(wait_until([&worker] { return worker.client->is_open(); }));
  for (int i = 0; i < 20; ++i)
    CHECK(worker.client->send(std::to_string(i) + std::string(200'000, 'x')));
  REQUIRE(wait_until([&worker] { return worker.heard().size() == 20; }));
  const auto heard = worker.heard();
  for (int i = 0; i < 20; ++i)
    CHECK(heard[static_cast<std::size_t>(i)] ==
          "echo " + std::to_string(i) + std::string(200'000, 'x'));
  worker.client->stop();
  REQUIRE(wait_until([&echo] { return echo.closed_count() == 1; }));
  CHECK(echo.closed_why(0).find("closed by the peer") != std::string::npos);
  CHECK_FALSE(echo.port->send(echo.opened_id(0), "into the void"));
}

TEST_CASE("what was queued before a close arrives before it, and the code with it") {
  echo_port echo;
  listener worker({.port = echo.port->port()});
  REQUIRE(wait_until([&echo] { return echo.open_count() == 1; }));
  for (int i = 0; i < 50; ++i) echo.port->send(echo.opened_id(0), std::string(10'000, 'y'));
  echo.port->close(echo.opened_id(0), 1008, "enough");
  REQUIRE(wait_until([&worker] { return worker.closed().size() == 1; }));
  CHECK(worker.heard().size() == 50);
  CHECK(worker.closed()[0] == "closed by the coordinator: 1008 enough");
}

TEST_CASE("a client connects again after the coordinator was away, under a new connection id") {
  auto echo = std::make_unique<echo_port>();
  const std::uint16_t port = echo->port->port();
  listener worker({.port = port});
  REQUIRE(wait_until([&worker] { return worker.client->is_open(); }));
  REQUIRE(wait_until([&echo] { return echo->open_count() == 1; }));
  echo.reset();
  REQUIRE(wait_until([&worker] { return !worker.client->is_open(); }));
  CHECK_FALSE(worker.client->send("lost"));
  std::this_thread::sleep_for(100ms);
  gateway::options o;
  o.port = port;
  echo_port again(o);
  REQUIRE(wait_until([&worker] { return worker.client->is_open(); }));
  CHECK(worker.client->send("hello"));
  REQUIRE(wait_until([&worker] { return worker.heard().size() == 1; }));
  CHECK(worker.opens == 2);
  worker.client->reconnect("for the test");
  REQUIRE(wait_until([&again] { return again.open_count() == 2; }));
  CHECK(again.opened_id(0) != again.opened_id(1));
}

TEST_CASE("beats tick on, connected or not") {
  listener worker({.port = 1});  // nobody is there
  std::atomic<int> ticks{0};
  worker.client->every(10ms, [&ticks] { ++ticks; });
  CHECK(wait_until([&ticks] { return ticks >= 10; }));
  worker.client->stop();
  const int before = ticks;
  std::this_thread::sleep_for(50ms);
  CHECK(ticks == before);
}

TEST_CASE("garbage frames and oversized messages close that channel only") {
  gateway::options o;
  o.message_bytes_max = 100'000;
  echo_port echo(o);
  listener healthy({.port = echo.port->port()});
  REQUIRE(wait_until([&healthy] { return healthy.client->is_open(); }));

  // RFC 6455: 0x81 = final text frame; second byte 0x80 | length = masked.
  const std::string mask(4, '\0');
  const std::vector<std::string> bad = {
      std::string("\xff\xff\xff\xff\xff\xff"),                             // reserved bits
      std::string("\x81\x05hello", 7),                                     // not masked
      std::string("\x81\xff\x00\x00\x00\x00\x40\x00\x00\x00", 10) + mask,  // 1 GiB announced
      std::string("\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff", 10) + mask,  // 2^64-1
      std::string("\x81\x82", 2) + mask + "\xff\xfe",                      // no UTF-8
      std::string("\x82\x82", 2) + mask + "ok",                            // binary
      std::string("\x80\x82", 2) + mask + "ok",                            // continues nothing
  };
  for (std::size_t i = 0; i < bad.size(); ++i) {
    CAPTURE(i);
    raw_socket socket(echo.port->port());
    socket.send(upgrade_request());
    REQUIRE(socket.read("\r\n\r\n").find("101") != std::string::npos);
    socket.send(bad[i]);
    ::shutdown(socket.fd(), SHUT_WR);
    socket.read();
    CHECK(wait_until([&echo, i] { return echo.closed_count() == i + 1; }));
  }
  listener fat({.port = echo.port->port()});
  REQUIRE(wait_until([&fat] { return fat.client->is_open(); }));
  CHECK(fat.client->send(std::string(100'001, 'x')));
  REQUIRE(wait_until([&fat] { return !fat.closed().empty(); }));
  CAPTURE(fat.closed()[0]);
  CHECK(fat.closed()[0].find("1009") != std::string::npos);  // RFC 6455 7.4.1: message too big
  CHECK(healthy.client->is_open());
  healthy.client->send("still here");
  CHECK(wait_until([&healthy] { return healthy.heard().size() == 1; }));
}

TEST_CASE("a consumer too far behind is closed, the others are not") {
  gateway::options o;
  o.queue_bytes_max = 4u << 20;
  echo_port echo(o);
  raw_socket lazy(echo.port->port());
  lazy.send(upgrade_request());
  REQUIRE(lazy.read("\r\n\r\n").find("101") != std::string::npos);
  REQUIRE(wait_until([&echo] { return echo.open_count() == 1; }));
  listener healthy({.port = echo.port->port()});
  REQUIRE(wait_until([&healthy] { return healthy.client->is_open(); }));
  bool took = true;
  for (int i = 0; i < 2000 && took; ++i)
    took = echo.port->send(echo.opened_id(0), std::string(100'000, 'z'));
  CHECK_FALSE(took);
  REQUIRE(wait_until([&echo] { return echo.closed_count() == 1; }));
  CHECK(echo.closed_why(0).find("too far behind") != std::string::npos);
  CHECK(healthy.client->is_open());
}

TEST_CASE("a silent peer is noticed, a quiet one that answers pings is kept") {
  gateway::options o;
  o.control_idle = 300ms;
  echo_port echo(o);
  listener quiet({.port = echo.port->port()});
  REQUIRE(wait_until([&quiet] { return quiet.client->is_open(); }));
  raw_socket silent(echo.port->port());
  silent.send(upgrade_request());
  REQUIRE(silent.read("\r\n\r\n").find("101") != std::string::npos);
  REQUIRE(wait_until([&echo] { return echo.closed_count() == 1; }));
  CHECK(echo.closed_why(0) == "no sign of life for 300 ms");
  std::this_thread::sleep_for(700ms);
  CHECK(quiet.client->is_open());
  CHECK(quiet.opens == 1);
}

TEST_CASE("a client reconnects when the coordinator is frozen") {
  // A listening socket that never accepts is what SIGSTOP looks like from outside.
  const int frozen = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::bind(frozen, reinterpret_cast<sockaddr*>(&at), sizeof(at)) == 0);
  REQUIRE(::listen(frozen, 8) == 0);
  socklen_t length = sizeof(at);
  ::getsockname(frozen, reinterpret_cast<sockaddr*>(&at), &length);
  const std::uint16_t port = ntohs(at.sin_port);
  listener worker({.port = port, .connect_within = 100ms});
  std::this_thread::sleep_for(300ms);
  CHECK_FALSE(worker.client->is_open());
  CHECK(worker.refused().empty());
  ::close(frozen);
  gateway::options o;
  o.port = port;
  echo_port echo(o);
  CHECK(wait_until([&worker] { return worker.client->is_open(); }));
}

// ---- TLS
// ----------------------------------------------------------------------------------------------

TEST_CASE("TLS: roles, tokens and wrong certificates") {
  temp_folder ours, strangers;
  REQUIRE(make_ca(ours.path));
  REQUIRE(make_ca(strangers.path));
  const auto cert = [&ours](tls_role what, const char* name, int days = 365) {
    const auto made = make_certificate(ours.path, {.what = what, .name = name, .days = days});
    REQUIRE(made);
    return *made;
  };
  const tls_files server = cert(tls_role::coordinator, "head");
  const tls_files worker = cert(tls_role::worker, "w1");
  const tls_files old_worker = cert(tls_role::worker, "w-old", -1);
  const tls_files person = cert(tls_role::operator_, "ann");
  const tls_files watcher = cert(tls_role::reader, "bob");
  const auto foreign =
      make_certificate(strangers.path, {.what = tls_role::operator_, .name = "mallory"});
  REQUIRE(foreign);

  const std::filesystem::path log = ours.path / "log";
  configure_log(level::info, log.string());
  gateway::options o;
  o.tls = server;
  o.token = "s3cret";
  echo_port echo(o);
  const auto ask = [&echo](const tls_files& who, const char* method = "GET",
                           const std::string& token = {}) {
    return http_call({.host = "127.0.0.1", .port = echo.port->port(), .tls = who, .token = token},
                     method, "/x");
  };
  const auto status = [&ask](const tls_files& who, const char* method = "GET",
                             const std::string& token = {}) {
    const auto reply = ask(who, method, token);
    if (!reply) FAIL(reply.err().message);
    return reply->status;
  };

  // One healthy channel stands through everything below.
  listener healthy({.port = echo.port->port(), .tls = worker});
  REQUIRE(wait_until([&healthy] { return healthy.client->is_open(); }));
  REQUIRE(wait_until([&echo] { return echo.open_count() == 1; }));
  CHECK(echo.peers[0].name == "w1");
  CHECK(echo.peers[0].what == tls_role::worker);

  const auto reply = ask(person, "POST");
  if (!reply) FAIL(reply.err().message);
  CHECK(reply->body == "POST /x -  ann operator");
  CHECK(status(watcher) == 200);
  CHECK(status(watcher, "POST") == 403);
  CHECK(status(worker) == 403);
  CHECK(status(server) == 403);

  tls_files nothing;
  nothing.ca = server.ca;
  CHECK(status(nothing) == 401);
  CHECK(status(nothing, "GET", "s3cret") == 200);
  CHECK(status(nothing, "POST", "s3cret") == 403);
  CHECK(status(nothing, "GET", "s3creT") == 401);
  CHECK(status(nothing, "GET", "s3cret2") == 401);

  tls_files mallory = *foreign;
  mallory.ca = server.ca;  // trusts us; we don't trust him
  const auto refused = ask(mallory);
  REQUIRE_FALSE(refused);
  const auto expired = ask(old_worker);
  REQUIRE_FALSE(expired);
  const auto distrusts = ask(*foreign);
  REQUIRE_FALSE(distrusts);
  CHECK(distrusts.err().code == errc::unauthorised);
  CHECK(distrusts.err().message.find("another CA") != std::string::npos);
  CHECK_FALSE(http_call(echo.server(), "GET", "/x"));  // plain HTTP on a TLS port
  {
    raw_socket garbage(echo.port->port());
    garbage.send(std::string(2000, '\x5a'));
    garbage.read();
  }

  SUBCASE("an expired, foreign or missing certificate, or another role, opens no channel") {
    listener old({.port = echo.port->port(), .tls = old_worker});
    CHECK(wait_until([&old] { return !old.refused().empty(); }));
    listener reader({.port = echo.port->port(), .tls = watcher});
    CHECK(wait_until([&reader] { return !reader.refused().empty(); }));
    listener ann({.port = echo.port->port(), .tls = person});
    CHECK(wait_until([&ann] { return !ann.refused().empty(); }));
    listener bare({.port = echo.port->port(), .tls = nothing});
    CHECK(wait_until([&bare] { return !bare.refused().empty(); }));
    CHECK(bare.refused()[0].find("401") != std::string::npos);
    listener stranger({.port = echo.port->port(), .tls = mallory});
    CHECK(wait_until([&stranger] { return !stranger.refused().empty(); }));
    CHECK(echo.open_count() == 1);
  }
  SUBCASE("a server whose certificate has another role or host is refused by the worker") {
    gateway::options fake = o;
    fake.tls = cert(tls_role::worker, "fake");
    echo_port impostor(fake);
    listener wary({.port = impostor.port->port(), .tls = worker});
    REQUIRE(wait_until([&wary] { return !wary.refused().empty(); }));
    CHECK(wary.refused()[0].find("expected coordinator") != std::string::npos);
    CHECK(impostor.open_count() == 0);
    listener elsewhere({.host = "127.0.0.2", .port = echo.port->port(), .tls = worker});
    // 127.0.0.2 reaches no listener on 127.0.0.1, so the name check is asked of a wider port.
    gateway::options wide = o;
    wide.host = "0.0.0.0";
    echo_port open(wide);
    listener other({.host = "127.0.0.2", .port = open.port->port(), .tls = worker});
    REQUIRE(wait_until([&other] { return !other.refused().empty(); }));
    CHECK(other.refused()[0].find("not for host 127.0.0.2") != std::string::npos);
  }

  CHECK(healthy.client->is_open());
  CHECK(healthy.opens == 1);
  healthy.client->send("undisturbed");
  CHECK(wait_until([&healthy] { return healthy.heard().size() == 1; }));
  CHECK(echo.port->refused_handshakes() >= 4);

  std::ifstream in(log);
  const std::string lines((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  CHECK(lines.find("event=tls_refused") != std::string::npos);
  CHECK(lines.find("reason=\"certificate expired (CN w-old)\"") != std::string::npos);
  CHECK(lines.find("reason=\"certificate of another CA (CN mallory)\"") != std::string::npos);
  CHECK(lines.find("reason=\"plain HTTP on a TLS port\"") != std::string::npos);
}
