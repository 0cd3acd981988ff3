#!/usr/bin/env python3
"""The exactness promise with real processes: layouts, kills, restarts, damaged stores; always the same hash.

usage: cluster_test.py PROGRAM GROUP     GROUP: matrix | faults | restarts | store | input
Python's standard library only. Everything runs on loopback in a temporary folder and is killed at the end.
"""
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

PROGRAM = os.path.abspath(sys.argv[1])
GROUP = sys.argv[2]
SEED = int(os.environ.get("STAGECOACH_TEST_SEED", "1"))
ROOT = pathlib.Path(tempfile.mkdtemp(prefix="stagecoach-test-"))
RANDOM = random.Random(SEED)
FAILURES = []


def say(words):
    print(f"[{time.strftime('%H:%M:%S')}] {words}", flush=True)


def check(condition, words):
    if not condition:
        FAILURES.append(words)
    say(("ok      " if condition else "FAILED  ") + words)


def make_text(path):
    """Words from a fixed rule: no file of this machine is needed."""
    words = "stage coach the wheel turns and road is long train on horses rest at dusk".split()
    source = random.Random(7)
    path.write_text("\n".join(" ".join(source.choice(words) for _ in range(12)) for _ in range(900)) + "\n")


JOB = """version: 1
name: {name}
model: {{preset: tiny}}
data: {{tokenizer: bytes, train: [{{path: {text}, format: text}}]}}
batch: {{global: 16 sequences, micro: 1, sequence: 64, leaves: 8}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup: 4 steps}}
stop: {{steps: {steps}}}
elasticity: {{workers: {workers}}}
{parallelism}
checkpoint: {{every: {every}, keep: {{last: {keep}}}}}
"""


def job_file(name, steps=30, workers="1", parallelism="", every="10 steps", keep=3):
    path = ROOT / f"{name}.yaml"
    path.write_text(JOB.format(name=name, text=ROOT / "text.txt", steps=steps, workers=workers,
                               parallelism=parallelism, every=every, keep=keep))
    return str(path)


def explicit(stages, replicas, schedule="1f1b"):
    return f"parallelism: {{mode: explicit, stages: {stages}, replicas: {replicas}, schedule: {schedule}}}"


