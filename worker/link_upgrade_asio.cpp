#include "worker/link_upgrade_asio.hpp"

#include <fcntl.h>
#include <openssl/rand.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/steady_timer.hpp>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "config/log.hpp"
#include "worker/connection_asio.hpp"

namespace stagecoach {

namespace asio = boost::asio;
using asio::local::stream_protocol;
using boost::system::error_code;
using steady = std::chrono::steady_clock;

namespace {

constexpr std::size_t visitors_max = 64;
constexpr std::chrono::milliseconds visit_within{2000};

std::array<std::byte, 16> random_bytes() {
  std::array<std::byte, 16> bytes;
  invariant(RAND_bytes(reinterpret_cast<unsigned char*>(bytes.data()), bytes.size()) == 1,
            "the system gives random bytes");
  return bytes;
}

stream_protocol::endpoint endpoint_of(const std::array<std::byte, 16>& name) {
  std::string path(1, '\0');  // abstract
  path += "stagecoach-";
  for (const std::byte b : name) path += fmt::format("{:02x}", static_cast<unsigned>(b));
  return stream_protocol::endpoint(path);
}

/// The process at the other end runs under our user.
bool is_same_user(int socket) {
  ucred who{};
  socklen_t bytes = sizeof(who);
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &who, &bytes) == 0 && who.uid == ::geteuid();
}

/// A nonce and room for one descriptor, as the system calls want them; it points into itself.
struct passing {
  explicit passing(std::array<std::byte, 16>& nonce) : part{nonce.data(), nonce.size()} {
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
  }
  passing(const passing&) = delete;

  iovec part;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
};

bool send_segment(int socket, std::array<std::byte, 16> nonce, int segment) {
  passing out(nonce);
  cmsghdr* head = CMSG_FIRSTHDR(&out.message);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(head), &segment, sizeof(int));
  return ::sendmsg(socket, &out.message, MSG_NOSIGNAL) == static_cast<ssize_t>(nonce.size());
}

struct segment_message {
  std::array<std::byte, 16> nonce{};
  descriptor segment;
};

/// Such a message is small enough to come in one piece; anything else is none of ours. The control
/// buffer has room for one descriptor, so the kernel hands over no more.
result<segment_message> receive_segment(int socket) {
  segment_message got;
  passing in(got.nonce);
  const ssize_t count = ::recvmsg(socket, &in.message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  const cmsghdr* head = count < 0 ? nullptr : CMSG_FIRSTHDR(&in.message);
  if (head != nullptr && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
      head->cmsg_len == CMSG_LEN(sizeof(int))) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(head), sizeof(int));
    got.segment = descriptor(fd);
  }
  if (count == 0) return make_error(errc::unreachable, "the peer closed its Unix socket");
  if (count != static_cast<ssize_t>(got.nonce.size()) || got.segment.fd() < 0 ||
      (in.message.msg_flags & MSG_CTRUNC) != 0)
    return make_error(errc::bad_input, "{} bytes without one descriptor", count);
  return got;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------
// The acceptor's side

result<void> memory_desk::listen() {
  name_ = random_bytes();
  error_code ec;
  acceptor_.open(stream_protocol(), ec);
  if (!ec) ::fcntl(acceptor_.native_handle(), F_SETFD, FD_CLOEXEC);
  if (!ec) acceptor_.bind(endpoint_of(name_), ec);
  if (!ec) acceptor_.listen(asio::socket_base::max_listen_connections, ec);
  if (ec) {
    shut_down();
    return make_error(errc::io, "can't listen on a Unix socket: {}", reason_of(ec));
  }
  accept();
  return ok();
}

void memory_desk::shut_down() {
  error_code ignored;
  acceptor_.close(ignored);
  for (const auto& v : visitors_) v->s.close(ignored);
  visitors_.clear();
  pending_.clear();
}

void memory_desk::tick(steady::time_point now) {
  error_code ignored;
  while (!visitors_.empty() && now - visitors_.front()->since > visit_within) {
    visitors_.front()->s.close(ignored);
    visitors_.pop_front();
  }
}

memory_offer memory_desk::offer(std::size_t payload_bytes) {
  const memory_offer made{name_, random_bytes()};
  pending_[made.nonce].payload_bytes = payload_bytes;
  return made;
}

std::optional<shm_pair> memory_desk::take(const memory_offer& offer) {
  const auto found = pending_.find(offer.nonce);
  if (found == pending_.end()) return {};
  std::optional<shm_pair> memory = std::move(found->second.memory);
  pending_.erase(found);
  return memory;
}

