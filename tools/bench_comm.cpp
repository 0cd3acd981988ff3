// stagecoach bench comm: links between two processes of this host, each way they can be carried.
//
// This process is rank 1; rank 0 is the same program once more per kind of link, which does what
// rank 1 says in a frame. What is reduced goes through the trainer's own replica_reduction, so the
// figure is that of a step.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "config/log.hpp"
#include "tools/bench_support.hpp"
#include "tools/certs.hpp"
#include "tools/process.hpp"
#include "worker/link_asio.hpp"
#include "worker/replica_reduction.hpp"

namespace stagecoach {
namespace {

using nlohmann::json;
using clock = std::chrono::steady_clock;

constexpr std::int64_t gradient_floats = 30'400'000;  // of d6/384 with 50,304 words: 122 MB
constexpr std::size_t frame_bytes = 1'572'864;        // an activation of it: B4 T256 C384 fp32
constexpr std::uint32_t frames_in_turn = 200, frames_in_flight = 4;
constexpr std::size_t bytes_max = std::size_t{4} << 20;
constexpr int repetitions = 10;  // in a turn
constexpr job_id bench_job{1};
constexpr generation_id bench_generation{1, 1};

enum class task : std::uint32_t { end = 0, reduce, frames, round_trips };

double seconds_since(clock::time_point began) {
  return std::chrono::duration<double>(clock::now() - began).count();
}

/// What both ends have.
struct rank_end {
  std::unique_ptr<link_server> server;
  std::unique_ptr<link_set> links;
  std::unique_ptr<backend> device = make_cpu_backend(1);
  std::optional<replica_reduction> reduction;
  std::vector<float> own, root;
  std::vector<std::byte> frame = std::vector<std::byte>(frame_bytes);
  std::uint64_t step = 0;
  int peer = 0;

  void prepare(int rank) {
    peer = 1 - rank;
    reduction_shape shape;
    shape.replica = rank;
    shape.ranks = {0, 1};
    shape.shares = {{{0, gradient_floats / 2}}, {{gradient_floats / 2, gradient_floats}}};
    shape.blocks = {maximal_blocks(0, 4), maximal_blocks(4, 8)};
    shape.leaf_count = 8;
    shape.needs = [](int, int) { return true; };
    reduction.emplace(std::move(shape), *links, *device);
    own.resize(gradient_floats);
    root.resize(gradient_floats);
    for (std::size_t i = 0; i < own.size(); ++i)
      own[i] = static_cast<float>(static_cast<int>(i % 1000) + rank * 7);
  }

  bool say(std::uint64_t number, std::span<const std::byte> bytes = {}) {
    return links->send(peer, {link_tag::probe, step, number}, bytes).has_value();
  }
  bool hear(std::uint64_t number, std::span<std::byte> into = {}) {
    return links->receive(peer, {link_tag::probe, step, number}, into).has_value();
  }

  /// Both ranks at once. False: a link broke.
  bool reduce() {
    ++step;
    return say(1) && hear(1) && reduction->run(step, {own.data()}, root.data()).has_value() &&
           say(2) && hear(2);
  }
  bool is_reduced_right() const {
    for (std::size_t i = 0; i < root.size(); i += 4093)
      if (root[i] != static_cast<float>(2 * static_cast<int>(i % 1000) + 7)) return false;
    return true;
  }
};

/// Rank 0: does what it is told until the end.
exit_code run_rank(const global_flags& flags, const std::string& at, link_choice links) {
  configure_log(level::error);
  rank_end me;
  link_server::options o;
  o.links = links;
  o.tls = flags.tls();
  auto server = link_server::start(o);
  if (!server) return complain(flags, server.err());
  me.server = *std::move(server);
  auto port = parse_host_port(at, 0);
  if (!port) return complain(flags, port.err());
  auto opened =
      me.server->open(bench_job, bench_generation, 0,
                      {{"", "127.0.0.1", me.server->port()}, {"", port->host, port->port}},
                      bytes_max, [](int, peer_event, std::string) {});
  if (!opened) return complain(flags, opened.err());
  me.links = *std::move(opened);
  me.prepare(0);
  for (;;) {
    ++me.step;
    std::array<std::uint32_t, 3> order{};
    if (!me.hear(0, std::as_writable_bytes(std::span(order)))) return exit_code::failed;
    const auto [what, count, bytes] = order;
    if (static_cast<task>(what) == task::end) return exit_code::success;
    if (bytes > bytes_max) return exit_code::failed;
    me.frame.resize(bytes);
    bool is_good = true;
    for (std::uint32_t i = 0; i < count && is_good; ++i) {
      if (static_cast<task>(what) == task::reduce) is_good = me.reduce();
      if (static_cast<task>(what) == task::frames) is_good = me.hear(3, me.frame) && me.say(5);
      if (static_cast<task>(what) == task::round_trips)
        is_good = me.hear(3, me.frame) && me.say(3, me.frame);
    }
    if (!is_good || !me.say(4)) return exit_code::failed;
  }
}

/// Rank 1 and its partner, over one kind of link.
class comm_pair {
 public:
  const char* name;
  std::vector<double> reduce_ms, gb_per_s, round_trip_us, ratios;

