#include "worker/peer_line.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <condition_variable>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "config/limits.hpp"
#include "config/log.hpp"
#include "tests/link_test_support.hpp"
#include "worker/link_asio.hpp"

using namespace stagecoach;
using namespace std::chrono_literals;
using steady = std::chrono::steady_clock;

namespace {

// Generous, as the box may be busy; what must be quick is compared with its own bound.
constexpr auto soon = 5s;

process_id process(int n) { return fmt::format("{:032x}", 0xabc000 + n); }

/// A worker's link server with what its line hears.
class talker {
 public:
  explicit talker(int n, tls_files tls = {}, std::uint16_t port = 0, int process_number = -1) {
    configure_log(level::error);
    link_server::options o;
    o.tls = std::move(tls);
    o.port = port;
    o.name = fmt::format("w{}", n);
    o.process = process(process_number < 0 ? n : process_number);
    auto started = link_server::start(o);
    REQUIRE_MESSAGE(started.has_value(), (started ? "" : started.err().message));
    server = *std::move(started);
    address = {o.name, o.process, "127.0.0.1", server->port()};
    server->line().listen(
        [this](const process_id& from, const std::string& name, std::string text) {
          const std::lock_guard lock(mutex_);
          heard_.push_back({from, name, std::move(text)});
          changed_.notify_all();
        },
        [this](const peer_address& to, peer_verdict verdict, const std::string& why) {
          const std::lock_guard lock(mutex_);
          given_up_.push_back({to.process, verdict, why});
          changed_.notify_all();
        });
  }
  ~talker() { server.reset(); }

  struct message {
    process_id from;
    std::string name, text;
  };
  struct loss {
    process_id to;
    peer_verdict verdict;
    std::string why;
  };

  std::vector<message> hear(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, soon, [&] { return heard_.size() >= count; });
    return heard_;
  }
  std::vector<loss> lose(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, soon, [&] { return given_up_.size() >= count; });
    return given_up_;
  }
  std::size_t heard_count() {
    const std::lock_guard lock(mutex_);
    return heard_.size();
  }

  struct answer {
    peer_verdict verdict;
    std::string why;
    std::chrono::milliseconds took;
  };
  answer ask(const peer_address& to, std::chrono::milliseconds within) {
    std::promise<answer> promise;
    const auto began = steady::now();
    server->line().ask_alive(to, within, [&](peer_verdict verdict, std::string why) {
      promise.set_value(
          {verdict, std::move(why),
           std::chrono::duration_cast<std::chrono::milliseconds>(steady::now() - began)});
    });
    return promise.get_future().get();
  }

  std::unique_ptr<link_server> server;
  peer_address address;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<message> heard_;
  std::vector<loss> given_up_;
};

/// Listens as a stopped process does: the kernel takes connections, nobody reads.
class frozen_listener {
 public:
  frozen_listener() : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(::bind(fd_, reinterpret_cast<sockaddr*>(&at), sizeof(at)) == 0);
    REQUIRE(::listen(fd_, 16) == 0);
    socklen_t size = sizeof(at);
    ::getsockname(fd_, reinterpret_cast<sockaddr*>(&at), &size);
    port = ntohs(at.sin_port);
  }
  ~frozen_listener() { ::close(fd_); }
  std::uint16_t port = 0;

 private:
  int fd_;
};

std::uint16_t closed_port() {
  frozen_listener once;
  return once.port;
}

auto line_header(std::uint64_t number, const std::string& text) {
  return encode(line_frame{line_kind::message, number, text.size(),
                           payload_checksum(std::as_bytes(std::span(text)))});
}

}  // namespace

TEST_CASE("peer line: messages of all sizes arrive once, in order, with their sender's name") {
  talker a(1), b(2), c(3);
  std::vector<std::string> sent;
  for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{70'000},
                           static_cast<std::size_t>(limits::control_message_bytes_max)})
    sent.push_back(std::string(size, static_cast<char>('a' + sent.size())));
  for (int i = 0; i < 200; ++i) sent.push_back(std::to_string(i));
  for (const std::string& text : sent) a.server->line().send(b.address, text);
  c.server->line().send(b.address, "from c");
  b.server->line().send(a.address, "back");
  std::vector<std::string> from_a;
  for (const auto& m : b.hear(sent.size() + 1)) {
    if (m.from == process(1)) {
      CHECK(m.name == "w1");
      from_a.push_back(m.text);
    } else {
      CHECK(m.from == process(3));
      CHECK(m.name == "w3");
      CHECK(m.text == "from c");
    }
  }
  CHECK(from_a == sent);
  REQUIRE(a.hear(1).size() == 1);
  CHECK(a.hear(1)[0].text == "back");
  CHECK(b.server->refused_connections() == 0);
}

