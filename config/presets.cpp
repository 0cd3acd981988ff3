#include "config/presets.hpp"

namespace stagecoach {

namespace {

struct row {
  const char* name;
  int n_layer;
  int d_model;
  int n_head;
  int vocab_size;
  int context;
  const char* about;
};

constexpr const char* gpt2_about = "GPT-2 as released (124M, 355M, 774M, 1.5B)";
// The printed table has rows that contradict themselves; see the two remarks below. GPT-3
// alternates dense and banded sparse attention, ours is dense, hence "gpt3-like" in the text.
constexpr const char* gpt3_about = "GPT-3-like, table 2.1 of arXiv:2005.14165, dense attention";
constexpr const char* hyperclova_about =
    "HyperCLOVA-like; shape and vocabulary UNVERIFIED (recalled, not read in arXiv:2109.04650)";
constexpr const char* megatron_about = "Megatron-LM scaling family (SC21 table 1)";

constexpr row table[] = {
    // For tests and first runs. Bytes need 256 entries.
    {"tiny", 4, 64, 4, 256, 64, "seconds on two CPU cores; bytes"},
    {"tiny-6", 6, 96, 6, 256, 64, "six blocks to cut into stages; bytes"},
    {"shakespeare", 6, 192, 6, 256, 128, "character model in minutes on two CPU cores; bytes"},
    {"small-384", 6, 384, 6, 50304, 1024, "nanoGPT-sized bench shape, GPT-2 vocabulary padded"},

    {"gpt2", 12, 768, 12, 50257, 1024, gpt2_about},
    {"gpt2-medium", 24, 1024, 16, 50257, 1024, gpt2_about},
    {"gpt2-large", 36, 1280, 20, 50257, 1024, gpt2_about},
    {"gpt2-xl", 48, 1600, 25, 50257, 1024, gpt2_about},

    {"gpt3-125m", 12, 768, 12, 50257, 2048, gpt3_about},
    {"gpt3-350m", 24, 1024, 16, 50257, 2048, gpt3_about},
    {"gpt3-760m", 24, 1536, 16, 50257, 2048, gpt3_about},
    // The paper prints 24 heads of 128, which is not 2048; implementations use 16 heads of 128.
    {"gpt3-1.3b", 24, 2048, 16, 50257, 2048,
     "GPT-3-like XL with 16 heads of 128 (the paper prints 24, which is not 2048)"},
    {"gpt3-2.7b", 32, 2560, 32, 50257, 2048, gpt3_about},
    {"gpt3-6.7b", 32, 4096, 32, 50257, 2048, gpt3_about},
    // The paper prints d_model 5140; 40 heads of 128 are 5120.
    {"gpt3-13b", 40, 5120, 40, 50257, 2048,
     "GPT-3-like 13B with d_model 5120 (the paper prints 5140, which is not 40 x 128)"},
    {"gpt3-175b", 96, 12288, 96, 50257, 2048, gpt3_about},

    {"kogpt2", 12, 768, 12, 51200, 1024, "SKT KoGPT-2 v2 (2021), 125M"},
    {"ko-gpt-trinity", 24, 1920, 16, 51200, 1024, "SKT Ko-GPT-Trinity (2021), 1.2B"},

    // The vocabulary of 51,200 is an assumption; the paper's is not known here.
    {"hyperclova-137m-like", 12, 768, 16, 51200, 2048, hyperclova_about},
    {"hyperclova-350m-like", 24, 1024, 16, 51200, 2048, hyperclova_about},
    {"hyperclova-760m-like", 24, 1536, 16, 51200, 2048, hyperclova_about},
    {"hyperclova-1.3b-like", 24, 2048, 16, 51200, 2048, hyperclova_about},
    {"hyperclova-6.9b-like", 32, 4096, 32, 51200, 2048, hyperclova_about},
    {"hyperclova-13b-like", 40, 5120, 40, 51200, 2048, hyperclova_about},
    {"hyperclova-39b-like", 48, 8192, 64, 51200, 2048, hyperclova_about},
    {"hyperclova-82b-like", 64, 10240, 80, 51200, 2048, hyperclova_about},

    {"megatron-1.7b", 24, 2304, 24, 51200, 2048, megatron_about},
    {"megatron-3.6b", 30, 3072, 32, 51200, 2048, megatron_about},
    {"megatron-7.5b", 36, 4096, 32, 51200, 2048, megatron_about},
    {"megatron-18b", 40, 6144, 48, 51200, 2048, megatron_about},
    {"megatron-39b", 48, 8192, 64, 51200, 2048, megatron_about},
    {"megatron-76b", 60, 10240, 80, 51200, 2048, megatron_about},
    {"megatron-145b", 80, 12288, 96, 51200, 2048, megatron_about},
    {"megatron-310b", 96, 16384, 128, 51200, 2048, megatron_about},
    {"megatron-530b", 105, 20480, 128, 51200, 2048, megatron_about},
    {"megatron-1t", 128, 25600, 160, 51200, 2048, megatron_about},
};

std::vector<preset> build() {
  std::vector<preset> all;
  for (const row& r : table) {
    preset& p = all.emplace_back();
    p.name = r.name;
    p.about = r.about;
    p.model.preset = r.name;
    p.model.n_layer = r.n_layer;
    p.model.d_model = r.d_model;
    p.model.n_head = r.n_head;
    p.model.d_ff = std::int64_t{4} * r.d_model;
    p.model.vocab_size = r.vocab_size;
    p.model.context = r.context;
    p.model.init = "random";
  }
  return all;
}

}  // namespace

const std::vector<preset>& presets() {
  static const std::vector<preset> all = build();
  return all;
}

const preset* find_preset(std::string_view name) {
  for (const preset& p : presets())
    if (p.name == name) return &p;
  return nullptr;
}

const std::vector<std::string>& preset_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const preset& p : presets()) all.push_back(p.name);
    return all;
  }();
  return names;
}

}  // namespace stagecoach