  comm_pair(const char* kind_name, link_choice links, const tls_files& first,
            const tls_files& second)
      : name(kind_name) {
    link_server::options o;
    o.links = links;
    o.tls = second;
    auto server = link_server::start(o);
    if (!server) return;
    me_.server = *std::move(server);
    std::vector<std::string> arguments{
        "bench",     "comm",
        "--partner", fmt::format("127.0.0.1:{}", me_.server->port()),
        "--links",   links == link_choice::tcp ? "tcp" : "shared-memory"};
    if (!first.empty())
      for (const auto& [flag, file] : {std::pair{"--tls-ca", first.ca},
                                       {"--tls-cert", first.certificate},
                                       {"--tls-key", first.key}}) {
        arguments.push_back(flag);
        arguments.push_back(file);
      }
    auto partner = child_process::start(own_program(), arguments, "");
    if (!partner) return;
    partner_ = *std::move(partner);
    auto opened = me_.server->open(bench_job, bench_generation, 1, {{}, {}}, bytes_max,
                                   [](int, peer_event, std::string) {});
    if (!opened) return;
    me_.links = *std::move(opened);
    me_.prepare(1);
    is_open_ =
        tell(task::reduce, 3) && reduce(3).size() == 3 && me_.hear(4) && me_.is_reduced_right();
  }
  ~comm_pair() {
    if (me_.links && tell(task::end, 0)) partner_.wait(std::chrono::seconds(2));
  }
  bool is_open() const { return is_open_; }
  std::string carried_by() const { return to_string(me_.links->kind(0)); }

  double turn() {
    if (!tell(task::reduce, repetitions)) return std::nan("");
    const auto ms = reduce(repetitions);
    if (!me_.hear(4)) return std::nan("");
    reduce_ms.insert(reduce_ms.end(), ms.begin(), ms.end());
    for (int i = 0; i < 5; ++i) one_way();
    round_trips();
    return median(ms);
  }

 private:
  bool tell(task what, std::uint32_t count, std::size_t bytes = 0) {
    ++me_.step;
    const std::array<std::uint32_t, 3> order{static_cast<std::uint32_t>(what), count,
                                             static_cast<std::uint32_t>(bytes)};
    me_.frame.resize(bytes);
    return me_.say(0, std::as_bytes(std::span(order)));
  }
  std::vector<double> reduce(int count) {
    std::vector<double> ms;
    for (int i = 0; i < count; ++i) {
      const auto began = clock::now();
      if (!me_.reduce()) break;
      ms.push_back(seconds_since(began) * 1e3);
    }
    return ms;
  }
  void one_way() {
    if (!tell(task::frames, frames_in_turn, frame_bytes)) return;
    const auto began = clock::now();
    for (std::uint32_t i = 0; i < frames_in_turn + frames_in_flight; ++i) {
      if (i < frames_in_turn && !me_.say(3, me_.frame)) return;
      if (i >= frames_in_flight && !me_.hear(5)) return;
    }
    gb_per_s.push_back(static_cast<double>(frames_in_turn * frame_bytes) / 1e9 /
                       seconds_since(began));
    me_.hear(4);
  }
  void round_trips() {
    constexpr std::uint32_t count = 200;
    if (!tell(task::round_trips, count, 1024)) return;
    for (std::uint32_t i = 0; i < count; ++i) {
      const auto began = clock::now();
      if (!me_.say(3, me_.frame) || !me_.hear(3, me_.frame)) return;
      round_trip_us.push_back(seconds_since(began) * 1e6);
    }
    me_.hear(4);
  }

