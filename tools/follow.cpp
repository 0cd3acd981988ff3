#include "tools/follow.hpp"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <thread>

namespace stagecoach {
namespace {

double number(const nlohmann::json& j, const char* key, double fallback = 0) {
  const auto at = j.find(key);
  return at != j.end() && at->is_number() ? at->get<double>() : fallback;
}

std::string text_of(const nlohmann::json& j, const char* key) {
  const auto at = j.find(key);
  return at != j.end() && at->is_string() ? at->get<std::string>() : std::string();
}

std::string loss_text(const nlohmann::json& view) {
  const double loss = number(view, "loss", std::nan(""));
  return std::isnan(loss) ? "-" : fmt::format("{:.4f}", loss);
}

// The form that users of other trainers already parse: step, loss, norm, lr, speed, time.
std::string step_line(const nlohmann::json& step, std::int64_t steps) {
  const auto loss = step.contains("loss") && step["loss"].is_number()
                        ? fmt::format("{:.4f}", step["loss"].get<double>())
                        : std::string("nan");
  return fmt::format("step {:>6}/{} | loss {} | gnorm {:.3f} | lr {:.2e} | {} tok/s | {:.1f} ms",
                     static_cast<std::int64_t>(number(step, "step")), steps, loss,
                     number(step, "norm"), number(step, "lr"),
                     format_count(number(step, "tokens_per_s")), number(step, "step_ms"));
}

}  // namespace

std::string format_duration(double seconds) {
  if (seconds < 0 || !std::isfinite(seconds)) return "-";
  if (seconds < 60) return fmt::format("{:.1f}s", seconds);
  const auto whole = static_cast<std::int64_t>(seconds);
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  return fmt::format("{}h{:02}m", whole / 3600, whole % 3600 / 60);
}

std::string format_count(double value) {
  if (value >= 1e9) return fmt::format("{:.2f}G", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.2f}M", value / 1e6);
  if (value >= 1e4) return fmt::format("{:.1f}k", value / 1e3);
  return fmt::format("{:.0f}", value);
}

std::string format_bytes(double bytes) {
  if (bytes >= 1e9) return fmt::format("{:.1f} GB", bytes / 1e9);
  if (bytes >= 1e6) return fmt::format("{:.1f} MB", bytes / 1e6);
  if (bytes >= 1e3) return fmt::format("{:.1f} kB", bytes / 1e3);
  return fmt::format("{:.0f} B", bytes);
}

bool is_end_state(const std::string& state) {
  return state == "COMPLETED" || state == "FAILED" || state == "CANCELLED";
}

exit_code exit_code_of_state(const std::string& state) {
  if (state == "FAILED") return exit_code::failed;
  if (state == "CANCELLED") return exit_code::cancelled;
  return exit_code::success;
}

follow_outcome follow_job(const global_flags& flags, const api_client& api, const std::string& job,
                          std::int64_t log_every, std::chrono::milliseconds patience) {
  follow_outcome out;
  const bool redraw = is_terminal(STDOUT_FILENO) && !flags.quiet && !flags.is_json();
  const bool quiet = flags.quiet || flags.is_json();
  std::int64_t next_event = 0, printed_step = 0;
  auto heard = std::chrono::steady_clock::now();
  bool is_away = false;
  const auto line = [&](const std::string& words) {
    if (quiet) return;
    std::printf(redraw ? "\r\033[K%s\n" : "%s\n", words.c_str());
  };
  for (;;) {
    if (is_interrupted()) {
      line("");
      out.code = exit_code::interrupted;
      return out;
    }
    auto view = api.get("/jobs/" + job, std::chrono::seconds(5));
    if (!view) {
      const bool is_gone =
          view.err().code == errc::not_found || view.err().code == errc::unauthorised;
      if (is_gone || std::chrono::steady_clock::now() - heard > patience) {
        out.code = complain(flags, view.err());
        return out;
      }
      if (!is_away) line("the coordinator is away; training goes on, waiting for it");
      is_away = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      continue;
    }
    heard = std::chrono::steady_clock::now();
    is_away = false;
    out.job = *view;
    const auto steps = static_cast<std::int64_t>(number(*view, "steps"));
    if (auto events = api.get(fmt::format("/jobs/{}/events?since={}", job, next_event))) {
      for (const auto& e : (*events)["events"]) line("  * " + text_of(e, "text"));
      next_event = events->value("next", next_event);
    }
    if (!quiet) {
      // A redo after a rollback reports its steps again; they are the same, so print each once.
      auto series = api.get(fmt::format("/jobs/{}/series?from={}", job, printed_step + 1));
      if (series) {
        for (const auto& s : (*series)["steps"]) {
          const auto at = static_cast<std::int64_t>(number(s, "step"));
          if (at <= printed_step) continue;
          if (at == 1 || at % log_every == 0 || at == steps) line(step_line(s, steps));
          printed_step = at;
        }
      }
      if (redraw) {
        const double done = steps > 0 ? number(*view, "step") / static_cast<double>(steps) : 0;
        std::string bar(30, '.');
        for (std::size_t i = 0; i < bar.size() && static_cast<double>(i) < done * 30; ++i)
          bar[i] = '#';
        std::printf("\r\033[K%s %s %lld/%lld  loss %s  ETA %s", text_of(*view, "state").c_str(),
                    ("[" + bar + "]").c_str(), static_cast<long long>(number(*view, "step")),
                    static_cast<long long>(steps), loss_text(*view).c_str(),
                    format_duration(number(*view, "eta_s", -1)).c_str());
      }
      std::fflush(stdout);
    }
    const std::string state = text_of(*view, "state");
    if (is_end_state(state)) {
      if (redraw) std::printf("\r\033[K");
      out.code = exit_code_of_state(state);
      return out;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

}  // namespace stagecoach
