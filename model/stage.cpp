#include "model/stage.hpp"

#include <algorithm>
#include <chrono>
#include <map>

#include "config/result.hpp"
#include "model/plan.hpp"

namespace stagecoach {

namespace {

constexpr std::int64_t line_floats = 16;  // one cache line: arrays never share one

std::int64_t round_up(std::int64_t count) {
  return (count + line_floats - 1) / line_floats * line_floats;
}

// One microbatch's arrays of a block. Backward reuses what forward has finished with:
//   after gelu_backward fc is dead      -> d_ln2 [M,C], d_qkv [M,3C]   (fc is never smaller than
//   4C) after attention_backward qkv is dead -> d_ln1 [M,C], dx [M,C]
// so that backward adds d_fc [M,F] and d_h [M,C] only.
struct block_arrays {
  float *x, *ln1, *mean1, *rstd1, *qkv, *lse, *attention, *h, *ln2, *mean2, *rstd2, *fc, *gelu;
  float *d_fc, *d_h;
  float *d_ln2, *d_qkv;  // inside fc
  float *d_ln1, *dx;     // inside qkv
  const float* dy;       // the next unit's dx, or the slot's copy of the gradient that came in
};

struct head_arrays {
  float *x, *ln, *mean, *rstd, *logits, *stats, *d_ln, *dx;
};

enum class slot_state : std::uint8_t { free, forwarded, input_done };

struct slot_arrays {
  slot_state state = slot_state::free;
  float* storage = nullptr;
  std::vector<block_arrays> blocks;
  head_arrays head{};
  float* top_gradient = nullptr;  // copy of output_gradient (stages without a head)
  const float* embedding_dy = nullptr;
  std::vector<std::int32_t> tokens, targets;  // [M], where the stage needs them
};

// Hands out pieces of one allocation. A first walk with no storage only counts.
class carver {
 public:
  explicit carver(float* storage) : storage_(storage) {}
  float* take(std::int64_t count) {
    float* piece = storage_ == nullptr ? nullptr : storage_ + used_;
    used_ += round_up(count);
    return piece;
  }
  std::int64_t used() const { return used_; }

 private:
  float* storage_;
  std::int64_t used_ = 0;
};

// Adds what its block takes: two readings of the clock for all layers of a pass.
class stopwatch {
 public:
  explicit stopwatch(std::chrono::nanoseconds& total) : total_(total) {}
  ~stopwatch() { total_ += std::chrono::steady_clock::now() - begin_; }

 private:
  std::chrono::nanoseconds& total_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Places of a block's tensors in the flat parameter array.
struct linear_places {
  int weight = -1, bias = -1;
};

}  // namespace

struct stage::implementation {
  implementation(const model_spec& m, const batch_spec& b, int begin, int end, backend& d,
                 precision p)
      : model(m), batch(b), unit_begin(begin), unit_end(end), device(d), products(p) {}

  model_spec model;
  batch_spec batch;
  int unit_begin, unit_end;
  backend& device;
  precision products;
  std::int64_t rows = 0;  // M = B * T

  std::vector<tensor_info> tensors;
  std::map<std::string, int> position;      // tensor name -> index in tensors
  std::vector<std::int64_t> state_offset;   // by index in tensors, into the parameters
  std::vector<std::int64_t> moment_offset;  // and into each moment array; -1: not kept here
  float *parameters = nullptr, *moments1 = nullptr, *moments2 = nullptr;

  std::vector<gradient_slot> layout;
  std::int64_t layout_count = 0;
  std::map<std::string, std::int64_t> gradient_offset;  // slot name -> offset

  // Looked up once, so that a step walks no map.
  struct block_places {
    linear_places ln1, c_attn, c_proj, ln2, c_fc, mlp_proj;
  };
  std::vector<block_places> blocks;
  int wte = -1, wpe = -1;
  linear_places ln_f;
  std::vector<std::int64_t> gradient_of;  // by index in tensors; for wte the slot that apply reads
  std::int64_t wte_embed_offset = 0, wte_head_offset = 0;

