#include "config/job_spec_yaml.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>

#include "config/leaves.hpp"
#include "config/limits.hpp"

using namespace stagecoach;

namespace {

const std::string small = R"(version: 1
name: small
model: {preset: tiny}
data: {tokenizer: bytes, train: input.txt}
batch: {global: 32 sequences}
stop: {steps: 100}
)";

const std::string full = R"(version: 1
name: kogpt2-base
priority: 3

model:
  preset: kogpt2
  n_layer: 12
  d_model: 768
  n_head: 12
  d_ff: 3072
  vocab_size: 51200
  context: 1024
  tie_embeddings: true
  resid_pdrop: 0.0
  init: {seed: 18446744073709551615, std: 0.02}

data:
  tokenizer: {type: sentencepiece, path: "tok en.model"}
  train:
    - {path: corpus/ko_wiki.bin, format: nanogpt, weight: 1, dtype: uint16}
    - corpus/뉴스.txt
  valid: [{path: corpus/valid.bin, format: llmc}]
  shuffle_seed: 99

batch:
  global: 512Ki tokens
  micro: auto
  leaves: auto

optimizer: {type: adamw, lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, grad_clip: 1.0, exact: true}
schedule:  {type: cosine, warmup: 375M tokens, decay: 32B tokens, min_lr: 6.0e-5}
precision: {compute: fp32, master: fp32}
stop:      {tokens: 32B}
eval:      {every: 500 steps, batches: 20}

parallelism:
  mode: auto
  recompute: none

elasticity:
  workers: 4..8
  on_loss: replace
  wait_for_min: 10m
  copies: 1
  max_failures: 10 per 1h

checkpoint:
  every: 10m
  keep: {last: 3, every: 10000 steps}
  store: /ckpt/kogpt2-base

resources: {device: cpu, labels: {pool: a100}}
observe:   {log_every: 10 steps}
)";

spec_result parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return parse_job_spec(text, "job.yaml", overrides);
}

job_spec good(const std::string& text, const std::vector<std::string>& overrides = {}) {
  spec_result r = parse(text, overrides);
  INFO(format_problems(r.problems));
  REQUIRE(r.spec);
  CHECK(r.problems.empty());
  return *r.spec;
}

/// The codes found, in order, such as "E002 E104".
std::string codes(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const spec_result r = parse(text, overrides);
  CHECK(r.spec.has_value() == r.problems.empty());
  std::string out;
  for (const spec_problem& p : r.problems) out += (out.empty() ? "" : " ") + p.code;
  return out;
}

std::string code_of(const std::string& override) { return codes(small, {override}); }

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("a small job resolves every auto from the file alone") {
  const job_spec s = good(small);
  CHECK(s.name == "small");
  CHECK(s.model.n_layer == 4);
  CHECK(s.model.vocab_size == 256);
  CHECK(s.model.init == "random");
  CHECK(s.data.tokenizer == "bytes");
  REQUIRE(s.data.train.size() == 1);
  CHECK(s.data.train[0].format == "text");
  CHECK(s.batch.global_sequences == 32);
  CHECK(s.batch.sequence_tokens == 64);
  CHECK(s.batch.micro_sequences == 8);  // four microbatches
  CHECK(s.batch.leaf_count == 1);       // one worker
  CHECK(s.stop_steps == 100);
  CHECK_FALSE(s.parallelism.is_explicit);
  CHECK(s.precision == "fp32");
}