TEST_CASE("peer line: a message waits for a process that breaks its connections, and comes once") {
  // The acceptor takes two frames, gives a receipt for the first alone and hangs up.
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof(at)) == 0);
  REQUIRE(::listen(fd, 16) == 0);
  socklen_t size = sizeof(at);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size);
  talker a(1);
  const peer_address to{"w2", process(2), "127.0.0.1", ntohs(at.sin_port)};
  a.server->line().send(to, "first");
  a.server->line().send(to, "second");
  const auto read_all = [](int peer, auto& bytes) {
    return ::recv(peer, std::data(bytes), std::size(bytes), MSG_WAITALL) ==
           static_cast<ssize_t>(std::size(bytes));
  };
  std::array<std::byte, line_greeting_bytes> greeting;
  std::array<std::byte, line_frame_bytes> header;
  std::array<std::uint64_t, 3> numbers{};
  std::array<std::string, 3> texts;
  std::size_t count = 0;
  for (const int frames : {2, 1}) {
    const int peer = ::accept(fd, nullptr, nullptr);
    REQUIRE(read_all(peer, greeting));
    const auto who = decode_line_greeting(greeting);
    REQUIRE(who);
    CHECK(who->from == process(1));
    CHECK(who->to == process(2));
    const auto welcome = encode(link_reply{});
    ::send(peer, welcome.data(), welcome.size(), MSG_NOSIGNAL);
    for (int i = 0; i < frames; ++i, ++count) {
      REQUIRE(read_all(peer, header));
      const auto frame = decode_line_frame(header);
      REQUIRE(frame);
      numbers[count] = frame->number;
      texts[count].resize(frame->length);
      REQUIRE(read_all(peer, texts[count]));
    }
    const auto receipt = encode(line_frame{line_kind::arrived, numbers[0]});
    if (frames == 2) ::send(peer, receipt.data(), receipt.size(), MSG_NOSIGNAL);
    ::shutdown(peer, SHUT_WR);
    std::this_thread::sleep_for(50ms);
    ::close(peer);
  }
  ::close(fd);
  CHECK(texts == std::array<std::string, 3>{"first", "second", "second"});
  CHECK(numbers[1] > numbers[0]);
  CHECK(numbers[2] == numbers[1]);
}

TEST_CASE("peer line: what comes twice is dropped, with a receipt") {
  talker b(2);
  for (const auto& numbers :
       {std::vector<std::uint64_t>{5, 6}, std::vector<std::uint64_t>{5, 6, 7}}) {
    raw_socket s(b.address.port);
    REQUIRE(s.send(encode(line_greeting{process(9), process(2), "w9"})));
    REQUIRE(s.reply()->verdict == link_verdict::welcome);
    for (const std::uint64_t number : numbers) {
      const std::string text = std::to_string(number);
      REQUIRE(s.send(line_header(number, text)));
      REQUIRE(s.send(text));
    }
    b.hear(numbers.back() - 4);
  }
  const auto heard = b.hear(3);
  REQUIRE(heard.size() == 3);
  CHECK(heard[0].text == "5");
  CHECK(heard[1].text == "6");
  CHECK(heard[2].text == "7");
}

TEST_CASE("peer line: alive, though links of a generation or a trainer may be busy") {
  talker a(1), b(2);
  const auto answer = a.ask(b.address, 2000ms);
  CHECK(answer.verdict == peer_verdict::alive);
  CHECK(answer.took < 1000ms);
  CHECK(b.server->refused_connections() == 0);
}

TEST_CASE("peer line: a refused port is gone, and what was queued for it is given up at once") {
  talker a(1);
  const peer_address dead{"w2", process(2), "127.0.0.1", closed_port()};
  const auto answer = a.ask(dead, 2000ms);
  CHECK(answer.verdict == peer_verdict::gone);
  CHECK(answer.why == "connection refused");
  CHECK(answer.took < 1000ms);
  a.server->line().send(dead, "x");
  const auto lost = a.lose(1);
  REQUIRE(lost.size() == 1);
  CHECK(lost[0].to == process(2));
  CHECK(lost[0].verdict == peer_verdict::gone);
}

TEST_CASE("peer line: another process on the port means that the one sought is gone") {
  talker a(1), later(2, {}, 0, 77);
  peer_address former = later.address;
  former.process = process(2);
  CHECK(a.ask(former, 2000ms).verdict == peer_verdict::gone);
  a.server->line().send(former, "x");
  const auto lost = a.lose(1);
  REQUIRE(lost.size() == 1);
  CHECK(lost[0].verdict == peer_verdict::gone);
  CHECK(lost[0].why == "another process answers there");
  CHECK(later.heard_count() == 0);
  CHECK(later.server->refused_connections() == 2);
}

TEST_CASE("peer line: a stopped process is silent, in time, and messages to it are given up") {
  talker a(1);
  frozen_listener frozen;
  const peer_address to{"w2", process(2), "127.0.0.1", frozen.port};
  const auto answer = a.ask(to, 300ms);
  CHECK(answer.verdict == peer_verdict::silent);
  CHECK(answer.took >= 290ms);
  CHECK(answer.took < 1500ms);
  a.server->line().send(to, "x");
  const auto lost = a.lose(1);
  REQUIRE(lost.size() == 1);
  CHECK(lost[0].verdict == peer_verdict::silent);
}