  std::vector<slot_arrays> slots;
  float* d_attention = nullptr;  // [M,C] scratch, dead at the end of a block's backward
  float* row_logits = nullptr;   // [V], whole models only
  std::int64_t allocated_floats = 0;
  std::chrono::nanoseconds layers_time{0};

  bool embeds() const { return unit_begin == 0; }
  bool heads() const { return unit_end == unit_count(model); }
  attention_shape attention() const {
    return {batch.micro_sequences, batch.sequence_tokens, model.n_head, model.d_model};
  }
  head_shape head() const { return {rows, model.d_model, model.vocab_size}; }
  float* parameter(int tensor) const {
    return parameters + state_offset[static_cast<std::size_t>(tensor)];
  }
  float* gradient(float* flat, int tensor) const {
    return flat + gradient_of[static_cast<std::size_t>(tensor)];
  }
  float* allocate(std::int64_t count) {
    allocated_floats += count;
    return device.allocate(count);
  }
  slot_arrays& slot(int index) {
    invariant(index >= 0 && index < static_cast<int>(slots.size()), "a slot is one of the stage's");
    return slots[static_cast<std::size_t>(index)];
  }

  std::int64_t packed_bytes() const;
  void lay_out_state(const std::optional<std::vector<int>>& moments_of);
  void lay_out_gradients();
  void find_places();
  void carve(slot_arrays& s, carver& arena) const;
  slot_arrays& free_slot();
  void run_to_head(slot_arrays& s, const float* input, const std::int32_t* tokens, float* output);
  void block_forward(const block_places& p, const block_arrays& a, float* y);
  void block_backward_input(const block_places& p, const block_arrays& a, float* dx);
  void block_backward_weight(const block_places& p, const block_arrays& a, float* gradients,
                             bool accumulate);
  tensor_hash hash_of(const float* state, const std::vector<std::int64_t>& offset, const char* kind,
                      bool owns_tied_matrix) const;
};

void stage::implementation::lay_out_state(const std::optional<std::vector<int>>& moments_of) {
  tensors = stage_tensors(model, unit_begin, unit_end);
  std::int64_t end = 0, moments_end = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    position[tensors[i].name] = static_cast<int>(i);
    state_offset.push_back(end);
    end += round_up(tensors[i].count());
    const bool has_moments = !moments_of || std::find(moments_of->begin(), moments_of->end(),
                                                      tensors[i].index) != moments_of->end();
    moment_offset.push_back(has_moments ? moments_end : -1);
    if (has_moments) moments_end += round_up(tensors[i].count());
  }
  parameters = allocate(end);
  if (moments_end == 0) return;
  moments1 = allocate(moments_end);
  moments2 = allocate(moments_end);
}

void stage::implementation::lay_out_gradients() {
  layout = stage_gradient_layout(model, unit_begin, unit_end);
  for (const gradient_slot& slot : layout) {
    gradient_offset[slot.name] = slot.offset;
    layout_count = slot.offset + round_up(slot.count);
  }
}

void stage::implementation::find_places() {
  const auto place = [this](const std::string& name) {
    const auto found = position.find(name);
    invariant(found != position.end(), "a stage holds every tensor of its units");
    return found->second;
  };
  const auto pair = [&place](const std::string& name) {
    return linear_places{place(name + ".weight"), place(name + ".bias")};
  };
  for (int unit = std::max(unit_begin, 1);
       unit < std::min(unit_end, static_cast<int>(model.n_layer) + 1); ++unit) {
    const std::string h = fmt::format("h.{}.", unit - 1);
    blocks.push_back({pair(h + "ln_1"), pair(h + "attn.c_attn"), pair(h + "attn.c_proj"),
                      pair(h + "ln_2"), pair(h + "mlp.c_fc"), pair(h + "mlp.c_proj")});
  }
  if (embeds() || heads()) wte = place("wte.weight");
  if (embeds()) wpe = place("wpe.weight");
  if (heads()) ln_f = pair("ln_f");
  if (embeds()) wte_embed_offset = gradient_offset.at("wte.weight@embed");
  if (heads()) wte_head_offset = gradient_offset.at("wte.weight@head");
  for (const tensor_info& tensor : tensors) {
    gradient_of.push_back(tensor.index != 0 ? gradient_offset.at(tensor.name)
                          : heads()         ? wte_head_offset
                                            : wte_embed_offset);
  }
}

void stage::implementation::carve(slot_arrays& s, carver& arena) const {
  const std::int64_t c = model.d_model, f = model.d_ff;
  const std::int64_t boundary = rows * c;
  s.blocks.clear();
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    block_arrays a{};
    a.x = arena.take(boundary);
    a.ln1 = arena.take(boundary);
    a.mean1 = arena.take(rows);
    a.rstd1 = arena.take(rows);
    a.qkv = arena.take(3 * round_up(boundary));
    a.lse = arena.take(rows * model.n_head);
    a.attention = arena.take(boundary);
    a.h = arena.take(boundary);
    a.ln2 = arena.take(boundary);
    a.mean2 = arena.take(rows);
    a.rstd2 = arena.take(rows);
    const std::int64_t fc_count = std::max(rows * f, 4 * round_up(boundary));
    a.fc = arena.take(fc_count);
    a.gelu = arena.take(rows * f);
    a.d_fc = arena.take(rows * f);
    a.d_h = arena.take(boundary);
    if (a.x != nullptr) {
      a.d_ln2 = a.fc;
      a.d_qkv = a.fc + round_up(boundary);
      a.d_ln1 = a.qkv;
      a.dx = a.qkv + round_up(boundary);
    }
    s.blocks.push_back(a);
  }
  if (heads()) {
    s.head.x = arena.take(boundary);
    s.head.ln = arena.take(boundary);
    s.head.mean = arena.take(rows);
    s.head.rstd = arena.take(rows);
    s.head.logits = arena.take(device.head_floats(head(), products));
    s.head.stats = arena.take(2 * rows);
    s.head.d_ln = arena.take(boundary);
    s.head.dx = arena.take(boundary);
  } else {
    s.top_gradient = arena.take(boundary);
  }
}

