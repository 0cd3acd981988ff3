// parity_batches JOB.yaml STEPS BATCHES.bin JOB.json: what Stagecoach trains on, for an outside
// trainer.
//
// BATCHES: int32 little endian, per step global_sequences x (T + 1) tokens in position order.
// JOB.json: the resolved job. Data paths must be absolute in the job file.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "config/job_spec_yaml.hpp"
#include "coordinator/wire.hpp"
#include "model/data_order.hpp"
#include "storage/dataset.hpp"

using namespace stagecoach;

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: parity_batches JOB.yaml STEPS BATCHES.bin JOB.json\n");
    return 2;
  }
  std::ifstream file(argv[1]);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  auto parsed = parse_job_spec(text, argv[1]);
  if (!parsed.spec) {
    std::fputs(format_problems(parsed.problems).c_str(), stderr);
    return 3;
  }
  const job_spec& spec = *parsed.spec;
  auto data = open_dataset(spec.data, spec.model.vocab_size);
  if (!data) {
    std::fprintf(stderr, "error: %s\n", data.err().message.c_str());
    return 3;
  }
  const std::int64_t t = spec.batch.sequence_tokens;
  std::vector<std::int32_t> row(static_cast<std::size_t>(t) + 1);
  std::ofstream out(argv[3], std::ios::binary);
  for (std::int64_t position = 0; position < std::atoll(argv[2]) * spec.batch.global_sequences;
       ++position) {
    const std::int64_t begin =
        sample_begin(position, data->train->count(), t, spec.data.shuffle_seed);
    if (auto got = data->train->read(begin, t + 1, row.data()); !got) {
      std::fprintf(stderr, "error: %s\n", got.err().message.c_str());
      return 3;
    }
    out.write(reinterpret_cast<const char*>(row.data()),
              static_cast<std::streamsize>(row.size() * sizeof row[0]));
  }
  std::ofstream(argv[4]) << to_json_text(spec) << "\n";
  return out ? 0 : 1;
}