TEST_CASE("peer line: an address without a process, or a text over the limit, harms nobody") {
  talker a(1), b(2);
  peer_address odd = b.address;
  odd.process = "no process";
  CHECK(a.ask(odd, 300ms).verdict == peer_verdict::silent);
  a.server->line().send(odd, "x");
  a.server->line().send(b.address, std::string(limits::control_message_bytes_max + 1, 'x'));
  a.server->line().send(b.address, "after");
  const auto lost = a.lose(2);
  REQUIRE(lost.size() == 2);
  CHECK(lost[1].verdict == peer_verdict::alive);
  REQUIRE(b.hear(1).size() == 1);
  CHECK(b.hear(1)[0].text == "after");
}

TEST_CASE("peer line: broken greetings and frames are refused, counted, and disturb nobody") {
  talker a(1), b(2);
  const auto good = encode(line_greeting{process(9), process(2), "w9"});
  std::uint64_t refused = 1;
  SUBCASE("a changed greeting") {
    auto bytes = good;
    bytes[40] ^= std::byte{1};
    raw_socket s(b.address.port);
    s.send(bytes);
    CHECK(s.closes());
  }
  SUBCASE("a greeting with an empty name") {
    raw_socket s(b.address.port);
    s.send(encode(line_greeting{process(9), process(2), ""}));
    CHECK(s.closes());
  }
  SUBCASE("a greeting to another process, with a word why") {
    raw_socket s(b.address.port);
    s.send(encode(line_greeting{process(9), process(3), "w9"}));
    const auto reply = s.reply();
    REQUIRE(reply);
    CHECK(reply->verdict == link_verdict::wrong_process);
    CHECK(s.closes());
  }
  SUBCASE("garbage, a header over the limit, a receipt, a text that differs from its checksum") {
    const auto huge = encode(line_frame{
        line_kind::message, 1, static_cast<std::uint64_t>(limits::control_message_bytes_max) + 1});
    const auto receipt = encode(line_frame{line_kind::arrived, 1});
    const auto header = line_header(1, "text");
    const auto bytes_of = [](const auto& bytes, const std::string& more = "") {
      return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()) + more;
    };
    for (const std::string& bytes :
         {bytes_of(pattern(400, 3)), bytes_of(huge), bytes_of(receipt), bytes_of(header, "tixt")}) {
      raw_socket s(b.address.port);
      REQUIRE(s.send(good));
      REQUIRE(s.reply()->verdict == link_verdict::welcome);
      REQUIRE(s.send(bytes));
      CHECK(s.closes());
    }
    refused = 4;
  }
  CHECK(b.server->refused_connections() == refused);
  a.server->line().send(b.address, "hello");
  REQUIRE(b.hear(1).size() == 1);
  CHECK(b.hear(1)[0].text == "hello");
}

TEST_CASE("peer line over TLS: names come from certificates, and others stay out") {
  certificate_maker maker;
  auto house = maker.make_authority("house");
  auto other = maker.make_authority("other");
  talker a(1, maker.issue(*house, "w1", "worker")), b(2, maker.issue(*house, "w2", "worker"));
  a.server->line().send(b.address, "hello");
  REQUIRE(b.hear(1).size() == 1);
  CHECK(b.hear(1)[0].name == "w1");
  CHECK(a.ask(b.address, 3000ms).verdict == peer_verdict::alive);

  SUBCASE("the name sought is not the one in the certificate: that one is gone") {
    peer_address wrong = b.address;
    wrong.name = "w7";
    CHECK(a.ask(wrong, 3000ms).verdict == peer_verdict::gone);
  }
  SUBCASE("a worker that says another name than its certificate") {
    talker liar(5, maker.issue(*house, "w6", "worker"));
    CHECK(liar.ask(b.address, 600ms).verdict == peer_verdict::silent);
    CHECK(b.server->refused_connections() >= 1);
  }
  SUBCASE("an operator's certificate, another authority's, none") {
    talker operator_(3, maker.issue(*house, "w3", "operator"));
    talker stranger(4, maker.issue(*other, "w4", "worker"));
    talker plain(6);
    for (talker* t : {&operator_, &stranger, &plain}) {
      t->server->line().send(b.address, "let me in");
      CHECK(t->ask(b.address, 600ms).verdict == peer_verdict::silent);
      CHECK(t->lose(1).size() == 1);
    }
    CHECK(b.heard_count() == 1);
  }
}

TEST_CASE("peer line: many ask and talk at once, and the servers go while they do") {
  std::vector<std::unique_ptr<talker>> all;
  for (int i = 0; i < 6; ++i) all.push_back(std::make_unique<talker>(i));
  std::vector<std::promise<peer_verdict>> answers(30);
  std::size_t next = 0;
  for (auto& from : all)
    for (auto& to : all) {
      if (from == to) continue;
      from->server->line().send(to->address, "x");
      from->server->line().ask_alive(
          to->address, 5000ms,
          [&p = answers[next++]](peer_verdict v, const std::string&) { p.set_value(v); });
    }
  for (auto& p : answers) CHECK(p.get_future().get() == peer_verdict::alive);
  for (auto& t : all) CHECK(t->hear(5).size() == 5);
  for (auto& from : all)
    for (auto& to : all) from->server->line().send(to->address, std::string(1 << 20, 'x'));
  all.clear();
}