slot_arrays& stage::implementation::free_slot() {
  const auto found = std::find_if(slots.begin(), slots.end(),
                                  [](const slot_arrays& s) { return s.state == slot_state::free; });
  invariant(found != slots.end(), "evaluation runs while a slot is free");
  return *found;
}

void stage::implementation::block_forward(const block_places& p, const block_arrays& a, float* y) {
  const std::int64_t c = model.d_model, f = model.d_ff, m = rows;
  device.layernorm_forward(a.ln1, a.mean1, a.rstd1, a.x, parameter(p.ln1.weight),
                           parameter(p.ln1.bias), m, c);
  device.linear_forward(a.qkv, a.ln1, parameter(p.c_attn.weight), parameter(p.c_attn.bias), m, c,
                        3 * c, products);
  device.attention_forward(a.attention, a.lse, a.qkv, attention(), products);
  device.linear_forward(a.h, a.attention, parameter(p.c_proj.weight), parameter(p.c_proj.bias), m,
                        c, c, products);
  device.add(a.h, a.h, a.x, m * c);
  device.layernorm_forward(a.ln2, a.mean2, a.rstd2, a.h, parameter(p.ln2.weight),
                           parameter(p.ln2.bias), m, c);
  device.linear_forward(a.fc, a.ln2, parameter(p.c_fc.weight), parameter(p.c_fc.bias), m, c, f,
                        products);
  device.gelu_forward(a.gelu, a.fc, m * f);
  device.linear_forward(y, a.gelu, parameter(p.mlp_proj.weight), parameter(p.mlp_proj.bias), m, f,
                        c, products);
  device.add(y, y, a.h, m * c);
}

