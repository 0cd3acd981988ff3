// One TCP connection, plain or TLS, under one type: what Beast's templates are instantiated on.
//
// With the two stream types of Asio every composed operation is compiled twice, and the TLS engine
// once per handler: 75 s for the gateway alone. Here the operation below Beast is a virtual call
// with one heap block, which a control message or an HTTP request does not feel; tensors go over
// links. Included by the three Beast files only. One io thread per io context is assumed.
#pragma once

#include <array>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/beast/core/role.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <memory>
#include <utility>

#include "config/tls.hpp"

namespace stagecoach {

/// A move-only void(error_code, size_t), called at most once.
class io_completion {
 public:
  io_completion() = default;
  template <class Handler>
  requires(!std::is_same_v<std::decay_t<Handler>, io_completion>) io_completion(Handler&& handler)
      : held_(std::make_unique<holder<std::decay_t<Handler>>>(std::forward<Handler>(handler))) {}
  void operator()(boost::system::error_code ec, std::size_t bytes = 0) {
    const auto held = std::move(held_);
    held->call(ec, bytes);
  }

 private:
  struct callee {
    virtual ~callee() = default;
    virtual void call(boost::system::error_code ec, std::size_t bytes) = 0;
  };
  template <class Handler>
  struct holder final : callee {
    explicit holder(Handler h) : handler(std::move(h)) {}
    void call(boost::system::error_code ec, std::size_t bytes) override {
      if constexpr (std::is_invocable_v<Handler&, boost::system::error_code, std::size_t>) {
        handler(ec, bytes);
      } else {
        handler(ec);
      }
    }
    Handler handler;
  };
  std::unique_ptr<callee> held_;
};

/// The first buffers of any sequence; a stream may write fewer bytes than it is given.
struct const_buffer_list {
  using value_type = boost::asio::const_buffer;
  using const_iterator = const value_type*;
  std::array<value_type, 16> list;
  std::size_t count = 0;
  const_iterator begin() const { return list.data(); }
  const_iterator end() const { return list.data() + count; }
};

class byte_stream {
 public:
  using next_layer_type = boost::beast::tcp_stream;
  using executor_type = next_layer_type::executor_type;

  /// Plain if tls is null.
  byte_stream(boost::asio::ip::tcp::socket socket, boost::asio::ssl::context* tls);
  ~byte_stream();
  byte_stream(byte_stream&&) noexcept;
  byte_stream& operator=(byte_stream&&) noexcept;

  executor_type get_executor() { return next_layer().get_executor(); }
  /// The TCP part, with the deadlines; boost::beast::get_lowest_layer finds it.
  next_layer_type& next_layer();
  const next_layer_type& next_layer() const;
  bool is_secure() const;
  SSL* native_tls();  // null if plain

  /// Only if is_secure().
  void handshake(tls_side side, io_completion done);
  void shutdown(io_completion done);
  /// The end of a WebSocket's connection.
  void teardown(io_completion done);

  template <class Buffers, class Token>
  auto async_read_some(const Buffers& buffers, Token&& token) {
    return boost::asio::async_initiate<Token, void(boost::system::error_code, std::size_t)>(
        [this](auto handler, boost::asio::mutable_buffer into) {
          read_some(into, io_completion(std::move(handler)));
        },
        token, first_of(buffers));
  }

  template <class Buffers, class Token>
  auto async_write_some(const Buffers& buffers, Token&& token) {
    return boost::asio::async_initiate<Token, void(boost::system::error_code, std::size_t)>(
        [this](auto handler, const const_buffer_list& from) {
          write_some(from, io_completion(std::move(handler)));
        },
        token, list_of(buffers));
  }

 private:
  template <class Buffers>
  static boost::asio::mutable_buffer first_of(const Buffers& buffers) {
    auto at = boost::asio::buffer_sequence_begin(buffers);
    const auto end = boost::asio::buffer_sequence_end(buffers);
    for (; at != end; ++at)
      if (boost::asio::mutable_buffer b(*at); b.size() > 0) return b;
    return {};
  }
  template <class Buffers>
  static const_buffer_list list_of(const Buffers& buffers) {
    const_buffer_list out;
    auto at = boost::asio::buffer_sequence_begin(buffers);
    const auto end = boost::asio::buffer_sequence_end(buffers);
    for (; at != end && out.count < out.list.size(); ++at)
      if (boost::asio::const_buffer b(*at); b.size() > 0) out.list[out.count++] = b;
    return out;
  }
  void read_some(boost::asio::mutable_buffer into, io_completion done);
  void write_some(const const_buffer_list& from, io_completion done);

  struct parts;
  std::unique_ptr<parts> parts_;
};

/// Found by Beast's WebSocket through its argument.
template <class Handler>
void async_teardown(boost::beast::role_type, byte_stream& stream, Handler&& handler) {
  stream.teardown(io_completion(std::forward<Handler>(handler)));
}

}  // namespace stagecoach
