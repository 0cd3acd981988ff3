// Memory of the CPU backend.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace stagecoach {

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

/// 64-byte aligned memory, not zeroed. From 4 MiB on in huge pages where the system grants them:
/// the head walks columns of rows that lie 200 KB apart, and small pages cost it a few percent.
inline float* allocate_floats(std::int64_t count) {
  constexpr std::size_t huge_page = std::size_t{2} << 20;
  std::size_t bytes =
      std::max<std::size_t>(64, static_cast<std::size_t>(round_up(count, 16)) * sizeof(float));
  const bool is_large = bytes >= 2 * huge_page;
  if (is_large) bytes = (bytes + huge_page - 1) / huge_page * huge_page;
  void* p = std::aligned_alloc(is_large ? huge_page : 64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  if (is_large) madvise(p, bytes, MADV_HUGEPAGE);  // advice only: a refusal changes nothing
  return static_cast<float*>(p);
}

/// Scratch that grows and is kept.
class scratch_buffer {
 public:
  scratch_buffer() = default;
  scratch_buffer(scratch_buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(other.count_) {}
  ~scratch_buffer() { std::free(data_); }
  float* of(std::int64_t count) {
    if (count > count_) {
      std::free(data_);
      count_ = round_up(count, 16);
      data_ = allocate_floats(count_);
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  std::int64_t count_ = 0;
};

}  // namespace stagecoach