void stage::implementation::block_backward_input(const block_places& p, const block_arrays& a,
                                                 float* dx) {
  const std::int64_t c = model.d_model, f = model.d_ff, m = rows;
  device.linear_backward_input(a.d_fc, a.dy, parameter(p.mlp_proj.weight), m, f, c, products);
  device.gelu_backward(a.d_fc, a.d_fc, a.fc, m * f);  // the last use of fc's values
  device.linear_backward_input(a.d_ln2, a.d_fc, parameter(p.c_fc.weight), m, c, f, products);
  // The residual stream feeds the norm and the sum, so its gradient is dy plus what the norm gives.
  device.layernorm_backward_input(a.d_h, a.dy, a.d_ln2, a.h, parameter(p.ln2.weight), a.mean2,
                                  a.rstd2, m, c);
  device.linear_backward_input(d_attention, a.d_h, parameter(p.c_proj.weight), m, c, c, products);
  device.attention_backward(a.d_qkv, d_attention, a.qkv, a.attention, a.lse, attention(), products);
  device.linear_backward_input(a.d_ln1, a.d_qkv, parameter(p.c_attn.weight), m, c, 3 * c, products);
  device.layernorm_backward_input(dx, a.d_h, a.d_ln1, a.x, parameter(p.ln1.weight), a.mean1,
                                  a.rstd1, m, c);
}

void stage::implementation::block_backward_weight(const block_places& p, const block_arrays& a,
                                                  float* g, bool accumulate) {
  const std::int64_t c = model.d_model, f = model.d_ff, m = rows;
  const auto linear = [&](const linear_places& l, const float* x, const float* dy, std::int64_t k,
                          std::int64_t n) {
    device.linear_backward_weight(gradient(g, l.weight), gradient(g, l.bias), x, dy, m, k, n,
                                  accumulate, products);
  };
  const auto norm = [&](const linear_places& l, const float* dy, const float* x, const float* mean,
                        const float* rstd) {
    device.layernorm_backward_weight(gradient(g, l.weight), gradient(g, l.bias), dy, x, mean, rstd,
                                     m, c, accumulate);
  };
  linear(p.mlp_proj, a.gelu, a.dy, f, c);
  linear(p.c_fc, a.ln2, a.d_fc, c, f);
  norm(p.ln2, a.d_ln2, a.h, a.mean2, a.rstd2);
  linear(p.c_proj, a.attention, a.d_h, c, c);
  linear(p.c_attn, a.ln1, a.d_qkv, c, 3 * c);
  norm(p.ln1, a.d_ln1, a.x, a.mean1, a.rstd1);
}

// All units up to the final norm; the head's products are the caller's.
void stage::implementation::run_to_head(slot_arrays& s, const float* input,
                                        const std::int32_t* tokens, float* output) {
  const std::int64_t boundary = rows * model.d_model;
  // The boundary after the units below block i is block i's x; after the last block the head's x,
  // or the array that the caller sends on.
  float* const last = heads() ? s.head.x : output;
  invariant(last != nullptr, "a stage without the head has an output");
  float* const first = s.blocks.empty() ? last : s.blocks.front().x;
  if (embeds()) {
    invariant(tokens != nullptr, "the embedding has tokens");
    device.embedding_forward(first, tokens, parameter(wte), parameter(wpe), batch.micro_sequences,
                             batch.sequence_tokens, model.d_model);
  } else {
    invariant(input != nullptr, "a stage without the embedding has an input");
    device.copy(first, input, boundary);  // the caller's array is free again when forward returns
  }
  {
    const stopwatch layers(layers_time);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      block_forward(blocks[i], s.blocks[i], i + 1 < blocks.size() ? s.blocks[i + 1].x : last);
    }
  }
  if (heads()) {
    device.layernorm_forward(s.head.ln, s.head.mean, s.head.rstd, s.head.x, parameter(ln_f.weight),
                             parameter(ln_f.bias), rows, model.d_model);
  }
}

tensor_hash stage::implementation::hash_of(const float* state,
                                           const std::vector<std::int64_t>& offset,
                                           const char* kind, bool owns_tied_matrix) const {
  tensor_hash sum;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (offset[i] < 0 || (tensors[i].index == 0 && !owns_tied_matrix && !embeds())) continue;
    sum += hash_tensor(tensors[i].name + kind, state + offset[i], tensors[i].count());
  }
  return sum;
}

/// What the device keeps beside the weights once each has been used.
std::int64_t stage::implementation::packed_bytes() const {
  const std::int64_t c = model.d_model, f = model.d_ff;
  const auto linear = [this](std::int64_t k, std::int64_t n) {
    return device.packed_linear_bytes(k, n, products);
  };
  const std::int64_t per_block = linear(c, 3 * c) + linear(c, c) + linear(c, f) + linear(f, c);
  return static_cast<std::int64_t>(blocks.size()) * per_block +
         (heads() ? device.packed_head_bytes(head(), products) : 0);
}

