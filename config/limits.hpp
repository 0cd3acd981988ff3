// Bounds on everything that comes from outside, each with its reason. Checked before allocation.
#pragma once

#include <cstdint>

namespace stagecoach::limits {

inline constexpr std::int64_t spec_bytes_max = 1 << 20;  // a job file; real ones are 2 KB
inline constexpr int spec_depth_max = 16;                // YAML nesting; ours needs 4
inline constexpr std::int64_t control_message_bytes_max =
    4 << 20;  // a plan of 1,024 members is 300 KB
inline constexpr int json_depth_max = 64;
inline constexpr std::int64_t http_body_bytes_max = 2 << 20;
inline constexpr std::int64_t http_header_bytes_max = 16 << 10;
inline constexpr std::int64_t link_frame_bytes_max = std::int64_t{1} << 30;
inline constexpr std::int64_t safetensors_header_bytes_max = 100'000'000;  // the format's own limit
inline constexpr std::int64_t manifest_bytes_max = 64 << 20;
inline constexpr int stage_count_max = 64;
inline constexpr int replica_count_max = 1024;
inline constexpr int worker_count_max = 4096;
inline constexpr int layer_count_max = 1024;
inline constexpr std::int64_t d_model_max = 65536;
inline constexpr std::int64_t vocab_size_max = 1 << 22;
inline constexpr std::int64_t context_max = 1 << 20;
inline constexpr std::int64_t step_count_max = std::int64_t{1} << 40;
inline constexpr int name_bytes_max = 63;

}  // namespace stagecoach::limits
