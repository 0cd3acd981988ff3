#include "worker/window_run.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "model/stage.hpp"
#include "storage/dataset.hpp"
#include "storage/huggingface.hpp"
#include "storage/part.hpp"
#include "worker/step_runner.hpp"

namespace stagecoach {

result<void> read_state(const std::vector<part_record>& parts,
                        const std::vector<tensor_info>& tensors,
                        const std::function<state_target(const std::string&)>& target_of,
                        const std::function<bool()>& is_cancelled) {
  std::map<std::string, const part_record*> where;
  for (const part_record& p : parts)
    for (const std::string& t : p.tensors) where.emplace(t, &p);
  std::map<std::string, part_file> open_parts;
  for (const tensor_info& t : tensors) {
    if (is_cancelled()) return error{errc::cancelled, "dropped"};
    const auto found = where.find(t.name);
    if (found == where.end())
      return make_error(errc::corrupt, "the checkpoint has no tensor {}", t.name);
    const part_record& p = *found->second;
    auto at = open_parts.find(p.file);
    if (at == open_parts.end()) {
      auto opened = part_file::open(std::filesystem::path(p.folder) / p.file, p.root_hash);
      if (!opened) return opened.err();
      at = open_parts.emplace(p.file, std::move(*opened)).first;
    }
    const state_target target = target_of(t.name);
    for (auto [name, into] : {std::pair{t.name, target.parameter},
                              {"opt.m." + t.name, target.moment1},
                              {"opt.v." + t.name, target.moment2}}) {
      if (into == nullptr) continue;  // moments that another replica keeps
      if (auto got = at->second.read(name, into, 0, t.count()); !got) return got;
    }
  }
  return ok();
}

result<void> read_initial_state(const model_spec& model, const std::vector<tensor_info>& tensors,
                                const std::function<state_target(const std::string&)>& target_of) {
  for (const tensor_info& t : tensors) {
    const state_target target = target_of(t.name);
    initialise(target.parameter, t, model);
    for (float* moment : {target.moment1, target.moment2})
      if (moment != nullptr) std::memset(moment, 0, static_cast<std::size_t>(t.count()) * 4);
  }
  if (model.init.rfind("hf:", 0) != 0) return ok();
  auto folder = hf_folder::open(model.init.substr(3));
  if (!folder) return folder.err();
  for (const tensor_info& t : tensors)
    if (auto got = folder->read(t.name, target_of(t.name).parameter); !got) return got;
  return ok();
}

namespace {

std::string list_of(const std::vector<std::string>& names, std::size_t shown) {
  std::string text;
  for (std::size_t i = 0; i < std::min(shown, names.size()); ++i)
    text += (i == 0 ? "" : ", ") + names[i];
  if (names.size() > shown) text += fmt::format(" and {} more", names.size() - shown);
  return text;
}

/// The whole window: what its threads share.
class replay {
 public:
  replay(const window& w, const std::atomic<bool>& cancelled,
         const std::function<void(std::uint64_t)>& on_step)
      : w_(w), cancelled_(cancelled), on_step_(on_step), spec_(w.spec), end_(w.last) {
    // Where moments and copies are kept changes no bit; here each stage has all of its own.
    spec_.parallelism.shard_optimizer = false;
    spec_.elasticity.copies = 0;
    plan_.job = static_cast<job_id>(1);
    plan_.generation = 1;
    plan_.shape = w.shape;
    for (int r = 0; r < w.shape.worker_count(); ++r)
      plan_.members.push_back({static_cast<worker_id>(r + 1), fmt::format("{:032x}", r),
                               fmt::format("thread {}", r), "", 0});
    verdict_.step = w.step;
  }

  result<window_verdict> run() {
    auto data = open_dataset(spec_.data, spec_.model.vocab_size);
    if (!data) return data.err();
    data_ = std::move(*data);
    links_ = make_memory_links(w_.shape.worker_count());
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < w_.shape.worker_count(); ++rank)
      ranks.emplace_back([this, rank] {
        if (auto done = run_rank(rank); !done) stop(done.err());
        const std::lock_guard lock(mutex_);
        if (++done_ == w_.shape.worker_count()) wake_.notify_all();
      });
    wait_for(ranks);
    if (problem_) return *problem_;
    describe();
    return verdict_;
  }

 private:
  /// A step may take minutes; who cancels waits for one instruction of it.
  void wait_for(std::vector<std::thread>& ranks) {
    {
      std::unique_lock lock(mutex_);
      while (!wake_.wait_for(lock, std::chrono::milliseconds(20),
                             [&] { return done_ == static_cast<int>(ranks.size()); })) {
        if (!cancelled_.load()) continue;
        for (step_runner* r : runners_) r->cancel();
        for (auto& l : links_) l->cancel();
      }
    }
    for (auto& t : ranks) t.join();
  }

