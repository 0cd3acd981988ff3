#include <map>
#include <mutex>

#include "storage/kv.hpp"

namespace stagecoach {
namespace {

class kv_memory final : public kv {
 public:
  result<std::optional<std::string>> get(std::string_view key) const override {
    const std::lock_guard lock(mutex_);
    const auto at = rows_.find(key);
    if (at == rows_.end()) return std::optional<std::string>{};
    return std::optional<std::string>{at->second};
  }

  result<void> write(const std::vector<kv_write>& batch, durability) override {
    const std::lock_guard lock(mutex_);
    for (const auto& w : batch) {
      if (w.what == kv_write::kind::put)
        rows_[w.key] = w.value;
      else
        rows_.erase(w.key);
    }
    return ok();
  }

  result<void> scan(std::string_view prefix,
                    const std::function<bool(std::string_view, std::string_view)>& visit,
                    std::string_view first) const override {
    // Copied first: the visitor sees one moment and may write, as with RocksDB's snapshot.
    std::vector<std::pair<std::string, std::string>> found;
    {
      const std::lock_guard lock(mutex_);
      for (auto at = rows_.lower_bound(std::max(prefix, first));
           at != rows_.end() && at->first.starts_with(prefix); ++at)
        found.push_back(*at);
    }
    for (const auto& [key, value] : found)
      if (!visit(key, value)) break;
    return ok();
  }

  result<void> flush() override { return ok(); }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::string, std::less<>> rows_;
};

}  // namespace

std::unique_ptr<kv> make_kv_memory() { return std::make_unique<kv_memory>(); }

}  // namespace stagecoach
