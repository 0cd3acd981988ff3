#!/usr/bin/env python3
"""How soon a real fault is known, and that load is not taken for one (DESIGN section 5, "Detection").

usage: detection_test.py PROGRAM faults|load [ROUNDS|MINUTES]
faults: SIGKILL, SIGSTOP, a cut link and a stuck trainer, each ROUNDS times (default 2) in a job of three; the time is
from the fault to the event with which the next generation is prepared. A host of its own for each worker where network
namespaces can be had, else loopback without the cuts. load: four workers that fill all cores for MINUTES (default 0.5).
Python's standard library only.
"""
import os
import pathlib
import signal
import statistics
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import private_network

IS_INSIDE = sys.argv[2] == "faults" and private_network.enter()
AMOUNT = float(sys.argv[3]) if len(sys.argv) > 3 else 0

import live_cluster
from cluster import PROGRAM, ROOT, check, explicit, job_file, main, say

# Bounds of issue 3, from the fault to the event. STAGECOACH_TEST_SLACK: how much longer a busy machine may take.
BOUNDS_MS = {"SIGKILL": 200, "SIGSTOP": 1500, "cut link": 1500, "stuck trainer": 3000}
SLACK = float(os.environ.get("STAGECOACH_TEST_SLACK", "3"))


class Hosts(live_cluster.Cluster):
    """Each worker on a host of its own, where there are any."""

    def __init__(self, name, network):
        super().__init__(PROGRAM, ROOT / name)
        self.network = network
        if network is not None:
            self.host = "10.77.0.1"

    def place(self, name):
        if self.network is None:
            return [], []
        if name == "coordinator":
            return [], ["--insecure"]
        if name not in self.network.hosts:
            self.network.add(name)
        host = self.network.hosts[name]
        return host.under(), ["--link-host", host.address, "--insecure"]


class Watch:
    """A job of three replicas that is hurt and heals, again and again."""

    def __init__(self, network):
        self.cluster = Hosts("faults", network)
        self.cluster.start_coordinator()
        for _ in range(3):
            self.cluster.start_worker()
        self.job = self.cluster.submit(job_file("watched", 1_000_000, "1..3", explicit(1, 3), "1000000 steps"))
        self.times = {}
        self.whole()

    def events(self):
        return self.cluster.call("GET", f"/jobs/{self.job}/events")["events"]

    def whole(self):
        """Waits until it runs on three, and a few steps more."""
        view = self.cluster.wait(self.job, lambda v: v["state"] == "RUNNING" and
                                 [m["state"] for m in v["plan"]["members"]] == ["running"] * 3, 60, "three members")
        self.cluster.wait_step(self.job, view["step"] + 10)

    def seen(self, kind, since, kinds, words="", seconds=20):
        """Milliseconds from `since` to the first event of these kinds."""
        until = time.time() + seconds
        while time.time() < until:
            found = [e for e in self.events() if e["unix_ms"] >= since * 1000 - 20 and e["kind"] in kinds and
                     words in e["text"]]
            if found:
                took = found[0]["unix_ms"] - since * 1000
                self.times.setdefault(kind, []).append(took)
                say(f"{kind}: {took:.0f} ms: {found[0]['kind']}: {found[0]['text']}")
                return
            time.sleep(0.02)
        check(False, f"{kind} was not seen in {seconds} s")

    def kill(self):
        victim = self.cluster.members(self.job)[-1]
        since = time.time()
        self.cluster.kill(victim)
        self.seen("SIGKILL", since, ("worker_lost",), victim)
        self.cluster.start_worker()
        self.whole()

    def freeze(self):
        victim = self.cluster.members(self.job)[-1]
        since = time.time()
        self.cluster.kill(victim, signal.SIGSTOP)
        self.seen("SIGSTOP", since, ("worker_lost",), victim)
        self.cluster.kill(victim, signal.SIGCONT)
        self.whole()

    def cut(self):
        a, b = self.cluster.members(self.job)[:2]
        lost = sum(e["kind"] == "worker_lost" for e in self.events())
        hosts = self.cluster.network.hosts
        since = time.time()
        self.cluster.network.cut(hosts[a], hosts[b])
        self.seen("cut link", since, ("generation_failed", "worker_lost"))
        self.cluster.network.mend(hosts[a], hosts[b])
        self.whole()
        check(sum(e["kind"] == "worker_lost" for e in self.events()) == lost, "a cut link evicts nobody")

    def hang(self):
        """The one to hang takes the place of one that leaves; it says at which step it stops for good."""
        at = self.cluster.job(self.job)["step"] + 100
        self.cluster.kill(self.cluster.members(self.job)[-1])
        victim = self.cluster.start_worker("--inject", f"stall@{at}")
        view = self.cluster.wait(self.job, lambda v: v["state"] == "RUNNING" and (victim, "running") in
                                 [(m["name"], m["state"]) for m in v["plan"]["members"]], 60, "the stalling member")
        check(view["step"] < at, f"{victim} joins before step {at}")
        self.cluster.wait(self.job, lambda v: v["step"] >= at - 1, 200, f"step {at - 1}")
        since = time.time()
        self.seen("stuck trainer", since, ("worker_lost",), victim)
        self.cluster.kill(victim)
        self.cluster.start_worker()
        self.whole()


def group_faults():
    network = private_network.Network() if IS_INSIDE else None
    if network is None:
        say("no network namespaces on this machine: links are not cut")
    watch = Watch(network)
    try:
        for _ in range(int(AMOUNT or 2)):
            watch.kill()
            watch.freeze()
            if network is not None:
                watch.cut()
            watch.hang()
        for kind, times in watch.times.items():
            bound = BOUNDS_MS[kind]
            check(statistics.median(times) < bound * SLACK,
                  f"{kind}: median {statistics.median(times):.0f} ms of {len(times)}, worst {max(times):.0f} "
                  f"(target {bound}{', met' if statistics.median(times) < bound else ', missed'})")
    finally:
        watch.cluster.close()
        if network is not None:
            network.close()


def group_load():
    """Four workers: on two cores each is wanted twice over, and nobody is evicted."""
    cluster = Hosts("load", None)
    try:
        cluster.start_coordinator()
        for _ in range(4):
            cluster.start_worker()
        job = cluster.submit(job_file("load", 1_000_000, "4", explicit(2, 2), "1000000 steps"))
        began = cluster.wait_step(job, 1)
        until = time.time() + 60 * (AMOUNT or 0.5)
        while time.time() < until:
            time.sleep(1)
        view = cluster.job(job)
        events = cluster.call("GET", f"/jobs/{job}/events")["events"]
        bad = [e for e in events if e["kind"] in ("worker_lost", "generation_failed", "worker_probed")]
        for e in bad:
            say(f"{e['kind']}: {e['text']}")
        load = pathlib.Path("/proc/loadavg").read_text().split()[0]
        check(view["state"] == "RUNNING" and view["generation"] == began["generation"] and
              not [e for e in bad if e["kind"] != "worker_probed"],
              f"{AMOUNT or 0.5} minutes at a load of {load}: {view['step']} steps, generation {view['generation']}, "
              f"{len(bad)} suspicions or losses")
    finally:
        cluster.close()


if __name__ == "__main__":
    sys.exit(main({"faults": group_faults, "load": group_load}))
