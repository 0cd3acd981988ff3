#include "worker/trainer.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "config/log.hpp"
#include "model/copies.hpp"
#include "model/shadow.hpp"
#include "model/stage.hpp"
#include "model/tensor_names.hpp"
#include "storage/dataset.hpp"
#include "storage/part.hpp"
#include "worker/feeder.hpp"
#include "worker/step_runner.hpp"
#include "worker/window_run.hpp"

namespace stagecoach {
namespace {

using namespace std::chrono_literals;
using clock = std::chrono::steady_clock;

std::int64_t unix_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}
std::int64_t us_since(clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::microseconds>(clock::now() - begin).count();
}

// A frame's largest payload: a whole tensor's state, or the whole gradient of any stage.
std::size_t frame_bytes_max(const stage& s, const job_spec& spec, const layout& shape) {
  std::int64_t floats = std::max(s.gradient_count(), s.boundary_count());
  for (const tensor_info& t : all_tensors(spec.model)) floats = std::max(floats, t.count());
  for (std::size_t i = 0; i + 1 < shape.unit_cuts.size(); ++i) {
    const gradient_slot last =
        stage_gradient_layout(spec.model, shape.unit_cuts[i], shape.unit_cuts[i + 1]).back();
    floats = std::max(floats, last.offset + last.count);
  }
  return static_cast<std::size_t>(floats) * 4 + 4096;
}

// One tensor's state, wherever it lies.
struct state_place {
  float *parameter = nullptr, *moment1 = nullptr, *moment2 = nullptr;
  float* array(std::uint64_t kind) const {
    return kind == 0 ? parameter : kind == 1 ? moment1 : moment2;
  }
};

template <class Holder>
state_place place_in(Holder* holder, const std::string& name) {
  if (holder == nullptr) return {};
  return {holder->parameter(name), holder->moment1(name), holder->moment2(name)};
}

// What a rank of a plan holds beside its stage.
std::vector<tensor_info> tensors_to_copy(const job_spec& spec, const plan& shape, int rank) {
  const std::vector<tensor_info> all = all_tensors(spec.model);
  std::vector<tensor_info> list;
  for (const kept_copy& copy : copies_kept(spec, shape.shape, hosts_of(shape), rank))
    for (const int tensor : copy.tensors) list.push_back(all[static_cast<std::size_t>(tensor)]);
  return list;
}

// Steps that a member can tell again: a minute of steps of 60 ms, at 100 B each.
constexpr std::size_t recent_max = 1024;

struct memory_copy {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// What one save writes, copied out of the stage at the step's end: the stall is this copy alone.
struct save_work {
  part_saved report;
  std::vector<memory_copy> tensors;
  std::map<std::string, std::string> metadata;
  std::filesystem::path folder;
  std::string file;
};

struct command {
  enum class kind { drop, load, run, resume, stop, warm_up } what;
  prepare p;
  commit c;
  std::string reason;
  std::uint64_t job = 0, generation = 0;
  feed f;
};

// A taker is given the rest of the step at which all hold; more than a round is never on its way.
constexpr auto feed_patience = 1500ms;

// Which tensors a (stage, replica) saves: the stage's own tensors, cut among its replicas in order
// by bytes, or by whose moments they are where those are shared out.
std::vector<tensor_info> tensors_to_save(const job_spec& spec, const plan& shape, int rank) {
  const int s = shape.stage_of(rank), replica = shape.replica_of(rank);
  const int first = shape.shape.unit_cuts[s], last = shape.shape.unit_cuts[s + 1];
  const bool is_shared_out = is_sharded(spec, shape.shape.replica_count);
  const std::vector<int> indices = stage_tensor_indices(spec.model, first, last);
  const std::vector<int> owners = moment_owners(spec.model, indices, shape.shape.replica_count);
  std::vector<tensor_info> own, mine;
  std::int64_t total = 0;
  std::size_t position = 0;
  for (tensor_info& t : stage_tensors(spec.model, first, last)) {
    const int owner = owners[position++];
    if (t.unit < first || t.unit >= last)
      continue;  // the head's copy of wte is the embedding's to save
    total += t.count();
    if (!is_shared_out) own.push_back(std::move(t));
    if (is_shared_out && owner == replica) mine.push_back(std::move(t));
  }
  std::int64_t before = 0;
  for (tensor_info& t : own) {
    const std::int64_t owner =
        before * shape.shape.replica_count / std::max<std::int64_t>(1, total);
    before += t.count();
    if (owner == replica) mine.push_back(std::move(t));
  }
  return mine;
}

std::vector<std::uint64_t> worker_ids(const plan& shape) {
  std::vector<std::uint64_t> ids;
  for (const plan_member& m : shape.members) ids.push_back(value(m.worker));
  return ids;
}

int count_parts(const job_spec& spec, const plan& shape) {
  int parts = 0;
  for (int rank = 0; rank < static_cast<int>(shape.members.size()); ++rank)
    parts += tensors_to_save(spec, shape, rank).empty() ? 0 : 1;
  return parts;
}

}  // namespace

struct trainer::implementation {
  implementation(trainer_options o, link_server& l) : options(std::move(o)), links(l) {
    device = make_cpu_backend(options.threads, options.isa);
    feed_device = make_cpu_backend(1, options.isa);
    faults = fault_injection(std::move(options.faults));
    worker_thread = std::thread([this] { loop(); });
    writer_thread = std::thread([this] { write_loop(); });
  }