TEST_CASE("the example file of the manual is understood field by field") {
  const job_spec s = good(full);
  CHECK(s.priority == 3);
  CHECK(s.model.init_seed == 18446744073709551615u);
  CHECK(s.data.tokenizer_path == "tok en.model");
  REQUIRE(s.data.train.size() == 2);
  CHECK(s.data.train[0].format == "nanogpt");
  CHECK(s.data.train[1].path == "corpus/뉴스.txt");
  CHECK(s.batch.global_sequences == 512);
  CHECK(s.batch.micro_sequences == 4);  // 4,096 tokens
  CHECK(s.batch.leaf_count == resolve_leaf_count(128, 4, 8));
  CHECK(s.stop_steps == 61'035);
  CHECK(s.schedule.warmup_steps == 715);
  CHECK(s.schedule.decay_steps == 61'035);
  CHECK(s.eval_every_steps == 500);
  CHECK(s.elasticity.workers_min == 4);
  CHECK(s.elasticity.workers_max == 8);
  CHECK(s.elasticity.wait_for_min_ms == 600'000);
  CHECK(s.elasticity.max_failures == 10);
  CHECK(s.elasticity.copies == 1);
  CHECK(s.checkpoint.every_ms == 600'000);
  CHECK(s.checkpoint.every_steps == 0);
  CHECK(s.checkpoint.keep_every_steps == 10'000);
  CHECK(s.labels.at("pool") == "a100");
}

TEST_CASE("errors are printed in the compiler's style, all of them, with place, mark and fix") {
  const std::string text = R"(version: 1
name: x
model:
  n_layer: 12
  n_head: 12
  context: 64
  vocab_size: 256
  # here
  d_model: 770
  vocab_size: 512
data: {tokenizer: bytes, train: input.txt}
batch: {global: 32}
stop: {steps: 100}
optimiser: {lr: 1}
elasticity:
  workers: 8..4
)";
  CHECK(format_problems(parse(text).problems) ==
        R"(job.yaml:9:12: error[E104]: model.d_model 770 is not divisible by model.n_head 12
    9 |   d_model: 770
      |            ^^^
  fix: use d_model: 768 (12 heads of 64), or n_head: 10, 11 or 14
job.yaml:10:3: error[E003]: duplicate key "vocab_size" (first set on line 7)
   10 |   vocab_size: 512
      |   ^^^^^^^^^^
  fix: keep one of them
job.yaml:14:1: error[E002]: unknown key "optimiser"; did you mean "optimizer"?
   14 | optimiser: {lr: 1}
      | ^^^^^^^^^
job.yaml:16:12: error[E210]: elasticity.workers 8..4: the minimum is larger than the maximum
   16 |   workers: 8..4
      |            ^^^^
  fix: workers: 4..8
4 errors; nothing was submitted
)");
}

TEST_CASE("columns count characters, not bytes, and the mark stands under wide ones") {
  const spec_result r = parse(small + "observe: {이름: 가, log_every: x}\n");
  REQUIRE(r.problems.size() == 2);
  CHECK(r.problems[0].column == 11);
  CHECK(r.problems[1].column == 29);
  CHECK(format_problems({r.problems[0]}).find("      |           ^^^^\n") != std::string::npos);
}

TEST_CASE("a problem carries its path, so that a program can act on it") {
  const spec_result r = parse(replaced(small, "steps: 100", "steps: 010"));
  REQUIRE(r.problems.size() == 1);
  const spec_problem& p = r.problems[0];
  CHECK(p.file == "job.yaml");
  CHECK(p.line == 6);
  CHECK(p.column == 15);
  CHECK(p.code == "E007");
  CHECK(p.path == "stop.steps");
  CHECK(p.message == "stop.steps: \"010\" starts with 0, which YAML readers take for octal");
  CHECK(p.fix == "write 10");
  CHECK(p.source_line == "stop: {steps: 010}");
}

TEST_CASE("required keys are asked for, each once") {
  CHECK(codes("version: 1\n") == "E005 E005 E005 E005 E005");  // name model data batch stop
  CHECK(codes(replaced(small, "version: 1\n", "")) == "E005");
  CHECK(codes(replaced(small, "{preset: tiny}", "{n_layer: 2}")) == "E005 E005 E005");
  CHECK(codes(replaced(small, ", train: input.txt", "")) == "E005");
  CHECK(codes(replaced(small, "tokenizer: bytes, ", "")) == "E005");
  CHECK(codes(replaced(small, "{steps: 100}", "{}")) == "E005");
  CHECK(codes("") == "E006");
  CHECK(codes("- a\n") == "E006");
  CHECK(codes("hello\n") == "E006");
  CHECK(codes(small + "resources:\n") == "");  // everything under it commented out
  CHECK(codes(small + "priority:\n") == "E006");
}

TEST_CASE("words of other trainers lead to ours") {
  const spec_result r = parse(replaced(small, "preset: tiny", "preset: tiny, hidden_size: 64"));
  REQUIRE(r.problems.size() == 1);
  CHECK(r.problems[0].message == "unknown key \"hidden_size\" in model; did you mean \"d_model\"?");
}

TEST_CASE("what a later version will do is refused by name, and its neutral value accepted") {
  for (const char* line : {"precision=fp16",
                           "precision={compute: fp8}",
                           "precision={compute: bf16, master: bf16}",
                           "batch.ramp={from: 1, over: 2}",
                           "parallelism.recompute=full",
                           "parallelism.schedule=zb-v",
                           "parallelism.schedule=interleaved",
                           "parallelism.virtual_stages=2",
                           "observe.trace={every: 1}",
                           "observe.tensorboard=x",
                           "elasticity.max_failures=10 per 2h",
                           "checkpoint.async=true",
                           "checkpoint.keep.best=1",
                           "resources.memory=16GB+",
                           "resources.device=gpu",
                           "stop.time=12h",
                           "model.tie_embeddings=false",
                           "model.dropout=0.1",
                           "model.attn_pdrop=0.1",
                           "data.tokenizer=gpt2-bpe",
                           "data.tokenizer={type: hf-json, path: t.json}",
                           "data.train=[{path: a, format: megatron}]",
                           "data.train=[{path: a.txt, weight: 0.7}]",
                           "data.train=a*.txt",
                           "data.train=${HOME}/a.txt",
                           "schedule.type=wsd",
                           "optimizer.type=sgd",
                           "version=2"}) {
    INFO(line);
    CHECK(code_of(line) == "E004");
  }
  for (const char* line :
       {"precision=bf16", "precision={compute: bf16, master: fp32}", "parallelism.recompute=none",
        "parallelism.virtual_stages=1", "elasticity.copies=2", "parallelism.shard_optimizer=true",
        "model.dropout=0", "model.embd_pdrop=0.0", "elasticity.max_failures=10 per 60m"}) {
    INFO(line);
    CHECK(code_of(line) == "");
  }
}

TEST_CASE("contradictions are found, each with its own code") {
  CHECK(code_of("model.preset=gpt-2") == "E101");
  CHECK(code_of("model.n_layer=0") == "E102");
  CHECK(code_of("model.n_layer=1025") == "E102");
  CHECK(code_of("elasticity.copies=3") == "E102");
  CHECK(code_of("model.n_head=5") == "E104");
  CHECK(code_of("batch.sequence=65") == "E106");
  CHECK(code_of("model.vocab_size=255") == "E107");
  CHECK(code_of("data.tokenizer=none") == "E110");
  CHECK(code_of("data.tokenizer={type: bytes, path: x}") == "E110");
  CHECK(code_of("data.tokenizer=sentencepiece") == "E005");
  CHECK(code_of("data.train=a.bin") == "E005");
  CHECK(codes(small, {"data.valid=v.txt", "data.valid_fraction=0.1"}) == "E111");
  CHECK(code_of("eval={every: 10}") == "E111");
  CHECK(code_of("batch.global=100 tokens") == "E120");
  CHECK(code_of("batch.micro=5") == "E121");
  CHECK(code_of("batch.leaves=3") == "E122");
  CHECK(code_of("batch.leaves=8") == "E123");  // four microbatches
  CHECK(code_of("schedule.warmup=101") == "E130");
  CHECK(code_of("schedule.min_lr=1") == "E130");
  CHECK(codes(small, {"schedule.warmup=50", "schedule.decay=40"}) == "E130");
  CHECK(code_of("parallelism.stages=7") == "E201");
  CHECK(codes(small, {"parallelism={replicas: 8}", "batch.leaves=4", "batch.micro=1"}) == "E202");
  CHECK(code_of("parallelism.layers=[2, 3]") == "E203");
  CHECK(code_of("parallelism={stages: 3, layers: [2, 2]}") == "E203");
  CHECK(code_of("parallelism.layers=[2, 0, 2]") == "E203");
  CHECK(code_of("parallelism={mode: auto, stages: 2}") == "E204");
  CHECK(codes(small, {"parallelism.stages=4", "elasticity.workers=2..3"}) == "E205");
  CHECK(code_of("checkpoint.placement=two") == "E004");
  CHECK(code_of("elasticity.workers=0") == "E102");
  CHECK(code_of("elasticity.workers=4..100000") == "E102");
  CHECK(code_of("stop.steps=0") == "E102");
  CHECK(code_of("stop={tokens: 100}") == "E102");  // less than one step
  CHECK(code_of("name=No Spaces") == "E007");
  CHECK(code_of("optimizer.lr=fast") == "E007");
  CHECK(code_of("optimizer.betas=[0.9]") == "E006");
  CHECK(code_of("optimizer.betas=[0.9, 1.0]") == "E102");
  CHECK(code_of("optimizer.lr=-1") == "E102");
  CHECK(code_of("elasticity.wait_for_min=10") == "E007");
  CHECK(code_of("elasticity.on_loss=replcae") == "E007");
  CHECK(code_of("optimizer.exact=yes") == "E007");
  CHECK(code_of("model.init=somewhere") == "E007");
  CHECK(code_of("checkpoint.keep.last=0") == "E102");
}

TEST_CASE("sizes that would overflow are refused, not wrapped") {
  CHECK(code_of("batch.global=16777216T tokens") == "E007");
  CHECK(codes(small, {"batch.global=99999999999"}) == "E102");
  CHECK(code_of("stop.steps=9e18") == "E102");
  CHECK(codes(small, {"model={n_layer: 1024, d_model: 65536, n_head: 64, d_ff: 524288, vocab_size: "
                      "4194304, context: 64}"}) == "");
  CHECK(codes(small, {"model.d_model=65540", "model.n_head=1"}) == "E102");
}

TEST_CASE("an explicit layout sets the worker count, and a shorter form is enough") {
  const job_spec s =
      good(small, {"parallelism={stages: 2, replicas: 2}", "batch.micro=1", "batch.leaves=4"});
  CHECK(s.parallelism.is_explicit);
  CHECK(s.elasticity.workers_min == 4);
  CHECK(s.elasticity.workers_max == 4);
  const job_spec t = good(small, {"parallelism.layers=[0, 4]"});
  CHECK(t.parallelism.stages == 2);
  CHECK(t.parallelism.replicas == 1);
}

TEST_CASE("initial weights are named in three ways") {
  CHECK(good(small, {"model.init=hf:/models/kogpt2"}).model.init == "hf:/models/kogpt2");
  CHECK(good(small, {"model.init=checkpoint:other-job@18_000"}).model.init ==
        "checkpoint:other-job@18000");
  CHECK(good(small, {"model.init={seed: 7, std: 0.01}"}).model.init_seed == 7);
}

TEST_CASE("a preset's field can be overridden, and d_ff follows d_model") {
  const job_spec s = good(small, {"model.d_model=128"});
  CHECK(s.model.preset == "tiny");
  CHECK(s.model.d_ff == 512);
  CHECK(good(small, {"model.d_model=128", "model.d_ff=100"}).model.d_ff == 100);
  CHECK(good(small, {"model={n_layer: 1, d_model: 8, n_head: 2, context: 16}"}).model.vocab_size ==
        256);
}

TEST_CASE("overrides reach every path and say so when they can't") {
  CHECK(good(small, {"batch.micro=1", "batch.micro=2"}).batch.micro_sequences == 2);
  CHECK(good(small, {"data.train=[a.txt, b.txt]", "data.train.1=c.txt"}).data.train[1].path ==
        "c.txt");
  CHECK(good(small, {"checkpoint.keep.last=5"}).checkpoint.keep_last == 5);
  for (const char* bad : {"batch.micro", "=8", "batch..micro=8", "name.x=1", "a b=1", "\x1b=1"}) {
    INFO(bad);
    CHECK(code_of(bad) == "E010");
  }
  CHECK(code_of("batch.mikro=8") == "E002");
  const spec_result r = parse(small, {"batch.micro=none"});
  REQUIRE(r.problems.size() == 1);
  CHECK(format_problems(r.problems).find("--set batch.micro=none: error[E007]: batch.micro") == 0);
  CHECK(code_of("batch.micro=[") == "E001");
  CHECK(code_of("batch.micro=*a") == "E001");  // yaml-cpp: unknown alias
}

TEST_CASE("tokens count as steps of the job's own batch") {
  const job_spec s = good(small, {"stop={tokens: 1M}", "checkpoint.every=204800 tokens"});
  CHECK(s.stop_steps == 488);  // 2,048 tokens a step
  CHECK(s.checkpoint.every_steps == 100);
  CHECK(good(small, {"stop={tokens: 1M, steps: 7}"}).stop_steps == 7);
  CHECK(good(small, {"batch.global=2Ki tokens"}).batch.global_sequences == 32);
}

TEST_CASE("checkpoints go by steps, by time or by both") {
  const job_spec s = good(small, {"checkpoint.every=[500 steps, 10m]"});
  CHECK(s.checkpoint.every_steps == 500);
  CHECK(s.checkpoint.every_ms == 600'000);
  CHECK(good(small, {"checkpoint.every=25"}).checkpoint.every_steps == 25);
}

TEST_CASE("micro auto leaves microbatches for the largest worker count") {
  CHECK(resolve_micro_sequences(512, 1024, 8, 8) == 4);
  CHECK(resolve_micro_sequences(32, 64, 1, 1) == 8);
  CHECK(resolve_micro_sequences(32, 64, 1, 8) == 2);
  CHECK(resolve_micro_sequences(12, 64, 1, 1) == 2);
  CHECK(resolve_micro_sequences(7, 64, 1, 1) == 1);
  CHECK(resolve_micro_sequences(512, 8192, 1, 1) == 1);
}

TEST_CASE("micro auto takes smaller microbatches where that balances the leaves") {
  // Two microbatches a worker are 16: at 3, 5, 6 and 7 replicas that falls below 0.90; 64 don't.
  CHECK(resolve_micro_sequences(64, 64, 1, 8) == 1);
  CHECK(resolve_micro_sequences(128, 64, 1, 8) == 2);
  CHECK(resolve_micro_sequences(64, 64, 8, 8) == 4);  // 8 replicas alone are even as it is
  for (const int most : {2, 3, 4, 6, 8, 12, 16})
    for (int least = 1; least <= most; ++least) {
      const auto micro = resolve_micro_sequences(256, 64, least, most);
      CAPTURE(least);
      CAPTURE(most);
      CHECK(are_leaves_balanced(256 / micro, least, most));
    }
}

TEST_CASE("what YAML would let through is refused with its line") {
  CHECK(codes("version: 1\n\tname: x\n") == "E001");
  CHECK(codes(small + "a: \xff\n") == "E001");
  CHECK(codes(small + std::string("a: \0b\n", 6)) == "E001");
  CHECK(codes(small + "a: \x1b[2J\n") == "E001");
  CHECK(codes(small + "a: \"\\e[2J\"\n") == "E001");
  CHECK(codes(small + "---\nversion: 1\n") == "E001");
  CHECK(codes(small + "a: [1, 2\n") == "E001");
  CHECK(codes(small + "a: &x 1\nb: *x\n") == "E009");
  CHECK(codes("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n") == "E009");
  CHECK(codes(small + "a: !!python/object:os.system x\n") == "E009");
  CHECK(codes(small + "? [a, b]\n: c\n") == "E001");
  CHECK(codes("\xEF\xBB\xBF" + small) == "");
  std::string crlf;
  for (const char c : small) crlf += c == '\n' ? std::string("\r\n") : std::string(1, c);
  CHECK(good(crlf) == good(small));
  const spec_result r = parse(small + "x: [1, 2\n");
  REQUIRE(r.problems.size() == 1);
  CHECK(r.problems[0].line >= 7);
}

TEST_CASE("bombs are refused quickly") {
  const auto repeated = [](const std::string& piece, int count) {
    std::string out;
    for (int i = 0; i < count; ++i) out += piece;
    return out;
  };
  for (const char* piece :
       {"[",   "{", "[{", "{a: ", "[a,",   "- ",     "? ",   ": ",    "&a ", "!",
        "{},", "'", "\"", "|\n",  "- -\n", "a: 1\n", "%a\n", "---\n", ",",   "*a "}) {
    INFO(piece);
    CHECK(codes(repeated(piece, 100'000)) != "");
  }
  std::string stairs;
  for (int i = 0; i < 1000; ++i) stairs += std::string(static_cast<std::size_t>(i), ' ') + "a:\n";
  CHECK(codes(stairs) == "E008");
  CHECK(codes(std::string(limits::spec_bytes_max + 1, '#')) == "E008");
  std::string keys = small;
  for (int i = 0; i < 20'000; ++i) keys += "key" + std::to_string(i) + ": 1\n";
  CHECK(parse(keys).problems.size() == 100);
  CHECK(codes(small + "n: " + std::string(100'000, '9') + "\n") == "E002");
  CHECK(code_of("stop.steps=" + std::string(100'000, '9')) == "E007");
}

TEST_CASE("the resolved form parses back to the same spec") {
  std::vector<job_spec> specs = {good(small), good(full)};
  // A job as submit leaves it, and one with every option moved.
  specs.push_back(good(small));
  specs.back().data.train[0] = {"/data/a \"b\" \\c: #d.txt", "text", 12345,
                                "0123456789abcdef0123456789abcdef"};
  specs.push_back(good(small, {"model.init=\"hf:/m o/d: x\"", "checkpoint.every=[3 steps, 1500ms]",
                               "parallelism={stages: 3, layers: [1, 3, 0], schedule: gpipe}",
                               "elasticity.workers=3..5", "resources.labels={\"a: b\": \"no\"}",
                               "optimizer={lr: 0.1234567890123456, eps: 1e-300}",
                               "data.valid=v.txt", "eval={every: 3 steps, batches: 2}"}));
  for (const job_spec& s : specs) {
    const std::string text = write_job_spec_yaml(s);
    INFO(text);
    CHECK(good(text) == s);
    CHECK(write_job_spec_yaml(good(text)) == text);
  }
}

TEST_CASE("any spec that parses has a resolved form that parses back to it") {
  std::mt19937_64 random(11);
  const auto pick = [&random](std::initializer_list<const char*> choices) {
    return std::string(choices.begin()[random() % choices.size()]);
  };
  int parsed = 0;
  for (int i = 0; i < 1500; ++i) {
    std::vector<std::string> set;
    const auto maybe = [&set, &random](const std::string& override) {
      if (random() % 3 == 0) set.push_back(override);
    };
    maybe("model.preset=" + pick({"tiny", "gpt2", "tiny-6", "megatron-1t", "shakespeare"}));
    maybe("model.d_model=" + pick({"64", "128", "96"}));
    maybe("model.init=" + pick({"hf:x", "checkpoint:j@5", "{seed: 5}", "{std: 1e-3}"}));
    maybe("data.train=" + pick({"[a.txt, b.txt]", "{path: c.bin, format: llmc}"}));
    maybe("data.valid_fraction=" + pick({"0", "0.05", "0.123456789"}));
    maybe("batch.global=" + pick({"64", "96 sequences", "64Ki tokens", "7", "1024"}));
    maybe("batch.micro=" + pick({"auto", "1", "2", "4"}));
    maybe("batch.leaves=" + pick({"auto", "1", "2", "4", "8"}));
    maybe("batch.sequence=" + pick({"64", "32", "17"}));
    maybe("stop=" + pick({"{steps: 1}", "{tokens: 1B}", "{steps: 1_000, tokens: 1T}"}));
    maybe("schedule=" + pick({"{type: constant}", "{warmup: 1}", "{min_lr: 1e-9, decay: 5}"}));
    maybe("eval=" + pick({"{every: never}", "{every: 5 steps}", "{every: 7, batches: 3}"}));
    maybe("parallelism=" + pick({"{stages: 2}", "{stages: 3, replicas: 2}", "{schedule: gpipe}",
                                 "{layers: [2, 2]}", "{mode: auto}"}));
    maybe("elasticity.workers=" + pick({"1", "1..4", "2..8", "6..7", "1..4096"}));
    maybe("elasticity.on_loss=" + pick({"replace", "shrink", "wait"}));
    maybe("elasticity.wait_for_min=" + pick({"0s", "1500ms", "90m", "3d"}));
    maybe("checkpoint=" + pick({"{every: 5}", "{every: 10m}", "{every: [5, 1h], placement: two}",
                                "{keep: {last: 1, every: 100}}", "{store: \"/a b\"}"}));
    maybe("priority=" + pick({"-5", "0", "12"}));
    maybe("observe.log_every=" + pick({"1 step", "100 steps"}));
    const spec_result r = parse(small, set);
    if (!r.spec) continue;
    ++parsed;
    const std::string text = write_job_spec_yaml(*r.spec);
    INFO(text);
    CHECK(good(text) == *r.spec);
    CHECK(r.spec->batch.global_sequences % r.spec->batch.micro_sequences == 0);
    CHECK(r.spec->batch.microbatch_count() % r.spec->batch.leaf_count == 0);
  }
  CHECK(parsed > 100);
}

TEST_CASE("no mutation of a valid file crashes, hangs or yields a spec with a problem") {
  std::mt19937_64 random(7);
  const std::string pieces[] = {"[",
                                "]",
                                "{",
                                "}",
                                ":",
                                ": ",
                                "\n",
                                "- ",
                                "  ",
                                "#",
                                "&a",
                                "*a",
                                "!",
                                "|",
                                ">",
                                "'",
                                "\"",
                                "%",
                                "@",
                                "`",
                                "?",
                                ",",
                                "\t",
                                "\r",
                                "\xff",
                                "\xEA\xB0\x80",
                                "---\n",
                                "...\n",
                                "0",
                                "99999999999999999999",
                                "-",
                                "1e999",
                                "null",
                                "~",
                                "<<: ",
                                "\\",
                                std::string(1, '\0')};
  for (int i = 0; i < 4000; ++i) {
    std::string text = i % 2 ? full : small;
    const int edits = 1 + static_cast<int>(random() % 6);
    for (int e = 0; e < edits; ++e) {
      const std::size_t at = random() % (text.size() + 1);
      const std::size_t length = random() % 12;
      switch (random() % 5) {
        case 0:
          text.insert(at, pieces[random() % std::size(pieces)]);
          break;
        case 1:
          text.erase(at, length);
          break;
        case 2:
          text.insert(at, text.substr(random() % text.size(), 4 * length));
          break;
        case 3:
          if (at < text.size()) text[at] = static_cast<char>(random() % 256);
          break;
        default:
          if (at < text.size()) text.replace(at, 1, pieces[random() % std::size(pieces)]);
      }
      if (text.empty()) text = " ";
    }
    const spec_result r = parse(text);
    REQUIRE(r.spec.has_value() == r.problems.empty());
    REQUIRE(std::is_sorted(r.problems.begin(), r.problems.end(),
                           [](const spec_problem& a, const spec_problem& b) {
                             return std::pair(a.line, a.column) < std::pair(b.line, b.column);
                           }));
    const std::string shown = format_problems(r.problems);
    REQUIRE(std::all_of(shown.begin(), shown.end(),
                        [](char c) { return c == '\n' || static_cast<unsigned char>(c) >= 0x20; }));
    if (r.spec) {
      INFO(text);
      CHECK(good(write_job_spec_yaml(*r.spec)) == *r.spec);
    }
  }
}