void memory_desk::accept() {
  auto v = std::make_shared<visitor>(io_);
  acceptor_.async_accept(v->s, [this, v](error_code ec) {
    if (!acceptor_.is_open() || ec == asio::error::operation_aborted) return;
    if (ec) {
      // Out of descriptors, most likely. Links are TCP from now on, which is as good.
      log_event(level::warn, "link_memory_closed", {{"reason", reason_of(ec)}});
      return shut_down();
    }
    ::fcntl(v->s.native_handle(), F_SETFD, FD_CLOEXEC);
    if (!is_same_user(v->s.native_handle())) {
      log_event(level::warn, "link_memory_refused", {{"reason", "it is of another user"}});
    } else {
      if (visitors_.size() >= visitors_max) {
        error_code ignored;
        visitors_.front()->s.close(ignored);
        visitors_.pop_front();
      }
      v->since = steady::now();
      visitors_.push_back(v);
      v->s.async_wait(socket::wait_read, [this, v](error_code ec) {
        if (ec || !v->s.is_open()) return;
        serve(v);
        visitors_.remove(v);
        error_code ignored;
        v->s.close(ignored);
      });
    }
    accept();
  });
}

/// What the visitor says decides whether it gets our segment.
void memory_desk::serve(const std::shared_ptr<visitor>& v) {
  const auto refuse = [](const std::string& why) {
    log_event(level::warn, "link_memory_refused", {{"reason", why}});
  };
  auto said = receive_segment(v->s.native_handle());
  if (!said) return refuse(said.err().message);
  const auto found = pending_.find(said->nonce);
  if (found == pending_.end() || found->second.memory) return refuse("no link waits for it");
  auto theirs = shm_segment::map(said->segment);
  if (!theirs) return refuse(theirs.err().message);
  auto ours = shm_segment::create(found->second.payload_bytes);
  if (!ours) return refuse(ours.err().message);
  if (!send_segment(v->s.native_handle(), said->nonce, ours->to_pass.fd()))
    return refuse(fmt::format("can't pass a descriptor: {}", std::strerror(errno)));
  found->second.memory.emplace(shm_pair{std::move(ours->segment), *std::move(theirs)});
}

// ---------------------------------------------------------------------------------------------------------
// The dialler's side

namespace {

struct errand : std::enable_shared_from_this<errand> {
  errand(asio::io_context& io, const memory_offer& o) : s(io), limit(io), offer(o) {}

  stream_protocol::socket s;
  asio::steady_timer limit;
  memory_offer offer;
  std::optional<shm_segment> own;
  std::function<void(result<shm_pair>)> done;

  void finish(result<shm_pair> with) {
    if (!done) return;
    error_code ignored;
    s.close(ignored);
    limit.cancel();
    std::exchange(done, nullptr)(std::move(with));
  }
  void fail(errc code, const std::string& why) { finish(error{code, why}); }

  void begin(std::size_t payload_bytes) {
    limit.expires_after(visit_within);
    limit.async_wait([self = shared_from_this()](error_code ec) {
      if (!ec) self->fail(errc::timed_out, "no answer at its Unix socket");
    });
    s.async_connect(endpoint_of(offer.socket),
                    [self = shared_from_this(), payload_bytes](error_code ec) {
                      if (!self->done) return;
                      if (ec) return self->fail(errc::unreachable, reason_of(ec));
                      self->connected(payload_bytes);
                    });
  }

  void connected(std::size_t payload_bytes) {
    ::fcntl(s.native_handle(), F_SETFD, FD_CLOEXEC);
    if (!is_same_user(s.native_handle()))
      return fail(errc::unauthorised, "its Unix socket is of another user");
    auto ours = shm_segment::create(payload_bytes);
    if (!ours) return fail(ours.err().code, ours.err().message);
    if (!send_segment(s.native_handle(), offer.nonce, ours->to_pass.fd()))
      return fail(errc::io, fmt::format("can't pass a descriptor: {}", std::strerror(errno)));
    own.emplace(std::move(ours->segment));
    s.async_wait(stream_protocol::socket::wait_read, [self = shared_from_this()](error_code ec) {
      if (!self->done) return;
      if (ec) return self->fail(errc::unreachable, reason_of(ec));
      self->answered();
    });
  }

  void answered() {
    auto said = receive_segment(s.native_handle());
    if (!said) return fail(said.err().code, said.err().message);
    if (said->nonce != offer.nonce) return fail(errc::bad_input, "it answers another offer");
    auto theirs = shm_segment::map(said->segment);
    if (!theirs) return fail(theirs.err().code, theirs.err().message);
    finish(shm_pair{*std::move(own), *std::move(theirs)});
  }
};

}  // namespace

void fetch_memory(asio::io_context& io, const memory_offer& offer, std::size_t payload_bytes,
                  std::function<void(result<shm_pair>)> done) {
  auto self = std::make_shared<errand>(io, offer);
  self->done = std::move(done);
  self->begin(payload_bytes);
}

}  // namespace stagecoach
