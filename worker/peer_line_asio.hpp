// Lines over the sockets of a link server (worker/link_asio): its port lets them in, its io thread
// runs them.
//
//   outgoing, one per peer:  dialled -> greeting, reply -> messages, each kept until its receipt
//                            broken: dialled again, what has no receipt is sent again
//                            refused, other process: gone; no receipt for `patience`: silent
//   incoming, one per peer:  frames checked, numbers seen before dropped, receipts sent
// A number grows over all messages of a process, so that what was sent twice is known by it.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "worker/connection_asio.hpp"
#include "worker/peer_line.hpp"

namespace stagecoach {

class peer_lines final : public peer_line {
 public:
  using steady = std::chrono::steady_clock;
  /// refuse: closes a connection that broke the rules, counts and logs it.
  peer_lines(boost::asio::io_context& io, std::string name, process_id process,
             std::function<void(const connection_ptr&, const std::string& why)> refuse);
  ~peer_lines() override;

  // Any thread.
  void send(const peer_address& to, std::string text) override;
  void ask_alive(const peer_address& to, std::chrono::milliseconds within,
                 std::function<void(peer_verdict, std::string)> done) override;
  void listen(std::function<void(const process_id&, const std::string&, std::string)> on_message,
              verdict_sink on_unreachable) override;

  // io thread only.
  void use(boost::asio::ssl::context* tls_client) { tls_ = tls_client; }
  /// A connection that greeted as a line to this process; its name is checked.
  void accepted(const connection_ptr& c, const line_greeting& greeting);
  /// has_slept: this process stood still, so nobody else is to blame for the time since.
  void tick(steady::time_point now, bool has_slept);
  void shut_down();

 private:
  struct outgoing;
  struct incoming;
  struct question;
  using outgoing_ptr = std::shared_ptr<outgoing>;
  using incoming_ptr = std::shared_ptr<incoming>;
  using question_ptr = std::shared_ptr<question>;

  void queue(const peer_address& to, std::string text);
  void dial_out(const outgoing_ptr& o);
  void stands(const outgoing_ptr& o, const connection_ptr& c);
  void pump(const outgoing_ptr& o);
  void read_receipt(const outgoing_ptr& o, const connection_ptr& c);
  void broke(const outgoing_ptr& o, const connection_ptr& c, const std::string& cause);
  void give_up(const outgoing_ptr& o, peer_verdict verdict, const std::string& why);

  /// Dials and greets; done comes once unless c is closed before, with silent for what may pass.
  void greet(const connection_ptr& c, const peer_address& to,
             std::function<void(peer_verdict, std::string)> done);
  void ask(const question_ptr& q);
  void answer(const question_ptr& q, peer_verdict verdict, const std::string& why);

  void read_header(const incoming_ptr& in);
  void read_text(const incoming_ptr& in);
  void arrived(const incoming_ptr& in);
  void send_receipt(const incoming_ptr& in);
  void leave(const incoming_ptr& in);

  void tell_unreachable(const peer_address& to, peer_verdict verdict, const std::string& why);

  boost::asio::io_context& io_;
  const std::string name_;
  const process_id process_;
  const std::function<void(const connection_ptr&, const std::string&)> refuse_;

  std::mutex sink_mutex_;  // of the two sinks
  std::function<void(const process_id&, const std::string&, std::string)> on_message_;
  verdict_sink on_unreachable_;

  // io thread only.
  boost::asio::ssl::context* tls_ = nullptr;
  std::map<process_id, outgoing_ptr> outgoing_;
  std::list<incoming_ptr> incoming_;  // longest silent first
  struct seen {
    std::uint64_t number = 0;
    steady::time_point at;
  };
  std::map<process_id, seen> seen_;  // newest message of each peer
  std::list<question_ptr> questions_;
  std::uint64_t next_number_ = 1;
  bool is_shut_down_ = false;
};

}  // namespace stagecoach
