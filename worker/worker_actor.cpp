// The worker's actor: translates events to the machine and its actions to effects. Decides nothing.
#include <sys/sysinfo.h>
#include <unistd.h>

#include <caf/all.hpp>
#include <condition_variable>
#include <future>
#include <mutex>
#include <random>

#include "config/log.hpp"
#include "coordinator/wire.hpp"
#include "worker/control_client.hpp"
#include "worker/deputy_disk.hpp"
#include "worker/device_probe.hpp"
#include "worker/link_asio.hpp"
#include "worker/patrol.hpp"
#include "worker/trainer.hpp"
#include "worker/worker.hpp"
#include "worker/worker_machine.hpp"

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(stagecoach::worker_event)

namespace stagecoach {
namespace {

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

process_id random_process_id() {
  std::random_device entropy;
  std::string id;
  for (int i = 0; i < 4; ++i) id += fmt::format("{:08x}", entropy());
  return id;
}

// A process that lives answers within a round trip or three; with the second of silence before, a
// stopped one is known within 1.5 s.
constexpr std::chrono::milliseconds probe_within{300};

// A coordinator that is frozen sends no pong: noticed within this time and a half. A blip costs a
// new connection and nothing else: a lost control socket evicts nobody.
constexpr std::chrono::milliseconds coordinator_idle{2'000};

level level_of(const std::string& name) {
  return name == "error" ? level::error : name == "warn" ? level::warn : level::info;
}

// What the actor's actions act on. Owned by the worker below, which outlives the actor.
struct effects {
  std::unique_ptr<link_server> links;
  std::unique_ptr<trainer> training;
  std::unique_ptr<patrol> auditing;
  std::unique_ptr<control_client> control;
  std::function<void(std::string)> give_up;
  std::function<void(to_coordinator)> say;  // to the actor, as the trainer does
  std::unique_ptr<deputy_disk> disk;

  // The client's first callback may come before start() has returned the client; the wait is for
  // that moment.
  std::promise<control_client*> started;
  std::shared_future<control_client*> client{started.get_future()};

  void carry_out(const worker_actions::send& x) { (void)client.get()->send(encode(x.message)); }
  void carry_out(const worker_actions::reconnect& x) { client.get()->reconnect(x.why); }
  void carry_out(const worker_actions::give_up& x) { give_up(x.why); }
  void carry_out(const worker_actions::ask_alive& x) {
    const probe& q = x.question;
    const peer_address to{q.peer.name, q.peer.process, q.peer.link_host, q.peer.link_port};
    links->line().ask_alive(to, probe_within, [this, q](peer_verdict verdict, std::string why) {
      say(probed{q.job, q.generation, value(q.peer.worker), to_string(verdict), std::move(why)});
    });
  }
  void carry_out(const worker_actions::send_peer& x) {
    links->line().send({x.to.name, x.to.process, x.to.link_host, x.to.link_port},
                       encode(x.message));
  }
  void carry_out(const worker_actions::store& x) { disk->carry_out(x); }
  void carry_out(const worker_actions::make_tie_break& x) { disk->carry_out(x); }
  void carry_out(const worker_actions::note& x) {
    log_event(level_of(x.record.level), x.record.kind,
              {{"job", value(x.record.job)}, {"text", x.record.text}});
  }
  void carry_out(const worker_actions::tell_trainer& x) {
    std::visit([this](const auto& message) { tell(message); }, x.message);
  }

  void tell(const prepare& x) { training->drop(x); }
  void tell(const commit& x) { training->load(x); }
  void tell(const run_stage& x) { training->run(x); }
  void tell(const give_order& x) { training->order(x); }
  void tell(const resume_stage& x) { training->resume(x); }
  void tell(const checkpoint_durable& x) { training->durable(x); }
  void tell(const stop_stage& x) { training->stop(x); }
  void tell(const feed& x) { training->begin_feed(x); }
  void tell(const stop_feed& x) { training->end_feed(x); }
  void tell(const trace_steps& x) { training->trace(x); }
  void tell(const audit& x) { auditing->begin(x); }
  void tell(const stop_audit&) { auditing->stop(); }
  template <class T>
  void tell(const T&) {}  // welcome, refused: the machine's own
};

struct actor_state {
  std::unique_ptr<worker_machine> machine;
};

caf::behavior worker_behavior(caf::stateful_actor<actor_state>* self, worker_identity identity,
                              effects* world) {
  self->state.machine = std::make_unique<worker_machine>(std::move(identity));
  return {[self, world](const worker_event& e) {
    for (const worker_action& action : self->state.machine->step(e))
      std::visit([world](const auto& x) { world->carry_out(x); }, action);
  }};
}

struct system_config : caf::actor_system_config {
  system_config() {
    set("scheduler.policy", caf::atom("sharing"));
    set("scheduler.max-threads", 2u);
  }
};

class running_worker : public worker {
 public:
  static result<std::unique_ptr<worker>> start(const worker_options& options) {
    auto self = std::make_unique<running_worker>();
    if (auto begun = self->begin(options); !begun) return begun.err();
    return std::unique_ptr<worker>(std::move(self));
  }

  ~running_worker() override {
    if (world_.control) world_.control->stop();
    // What it acts on goes after it: a message of a peer may come at any time.
    if (actor_) {
      caf::anon_send_exit(actor_, caf::exit_reason::user_shutdown);
      caf::scoped_actor(system_)->wait_for(actor_);
    }
    world_.auditing.reset();
    world_.training.reset();
    world_.disk.reset();
    world_.links.reset();
    actor_ = nullptr;
  }

  result<void> wait() override {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return is_ending_; });
    if (!refusal_.empty()) return error{errc::unauthorised, refusal_};
    return ok();
  }

