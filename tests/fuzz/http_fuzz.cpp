// Any bytes at the coordinator's port, through a real socket: as an HTTP request, or as frames
// behind a good WebSocket upgrade. What holds: the port answers or hangs up within its deadlines,
// calls nothing with a request that breaks its rules, and serves the next client.
//
// With libFuzzer define STAGECOACH_LIBFUZZER; without, main() mutates seeds: http_fuzz [count]
// [seed].
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "config/log.hpp"
#include "coordinator/gateway.hpp"
#include "coordinator/gateway_rules.hpp"

using namespace stagecoach;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

gateway& port() {
  static const std::unique_ptr<gateway> started = [] {
    configure_log(level::error);
    gateway::callbacks c;
    c.on_request = [](http_request request, http_reply_function reply) {
      require(!request.path.empty() && request.path.front() == '/', "a path begins with /");
      require(request.body.size() <= 4096, "a body is within its bound");
      const bool reads = request.method == "GET";
      require(reads || request.content_type == "application/json", "only JSON writes");
      for (const unsigned char c : request.path) require(c >= 0x20 && c != 0x7f, "a path is plain");
      reply({.body = "{}"});
    };
    static gateway* self = nullptr;
    c.on_message = [](connection_id id, std::string text) {
      require(text.size() <= 2048, "a message is within its bound");
      self->send(id, std::move(text));
    };
    gateway::options o;
    o.header_bytes_max = 2048;
    o.body_bytes_max = 4096;
    o.message_bytes_max = 2048;
    auto made = gateway::start(o, std::move(c));
    require(made.has_value(), "the port opens");
    self = made->get();
    return std::move(*made);
  }();
  return *started;
}

/// Sends, says that nothing follows, and reads to the end; false if no end came within 5 s.
bool talk(const std::string& first, const std::string& then, std::string& answer) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(port().port());
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  require(fd >= 0 && ::connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) == 0,
          "the port takes connections");
  const timeval patience{5, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  // Our end closes by reset, so that a million inputs leave no million sockets in TIME_WAIT.
  const linger at_once{1, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
  const auto send = [fd](const std::string& bytes) {
    std::size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t n = ::send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
      if (n <= 0) return;
      done += static_cast<std::size_t>(n);
    }
  };
  char part[4096];
  ssize_t n = 0;
  send(first);
  if (!then.empty()) {
    while (answer.find("\r\n\r\n") == std::string::npos &&
           (n = ::recv(fd, part, sizeof(part), 0)) > 0)
      answer.append(part, static_cast<std::size_t>(n));
    send(then);
  }
  ::shutdown(fd, SHUT_WR);
  while ((n = ::recv(fd, part, sizeof(part), 0)) > 0)
    answer.append(part, static_cast<std::size_t>(n));
  const bool ended = n == 0 || errno != EAGAIN;
  ::close(fd);
  return ended;
}

const std::string upgrade =
    "GET /control HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  (void)parse_target(bytes);
  (void)host_name_of(bytes);
  std::string answer;
  if (data[0] % 2 == 0) {
    require(talk(bytes, "", answer), "a connection ends after garbage");
  } else {
    require(talk(upgrade, bytes.empty() ? "x" : bytes, answer), "a channel ends after garbage");
    require(answer.find("101") != std::string::npos, "a good upgrade is taken");
  }
  static unsigned inputs = 0;
  if (++inputs % 64 == 0) {
    std::string alive;
    talk("GET /alive HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", "", alive);
    require(alive.rfind("HTTP/1.1 200", 0) == 0, "the port serves the next client");
  }
  return 0;
}

#ifndef STAGECOACH_LIBFUZZER
int main(int count, char** arguments) {
  const long inputs = count > 1 ? std::atol(arguments[1]) : 5000;
  std::uint64_t state = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  const auto below = [&state](std::size_t bound) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<std::size_t>(state >> 33) % bound;
  };
  const std::string mask("\0\0\0\0", 4);
  const std::string seeds[] = {
      "0GET /api/v1/jobs?since=3&q=%20 HTTP/1.1\r\nHost: localhost:7070\r\nAccept: */*\r\n\r\n",
      "0POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
      "Content-Length: 7\r\n\r\n{\"a\":1}",
      "0POST /x HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nExpect: "
      "100-continue\r\n"
      "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: x\r\n\r\n",
      "0" + upgrade,
      "0HEAD / HTTP/1.0\r\nHost: localhost\r\nOrigin: http://localhost\r\nConnection: "
      "keep-alive\r\n\r\n"
      "GET /b HTTP/1.1\r\nHost: localhost\r\n\r\n",
      "1" + std::string("\x81\x85", 2) + mask + "hello",
      "1" + std::string("\x01\x82", 2) + mask + "he" + std::string("\x80\x83", 2) + mask + "llo",
      "1" + std::string("\x89\x80", 2) + mask + std::string("\x88\x82\0\0\0\0\x03\xe8", 8),
      "1" + std::string("\x81\xfe\x01\x00", 4) + mask + std::string(256, 'x'),
      "1" + std::string("\x81\xff\0\0\0\0\0\0\x01\x00", 10) + mask + std::string(256, 'y'),
  };
  for (long i = 0; i < inputs; ++i) {
    std::string bytes = seeds[below(std::size(seeds))];
    for (std::size_t n = below(5); n > 0 && bytes.size() > 1; --n) {
      const std::size_t at = 1 + below(bytes.size() - 1);
      switch (below(6)) {
        case 0:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
          break;
        case 1:
          bytes[at] = static_cast<char>(below(256));
          break;
        case 2:
          bytes.resize(at);
          break;
        case 3:
          bytes.insert(at, bytes.substr(at, below(40)));
          break;
        case 4:
          bytes.erase(at, below(8) + 1);
          break;
        case 5:
          bytes.insert(at, std::string(below(3000), static_cast<char>(below(256))));
          break;
      }
    }
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  }
  std::printf("%ld inputs\n", inputs);
}
#endif