class Cluster:
    def __init__(self, name, environment=None):
        self.folder = ROOT / name
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.environment = dict(os.environ, **(environment or {}))
        self.port = 0
        self.workers = {}
        self.count = 0
        self.coordinator = None

    def spawn(self, name, arguments):
        log = open(self.folder / "logs" / f"{name}.log", "ab")
        return subprocess.Popen([PROGRAM] + arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=self.environment)

    def start_coordinator(self, *more):
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        self.coordinator = self.spawn("coordinator", [
            "coordinator", "--state", str(self.folder / "state"), "--listen", f"127.0.0.1:{self.port}",
            "--port-file", str(port_file), *more])
        until = time.time() + 30
        while time.time() < until:
            if port_file.exists():
                self.port = int(port_file.read_text())
                return
            if self.coordinator.poll() is not None:
                break
            time.sleep(0.01)
        raise RuntimeError("the coordinator did not start:\n" + self.log("coordinator"))

    def log(self, name):
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")[-3000:]

    def start_worker(self, *more):
        self.count += 1
        name = f"w{self.count}"
        self.workers[name] = self.spawn(name, ["worker", "--coordinator", f"127.0.0.1:{self.port}", "--name", name,
                                               "--threads", "1", *more])
        return name

    def kill(self, name, number=signal.SIGKILL):
        self.workers[name].send_signal(number)
        if number == signal.SIGKILL:
            self.workers.pop(name).wait()

    def kill_coordinator(self):
        self.coordinator.kill()
        self.coordinator.wait()

    def kill_all(self):
        for process in [*self.workers.values(), self.coordinator]:
            process.kill()
        for process in [*self.workers.values(), self.coordinator]:
            process.wait()
        self.workers.clear()

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/v1{path}", data=data, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def job(self, name):
        try:
            return self.call("GET", f"/jobs/{name}")
        except (urllib.error.URLError, OSError):
            return {"state": "AWAY", "step": -1, "generation": -1}

    def cli(self, *arguments):
        return subprocess.run([PROGRAM, *arguments, "--coordinator", f"127.0.0.1:{self.port}"], text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=120)

    def submit(self, path):
        done = self.cli("submit", path, "-d", "-q")
        if done.returncode != 0:
            raise RuntimeError(f"submit failed: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def wait(self, name, condition, seconds=120, words=""):
        until = time.time() + seconds
        view = {}
        while time.time() < until:
            view = self.job(name)
            if condition(view):
                return view
            time.sleep(0.02)
        raise RuntimeError(f"{name}: {words or 'condition'} not reached in {seconds} s; last: "
                           f"{ {k: view.get(k) for k in ('state', 'step', 'generation', 'reason')} }\n"
                           + self.log("coordinator"))

    def wait_step(self, name, step):
        return self.wait(name, lambda v: v["state"] in ("COMPLETED", "FAILED") or
                         (v["state"] == "RUNNING" and v["step"] >= step), words=f"step {step}")

    def finish(self, name, seconds=180):
        return self.wait(name, lambda v: v["state"] in ("COMPLETED", "FAILED", "CANCELLED"), seconds, "the end")

    def members(self, name):
        return [m["name"] for m in self.job(name)["plan"]["members"]]

    def close(self):
        for process in [*self.workers.values(), self.coordinator]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()


def run(name, path, workers, disturb=None, environment=None):
    """One job on a fresh cluster; returns (final view, cluster closed)."""
    cluster = Cluster(name, environment)
    try:
        cluster.start_coordinator()
        for _ in range(workers):
            cluster.start_worker()
        job = cluster.submit(path)
        if disturb is not None:
            disturb(cluster, job)
        return cluster.finish(job)
    finally:
        cluster.close()


GOLDEN = {}


def golden(steps, environment=None):
    key = (steps, json.dumps(environment or {}))
    if key not in GOLDEN:
        view = run(f"golden-{len(GOLDEN)}", job_file(f"golden-{len(GOLDEN)}", steps), 1, environment=environment)
        GOLDEN[key] = view["weights_hash"]
        check(view["state"] == "COMPLETED" and view["step"] == steps and len(view["weights_hash"]) == 32,
              f"one worker alone completes {steps} steps: {view['weights_hash']}")
    return GOLDEN[key]


def same(view, steps, words, environment=None):
    check(view["state"] == "COMPLETED" and view["weights_hash"] == golden(steps, environment),
          f"{words}: {view['state']} {view['weights_hash']} {view.get('reason') or ''}")


def group_matrix():
    layouts = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (3, 2), (2, 3)]
    for i, (stages, replicas) in enumerate(layouts):
        schedule = ("1f1b", "gpipe")[i % 2]
        n = stages * replicas
        path = job_file(f"m{stages}x{replicas}", 12, str(n), explicit(stages, replicas, schedule))
        same(run(f"matrix{i}", path, n), 12, f"{stages} stages x {replicas} replicas, {schedule}, {n} workers")
    environment = {"STAGECOACH_MAX_ISA": "avx2"}
    path = job_file("avx2", 12, "4", explicit(2, 2))
    same(run("avx2", path, 4, environment=environment), 12, "2 x 2 capped to AVX2, against its own value", environment)


def group_faults():
    steps = 300

    def kill_with_spare(cluster, job):
        cluster.start_worker()
        cluster.wait_step(job, 40 + RANDOM.randrange(60))
        cluster.kill(RANDOM.choice(cluster.members(job)))

    def kill_without_spare(cluster, job):
        cluster.wait_step(job, 40 + RANDOM.randrange(60))
        cluster.kill(RANDOM.choice(cluster.members(job)))

    def kill_twice(cluster, job):
        kill_without_spare(cluster, job)
        cluster.wait(job, lambda v: v["state"] == "RUNNING" and v["generation"] > 1)
        time.sleep(RANDOM.random() * 0.3)
        cluster.kill(RANDOM.choice(cluster.members(job)))
        cluster.start_worker()

    def freeze(cluster, job):
        cluster.start_worker()
        cluster.wait_step(job, 50)
        generation = cluster.job(job)["generation"]
        victim = RANDOM.choice(cluster.members(job))
        cluster.kill(victim, signal.SIGSTOP)
        cluster.wait(job, lambda v: v["state"] in ("RUNNING", "COMPLETED") and v["generation"] > generation, 30,
                     "a generation without the frozen worker")
        cluster.kill(victim, signal.SIGCONT)

    cases = [
        ("killed worker, a spare takes its place (2 replicas)", 2, "2..3", explicit(1, 2), kill_with_spare),
        ("killed worker of a single pipeline, a spare takes its stage", 2, "2..3", explicit(2, 1), kill_with_spare),
        ("killed worker, no spare: laid out anew on those left", 3, "1..3", "", kill_without_spare),
        ("two kills and a late joiner", 4, "1..4", explicit(2, 2), kill_twice),
        ("frozen worker, thawed later", 2, "1..3", explicit(1, 2), freeze),
    ]
    for i, (words, workers, band, parallelism, disturb) in enumerate(cases):
        path = job_file(f"fault{i}", steps, band, parallelism, "50 steps")
        same(run(f"fault{i}", path, workers, disturb), steps, words)