  void stop(const std::string& reason) override {
    caf::anon_send(actor_, worker_event{worker_events::stopping{reason}});
    end({});
  }

  const std::string& name() const override { return name_; }

 private:
  result<void> begin(const worker_options& options) {
    if (!is_loopback_host(options.link_host) && options.tls.empty() && !options.insecure)
      return make_error(
          errc::usage,
          "link address {} is wider than this host and there are no certificates. fix: "
          "--tls-ca, --tls-cert and --tls-key (stagecoach certs makes them), or "
          "--insecure on a network that you trust",
          options.link_host);
    name_ = options.name.empty() ? fmt::format("{}-{}", host_name(), getpid()) : options.name;

    const process_id process = random_process_id();
    link_server::options link_options;
    link_options.name = name_;
    link_options.process = process;
    link_options.host = options.link_host;
    link_options.port = options.link_port;
    link_options.tls = options.tls;
    link_options.links = options.links;
    auto links = link_server::start(link_options);
    if (!links) return links.err();
    world_.links = std::move(*links);

    worker_identity identity;
    identity.name = name_;
    identity.process = process;
    identity.host = host_name();
    identity.link_host = options.link_host;
    identity.link_port = world_.links->port();
    identity.device = "cpu";
    identity.device_class = device_class(options.threads, options.isa);
    identity.threads = options.threads;
    struct sysinfo facts {};
    if (sysinfo(&facts) == 0)
      identity.memory_bytes = static_cast<std::uint64_t>(facts.totalram) * facts.mem_unit;
    identity.labels = options.labels;
    identity.version = "0.1.0";
    log_event(level::info, "worker_started",
              {{"name", name_},
               {"process", identity.process},
               {"links", fmt::format("{}:{}", options.link_host, identity.link_port)},
               {"device_class", identity.device_class},
               {"threads", options.threads}});

    world_.give_up = [this](std::string why) { end(std::move(why)); };
    actor_ = system_.spawn(worker_behavior, identity, &world_);

    trainer_options training;
    training.threads = options.threads;
    training.isa = options.isa;
    training.host = identity.host;
    training.name = name_;
    training.process = identity.process;
    training.faults = options.faults;
    world_.say = [to = actor_](to_coordinator message) {
      caf::anon_send(to, worker_event{worker_events::trainer_said{std::move(message)}});
    };
    training.emit = world_.say;
    world_.disk = std::make_unique<deputy_disk>(
        [to = actor_](worker_event e) { caf::anon_send(to, std::move(e)); });
    world_.links->line().listen(
        [to = actor_](const process_id& from, const std::string& name, const std::string& text) {
          auto message = decode_peer_message(text);
          if (!message) {
            log_event(level::warn, "peer_message_dropped",
                      {{"from", name}, {"reason", message.err().message}});
            return;
          }
          caf::anon_send(to, worker_event{worker_events::peer_said{from, std::move(*message)}});
        },
        [to = actor_](const peer_address& peer, peer_verdict verdict, const std::string& why) {
          caf::anon_send(to, worker_event{worker_events::peer_unreachable{
                                 peer.process, verdict == peer_verdict::gone, why}});
        });
    world_.auditing = std::make_unique<patrol>(
        patrol::options{options.threads, options.isa, identity.host, world_.say});
    world_.training = std::make_unique<trainer>(std::move(training), *world_.links);

    control_client::options control;
    control.host = options.coordinator_host;
    control.port = options.coordinator_port;
    control.tls = options.tls;
    control.idle = coordinator_idle;
    control.seed = std::stoull(identity.process.substr(0, 15), nullptr, 16);
    trainer* training_now = world_.training.get();
    control_client::callbacks callbacks;
    callbacks.on_open = [to = actor_, training_now] {
      caf::anon_send(to, worker_event{worker_events::connected{training_now->now().step}});
    };
    callbacks.on_message = [this, to = actor_](std::string text) {
      auto message = decode_to_worker(text);
      if (!message) {
        log_event(level::warn, "control_message_dropped", {{"reason", message.err().message}});
        return;
      }
      // Here and now, since a mailbox on the way would spoil it.
      if (const auto* x = std::get_if<clock_question>(&*message)) {
        const auto now_ns =
            std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
        (void)world_.client.get()->send(encode(clock_answer{x->number, x->asked_ns, now_ns}));
        return;
      }
      caf::anon_send(to, worker_event{worker_events::coordinator_said{std::move(*message)}});
    };
    callbacks.on_close = [to = actor_](const std::string& why) {
      caf::anon_send(to, worker_event{worker_events::disconnected{why}});
    };
    callbacks.on_refused = [](const error& why) {
      log_event(level::error, "coordinator_refused", {{"reason", why.message}});
    };
    auto client = control_client::start(control, std::move(callbacks));
    if (!client) return client.err();
    world_.control = std::move(*client);
    world_.started.set_value(world_.control.get());
    const auto began = std::chrono::steady_clock::now();
    world_.control->every(std::chrono::milliseconds(100), [to = actor_, training_now, began] {
      const auto now = std::chrono::duration_cast<std::chrono::milliseconds>(
                           std::chrono::steady_clock::now() - began)
                           .count();
      const auto unix_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                               std::chrono::system_clock::now().time_since_epoch())
                               .count();
      const trainer::status shown = training_now->now();
      caf::anon_send(to, worker_event{worker_events::tick{now, shown.step, shown.pulse, unix_ms,
                                                          shown.leaf_us, shown.layer_us}});
    });
    return ok();
  }

  void end(std::string why) {
    {
      std::lock_guard lock(mutex_);
      is_ending_ = true;
      refusal_ = std::move(why);
    }
    wake_.notify_all();
  }

  std::string name_;
  system_config config_;
  caf::actor_system system_{config_};
  effects world_;
  caf::actor actor_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool is_ending_ = false;
  std::string refusal_;
};

}  // namespace

result<std::unique_ptr<worker>> worker::start(const worker_options& options) {
  return running_worker::start(options);
}

}  // namespace stagecoach
