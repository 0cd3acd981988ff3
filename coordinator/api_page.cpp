// The page at "/": a table of jobs and workers, read from the API every two seconds.
// Nothing is loaded from elsewhere, and texts enter the page as text, never as markup.
#include "coordinator/api.hpp"

namespace stagecoach {

namespace {

constexpr const char* page_html = R"html(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Stagecoach</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/page.css"><script src="/page.js" defer></script></head>
<body><h1>Stagecoach <small id="about"></small></h1>
<h2>Jobs</h2><table id="jobs"></table>
<h2>Workers</h2><table id="workers"></table>
<p id="problem" role="alert"></p></body></html>
)html";

constexpr const char* page_css = R"css(:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
small { font-weight: normal; opacity: .7; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
#problem { color: #c33; }
)css";

constexpr const char* page_js = R"js("use strict";
const dash = (x) => (x === null || x === undefined || x === "" ? "-" : String(x));
const short = (x, digits) => (x === null || x === undefined ? "-" : Number(x).toFixed(digits));
const columns = {
  jobs: [["NAME", (j) => j.name], ["ID", (j) => j.id], ["STATE", (j) => j.state],
         ["STEP", (j) => j.step + "/" + j.steps], ["LOSS", (j) => short(j.loss, 4)],
         ["VALID", (j) => short(j.valid_loss, 4)], ["TOK/S", (j) => short(j.tokens_per_s, 0)],
         ["WORKERS", (j) => j.workers + "/" + j.workers_max],
         ["ETA s", (j) => short(j.eta_s, 0)], ["REASON", (j) => dash(j.reason)]],
  workers: [["NAME", (w) => w.name], ["STATE", (w) => w.state], ["JOB", (w) => dash(w.job)],
            ["STAGE", (w) => w.stage === null ? "-" : w.stage + "/" + w.replica],
            ["DEVICE", (w) => w.device], ["THREADS", (w) => w.threads],
            ["HEARTBEAT ms", (w) => w.heartbeat_ms], ["HOST", (w) => w.host]],
};
function fill(id, rows) {
  const table = document.getElementById(id);
  const line = (cells, kind) => {
    const tr = document.createElement("tr");
    for (const text of cells) {
      const cell = document.createElement(kind);
      cell.textContent = text;
      tr.append(cell);
    }
    return tr;
  };
  table.replaceChildren(line(columns[id].map((c) => c[0]), "th"),
                        ...rows.map((r) => line(columns[id].map((c) => c[1](r)), "td")));
}
async function get(path) {
  const reply = await fetch("/api/v1/" + path);
  if (!reply.ok) throw new Error(path + ": " + reply.status);
  return reply.json();
}
async function refresh() {
  const problem = document.getElementById("problem");
  try {
    const [version, jobs, workers] = await Promise.all([get("version"), get("jobs?all=1"), get("workers")]);
    document.getElementById("about").textContent =
      version.version + ", incarnation " + version.incarnation;
    fill("jobs", jobs.jobs);
    fill("workers", workers.workers);
    problem.textContent = "";
  } catch (e) {
    problem.textContent = "coordinator does not answer (" + e.message + ")";
  }
  setTimeout(refresh, 2000);
}
refresh();
)js";

constexpr page_file files[] = {
    {"/", "text/html; charset=utf-8", page_html},
    {"/page.css", "text/css; charset=utf-8", page_css},
    {"/page.js", "text/javascript; charset=utf-8", page_js},
};

}  // namespace

const page_file* find_page_file(const std::string& path) {
  for (const auto& file : files)
    if (path == file.path) return &file;
  return nullptr;
}

}  // namespace stagecoach
