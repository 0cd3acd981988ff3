#include "worker/vote.hpp"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "model/leaf_tree.hpp"
#include "model/stage.hpp"

namespace stagecoach {
namespace {

constexpr std::uint32_t ballot_magic = 0x32544f56;  // "VOT2"
constexpr std::uint32_t result_magic = 0x32534552;  // "RES2"
constexpr std::size_t entries_max = 1 << 20;

class writer {
 public:
  template <class T>
  void put(const T& value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    out.insert(out.end(), bytes, bytes + sizeof value);
  }
  std::vector<std::byte> out;
};

class reader {
 public:
  explicit reader(std::span<const std::byte> bytes) : left_(bytes) {}
  template <class T>
  bool get(T& value) {
    if (left_.size() < sizeof value) return false;
    std::memcpy(&value, left_.data(), sizeof value);
    left_ = left_.subspan(sizeof value);
    return true;
  }
  std::size_t left() const { return left_.size(); }

 private:
  std::span<const std::byte> left_;
};

void put_pairs(writer& w, const std::vector<std::pair<std::uint32_t, double>>& pairs) {
  w.put(static_cast<std::uint32_t>(pairs.size()));
  for (const auto& [index, value] : pairs) {
    w.put(index);
    w.put(value);
  }
}

bool get_pairs(reader& r, std::vector<std::pair<std::uint32_t, double>>& pairs) {
  std::uint32_t count = 0;
  if (!r.get(count) || count > entries_max || r.left() < count * 12ull) return false;
  pairs.resize(count);
  for (auto& [index, value] : pairs) {
    if (!r.get(index) || !r.get(value)) return false;
  }
  return true;
}

void put_weights(writer& w, const std::vector<std::pair<std::uint32_t, tensor_hash>>& weights) {
  w.put(static_cast<std::uint32_t>(weights.size()));
  for (const auto& [index, hash] : weights) {
    w.put(index);
    w.put(hash.low);
    w.put(hash.high);
  }
}

bool get_weights(reader& r, std::vector<std::pair<std::uint32_t, tensor_hash>>& weights) {
  std::uint32_t count = 0;
  if (!r.get(count) || count > entries_max || r.left() < count * 20ull) return false;
  weights.resize(count);
  for (auto& [index, hash] : weights) {
    if (!r.get(index) || !r.get(hash.low) || !r.get(hash.high)) return false;
  }
  return true;
}

error malformed(const char* what) {
  return make_error(errc::bad_input, "a {} frame is malformed; expected protocol {}", what,
                    protocol_version);
}

}  // namespace

std::vector<std::byte> encode_ballot(const ballot& b) {
  writer w;
  w.put(ballot_magic);
  w.put(b.step);
  w.put(b.plan_hash);
  w.put(b.chain);
  w.put(static_cast<std::int32_t>(b.rank));
  put_pairs(w, b.squares);
  put_pairs(w, b.losses);
  put_weights(w, b.weights);
  return std::move(w.out);
}

result<ballot> decode_ballot(std::span<const std::byte> bytes) {
  reader r(bytes);
  ballot b;
  std::uint32_t magic = 0;
  std::int32_t rank = 0;
  if (!r.get(magic) || magic != ballot_magic || !r.get(b.step) || !r.get(b.plan_hash) ||
      !r.get(b.chain) || !r.get(rank) || !get_pairs(r, b.squares) || !get_pairs(r, b.losses) ||
      !get_weights(r, b.weights) || r.left() != 0)
    return malformed("vote");
  b.rank = rank;
  return b;
}

std::vector<std::byte> encode_vote(const vote_result& v) {
  writer w;
  w.put(result_magic);
  w.put(v.step);
  w.put(static_cast<std::uint8_t>(v.finite));
  for (const exact_double& x : {v.loss, v.norm, v.lr, v.bias1, v.bias2, v.grad_scale})
    w.put(x.bits);
  w.put(v.orders);
  w.put(static_cast<std::uint32_t>(v.order_ids.size()));
  for (std::uint64_t id : v.order_ids) w.put(id);
  w.put(v.chain);
  tensor_hash weights;
  const bool has_weights = parse_tensor_hash(v.weights_hash, weights);
  w.put(static_cast<std::uint8_t>(has_weights));
  w.put(weights.low);
  w.put(weights.high);
  return std::move(w.out);
}

result<vote_result> decode_vote(std::span<const std::byte> bytes) {
  reader r(bytes);
  vote_result v;
  std::uint32_t magic = 0, count = 0;
  std::uint8_t finite = 0;
  if (!r.get(magic) || magic != result_magic || !r.get(v.step) || !r.get(finite))
    return malformed("vote result");
  v.finite = finite != 0;
  for (exact_double* x : {&v.loss, &v.norm, &v.lr, &v.bias1, &v.bias2, &v.grad_scale})
    if (!r.get(x->bits)) return malformed("vote result");
  if (!r.get(v.orders) || !r.get(count) || count > 4096 || r.left() != count * 8ull + 25)
    return malformed("vote result");
  v.order_ids.resize(count);
  for (auto& id : v.order_ids) r.get(id);
  r.get(v.chain);
  std::uint8_t has_weights = 0;
  tensor_hash weights;
  r.get(has_weights);
  r.get(weights.low);
  r.get(weights.high);
  if (has_weights != 0) v.weights_hash = to_string(weights);
  return v;
}

std::vector<std::string> stage_hashes(const model_spec& model, const layout& shape,
                                      const std::vector<tensor_hash>& weights) {
  std::vector<std::string> hashes;
  for (int s = 0; s < shape.stage_count; ++s) {
    const int first = shape.unit_cuts[static_cast<std::size_t>(s)];
    const int last = shape.unit_cuts[static_cast<std::size_t>(s) + 1];
    tensor_hash sum;
    for (const tensor_info& t : stage_tensors(model, first, last)) {
      if (t.unit < first || t.unit >= last) continue;  // the tied matrix counts where it embeds
      sum += weights[static_cast<std::size_t>(t.index)];
    }
    hashes.push_back(to_string(sum));
  }
  return hashes;
}

adamw_scalars scalars_of(const vote_result& vote, const job_spec& spec) {
  adamw_scalars scalars;
  scalars.lr = static_cast<float>(vote.lr.get());
  scalars.beta1 = static_cast<float>(spec.optimizer.beta1);
  scalars.beta2 = static_cast<float>(spec.optimizer.beta2);
  scalars.eps = static_cast<float>(spec.optimizer.eps);
  scalars.weight_decay = static_cast<float>(spec.optimizer.weight_decay);
  scalars.bias1 = static_cast<float>(vote.bias1.get());
  scalars.bias2 = static_cast<float>(vote.bias2.get());
  scalars.grad_scale = static_cast<float>(vote.grad_scale.get());
  return scalars;
}

std::uint64_t next_chain(std::uint64_t chain, std::uint64_t step, double loss, double norm) {
  std::uint64_t words[4] = {chain, step, std::bit_cast<std::uint64_t>(loss),
                            std::bit_cast<std::uint64_t>(norm)};
  return XXH3_64bits(words, sizeof words);
}

namespace {

/// By tensor: what is held, and by whom.
std::map<std::uint32_t, std::map<std::pair<std::uint64_t, std::uint64_t>, std::vector<int>>>
holdings_of(const std::vector<ballot>& ballots) {
  std::map<std::uint32_t, std::map<std::pair<std::uint64_t, std::uint64_t>, std::vector<int>>> held;
  for (const ballot& b : ballots)
    for (const auto& [tensor, hash] : b.weights)
      held[tensor][{hash.high, hash.low}].push_back(b.rank);
  return held;
}

}  // namespace

std::optional<weights_dispute> find_dispute(const std::vector<ballot>& ballots) {
  const auto held = holdings_of(ballots);
  weights_dispute found;
  std::set<int> outvoted, unclear;
  for (const auto& [tensor, versions] : held) {
    if (versions.size() < 2) continue;
    found.tensors.push_back(tensor);
    std::size_t most = 0, holders = 0;
    for (const auto& [hash, ranks] : versions) {
      most = std::max(most, ranks.size());
      holders += ranks.size();
    }
    // A plain majority of all who hold it: two wrong ones of five never outvote two right ones.
    const bool is_majority = most * 2 > holders;
    for (const auto& [hash, ranks] : versions) {
      if (is_majority && ranks.size() == most) continue;
      (is_majority ? outvoted : unclear).insert(ranks.begin(), ranks.end());
    }
  }
  if (found.tensors.empty()) return std::nullopt;
  found.step = ballots.front().step - 1;
  // Who was outvoted on one tensor also explains those on which two stand against each other.
  for (const int rank : outvoted) unclear.erase(rank);
  const bool explains_all = std::all_of(held.begin(), held.end(), [&outvoted](const auto& t) {
    return std::count_if(t.second.begin(), t.second.end(), [&outvoted](const auto& version) {
             return std::any_of(version.second.begin(), version.second.end(),
                                [&outvoted](int rank) { return outvoted.count(rank) == 0; });
           }) <= 1;
  });
  found.is_certain = explains_all;
  std::set<int> suspects = outvoted;
  if (!explains_all) suspects.insert(unclear.begin(), unclear.end());
  for (const int rank : suspects) {
    tensor_hash whole;
    for (const auto& [tensor, versions] : held) {
      // This rank's word where it has one; else that of most.
      const auto* chosen = &*versions.begin();
      for (const auto& version : versions) {
        if (version.second.size() > chosen->second.size()) chosen = &version;
      }
      for (const auto& version : versions) {
        const auto& ranks = version.second;
        if (std::find(ranks.begin(), ranks.end(), rank) != ranks.end()) chosen = &version;
      }
      whole += tensor_hash{chosen->first.second, chosen->first.first};
    }
    found.suspects.push_back({rank, to_string(whole)});
  }
  return found;
}

result<vote_result> count_votes(const job_spec& spec, const std::vector<ballot>& ballots,
                                std::size_t tensor_count) {
  invariant(!ballots.empty(), "a vote has at least one ballot");
  const ballot& first = ballots.front();
  std::map<std::uint32_t, std::pair<double, int>> squares;  // tensor -> value, who said it first
  std::map<std::uint32_t, double> losses;
  std::map<std::uint32_t, tensor_hash> weights;
  for (const ballot& b : ballots) {
    if (b.step != first.step || b.plan_hash != first.plan_hash || b.chain != first.chain)
      return make_error(
          errc::conflict,
          "rank {} votes for step {} (chain {:016x}), rank {} for step {} (chain {:016x})", b.rank,
          b.step, b.chain, first.rank, first.step, first.chain);
    for (const auto& [index, value] : b.squares) {
      auto [at, is_new] = squares.try_emplace(index, value, b.rank);
      if (!is_new &&
          std::bit_cast<std::uint64_t>(at->second.first) != std::bit_cast<std::uint64_t>(value))
        return make_error(
            errc::corrupt,
            "silent corruption: ranks {} and {} hold the same tensor {} but their reduced "
            "gradients differ in step {}",
            at->second.second, b.rank, index, b.step);
    }
    for (const auto& [index, value] : b.losses) losses[index] = value;
    for (const auto& [index, hash] : b.weights) weights[index] = hash;
  }
  if (squares.size() != tensor_count)
    return make_error(errc::bad_input, "votes of step {} cover {} of {} tensors", first.step,
                      squares.size(), tensor_count);
  const auto microbatches = static_cast<std::size_t>(spec.batch.microbatch_count());
  if (losses.size() != microbatches)
    return make_error(errc::bad_input, "votes of step {} carry {} of {} losses", first.step,
                      losses.size(), microbatches);

  std::vector<double> values;
  for (const auto& [index, value] : losses) values.push_back(value);
  const double tokens = static_cast<double>(spec.batch.global_sequences) *
                        static_cast<double>(spec.batch.sequence_tokens);
  const double loss = tree_sum(values) / tokens;
  values.clear();
  for (const auto& [index, value] : squares) values.push_back(value.first);
  const double norm = std::sqrt(tree_sum(values));

  vote_result v;
  v.step = first.step;
  v.finite = std::isfinite(loss) && std::isfinite(norm);
  v.loss = exact_double::of(loss);
  v.norm = exact_double::of(norm);
  v.lr = exact_double::of(learning_rate(spec, static_cast<std::int64_t>(v.step)));
  const adamw_scalars scalars =
      step_scalars(spec, static_cast<std::int64_t>(v.step), v.finite ? norm : 0.0);
  v.bias1 = exact_double::of(scalars.bias1);
  v.bias2 = exact_double::of(scalars.bias2);
  v.grad_scale = exact_double::of(scalars.grad_scale);
  v.chain = next_chain(first.chain, v.step, loss, norm);
  if (weights.size() == tensor_count) {
    tensor_hash whole;
    for (const auto& [index, hash] : weights) whole += hash;
    v.weights_hash = to_string(whole);
  }
  return v;
}

}  // namespace stagecoach