std::vector<gradient_slot> stage_gradient_layout(const model_spec& model, int unit_begin,
                                                 int unit_end) {
  std::vector<gradient_slot> layout;
  std::int64_t end = 0;
  const auto add = [&](const std::string& name, const tensor_info& tensor) {
    layout.push_back({name, tensor.index, end, tensor.count()});
    end += round_up(tensor.count());
  };
  const std::vector<tensor_info> tensors = stage_tensors(model, unit_begin, unit_end);
  for (const tensor_info& tensor : tensors) {
    if (tensor.index != 0) {
      add(tensor.name, tensor);
    } else if (unit_begin == 0) {
      add(tensor.name + "@embed", tensor);
    }
  }
  if (unit_end == unit_count(model)) add(tensors.front().name + "@head", tensors.front());
  return layout;
}

stage::stage(const model_spec& model, const batch_spec& batch, int unit_begin, int unit_end,
             int slots, backend& device, const std::optional<std::vector<int>>& moments_of,
             precision products)
    : self_(
          std::make_unique<implementation>(model, batch, unit_begin, unit_end, device, products)) {
  implementation& s = *self_;
  invariant(unit_begin >= 0 && unit_begin < unit_end && unit_end <= unit_count(model),
            "a stage is a non-empty run of the model's units");
  invariant(slots >= 1, "a stage has at least one microbatch in flight");
  invariant(batch.sequence_tokens <= model.context, "a sample fits the positions");
  s.rows = batch.micro_sequences * batch.sequence_tokens;
  s.lay_out_state(moments_of);
  s.lay_out_gradients();
  s.find_places();
  s.slots.resize(static_cast<std::size_t>(slots));
  for (slot_arrays& slot : s.slots) {
    carver count(nullptr);
    s.carve(slot, count);
    if (count.used() > 0) slot.storage = s.allocate(count.used());
    carver arena(slot.storage);
    s.carve(slot, arena);
    if (s.embeds()) slot.tokens.resize(static_cast<std::size_t>(s.rows));
    if (s.heads()) slot.targets.resize(static_cast<std::size_t>(s.rows));
  }
  if (!s.blocks.empty()) s.d_attention = s.allocate(s.rows * model.d_model);
  if (s.embeds() && s.heads()) s.row_logits = s.allocate(model.vocab_size);
}

stage::~stage() {
  implementation& s = *self_;
  for (slot_arrays& slot : s.slots) {
    if (slot.storage != nullptr) s.device.release(slot.storage);
  }
  for (float* array : {s.parameters, s.moments1, s.moments2, s.d_attention, s.row_logits}) {
    if (array != nullptr) s.device.release(array);
  }
}

bool stage::has_embedding() const { return self_->embeds(); }
bool stage::has_head() const { return self_->heads(); }
std::int64_t stage::boundary_count() const { return self_->rows * self_->model.d_model; }
int stage::layer_count() const { return static_cast<int>(self_->blocks.size()); }
std::int64_t stage::layers_us() const {
  if (self_->blocks.empty()) return 0;  // reading the clock takes time, too
  return std::chrono::duration_cast<std::chrono::microseconds>(self_->layers_time).count();
}
const batch_spec& stage::batch() const { return self_->batch; }
const std::vector<tensor_info>& stage::tensors() const { return self_->tensors; }
const std::vector<gradient_slot>& stage::gradient_layout() const { return self_->layout; }
std::int64_t stage::gradient_count() const { return self_->layout_count; }

namespace {
float* place_of(float* state, const std::map<std::string, int>& position,
                const std::vector<std::int64_t>& offset, const std::string& name) {
  const auto found = position.find(name);
  if (found == position.end()) return nullptr;
  const std::int64_t at = offset[static_cast<std::size_t>(found->second)];
  return at < 0 ? nullptr : state + at;
}
}  // namespace

