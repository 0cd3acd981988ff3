"""A real cluster of this program's processes: start, kill, ask, wait. For the tests and for tools/chaos.

Every process dies with the one that started it (PR_SET_PDEATHSIG), so a killed script leaves nothing behind.
Knows no job and no fault; where processes run (one host, or a network of their own) is `place`'s word.
"""
import ctypes
import json
import os
import pathlib
import random
import signal
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with_parent():
    """For preexec_fn. The signal comes when the *thread* that started it ends, so only the main thread may ask."""
    if threading.current_thread() is threading.main_thread():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def make_text(path):
    """Words from a fixed rule: no file of this machine is needed."""
    words = "stage coach the wheel turns and road is long train on horses rest at dusk".split()
    source = random.Random(7)
    path.write_text("\n".join(" ".join(source.choice(words) for _ in range(12)) for _ in range(900)) + "\n")


class Cluster:
    """identity: from a name (coordinator, alice, w1, ...) to TLS flags; None: plain ports."""

    host = "127.0.0.1"  # where the coordinator listens

    def __init__(self, program, folder, environment=None, identity=None):
        self.program = program
        self.folder = pathlib.Path(folder)
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

    def place(self, name):
        """A command that the process is started under, and flags for it."""
        return [], []

    def way_from(self, name):
        """Where a worker finds the coordinator."""
        return f"{self.host}:{self.port}"

    def spawn(self, name, arguments):
        under, flags = self.place(name)
        with open(self.folder / "logs" / f"{name}.log", "ab") as log:
            return subprocess.Popen([*under, self.program, *arguments, *flags], stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=log, env=self.environment, preexec_fn=die_with_parent)

    def start_coordinator(self, *more):
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        self.coordinator = self.spawn("coordinator", [
            "coordinator", "--state", str(self.folder / "state"), "--listen", f"{self.host}:{self.port}",
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
        self.workers[name] = self.spawn(name, ["worker", "--coordinator", self.way_from(name), "--name", name,
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

    def call(self, method, path, body=None, seconds=10):
        data = None if body is None else json.dumps(body).encode()
        scheme = "http" if self.tls is None else "https"
        request = urllib.request.Request(f"{scheme}://{self.host}:{self.port}/api/v1{path}", data=data, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=seconds, context=self.tls) as reply:
            return json.load(reply)

    def job(self, name):
        try:
            return self.call("GET", f"/jobs/{name}")
        except (urllib.error.URLError, OSError):
            return {"state": "AWAY", "step": -1, "generation": -1}

    def cli(self, *arguments):
        return subprocess.run([self.program, *arguments, "--coordinator", f"{self.host}:{self.port}",
                               *self.identity("alice")], text=True, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=120)

    def submit(self, path, *more):
        done = self.cli("submit", path, "-d", "-q", *more)
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