def group_restarts():
    steps = 300

    def kill_coordinator(cluster, job):
        before = cluster.wait_step(job, 40)
        cluster.kill_coordinator()
        left = time.time()
        time.sleep(1.0)
        cluster.start_coordinator()
        back = time.time()
        view = cluster.wait_step(job, before["step"] + 1)
        check(view["generation"] == before["generation"], "the coordinator's death changed no generation")
        series = cluster.call("GET", f"/jobs/{job}/series")["steps"]
        meanwhile = [s for s in series if left * 1000 < s["unix_ms"] < back * 1000]
        check(len(meanwhile) > 0, f"{len(meanwhile)} steps went on while the coordinator was away")

    def kill_everything(cluster, job):
        cluster.wait_step(job, 130)
        cluster.kill_all()
        cluster.start_coordinator()
        for _ in range(2):
            cluster.start_worker()

    def pause_resume(cluster, job):
        cluster.wait_step(job, 40)
        check(cluster.cli("pause", job).returncode == 0, "pause is accepted")
        cluster.wait(job, lambda v: v["state"] == "PAUSED", 30, "PAUSED")
        time.sleep(0.3)
        check(cluster.cli("resume", job).returncode == 0, "resume is accepted")

    def drain(cluster, job):
        cluster.wait_step(job, 40)
        victim = cluster.members(job)[0]
        cluster.start_worker()
        check(cluster.cli("drain", victim, "--reason", "test").returncode == 0, "drain is accepted")
        cluster.wait(job, lambda v: v["state"] == "COMPLETED" or
                     (v["state"] == "RUNNING" and victim not in [m["name"] for m in v["plan"]["members"]]), 30,
                     "a plan without the drained worker")

    cases = [
        ("kill -9 of the coordinator and a restart", 2, "2", explicit(2, 1), kill_coordinator),
        ("kill -9 of everything and a restart from the store", 2, "2", explicit(1, 2), kill_everything),
        ("pause and resume", 2, "2", explicit(2, 1), pause_resume),
        ("a drained worker", 2, "1..2", explicit(1, 2), drain),
    ]
    for i, (words, workers, band, parallelism, disturb) in enumerate(cases):
        path = job_file(f"restart{i}", steps, band, parallelism, "25 steps")
        same(run(f"restart{i}", path, workers, disturb), steps, words)


def group_store():
    steps = 200

    def damaged(damage):
        def disturb(cluster, job):
            cluster.wait(job, lambda v: v["step"] >= 120 and (v.get("checkpoint") or {}).get("step", 0) >= 100)
            cluster.kill_all()
            damage(cluster.folder / "state")
            cluster.start_coordinator()
            for _ in range(2):
                cluster.start_worker()
        return disturb

    def first_part(manifest):
        text = manifest.read_text()
        return manifest.parent / json.loads(text[:text.rindex("xxh3-128:")])["parts"][0]["file"]

    def newest(state, pattern):
        found = sorted(p for p in (state / "checkpoints").rglob(pattern))
        assert found, f"no {pattern} under {state}"
        return found

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(bytes(data))

    def flip_part(state):
        manifest = newest(state, "manifest-*.json")[-1]
        flip(first_part(manifest))

    def lose_part(state):
        manifest = newest(state, "manifest-*.json")[-1]
        first_part(manifest).unlink()

    def lose_manifest(state):
        name = newest(state, "manifest-*.json")[-1].name
        for path in state.rglob(name):
            path.unlink()

    def flip_manifest(state):
        name = newest(state, "manifest-*.json")[-1].name
        for path in state.rglob(name):
            flip(path)

    def lose_index(state):
        shutil.rmtree(state / "index")

    def damage_index(state):
        for path in (state / "index").iterdir():
            if path.is_file() and path.stat().st_size > 0:
                flip(path)

    cases = [("a flipped bit in a part", flip_part), ("a missing part", lose_part),
             ("a missing manifest", lose_manifest), ("a flipped bit in a manifest", flip_manifest),
             ("the whole RocksDB folder gone", lose_index), ("the RocksDB folder damaged", damage_index)]
    for i, (words, damage) in enumerate(cases):
        path = job_file(f"store{i}", steps, "2", explicit(2, 1), "20 steps", keep=4)
        same(run(f"store{i}", path, 2, damaged(damage)), steps, f"restart with {words}")


def main():
    make_text(ROOT / "text.txt")
    began = time.time()
    try:
        {"matrix": group_matrix, "faults": group_faults, "restarts": group_restarts,
         "store": group_store}[GROUP]()
    except Exception as problem:  # whatever it is, the test has failed and says why
        check(False, f"{type(problem).__name__}: {problem}")
    say(f"{GROUP}: {len(FAILURES)} failed, seed {SEED}, {time.time() - began:.0f} s")
    if FAILURES:
        say(f"logs are kept in {ROOT}")
        return 1
    shutil.rmtree(ROOT, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