  rank_end me_;
  child_process partner_;
  bool is_open_ = false;
};

struct gloo_turn {
  std::vector<double> ms;
  std::string version;
};
gloo_turn run_gloo(const comm_flags& own) {
  gloo_turn turn;
  struct stat facts {};
  std::string python = own.peer;
  if (::stat(python.c_str(), &facts) == 0 && S_ISDIR(facts.st_mode)) python += "/bin/python";
  const std::string script = own.peer_script.empty() ? "tools/bench_peer_gloo.py" : own.peer_script;
  const std::string command = fmt::format("{} {} --floats {} --repetitions {} 2>/dev/null", python,
                                          script, gradient_floats, repetitions);
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return turn;
  std::string text;
  char buffer[8192];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) text = buffer;
  pclose(pipe);
  const json line = json::parse(text, nullptr, false);
  if (line.is_discarded() || !line.contains("ms")) return turn;
  turn.ms = line["ms"].get<std::vector<double>>();
  turn.version = line.value("version", "");
  return turn;
}

json spread_of(const std::vector<double>& values, bool is_higher_better) {
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  return {
      {"median", median(values)},
      {"best", is_higher_better ? *most : *least},
      {"spread_percent", (quantile(values, 0.9) - quantile(values, 0.1)) / median(values) * 100},
      {"repetitions", values.size()}};
}

}  // namespace

exit_code bench_comm(const global_flags& flags, const comm_flags& own,
                     const std::function<void(const std::string&, json)>& figure) {
  if (!own.partner.empty()) return run_rank(flags, own.partner, own.links);
  configure_log(level::error);
  std::string folder = (std::filesystem::temp_directory_path() / "stagecoach-comm-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr)
    return complain(flags, make_error(errc::io, "can't make a folder {}", folder));
  tls_files first, second;
  if (make_ca(folder)) {
    if (auto made = make_certificate(folder, {tls_role::worker, "rank-0"})) first = *made;
    if (auto made = make_certificate(folder, {tls_role::worker, "rank-1"})) second = *made;
  }
  std::vector<std::unique_ptr<comm_pair>> pairs;
  pairs.push_back(std::make_unique<comm_pair>("shared memory", link_choice::shared_memory,
                                              tls_files{}, tls_files{}));
  pairs.push_back(std::make_unique<comm_pair>("TCP", link_choice::tcp, tls_files{}, tls_files{}));
  pairs.push_back(std::make_unique<comm_pair>("TCP with TLS", link_choice::tcp, first, second));
  std::filesystem::remove_all(folder);
  for (const auto& pair : pairs)
    if (!pair->is_open())
      return complain(flags,
                      make_error(errc::unexpected, "no links over {}, or a wrong sum", pair->name));

  const json load = own.load_now();
  std::vector<double> theirs;
  std::string version;
  for (int round = 0; round < own.rounds && !is_interrupted(); ++round) {
    gloo_turn gloo;
    if (!own.peer.empty()) gloo = run_gloo(own);
    if (!gloo.version.empty()) version = gloo.version;
    theirs.insert(theirs.end(), gloo.ms.begin(), gloo.ms.end());
    for (const auto& pair : pairs) {
      const double ms = pair->turn();
      if (!gloo.ms.empty()) pair->ratios.push_back(median(gloo.ms) / ms);
    }
  }
  for (const auto& pair : pairs) {
    const auto line = [&](const char* what, const char* unit, const json& values) {
      json out = {{"what", what},        {"unit", unit},
                  {"links", pair->name}, {"carried_by", pair->carried_by()},
                  {"processes", 2},      {"load_before", load}};
      out.update(values);
      return out;
    };
    json reduced = line("sum of 122 MB over 2 replicas", "ms", spread_of(pair->reduce_ms, false));
    if (!theirs.empty()) {
      reduced["peer"] = "PyTorch " + version + " Gloo all_reduce";
      reduced["peer_median"] = median(theirs);
      reduced["peer_best"] = *std::min_element(theirs.begin(), theirs.end());
      reduced["times_as_fast_as_peer"] = median(pair->ratios);
      reduced["times_as_fast_as_peer_best"] =
          reduced["peer_best"].get<double>() / reduced["best"].get<double>();
    }
    figure("comm", std::move(reduced));
    figure("comm", line("frames of 1.5 MiB, one way", "GB/s", spread_of(pair->gb_per_s, true)));
    figure("comm", line("round trip of 1 KiB", "us", spread_of(pair->round_trip_us, false)));
  }
  return is_interrupted() ? exit_code::interrupted : exit_code::success;
}

}  // namespace stagecoach