float* stage::parameter(const std::string& name) {
  self_->device.weights_changed();  // the caller may write
  return place_of(self_->parameters, self_->position, self_->state_offset, name);
}
float* stage::moment1(const std::string& name) {
  return place_of(self_->moments1, self_->position, self_->moment_offset, name);
}
float* stage::moment2(const std::string& name) {
  return place_of(self_->moments2, self_->position, self_->moment_offset, name);
}

void stage::initialise_parameters() {
  implementation& s = *self_;
  s.device.weights_changed();
  for (std::size_t i = 0; i < s.tensors.size(); ++i) {
    initialise(s.parameters + s.state_offset[i], s.tensors[i], s.model);
    const std::int64_t count = s.tensors[i].count();
    if (s.moment_offset[i] < 0) continue;
    std::fill_n(s.moments1 + s.moment_offset[i], count, 0.0F);
    std::fill_n(s.moments2 + s.moment_offset[i], count, 0.0F);
  }
}

double stage::forward(int slot, const float* input, const std::int32_t* tokens,
                      const std::int32_t* targets, float* output) {
  implementation& s = *self_;
  slot_arrays& a = s.slot(slot);
  invariant(a.state == slot_state::free, "a slot holds one microbatch until its weight gradient");
  s.run_to_head(a, input, tokens, output);
  a.state = slot_state::forwarded;
  if (s.embeds()) std::copy_n(tokens, s.rows, a.tokens.begin());
  if (!s.heads()) return 0.0;
  invariant(targets != nullptr, "the head has targets");
  std::copy_n(targets, s.rows, a.targets.begin());
  return s.device.head_forward(a.head.logits, a.head.stats, a.head.ln, s.parameter(s.wte),
                               a.targets.data(), s.head(), s.products);
}

void stage::backward_input(int slot, const float* output_gradient, float* input_gradient,
                           float loss_scale) {
  implementation& s = *self_;
  slot_arrays& a = s.slot(slot);
  invariant(a.state == slot_state::forwarded, "backward follows forward");
  a.state = slot_state::input_done;
  const std::int64_t c = s.model.d_model;
  const float* dy = nullptr;
  if (s.heads()) {
    head_arrays& h = a.head;
    s.device.head_backward_input(h.d_ln, h.logits, h.stats, s.parameter(s.wte), a.targets.data(),
                                 loss_scale, s.head(), s.products);
    s.device.layernorm_backward_input(h.dx, nullptr, h.d_ln, h.x, s.parameter(s.ln_f.weight),
                                      h.mean, h.rstd, s.rows, c);
    dy = h.dx;
  } else {
    invariant(output_gradient != nullptr, "a stage without the head is given its gradient");
    s.device.copy(a.top_gradient, output_gradient, s.rows * c);
    dy = a.top_gradient;
  }
  {
    const stopwatch layers(s.layers_time);
    for (std::size_t i = s.blocks.size(); i-- > 0;) {
      a.blocks[i].dy = dy;
      s.block_backward_input(s.blocks[i], a.blocks[i], a.blocks[i].dx);
      dy = a.blocks[i].dx;
    }
  }
  if (s.embeds()) {
    a.embedding_dy = dy;
  } else {
    invariant(input_gradient != nullptr, "a stage without the embedding gives its gradient on");
    s.device.copy(input_gradient, dy, s.rows * c);
  }
}

void stage::forget_microbatches() {
  for (slot_arrays& slot : self_->slots) slot.state = slot_state::free;
  self_->layers_time = {};
  self_->device.weights_changed();
}

void stage::backward_weight(int slot, float* gradients, bool accumulate) {
  implementation& s = *self_;
  slot_arrays& a = s.slot(slot);
  invariant(a.state == slot_state::input_done, "the weight gradient follows the input gradient");
  a.state = slot_state::free;
  if (s.heads()) {
    const head_arrays& h = a.head;
    s.device.head_backward_weight(gradients + s.wte_head_offset, h.logits, h.ln, s.head(),
                                  accumulate, s.products);
    s.device.layernorm_backward_weight(s.gradient(gradients, s.ln_f.weight),
                                       s.gradient(gradients, s.ln_f.bias), h.d_ln, h.x, h.mean,
                                       h.rstd, s.rows, s.model.d_model, accumulate);
  }
  {
    const stopwatch layers(s.layers_time);
    for (std::size_t i = s.blocks.size(); i-- > 0;) {
      s.block_backward_weight(s.blocks[i], a.blocks[i], gradients, accumulate);
    }
  }
  if (s.embeds()) {
    s.device.embedding_backward(gradients + s.wte_embed_offset, s.gradient(gradients, s.wpe),
                                a.embedding_dy, a.tokens.data(), s.batch.micro_sequences,
                                s.batch.sequence_tokens, s.model.d_model, s.model.vocab_size,
                                s.model.context, accumulate);
  }
}