  // Cancelled and the others' broken links follow the first problem.
  void stop(const error& why) {
    const std::lock_guard lock(mutex_);
    if (!problem_) problem_ = why;
    for (auto& l : links_) l->cancel();
  }

  result<void> run_rank(int rank) {
    auto device = make_cpu_backend(w_.threads, w_.isa);
    const int s = plan_.stage_of(rank);
    const auto& cuts = w_.shape.unit_cuts;
    auto slots = step_runner::slots(spec_, plan_, rank);
    if (!slots) return slots.err();
    stage model(spec_.model, spec_.batch, cuts[static_cast<std::size_t>(s)],
                cuts[static_cast<std::size_t>(s) + 1], *slots, *device, std::nullopt,
                precision_of(spec_.precision));
    const auto target = [&model](const std::string& name) {
      return state_target{model.parameter(name), model.moment1(name), model.moment2(name)};
    };
    auto loaded = w_.parts.empty() ? read_initial_state(spec_.model, model.tensors(), target)
                                   : read_state(w_.parts, model.tensors(), target,
                                                [this] { return cancelled_.load(); });
    if (!loaded) return loaded;
    std::optional<error> data_problem;
    token_reader train;
    train.token_count = data_.train->count();
    train.read = [&](std::int64_t begin, std::int64_t n, std::int32_t* out) {
      if (auto got = data_.train->read(begin, n, out); !got) {
        std::memset(out, 0, static_cast<std::size_t>(n) * sizeof *out);
        data_problem = got.err();
      }
    };
    step_runner runner(spec_, plan_, rank, model, *links_[static_cast<std::size_t>(rank)], *device,
                       std::move(train), {});
    {
      const std::lock_guard lock(mutex_);
      runners_.insert(&runner);
    }
    auto done = run_steps(rank, model, runner, data_problem);
    const std::lock_guard lock(mutex_);
    runners_.erase(&runner);
    return done;
  }

  result<void> run_steps(int rank, stage& model, step_runner& runner,
                         const std::optional<error>& data_problem) {
    std::uint64_t chain = w_.chain;
    // What ends all ranks at one step rides in its vote, as a pause does: then nobody applies it.
    const auto orders = [this](std::uint64_t step) {
      const bool is_end = cancelled_.load() || step > end_.load();
      return std::pair{is_end ? order_bit(order_kind::stop) : 0, std::vector<std::uint64_t>{}};
    };
    for (std::uint64_t step = w_.step + 1; step <= w_.last; ++step) {
      auto vote = runner.compute(step, chain, orders);
      if (data_problem) return *data_problem;
      if (!vote) return vote.err();
      if (vote->orders & order_bit(order_kind::stop)) {
        if (cancelled_.load()) return error{errc::cancelled, "stopped"};
        return ok();
      }
      if (rank == 0) compare(*vote, runner.voted_weights());
      runner.apply(*vote);
      chain = vote->chain;
      if (auto same = compare_saved(step, rank, model); !same) return same;
      if (rank == 0 && on_step_) on_step_(step);
    }
    if (plan_.replica_of(rank) != 0) return ok();
    const std::lock_guard lock(mutex_);
    for (const auto& [tensor, hash] : model.tensor_hashes()) end_weights_[tensor] = hash;
    return ok();
  }

  // Rank 0's thread.
  void compare(const vote_result& vote, const std::vector<tensor_hash>& weights) {
    const auto row = w_.log.find(vote.step);
    if (row == w_.log.end()) return;
    compare_weights(vote.step - 1, weights, row->second);
    const std::lock_guard lock(mutex_);
    if (!verdict_.is_identical) return;
    ++verdict_.compared;
    verdict_.step = vote.step;
    if (row->second.chain == vote.chain) return;
    verdict_.is_identical = false;
    verdict_.what = "loss";
    first_ =
        fmt::format("loss {:.9g} and norm {:.9g}, the log has {:.9g} and {:.9g}", vote.loss.get(),
                    vote.norm.get(), row->second.loss.get(), row->second.norm.get());
    find_checkpoint_after(vote.step);
  }

  void compare_weights(std::uint64_t state_step, const std::vector<tensor_hash>& weights,
                       const step_report& row) {
    const std::lock_guard lock(mutex_);
    if (row.weights_hash.empty() || !verdict_.is_identical) return;
    tensor_hash whole;
    for (const tensor_hash& h : weights) whole += h;
    ++verdict_.compared;
    if (to_string(whole) == row.weights_hash) return;
    verdict_.is_identical = false;
    verdict_.step = state_step;
    verdict_.what = "weights";
    first_ = fmt::format("weights hash {}, the log has {}", to_string(whole), row.weights_hash);
    const layout_span* span = nullptr;
    for (const layout_span& l : w_.layouts)
      if (l.first_step <= row.step) span = &l;
    if (span != nullptr && span->shape.stage_count == 1) verdict_.stages = {0};
    if (span != nullptr && static_cast<int>(row.stage_hashes.size()) == span->shape.stage_count) {
      const auto mine = stage_hashes(spec_.model, span->shape, weights);
      for (std::size_t s = 0; s < mine.size(); ++s)
        if (mine[s] != row.stage_hashes[s]) verdict_.stages.push_back(static_cast<int>(s));
    }
    find_checkpoint_after(state_step);
  }