  ~implementation() {
    {
      std::lock_guard lock(mutex);
      ending = true;
      interrupt_locked();
    }
    wake.notify_all();
    worker_thread.join();
    {
      std::lock_guard lock(write_mutex);
      write_ending = true;
    }
    write_wake.notify_all();
    writer_thread.join();
    feeding.reset();
    runner.reset();
    was_fed.reset();
    copies.reset();
    model.reset();
  }

  // ---- commands (any thread)
  // -------------------------------------------------------------------------
  void push(command c, bool interrupts) {
    {
      std::lock_guard lock(mutex);
      commands.push_back(std::move(c));
      if (interrupts) interrupt_locked();
    }
    wake.notify_all();
  }

  void interrupt_locked() {
    interrupted = true;
    if (current_links) current_links->cancel();
    if (runner) runner->cancel();
    if (loading_job != 0) links.abandon(static_cast<job_id>(loading_job));
  }

  // ---- the trainer's thread
  // --------------------------------------------------------------------------
  void loop() {
    for (;;) {
      command c;
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [this] { return ending || !commands.empty(); });
        if (ending) return;
        c = std::move(commands.front());
        commands.pop_front();
        // What comes after the last interrupting command runs undisturbed.
        interrupted = std::any_of(commands.begin(), commands.end(), [](const command& later) {
          return later.what == command::kind::drop || later.what == command::kind::stop;
        });
      }
      const pulse_counter::scope busy(pulse, c.what == command::kind::load
                                                 ? trainer_activity::load
                                                 : trainer_activity::compute);
      switch (c.what) {
        case command::kind::drop:
          on_drop(c.p);
          break;
        case command::kind::load:
          on_load(std::move(c.c));
          break;
        case command::kind::run:
        case command::kind::resume:
          on_run(c.job, c.generation);
          break;
        case command::kind::stop:
          on_stop(c.job);
          break;
        case command::kind::warm_up:
          on_warm_up(c.f);
          break;
      }
    }
  }

  void on_drop(const prepare& p) {
    flush_progress();
    close_links();
    take_fed(p);
    prepared answer;
    answer.job = p.job;
    answer.number = p.number;
    if (value(shape.job) == p.job && has_state) {
      answer.has_state = true;
      answer.step = state_step;
      answer.chain = state_chain;
      if (model) {
        // Who has no moments of a tensor can't go on with it alone.
        for (const tensor_info& t : model->tensors())
          if (model->moment1(t.name) != nullptr) answer.tensors.push_back(t.name);
      }
      for (const shadow_state* beside : {copies.get(), was_fed.get()})
        if (beside != nullptr)
          for (const tensor_info& t : beside->tensors()) answer.tensors.push_back(t.name);
      answer.last_vote = last_vote;
      answer.has_pending = runner && runner->has_pending(state_step + 1);
      answer.loaded_in = shape.generation;
    }
    set_phase(worker_phase::prepared, p.job, p.number, 0);
    options.emit(answer);
  }

  // ---- feeds
  // -----------------------------------------------------------------------------------------
  std::shared_ptr<feeder> current_feed() {
    std::lock_guard lock(mutex);
    return feeding;
  }

  /// Ends the part in a feed: of this request, of this job; 0: any.
  void end_feed(std::uint64_t request, std::uint64_t job) {
    std::shared_ptr<feeder> old;
    {
      std::lock_guard lock(mutex);
      const bool is_meant = feeding && (request == 0 || feeding->request() == request) &&
                            (job == 0 || feeding->job() == job);
      if (is_meant) old = std::move(feeding);
    }
  }

  void begin_feed(const feed& order) {
    end_feed(0, 0);
    int index = -1;
    for (std::size_t i = 0; i < order.participants.size(); ++i)
      if (order.participants[i].process == options.process) index = static_cast<int>(i);
    auto begun = index < 0 ? result<std::unique_ptr<feeder>>(
                                 error{errc::conflict, "the feed has no part for this worker"})
                           : feeder::start(links, order, index, *feed_device, options.emit);
    if (!begun) return refuse_feed(order, begun.err());
    {
      std::lock_guard lock(mutex);
      feeding = std::move(*begun);
    }
    command c{};
    c.what = command::kind::warm_up;
    c.f = order;
    push(std::move(c), false);
  }

  void refuse_feed(const feed& order, const error& why) {
    fed x;
    x.job = order.job;
    x.generation = order.generation;
    x.request = order.request;
    x.problem = fmt::format("{} (worker {}, host {})", why.message, options.name, options.host);
    x.is_own = true;
    options.emit(x);
  }

  /// A joiner: what else its first load would take time for. A member is past it when it gets here.
  void on_warm_up(const feed& order) {
    fed_in = order.generation;
    if (model || has_state) return;
    if (auto opened = open_data(order.spec); !opened) return refuse_feed(order, opened.err());
    spec = order.spec;
  }

  /// What it was fed becomes a part of what it holds, where both are of one step.
  void take_fed(const prepare& p) {
    const std::shared_ptr<feeder> f = current_feed();
    if (!f || f->job() != p.job) return;
    f->finish();
    auto taken = f->take(p.wait_step, feed_patience);
    if (!taken) return;
    if (model && has_state && value(shape.job) == p.job) {
      const bool is_pending = runner && runner->has_pending(state_step + 1);
      if (taken->step == state_step && taken->chain == state_chain && !is_pending)
        was_fed = std::move(taken->state);
      return;
    }
    if (model || has_state) return;
    shape = plan{};
    shape.job = static_cast<job_id>(p.job);
    shape.generation = fed_in;  // whose state it is
    copies = std::move(taken->state);
    state_step = taken->step;
    state_chain = taken->chain;
    last_vote = std::move(taken->last_vote);
    has_state = true;
  }

  void on_stop(std::uint64_t job) {
    end_feed(0, job);
    if (model && job != 0 && value(shape.job) != job) return;
    flush_progress();
    close_links();
    forget_state();
    set_phase(worker_phase::idle, 0, 0, 0);
  }

  void forget_state() {
    drop_runner();
    was_fed.reset();
    copies.reset();
    model.reset();
    has_state = false;
    state_step = state_chain = 0;
    last_vote.reset();
    recent.clear();
    train_source.reset();
    valid_source.reset();
  }

  void drop_runner() {
    std::unique_ptr<step_runner> old;
    {
      std::lock_guard lock(mutex);
      old = std::move(runner);
    }
  }

  void close_links() {
    std::shared_ptr<link_set> old;
    {
      std::lock_guard lock(mutex);
      old = std::move(current_links);
      current_links.reset();
    }
    if (old) old->cancel();
  }

  bool is_interrupted() {
    std::lock_guard lock(mutex);
    return interrupted || ending;
  }

  // ---- load
  // ------------------------------------------------------------------------------------------
  void on_load(commit c) {
    const auto began = clock::now();
    const generation_id id = identity(c.shape);
    set_phase(worker_phase::loading, value(c.shape.job), id.number, id.plan_hash);
    auto done = load_generation(c);
    if (!done) {
      {
        std::lock_guard lock(mutex);
        loading_job = 0;
      }
      // Cancelled means that a newer PREPARE waits in the queue; it asks what we hold.
      if (done.err().code == errc::cancelled) return;
      failed f;
      f.job = value(c.shape.job);
      f.generation = id.number;
      f.code = to_string(done.err().code);
      f.message =
          fmt::format("{} (worker {}, host {})", done.err().message, options.name, options.host);
      f.is_fatal = done.err().code == errc::bad_spec;
      set_phase(worker_phase::prepared, value(c.shape.job), id.number, 0);
      options.emit(f);
      return;
    }
    ready r;
    r.job = value(shape.job);
    r.generation = id.number;
    r.plan_hash = id.plan_hash;
    r.step = state_step;
    r.weights_hash = to_string(model->weights_hash(model->has_embedding()));
    set_phase(worker_phase::ready, r.job, r.generation, r.plan_hash);
    load_us = us_since(began);
    is_memory_shown = false;
    save_first = save_at_start;
    options.emit(r);
    if (c.retell_rank == my_rank)
      retell(c.retell_after);  // numbers: load_generation moved the rest
  }

  result<void> load_generation(commit& c) {
    const std::string me = self_process;
    int rank = -1;
    for (std::size_t i = 0; i < c.shape.members.size(); ++i)
      if (c.shape.members[i].process == me) rank = static_cast<int>(i);
    if (rank < 0) return error{errc::conflict, "the plan has no place for this worker process"};

    if (auto opened = open_data(c.spec); !opened) return opened;

    const int s = c.shape.stage_of(rank);
    const int first = c.shape.shape.unit_cuts[s], last = c.shape.shape.unit_cuts[s + 1];
    auto slots = step_runner::slots(c.spec, c.shape, rank);
    if (!slots) return slots.err();

    // Roll forward before anything of the old generation goes: the gradient is in its runner.
    if (c.source == source_kind::live && c.roll_forward && has_state &&
        state_step + 1 == c.roll_forward->step && runner &&
        runner->has_pending(c.roll_forward->step))
      apply_vote(*c.roll_forward);

    // Links are opened for every source: they are part of the generation.
    std::unique_ptr<link_set> opened_links;
    const bool alone = c.shape.members.size() == 1;
    std::vector<int> keeps =
        kept_moments(c.spec, first, last, c.shape.replica_of(rank), c.shape.shape.replica_count);
    const bool same_stage = model && has_state && units_first == first && units_last == last &&
                            keeps == kept && slot_count == *slots && same_model(c.spec);
    std::unique_ptr<stage> fresh;
    if (!same_stage)
      fresh = std::make_unique<stage>(c.spec.model, c.spec.batch, first, last, *slots, *device,
                                      keeps, precision_of(c.spec.precision));
    new_state target{same_stage ? *model : *fresh, std::make_unique<shadow_state>(*device)};
    const bool can_share = has_state && state_step == c.step && c.source == source_kind::live;
    for (const tensor_info& t : tensors_to_copy(c.spec, c.shape, rank))
      if (!can_share ||
          !(target.copies->share(t, *copies) || (was_fed && target.copies->share(t, *was_fed))))
        target.copies->add(t);

    if (alone) {
      opened_links = std::move(make_memory_links(1).front());
    } else {
      std::vector<link_peer> peers;
      for (const plan_member& m : c.shape.members)
        peers.push_back({m.name, m.link_host, m.link_port});
      {
        std::lock_guard lock(mutex);
        if (interrupted || ending) return error{errc::cancelled, "dropped"};
        loading_job = value(c.shape.job);
      }
      const std::vector<std::uint64_t> workers = worker_ids(c.shape);
      const std::uint64_t job = value(c.shape.job), generation = c.shape.generation;
      auto made =
          links.open(c.shape.job, identity(c.shape), rank, peers,
                     frame_bytes_max(target.own, c.spec, c.shape.shape),
                     [this, job, generation, workers](int peer, peer_event what, std::string why) {
                       peer_report report;
                       report.job = job;
                       report.generation = generation;
                       report.peer = workers[static_cast<std::size_t>(peer)];
                       report.what = what == peer_event::lost        ? "lost"
                                     : what == peer_event::suspected ? "suspected"
                                                                     : "recovered";
                       report.why = std::move(why);
                       options.emit(report);
                     });
      {
        std::lock_guard lock(mutex);
        loading_job = 0;
      }
      if (!made) return made.err();
      opened_links = std::move(*made);
    }
    opened_links =
        std::make_unique<watched_links>(std::move(opened_links), worker_ids(c.shape), pulse);
    {
      std::lock_guard lock(mutex);
      current_links = std::move(opened_links);
      if (interrupted || ending) return error{errc::cancelled, "dropped"};
    }

    if (c.source == source_kind::live) {
      if (auto moved = transfer(c, rank, target); !moved) return moved;
    } else {
      // From here on what this worker held is no longer a state of one step.
      has_state = false;
      auto loaded = c.source == source_kind::initial ? initialise(c.spec, target)
                                                     : read_checkpoint(c, target);
      if (!loaded) return loaded;
      last_vote.reset();
    }

    drop_runner();
    if (fresh) model = std::move(fresh);
    copies = std::move(target.copies);
    if (shape.job != c.shape.job) recent.clear();
    was_fed.reset();
    end_feed(0, 0);
    spec = std::move(c.spec);
    shape = std::move(c.shape);
    my_rank = rank;
    units_first = first;
    units_last = last;
    kept = std::move(keeps);
    slot_count = *slots;
    state_step = c.step;
    state_chain = c.chain;
    forget_steps_from(state_step + 1);
    has_state = true;
    checkpoint_folder = c.checkpoint_folder;
    save_at_start = c.save_at_start;
    token_reader train = reader_of(train_source), valid = reader_of(valid_source);
    auto made = std::make_unique<step_runner>(spec, shape, my_rank, *model, *current_links, *device,
                                              std::move(train), std::move(valid), copies.get());
    made->count_into(pulse);
    if (!faults.is_empty())
      made->watch_middle([this](std::uint64_t step) { faults.within_compute(step); });
    {
      std::lock_guard lock(mutex);
      runner = std::move(made);
      orders.clear();
      if (interrupted || ending) runner->cancel();
    }
    last_save_time = clock::now();
    last_step_time = clock::now();
    leaf_us.store(0);
    layer_us.store(0);
    return ok();
  }

  bool same_model(const job_spec& other) const {
    return spec.model == other.model && spec.batch == other.batch &&
           spec.precision == other.precision;
  }

  token_reader reader_of(const std::shared_ptr<const token_source>& source) {
    token_reader reader;
    if (!source) return reader;
    reader.token_count = source->count();
    reader.read = [this, source](std::int64_t begin, std::int64_t n, std::int32_t* out) {
      if (auto got = source->read(begin, n, out); !got) {
        // The file changed under us. Zeros would train on garbage: break the step instead.
        std::memset(out, 0, static_cast<std::size_t>(n) * sizeof *out);
        data_problem = got.err();
      }
    };
    return reader;
  }

  result<void> open_data(const job_spec& wanted) {
    if (train_source && spec.data == wanted.data &&
        spec.model.vocab_size == wanted.model.vocab_size)
      return ok();
    auto opened = open_dataset(wanted.data, wanted.model.vocab_size);
    if (!opened) return opened.err();
    if (opened->train->count() <= wanted.batch.sequence_tokens)
      return make_error(errc::bad_spec,
                        "the training data has {} tokens; one sample needs {}. fix: more text or a "
                        "smaller batch.sequence",
                        opened->train->count(), wanted.batch.sequence_tokens + 1);
    if (wanted.eval_every_steps > 0 &&
        (!opened->valid || opened->valid->count() <= wanted.batch.sequence_tokens))
      return make_error(errc::bad_spec,
                        "the validation data has {} tokens; one sample needs {}. fix: a larger "
                        "data.valid_fraction, or no eval",
                        opened->valid ? opened->valid->count() : 0,
                        wanted.batch.sequence_tokens + 1);
    train_source = opened->train;
    valid_source = opened->valid;
    return ok();
  }

  /// What a generation will hold: a stage, which may be the present one, and copies.
  struct new_state {
    stage& own;
    std::unique_ptr<shadow_state> copies;
    state_place place(const std::string& name) const {
      const state_place p = place_in(&own, name);
      return p.parameter != nullptr ? p : place_in(copies.get(), name);
    }
    std::vector<tensor_info> tensors() const {
      std::vector<tensor_info> list = own.tensors();
      list.insert(list.end(), copies->tensors().begin(), copies->tensors().end());
      return list;
    }
  };

  /// Where the present state of a tensor lies; nulls: not held.
  state_place held_place(const std::string& name) {
    for (const state_place& p : {place_in(model.get(), name), place_in(copies.get(), name)})
      if (p.parameter != nullptr) return p;
    return place_in(was_fed.get(), name);
  }

  result<void> transfer(const commit& c, int rank, const new_state& target) {
    if (has_state && state_step == c.step) {
      for (const tensor_info& t : target.tensors()) {
        const state_place from = held_place(t.name), to = target.place(t.name);
        if (from.parameter == nullptr || from.parameter == to.parameter) continue;
        for (std::uint64_t k = 0; k < 3; ++k) {
          // Moments that are not kept, before or after, are null.
          if (from.array(k) != nullptr && to.array(k) != nullptr)
            device->copy(to.array(k), from.array(k), t.count());
        }
      }
    }
    std::map<std::string, tensor_info> by_name;
    for (tensor_info& t : all_tensors(c.spec.model)) by_name.emplace(t.name, t);
    // All ranks walk the list in its order, so a sender that waits for room waits for a receiver
    // that is at, or on its way to, the same entry.
    for (const transfer_record& t : c.transfers) {
      const auto found = by_name.find(t.tensor);
      if (found == by_name.end())
        return make_error(errc::bad_input, "transfer of unknown tensor {}", t.tensor);
      const tensor_info& info = found->second;
      for (std::uint64_t k = 0; k < (t.is_parameter_only ? 1u : 3u); ++k) {
        const link_key key{link_tag::state, c.step, static_cast<std::uint64_t>(info.index) * 4 + k};
        if (t.from_rank == rank) {
          const float* from = held_place(t.tensor).array(k);
          if (from == nullptr)
            return make_error(errc::conflict, "asked to send {}, which this worker does not hold",
                              t.tensor);
          std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(from),
                                           static_cast<std::size_t>(info.count()) * 4);
          if (auto sent = current_links->send(t.to_rank, key, bytes); !sent) return sent;
        } else if (t.to_rank == rank) {
          float* into = target.place(t.tensor).array(k);
          if (into == nullptr)
            return make_error(errc::conflict, "asked to take {}, which this stage does not have",
                              t.tensor);
          // What arrives replaces state of the same step (or of none): until all is here the
          // holding is mixed.
          if (into == held_place(t.tensor).array(k) && !t.is_parameter_only) has_state = false;
          std::span<std::byte> bytes(reinterpret_cast<std::byte*>(into),
                                     static_cast<std::size_t>(info.count()) * 4);
          if (auto got = current_links->receive(t.from_rank, key, bytes); !got) return got;
        }
      }
    }
    return ok();
  }

  static std::function<state_target(const std::string&)> places_of(const new_state& target) {
    return [&target](const std::string& name) {
      const state_place place = target.place(name);
      return state_target{place.parameter, place.moment1, place.moment2};
    };
  }

  result<void> initialise(const job_spec& wanted, const new_state& target) {
    return read_initial_state(wanted.model, target.tensors(), places_of(target));
  }

  result<void> read_checkpoint(const commit& c, const new_state& target) {
    return read_state(c.parts, target.tensors(), places_of(target),
                      [this] { return is_interrupted(); });
  }

  // After the first step of a generation, when the gradient buffers are there too.
  void log_memory() {
    const stage_memory predicted =
        predict_memory(spec, shape.shape, shape.stage_of(my_rank), shape.replica_of(my_rank));
    log_line line;
    line.job = value(shape.job);
    line.unix_ms = unix_ms();
    line.level = "info";
    line.text = fmt::format(
        "generation {}: {} runs stage {} of replica {} (units {}..{}), began at step {}; memory "
        "predicted "
        "{:.1f} MB, allocated {:.1f} MB; loaded in {:.1f} ms",
        shape.generation, options.name, shape.stage_of(my_rank), shape.replica_of(my_rank),
        units_first, units_last - 1, state_step - 1, static_cast<double>(predicted.total()) / 1e6,
        static_cast<double>(model->allocated_bytes() + copies->allocated_bytes() +
                            runner->allocated_bytes()) /
            1e6,
        static_cast<double>(load_us) / 1e3);
    options.emit(line);
    is_memory_shown = true;
  }

  // ---- run
  // -------------------------------------------------------------------------------------------
  void apply_vote(const vote_result& vote) {
    runner->apply(vote);
    faults.after_apply(vote.step, *model);
    pulse.count();
    state_step = vote.step;
    state_chain = vote.chain;
    last_vote = vote;
    remember_step(vote);
    was_fed.reset();  // of the step before
    std::lock_guard lock(mutex);
    shown.step = state_step;
  }

  void on_run(std::uint64_t job, std::uint64_t generation) {
    if (!runner || !has_state || value(shape.job) != job || shape.generation != generation) return;
    set_phase(worker_phase::running, job, generation, plan_hash(shape));
    last_step_time = clock::now();
    if (save_first) {
      save_first = false;
      start_save(false);
    }
    const auto last = static_cast<std::uint64_t>(spec.stop_steps);
    while (state_step < last) {
      if (is_interrupted()) return;
      const std::uint64_t step = state_step + 1;
      begin_trace(step);
      auto vote =
          runner->compute(step, state_chain, [this](std::uint64_t s) { return take_orders(s); });
      if (!vote || data_problem) return on_broken(vote ? *data_problem : vote.err());
      count_leaf_time();
      const auto apply_began = clock::now();
      apply_vote(*vote);
      report_step();
      if (auto shared = runner->share_weights(*vote); !shared) return on_broken(shared.err());
      end_trace(step, apply_began);
      give_to_feed(*vote);
      if (!is_memory_shown) log_memory();
      if (vote->orders & order_bit(order_kind::evaluate)) {
        if (!evaluate()) return;
      }
      const bool is_final = step == last;
      if ((vote->orders & order_bit(order_kind::save)) || is_final) start_save(is_final);
      if (vote->orders & (order_bit(order_kind::hold) | order_bit(order_kind::stop))) {
        flush_progress();
        set_phase(worker_phase::held, job, generation, plan_hash(shape));
        held h;
        h.job = job;
        h.generation = generation;
        h.step = state_step;
        options.emit(h);
        if (!is_final) return;
      }
    }
    flush_progress();
    log_peak();
    set_phase(worker_phase::finished, job, generation, plan_hash(shape));
    finished f;
    f.job = job;
    f.generation = generation;
    f.step = state_step;
    f.weights_hash = to_string(model->weights_hash(model->has_embedding()));
    options.emit(f);
  }

  // ---- traces
  // ----------------------------------------------------------------------------------------
  void begin_trace(std::uint64_t step) {
    std::optional<trace_steps> wanted;
    {
      std::lock_guard lock(mutex);
      wanted = to_trace;
    }
    const bool is_wanted =
        wanted && wanted->job == value(shape.job) && wanted->first <= step && step <= wanted->last;
    trace_request = is_wanted ? wanted->request : 0;
    spans.clear();
    runner->record_into(is_wanted ? &spans : nullptr);
  }

  void end_trace(std::uint64_t step, clock::time_point apply_began) {
    if (trace_request == 0 || spans.empty()) return;
    const auto ns = [](clock::time_point t) {
      return t.time_since_epoch() / std::chrono::nanoseconds(1);
    };
    spans.push_back({{op::step}, ns(apply_began), ns(clock::now()), 0});
    traced x;
    x.job = value(shape.job);
    x.generation = shape.generation;
    x.request = trace_request;
    x.step = step;
    x.began_ns = spans.front().begin_ns;
    x.is_cut = spans.size() > traced_spans_max;
    for (std::size_t i = 0; i < std::min(spans.size(), traced_spans_max); ++i) {
      const instruction_span& s = spans[i];
      const bool is_apply = i + 1 == spans.size();
      x.spans.push_back(is_apply ? traced_op_apply : static_cast<int>(s.what.what));
      x.spans.push_back(s.what.microbatch);
      x.spans.push_back(s.begin_ns - x.began_ns);
      x.spans.push_back(s.end_ns - x.began_ns);
    }
    options.emit(std::move(x));
  }

  void give_to_feed(const vote_result& vote) {
    const std::shared_ptr<feeder> f = current_feed();
    if (!f || f->job() != value(shape.job)) return;
    f->give(vote, [this, all = all_tensors(spec.model)](int tensor) {
      const state_place p = held_place(all[static_cast<std::size_t>(tensor)].name);
      return feed_source{p.parameter, p.moment1, p.moment2, runner->reduced_gradient(tensor)};
    });
  }

  void on_broken(const error& why) {
    flush_progress();
    if (why.code == errc::cancelled) return;
    const bool is_link = why.code == errc::unreachable;
    log_event(is_link ? level::warn : level::error, "step_dropped",
              {{"job", value(shape.job)}, {"step", state_step + 1}, {"reason", why.message}});
    // A broken link is reported by the links themselves, with the peer's name; the next PREPARE
    // follows.
    if (is_link) return;
    failed f;
    f.job = value(shape.job);
    f.generation = shape.generation;
    f.code = to_string(why.code);
    f.message = fmt::format("step {}: {} (worker {}, host {})", state_step + 1, why.message,
                            options.name, options.host);
    data_problem.reset();
    if (const auto& dispute = runner->dispute(); why.code == errc::corrupt && dispute) {
      f.step = dispute->step;
      f.is_certain = dispute->is_certain;
      for (const auto& s : dispute->suspects)
        f.suspects.push_back(
            {value(shape.members[static_cast<std::size_t>(s.rank)].worker), s.weights_hash});
    }
    options.emit(f);
  }

  // Rank 0 alone: which orders act after this step.
  std::pair<std::uint64_t, std::vector<std::uint64_t>> take_orders(std::uint64_t step) {
    std::uint64_t bits = 0;
    std::vector<std::uint64_t> ids;
    {
      std::lock_guard lock(mutex);
      for (const give_order& o : orders) {
        bits |= order_bit(static_cast<order_kind>(o.kind)) | o.with;
        ids.push_back(o.order);
      }
      orders.clear();
    }
    const auto s = static_cast<std::int64_t>(step);
    if (spec.checkpoint.every_steps > 0 && s % spec.checkpoint.every_steps == 0)
      bits |= order_bit(order_kind::save);
    if (spec.checkpoint.every_ms > 0 && us_since(last_save_time) >= spec.checkpoint.every_ms * 1000)
      bits |= order_bit(order_kind::save);
    if (spec.eval_every_steps > 0 && (s % spec.eval_every_steps == 0 || s == spec.stop_steps))
      bits |= order_bit(order_kind::evaluate);
    if (bits & order_bit(order_kind::save)) last_save_time = clock::now();
    return {bits, ids};
  }

  bool evaluate() {
    if (!runner->takes_part_in_evaluation() || !valid_source) return true;
    const pulse_counter::scope evaluating(pulse, trainer_activity::evaluate);
    auto loss = runner->evaluate(state_step);
    if (!loss) {
      on_broken(loss.err());
      return false;
    }
    if (runner->reports_evaluation()) {
      evaluated e;
      e.job = value(shape.job);
      e.generation = shape.generation;
      e.step = state_step;
      e.loss = exact_double::of(*loss);
      options.emit(e);
    }
    return true;
  }

  // Every member keeps its newest steps: those that rank 0 had not told when it died are told by
  // another (retell), or the log of the run would have a hole.
  void remember_step(const vote_result& vote) {
    step_report r;
    r.step = vote.step;
    r.loss = vote.loss;
    r.norm = vote.norm;
    r.lr = vote.lr;
    r.skipped = !vote.finite;
    r.chain = vote.chain;
    r.weights_hash = vote.weights_hash;
    // Only rank 0 counts the votes; the others know the whole's hash, from its result.
    if (shape.shape.stage_count > 1 && !runner->voted_weights().empty())
      r.stage_hashes = stage_hashes(spec.model, shape.shape, runner->voted_weights());
    r.step_us = us_since(last_step_time);
    r.unix_ms = unix_ms();
    last_step_time = clock::now();
    forget_steps_from(r.step);
    recent.push_back(r);
    if (recent.size() > recent_max) recent.pop_front();
  }

  void forget_steps_from(std::uint64_t step) {
    while (!recent.empty() && recent.back().step >= step) recent.pop_back();
  }

  void report_step() {
    if (my_rank != 0) return;
    unreported.push_back(recent.back());
    // Batched, so that a model with 1 ms steps does not spend them on messages.
    if (us_since(last_report_time) >= 50'000) flush_progress();
  }

  void retell(std::uint64_t after) {
    for (const step_report& r : recent)
      if (r.step > after && r.step <= state_step) unreported.push_back(r);
    flush_progress();
  }

  void flush_progress() {
    if (unreported.empty()) return;
    progress p;
    p.job = value(shape.job);
    p.generation = shape.generation;
    p.plan_hash = plan_hash(shape);
    p.steps = std::move(unreported);
    unreported.clear();
    last_report_time = clock::now();
    options.emit(p);
  }

  void log_peak() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    log_line line;
    line.job = value(shape.job);
    line.unix_ms = unix_ms();
    line.level = "info";
    line.text = fmt::format("{}: peak memory of the process {:.1f} MB", options.name,
                            static_cast<double>(usage.ru_maxrss) / 1e3);
    options.emit(line);
  }

  // ---- save
  // ------------------------------------------------------------------------------------------
  void start_save(bool is_final) {
    const pulse_counter::scope saving(pulse, trainer_activity::save);
    // A checkpoint that is whole has rank 0's part, so its steps were told before it counts.
    flush_progress();
    const auto began = clock::now();
    const auto mine = tensors_to_save(spec, shape, my_rank);
    if (mine.empty()) return;
    // One save in memory at a time: the next one waits for the disk, and says how long.
    {
      std::unique_lock lock(write_mutex);
      write_wake.wait(lock, [this] { return !write_work || write_ending; });
      give_up_saving = false;
    }
    auto work = std::make_unique<save_work>();
    for (const tensor_info& t : mine) {
      for (auto [name, from] : {std::pair{t.name, model->parameter(t.name)},
                                {"opt.m." + t.name, model->moment1(t.name)},
                                {"opt.v." + t.name, model->moment2(t.name)}}) {
        memory_copy copy;
        copy.name = name;
        copy.shape = t.shape;
        copy.values.assign(from, from + t.count());
        work->tensors.push_back(std::move(copy));
      }
      work->report.part.tensors.push_back(t.name);
    }
    work->file = part_file_name({shape.generation, state_step, shape.stage_of(my_rank),
                                 shape.replica_of(my_rank), plan_hash(shape)});
    work->folder = checkpoint_folder;
    work->metadata = {{"job", std::to_string(value(shape.job))},
                      {"step", std::to_string(state_step)},
                      {"generation", std::to_string(shape.generation)},
                      {"plan_hash", fmt::format("{:016x}", plan_hash(shape))}};
    work->report.job = value(shape.job);
    work->report.generation = shape.generation;
    work->report.plan_hash = plan_hash(shape);
    work->report.step = state_step;
    work->report.part_count = count_parts(spec, shape);
    work->report.part.host = options.host;
    if (last_vote) work->report.loss = last_vote->loss;
    work->report.chain = state_chain;
    work->report.is_final = is_final;
    work->report.stall_us = us_since(began);
    {
      std::lock_guard lock(write_mutex);
      write_work = std::move(work);
    }
    write_wake.notify_all();
  }

  void write_loop() {
    for (;;) {
      save_work* work = nullptr;
      {
        std::unique_lock lock(write_mutex);
        write_wake.wait(lock, [this] { return write_ending || write_work; });
        if (!write_work) return;
        work = write_work.get();
      }
      write_one(*work);
      {
        std::lock_guard lock(write_mutex);
        write_work.reset();
        if (write_ending) return;
      }
      write_wake.notify_all();
    }
  }

  void write_one(save_work& work) {
    const auto began = clock::now();
    std::vector<tensor_view> views;
    tensor_hash weights, state;
    for (const memory_copy& t : work.tensors) {
      views.push_back({t.name, t.shape, t.values.data()});
      const tensor_hash h =
          hash_tensor(t.name, t.values.data(), static_cast<std::int64_t>(t.values.size()));
      state += h;
      if (t.name.rfind("opt.", 0) != 0) weights += h;
    }
    work.report.part.weights_hash = to_string(weights);
    work.report.part.state_hash = to_string(state);
    for (int attempt = 0;; ++attempt) {
      auto written = write_part(work.folder, work.file, work.metadata, views);
      work.report.write_us = us_since(began);
      if (written) {
        work.report.part.file = written->file;
        work.report.part.folder = work.folder.string();
        work.report.part.bytes = written->bytes;
        work.report.part.root_hash = written->root_hash;
        work.report.problem.clear();
        options.emit(work.report);
        return;
      }
      work.report.problem = fmt::format("{}: {}", options.host, written.err().message);
      options.emit(work.report);
      log_event(level::error, "part_not_saved",
                {{"job", work.report.job},
                 {"step", work.report.step},
                 {"reason", written.err().message}});
      // The last step's state exists nowhere else: keep trying until there is room again.
      if (!work.report.is_final) return;
      std::unique_lock lock(write_mutex);
      if (write_wake.wait_for(lock, 2s, [this] { return write_ending || give_up_saving; })) return;
    }
  }

  /// Without waits, so that a fast worker beside a slow one is seen as fast. The first step is
  /// slower than all others, and a mean over eight follows a change within a few beats.
  void count_leaf_time() {
    const step_times& t = runner->times();
    const auto leaves = std::max(1, shape.shape.leaf_cuts[shape.replica_of(my_rank) + 1] -
                                        shape.shape.leaf_cuts[shape.replica_of(my_rank)]);
    const auto follow = [](std::atomic<std::int64_t>& mean, std::int64_t us) {
      const std::int64_t before = mean.load();
      mean.store(before == 0 ? us : before + (us - before) / 8);
    };
    follow(leaf_us, (t.forward_us + t.backward_input_us + t.backward_weight_us) / leaves);
    const int layers = model->layer_count();
    if (layers > 0) follow(layer_us, t.layers_us / leaves / layers);
  }

  // ---- status
  // ----------------------------------------------------------------------------------------
  void set_phase(worker_phase phase, std::uint64_t job, std::uint64_t generation,
                 std::uint64_t hash) {
    std::lock_guard lock(mutex);
    shown.phase = phase;
    shown.job = job;
    shown.generation = generation;
    shown.plan_hash = hash;
    shown.step = has_state ? state_step : 0;
  }

  trainer_options options;
  link_server& links;
  std::unique_ptr<backend> device, feed_device;
  std::string self_process;
  pulse_counter pulse;

  mutable std::mutex mutex;  // guards the lines below
  std::condition_variable wake;
  std::deque<command> commands;
  bool ending = false, interrupted = false;
  std::uint64_t loading_job = 0;
  std::shared_ptr<link_set> current_links;
  std::unique_ptr<step_runner> runner;  // replaced by the trainer's thread only
  std::vector<give_order> orders;
  std::optional<trace_steps> to_trace;
  std::shared_ptr<feeder> feeding;
  trainer::status shown;
  // Of the step that is computed, if it is traced: the trainer's thread alone.
  std::vector<instruction_span> spans;
  std::uint64_t trace_request = 0;                    // 0: it is not
  std::atomic<std::int64_t> leaf_us{0}, layer_us{0};  // 0: no step of this generation was computed

  // The trainer's thread alone:
  std::unique_ptr<stage> model;
  std::unique_ptr<shadow_state> copies;  // beside model, at the same step; never null where that is
  std::uint64_t fed_in = 0;              // generation of the newest feed
  std::unique_ptr<shadow_state> was_fed;  // and what a feed brought, from a prepare to its load
  job_spec spec;
  plan shape;
  int my_rank = 0, units_first = 0, units_last = 0, slot_count = 0;
  std::vector<int> kept;  // tensors whose moments model keeps
  bool has_state = false, save_at_start = false, save_first = false, is_memory_shown = false;
  std::int64_t load_us = 0;
  std::uint64_t state_step = 0, state_chain = 0;
  std::optional<vote_result> last_vote;
  std::shared_ptr<const token_source> train_source, valid_source;
  std::optional<error> data_problem;
  fault_injection faults;
  std::string checkpoint_folder;
  std::vector<step_report> unreported;
  std::deque<step_report>
      recent;  // by step; done again from state_step on, if it is below the last
  clock::time_point last_report_time{}, last_step_time{}, last_save_time{};

  std::mutex write_mutex;  // guards the save in progress
  std::condition_variable write_wake;
  std::unique_ptr<save_work> write_work;
  bool write_ending = false, give_up_saving = false;

  std::thread worker_thread, writer_thread;
};