double stage::evaluate(const float* input, const std::int32_t* tokens, const std::int32_t* targets,
                       float* output) {
  implementation& s = *self_;
  slot_arrays& a = s.free_slot();
  s.run_to_head(a, input, tokens, output);
  if (!s.heads()) return 0.0;
  invariant(targets != nullptr, "the head has targets");
  return s.device.head_forward(a.head.logits, a.head.stats, a.head.ln, s.parameter(s.wte), targets,
                               s.head(), s.products);
}

void stage::logits(const std::int32_t* tokens, std::int64_t row, float* to) {
  implementation& s = *self_;
  invariant(s.embeds() && s.heads(), "logits need the whole model in one stage");
  invariant(row >= 0 && row < s.rows, "the row is one of the batch");
  slot_arrays& a = s.free_slot();
  s.run_to_head(a, nullptr, tokens, nullptr);
  s.device.head_logits(s.row_logits, a.head.ln + row * s.model.d_model, s.parameter(s.wte),
                       {1, s.model.d_model, s.model.vocab_size}, s.products);
  s.device.copy(to, s.row_logits, s.model.vocab_size);
}

void stage::apply(const float* gradients, const adamw_scalars& scalars) {
  implementation& s = *self_;
  s.device.weights_changed();
  for (std::size_t i = 0; i < s.tensors.size(); ++i) {
    const std::int64_t moments = s.moment_offset[i];
    if (moments < 0) continue;
    adamw_scalars own = scalars;
    if (!s.tensors[i].decays()) own.weight_decay = 0;
    s.device.adamw(s.parameters + s.state_offset[i], s.moments1 + moments, s.moments2 + moments,
                   gradients + s.gradient_of[i], s.tensors[i].count(), own);
  }
}

tensor_hash stage::weights_hash(bool owns_tied_matrix) const {
  return self_->hash_of(self_->parameters, self_->state_offset, "", owns_tied_matrix);
}

tensor_hash stage::state_hash(bool owns_tied_matrix) const {
  tensor_hash sum = weights_hash(owns_tied_matrix);
  sum += moments_hash(owns_tied_matrix);
  return sum;
}

tensor_hash stage::moments_hash(bool owns_tied_matrix) const {
  const implementation& s = *self_;
  // A suffix per kind: a moment that stood in another's place would otherwise hash the same.
  tensor_hash sum = s.hash_of(s.moments1, s.moment_offset, "@moment1", owns_tied_matrix);
  sum += s.hash_of(s.moments2, s.moment_offset, "@moment2", owns_tied_matrix);
  return sum;
}

std::vector<std::pair<std::uint32_t, tensor_hash>> stage::tensor_hashes() const {
  const implementation& s = *self_;
  std::vector<std::pair<std::uint32_t, tensor_hash>> hashes;
  for (std::size_t i = 0; i < s.tensors.size(); ++i) {
    const tensor_info& t = s.tensors[i];
    hashes.emplace_back(static_cast<std::uint32_t>(t.index),
                        hash_tensor(t.name, s.parameters + s.state_offset[i], t.count()));
  }
  return hashes;
}

std::int64_t stage::allocated_bytes() const {
  const implementation& s = *self_;
  std::int64_t integers = 0;
  for (const slot_arrays& slot : s.slots) {
    integers += static_cast<std::int64_t>(slot.tokens.size() + slot.targets.size());
  }
  return 4 * (s.allocated_floats + integers) + s.packed_bytes();
}

}  // namespace stagecoach