  // Goes on to the next checkpoint, whose tensors are compared, and no further. mutex_ is held.
  void find_checkpoint_after(std::uint64_t step) {
    const auto saved = w_.saved.lower_bound(step);
    end_ = saved == w_.saved.end() ? step : saved->first;
  }

  result<void> compare_saved(std::uint64_t step, int rank, stage& model) {
    const auto saved = w_.saved.find(step);
    if (saved == w_.saved.end() || plan_.replica_of(rank) != 0) return ok();
    std::vector<tensor_info> own;
    std::size_t largest = 0;
    for (const tensor_info& t : model.tensors()) {
      if (t.index == 0 && !model.has_embedding()) continue;  // compared where it embeds
      own.push_back(t);
      largest = std::max(largest, static_cast<std::size_t>(t.count()));
    }
    std::vector<float> values(largest), first(largest), second(largest);
    for (const tensor_info& t : own) {
      auto got = read_state(
          saved->second, {t},
          [&](const std::string&) {
            return state_target{values.data(), first.data(), second.data()};
          },
          [this] { return cancelled_.load(); });
      if (!got) return got;
      const auto bytes = static_cast<std::size_t>(t.count()) * sizeof(float);
      const bool is_same = std::memcmp(values.data(), model.parameter(t.name), bytes) == 0 &&
                           std::memcmp(first.data(), model.moment1(t.name), bytes) == 0 &&
                           std::memcmp(second.data(), model.moment2(t.name), bytes) == 0;
      const std::lock_guard lock(mutex_);
      ++verdict_.compared;
      if (!is_same && (verdict_.saved_step == 0 || verdict_.saved_step == step)) {
        verdict_.saved_step = step;
        differing_[t.index] = t.name;
      }
    }
    return ok();
  }

  void describe() {
    for (const auto& [index, name] : differing_) verdict_.tensors.push_back(name);
    if (const auto row = w_.log.find(w_.last + 1);
        verdict_.is_identical && row != w_.log.end() && !row->second.weights_hash.empty()) {
      std::vector<tensor_hash> weights(all_tensors(spec_.model).size());
      for (const auto& [tensor, hash] : end_weights_) weights[tensor] = hash;
      compare_weights(w_.last, weights, row->second);
    }
    if (verdict_.is_identical && !verdict_.tensors.empty()) {
      // The log agrees, so the run computed right and the copy that was saved is wrong.
      verdict_.is_identical = false;
      verdict_.what = "checkpoint";
      verdict_.step = verdict_.saved_step;
      first_ = "the checkpoint holds other values than the run had";
    }
    if (verdict_.is_identical) {
      verdict_.text = fmt::format("identical: steps {} to {}, {} hashes", w_.step + 1, w_.last,
                                  verdict_.compared);
      return;
    }
    verdict_.text =
        fmt::format("step {} differs in its {}: {}", verdict_.step, verdict_.what, first_);
    if (!verdict_.stages.empty()) {
      std::vector<std::string> names;
      for (const int s : verdict_.stages) names.push_back(std::to_string(s));
      verdict_.text += fmt::format("; stage {} of the run held them", list_of(names, 8));
    }
    if (!verdict_.tensors.empty())
      verdict_.text +=
          fmt::format("; at the checkpoint of step {} tensor {} differ{}", verdict_.saved_step,
                      list_of(verdict_.tensors, 3), verdict_.tensors.size() == 1 ? "s" : "");
  }

  const window& w_;
  const std::atomic<bool>& cancelled_;
  const std::function<void(std::uint64_t)>& on_step_;
  job_spec spec_;
  plan plan_;
  dataset data_;
  std::vector<std::unique_ptr<link_set>> links_;
  std::atomic<std::uint64_t> end_;  // no step after it is of use

  std::mutex mutex_;  // guards the lines below
  std::condition_variable wake_;
  int done_ = 0;
  std::set<step_runner*> runners_;
  std::optional<error> problem_;
  window_verdict verdict_;
  std::string first_;
  std::map<int, std::string> differing_;  // by tensor index
  std::map<std::uint32_t, tensor_hash> end_weights_;
};

}  // namespace

result<window_verdict> run_window(const window& w, const std::atomic<bool>& cancelled,
                                  const std::function<void(std::uint64_t)>& on_step) {
  return replay(w, cancelled, on_step).run();
}

}  // namespace stagecoach