trainer::trainer(trainer_options options, link_server& links)
    : self_(std::make_unique<implementation>(std::move(options), links)) {
  self_->self_process = self_->options.process;
}
trainer::~trainer() = default;

void trainer::drop(const prepare& p) {
  command c{};
  c.what = command::kind::drop;
  c.p = p;
  self_->push(std::move(c), true);
}
void trainer::load(const commit& order) {
  command c{};
  c.what = command::kind::load;
  c.c = order;
  self_->push(std::move(c), false);
}
void trainer::run(const run_stage& r) {
  command c{};
  c.what = command::kind::run;
  c.job = r.job;
  c.generation = r.generation;
  self_->push(std::move(c), false);
}
void trainer::resume(const resume_stage& r) {
  command c{};
  c.what = command::kind::resume;
  c.job = r.job;
  c.generation = r.generation;
  self_->push(std::move(c), false);
}
void trainer::order(const give_order& o) {
  std::lock_guard lock(self_->mutex);
  if (self_->shown.job == o.job && self_->shown.generation == o.generation)
    self_->orders.push_back(o);
}
void trainer::trace(const trace_steps& t) {
  std::lock_guard lock(self_->mutex);
  self_->to_trace = t;
}
void trainer::durable(const checkpoint_durable&) {
  // One save is in memory at a time and is freed when written; nothing waits for this word yet.
}
void trainer::stop(const stop_stage& s) {
  command c{};
  c.what = command::kind::stop;
  c.job = s.job;
  c.reason = s.reason;
  {
    std::lock_guard lock(self_->write_mutex);
    self_->give_up_saving = true;
  }
  self_->write_wake.notify_all();
  self_->push(std::move(c), true);
}
void trainer::begin_feed(const feed& f) { self_->begin_feed(f); }
void trainer::end_feed(const stop_feed& f) { self_->end_feed(f.request, f.job); }
trainer::status trainer::now() const {
  std::lock_guard lock(self_->mutex);
  status shown = self_->shown;
  shown.pulse = self_->pulse.now();
  shown.leaf_us = self_->leaf_us.load();
  shown.layer_us = self_->layer_us.load();
  return shown;
}

}  // namespace stagecoach
