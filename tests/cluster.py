"""What the tests with real processes share: a cluster on loopback, small jobs, their golden hash, checks.

usage of a test that imports it: TEST PROGRAM GROUP
Python's standard library only. Everything runs in a temporary folder and is killed at the end.
"""
import json
import os
import pathlib
import random
import shutil
import signal
import ssl
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
    """identity: from a name (coordinator, alice, w1, ...) to TLS flags; None: plain ports."""

    def __init__(self, name, environment=None, identity=None):
        self.folder = ROOT / name
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.environment = dict(os.environ, **(environment or {}))
        self.port = 0
        self.workers = {}
        self.count = 0
        self.coordinator = None
        self.identity = identity or (lambda name: [])
        self.tls = None
        if identity is not None:
            _, ca, _, certificate, _, key = identity("alice")
            self.tls = ssl.create_default_context(cafile=ca)
            self.tls.load_cert_chain(certificate, key)

    def spawn(self, name, arguments):
        log = open(self.folder / "logs" / f"{name}.log", "ab")
        return subprocess.Popen([PROGRAM] + arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=self.environment)

    def start_coordinator(self, *more):
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        self.coordinator = self.spawn("coordinator", [
            "coordinator", "--state", str(self.folder / "state"), "--listen", f"127.0.0.1:{self.port}",
            "--port-file", str(port_file), *self.identity("coordinator"), *more])
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
                                               "--threads", "1", *self.identity(name), *more])
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
        scheme = "http" if self.tls is None else "https"
        request = urllib.request.Request(f"{scheme}://127.0.0.1:{self.port}/api/v1{path}", data=data, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10, context=self.tls) as reply:
            return json.load(reply)

    def job(self, name):
        try:
            return self.call("GET", f"/jobs/{name}")
        except (urllib.error.URLError, OSError):
            return {"state": "AWAY", "step": -1, "generation": -1}

    def cli(self, *arguments):
        return subprocess.run([PROGRAM, *arguments, "--coordinator", f"127.0.0.1:{self.port}",
                               *self.identity("alice")], text=True, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=120)

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


def main(groups):
    make_text(ROOT / "text.txt")
    began = time.time()
    try:
        groups[GROUP]()
    except Exception as problem:  # whatever it is, the test has failed and says why
        check(False, f"{type(problem).__name__}: {problem}")
    say(f"{GROUP}: {len(FAILURES)} failed, seed {SEED}, {time.time() - began:.0f} s")
    if FAILURES:
        say(f"logs are kept in {ROOT}")
        return 1
    shutil.rmtree(ROOT, ignore_errors=True)
    return 0
