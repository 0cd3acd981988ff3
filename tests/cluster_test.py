#!/usr/bin/env python3
"""The exactness promise with real processes: layouts, kills, restarts, damaged stores; always the same hash.

usage: cluster_test.py PROGRAM GROUP     GROUP: matrix | faults | copies | feeds | sharded | restarts | store |
                                        deputy | compete | stragglers | elastic | trace |
                                        links
Python's standard library only. Everything runs on loopback in a temporary folder and is killed at the end.
"""
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
from cluster import Cluster, PROGRAM, RANDOM, ROOT, check, explicit, golden, job_file, main, run, same, say


def group_matrix():
    layouts = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (3, 2), (2, 3)]
    for i, (stages, replicas) in enumerate(layouts):
        schedule = ("zb-h1", "gpipe", "1f1b")[i % 3]
        n = stages * replicas
        path = job_file(f"m{stages}x{replicas}", 12, str(n), explicit(stages, replicas, schedule))
        same(run(f"matrix{i}", path, n), 12, f"{stages} stages x {replicas} replicas, {schedule}, {n} workers")
    path = job_file("alone", 12, "1..4", explicit(2, 2))
    alone = subprocess.run([PROGRAM, "train", path, "--workers", "1", "-q", "--state", str(ROOT / "alone")], text=True,
                           stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    check(alone.stdout.strip() == golden(12), f"train --workers 1 of a 2 x 2 job: {alone.stdout.strip()} {alone.stderr}")
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


def group_copies():
    """A single pipeline whose stages are also in neighbours' memories: a loss costs no committed step."""
    steps = 300

    def kill(count, spares):
        def disturb(cluster, job):
            for _ in range(spares):
                cluster.start_worker()
            view = cluster.wait_step(job, 40 + RANDOM.randrange(60))
            check(view["survives_losses"] == count and view["weakest"].startswith("stage "),
                  f"status: {view['survives_losses']} losses survived, weakest {view['weakest']}")
            for _ in range(count):
                cluster.kill(RANDOM.choice(cluster.members(job)))
        return disturb

    cases = [
        ("killed member of a pipeline of 3, no spare", 1, 3, 0, "1..3"),
        ("killed member of a pipeline of 3, a spare takes its stage", 1, 3, 1, "3"),
        ("two members of a pipeline of 4 killed at once, two copies", 2, 4, 1, "1..4"),
    ]
    for i, (words, copies, workers, spares, band) in enumerate(cases):
        path = job_file(f"copies{i}", steps, f"{band}, copies: {copies}", explicit(workers, 1), "1000 steps")
        events = []

        def disturb(cluster, job):
            kill(copies, spares)(cluster, job)
            cluster.finish(job)
            events.extend(cluster.call("GET", f"/jobs/{job}/events")["events"])

        view = run(f"copies{i}", path, workers, disturb)
        same(view, steps, words)
        committed = [e["text"] for e in events if e["kind"] == "generation_committed"]
        check(len(committed) > 1 and all("(live)" in text for text in committed[1:]) and view["redone_steps"] == 0,
              f"{words}: {view['redone_steps']} steps redone; " + "; ".join(committed))


def group_sharded():
    """ZeRO-1: replicas share the optimizer's state among them; the bits stay, and with a copy no step is lost."""

    def sharded(stages, replicas, more=""):
        return explicit(stages, replicas)[:-1] + f", shard_optimizer: true}}{more}"

    for i, (stages, replicas) in enumerate([(1, 2), (1, 3), (2, 2)]):
        n = stages * replicas
        path = job_file(f"sharded{i}", 12, str(n), sharded(stages, replicas))
        same(run(f"sharded{i}", path, n), 12, f"{stages} stages x {replicas} replicas with a sharded optimizer")
    steps = 300
    cases = [
        ("1 x 3 sharded, one copy, a killed replica, no spare", (1, 3), 1, 0, "1..3", True),
        ("1 x 2 sharded, one copy, a killed replica and a spare", (1, 2), 1, 1, "2..3", True),
        ("2 x 2 sharded, one copy, a killed member and a spare", (2, 2), 1, 1, "4", True),
        ("1 x 3 sharded without copies: back to the checkpoint", (1, 3), 0, 0, "1..3", False),
    ]
    for i, (words, (stages, replicas), copies, spares, band, is_live) in enumerate(cases):
        path = job_file(f"zero{i}", steps, f"{band}, copies: {copies}", sharded(stages, replicas),
                        "1000 steps" if is_live else "25 steps")
        events = []

        def disturb(cluster, job):
            for _ in range(spares):
                cluster.start_worker()
            view = cluster.wait_step(job, 40 + RANDOM.randrange(60))
            check(view["survives_losses"] == copies, f"status: {view['survives_losses']} losses survived")
            cluster.kill(RANDOM.choice(cluster.members(job)))
            cluster.finish(job)
            events.extend(cluster.call("GET", f"/jobs/{job}/events")["events"])

        view = run(f"zero{i}", path, stages * replicas, disturb)
        same(view, steps, words)
        committed = [e["text"] for e in events if e["kind"] == "generation_committed"]
        wanted = "(live)" if is_live else "(checkpoint)"
        check(len(committed) > 1 and all(wanted in text for text in committed[1:]),
              f"{words}: {view['redone_steps']} steps redone; " + "; ".join(committed))


def group_feeds():
    """Growing, draining and moving copy their state in the background: the switch moves nothing and redoes nothing."""
    steps = 600

    def grown(cluster, job, workers):
        return cluster.wait(job, lambda v: v["state"] == "COMPLETED" or (
            v["state"] == "RUNNING" and len(v["plan"]["members"]) == workers), 30, f"a plan of {workers}")

    def grow(cluster, job):
        for workers in (2, 3):
            cluster.wait_step(job, 30 * workers)
            cluster.start_worker()
            grown(cluster, job, workers)

    def drain(with_spare):
        def disturb(cluster, job):
            cluster.wait_step(job, 40)
            victim = cluster.members(job)[0]
            if with_spare:
                cluster.start_worker()
            check(cluster.cli("drain", victim, "--reason", "test").returncode == 0, "drain is accepted")
            cluster.wait(job, lambda v: v["state"] == "COMPLETED" or
                         (v["state"] == "RUNNING" and victim not in [m["name"] for m in v["plan"]["members"]]), 30,
                         "a plan without the drained worker")
        return disturb

    def kill_joiner(cluster, job):
        cluster.wait_step(job, 40)
        joiner = cluster.start_worker()
        cluster.wait(job, lambda v: any(e["kind"] == "feed_started"
                                        for e in cluster.call("GET", f"/jobs/{job}/events")["events"]), 30, "a feed")
        cluster.kill(joiner)
        cluster.start_worker()
        grown(cluster, job, 2)

    cases = [
        ("grown 1 -> 2 -> 3 while it runs", 1, "1..3", "", grow, 2),
        ("a pipeline's stage moves from a drained worker to a spare", 2, "2", explicit(2, 1), drain(True), 1),
        ("a drained worker's stage goes to those who stay", 2, "1..2", explicit(2, 1), drain(False), 1),
        ("a joiner killed while it is fed, then another", 1, "1..2", "", kill_joiner, 1),
    ]
    for i, (words, workers, band, parallelism, disturb, switches) in enumerate(cases):
        path = job_file(f"feed{i}", steps, band, parallelism, "5000 steps")
        events = []

        def disturbed(cluster, job):
            disturb(cluster, job)
            cluster.finish(job)
            events.extend(cluster.call("GET", f"/jobs/{job}/events")["events"])
            logs = "".join(path.read_text(errors="replace") for path in (cluster.folder / "logs").glob("w*.log"))
            strange = [line for line in logs.splitlines() if "job=9223372036" in line]
            check(not strange, f"a feed's end is no lost link of a job: {strange[:2]}")

        view = run(f"feed{i}", path, workers, disturbed)
        same(view, steps, words)
        kinds = [e["kind"] for e in events]
        committed = [e for e in events if e["kind"] == "generation_committed"][1:]
        done = [e["fields"]["transfers"] for e in committed]
        check(kinds.count("feed_done") >= switches and view["redone_steps"] == 0 and done == ["0"] * switches,
              f"{words}: {kinds.count('feed_done')} feeds done, {view['redone_steps']} steps redone, "
              f"transfers of the switches {done}")
        for e in events:
            if e["kind"] in ("feed_stopped", "feed_started", "switched"):
                say("        " + e["kind"] + ": " + e["text"])


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
        meanwhile = []
        until = time.time() + 10  # beats may tell of the step before the queued reports arrive
        while not meanwhile and time.time() < until:
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


def group_deputy():
    """Workers are lost while the coordinator is away: the survivors go on, and it adopts what they decided."""
    def manifests(cluster):
        return sorted(p.name for p in (cluster.folder / "state" / "checkpoints").rglob("manifest-*.json"))

    def step_of(name):
        return int(name.split("-step-")[1].split(".")[0])

    def wait_manifest(cluster, step, seconds):
        """Seconds until a manifest of a later step lies there, the only sign of progress without a coordinator."""
        began = time.time()
        while time.time() - began < seconds:
            if any(step_of(name) > step for name in manifests(cluster)):
                return time.time() - began
            time.sleep(0.02)
        return None

    def newest(cluster):
        return max((step_of(name) for name in manifests(cluster)), default=0)

    def events(cluster, job, kind):
        return [e for e in cluster.call("GET", f"/jobs/{job}/events")["events"] if e["kind"] == kind]

    def adopted(cluster, job, generation, words):
        cluster.start_coordinator()
        view = cluster.wait(job, lambda v: v["state"] in ("RUNNING", "CHECKPOINTING", "COMPLETED") and
                            v["generation"] > generation, 30, "a generation that is newer")
        until = time.time() + 5  # a view shows what is decided, an event what is stored
        while not (notes := events(cluster, job, "deputy_decided")) and time.time() < until:
            time.sleep(0.05)
        check(len(notes) == 1 and notes[0]["fields"]["decided_by"] and notes[0]["fields"]["reason"],
              f"{words}: generation {view['generation']} is adopted: {[n['text'] for n in notes]}")

    def kill_during(count, words):
        def disturb(cluster, job):
            before = cluster.wait_step(job, 60)
            members = cluster.members(job)
            cluster.kill_coordinator()
            time.sleep(0.3)
            for victim in RANDOM.sample(members, count):
                cluster.kill(victim)
            at = newest(cluster)
            took = wait_manifest(cluster, at, 10)
            check(took is not None, f"{words}: saved again {took} s after the kill (coordinator dead, a save each 5 steps)")
            time.sleep(0.5)
            check(len(manifests(cluster)) > 0, f"{words}: manifests without a coordinator: {manifests(cluster)}")
            adopted(cluster, job, before["generation"], words)
        return disturb

    def nobody_lost(cluster, job):
        before = cluster.wait_step(job, 60)
        cluster.kill_coordinator()
        left = time.time()
        at = newest(cluster)
        took = wait_manifest(cluster, at, 10)
        check(took is not None, f"nobody lost: the lowest rank writes manifests, the first after {took} s")
        time.sleep(1)
        cluster.start_coordinator()
        back = time.time()
        view = cluster.wait(job, lambda v: v["state"] in ("RUNNING", "CHECKPOINTING", "COMPLETED"))
        check(view["generation"] == before["generation"], "nobody lost: the generation did not change")
        until = time.time() + 10
        away = []
        while not away and time.time() < until:
            series = cluster.call("GET", f"/jobs/{job}/series")["steps"]
            away = [s["step"] for s in series if left * 1000 < s["unix_ms"] < back * 1000]
        whole = away and away == list(range(away[0], away[-1] + 1))
        check(whole, f"nobody lost: {len(away)} steps while it was away, none missing")

    def frozen_coordinator(cluster, job):
        before = cluster.wait_step(job, 60)
        victim = RANDOM.choice(cluster.members(job))
        cluster.coordinator.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        cluster.kill(victim)
        took = wait_manifest(cluster, newest(cluster), 15)
        check(took is not None, f"coordinator frozen, a worker killed: saved again {took} s after")
        time.sleep(0.5)
        cluster.coordinator.send_signal(signal.SIGCONT)
        cluster.wait(job, lambda v: v["state"] in ("RUNNING", "CHECKPOINTING", "COMPLETED") and
                     v["generation"] > before["generation"], 30, "a generation that is newer")

    slow = 1200  # steps, so that a job lasts longer than what is done to it
    cases = [
        ("two workers, one killed", 2, "1..2", explicit(1, 2), kill_during(1, "two workers, one killed")),
        ("a pipeline of three, one killed", 3, "1..3", "", kill_during(1, "three workers, one killed")),
        ("most of the workers killed", 4, "1..4", "", kill_during(3, "three of four killed")),
        ("nobody lost", 2, "2", explicit(2, 1), nobody_lost),
        ("a frozen coordinator, a killed worker", 3, "1..3", explicit(1, 3), frozen_coordinator),
    ]
    for i, (words, workers, band, parallelism, disturb) in enumerate(cases):
        path = job_file(f"deputy{i}", slow, band, parallelism, "5 steps")
        same(run(f"deputy{i}", path, workers, disturb), slow, f"coordinator away: {words}")


def group_compete():
    """Two jobs on three workers: the lower is shrunk, then suspended, comes back, and both end with their hash."""
    low_steps, high_steps = 400, 60
    low, high = job_file("low", low_steps, "1..3"), job_file("high", high_steps, "2")
    urgent = job_file("urgent", high_steps, "3", explicit(3, 1))
    cluster = Cluster("compete")

    def submit(path, priority):
        done = cluster.cli("submit", path, "-d", "-q", "--set", f"priority={priority}")
        check(done.returncode == 0, f"submit with priority {priority}: {done.stderr}")

    try:
        cluster.start_coordinator("--preempt-after", "0.5")
        for _ in range(3):
            cluster.start_worker()
        submit(low, 0)
        cluster.wait("low", lambda v: v["state"] == "RUNNING" and v["workers"] == 3 and v["step"] >= 20)
        submit(high, 5)
        shrunk = cluster.wait("low", lambda v: v["state"] == "RUNNING" and v["workers"] == 1, 30, "one worker")
        check(shrunk["redone_steps"] == 0, "shrunk without a step done again")
        same(cluster.finish("high"), high_steps, "the higher job")
        cluster.wait("low", lambda v: v["state"] == "RUNNING" and v["workers"] == 3, 30, "grown again")
        submit(urgent, 0)
        waiting = cluster.wait("urgent", lambda v: v["queue"] == 1, 10, "a place in the queue")
        check(waiting["state"] == "PENDING", "equal priority takes nothing")
        check(cluster.cli("priority", "urgent", "9").returncode == 0, "a priority is changed while it waits")
        suspended = cluster.wait("low", lambda v: v["state"] == "PENDING", 30, "PENDING")
        check("preempted by urgent (priority 9)" in suspended["reason"], f"the reason: {suspended['reason']}")
        check("preempted by urgent" in cluster.cli("why", "low").stdout, "why says it too")
        same(cluster.finish("urgent"), high_steps, "the job that took all workers")
        same(cluster.finish("low"), low_steps, "the job that was shrunk and suspended")
        kinds = [e["kind"] for e in cluster.call("GET", "/jobs/low/events")["events"]]
        check(all(kind in kinds for kind in ("shrink_ordered", "preemption_ordered")), f"its events: {kinds}")
    finally:
        cluster.close()


def group_elastic():
    """Five workers, one by one down to one and up to five again; at each size the coordinator is killed."""
    steps = 600

    def at_size(cluster, job, size):
        view = cluster.wait(job, lambda v: v["state"] == "COMPLETED" or v["state"] == "RUNNING" and
                            len(v["plan"]["members"]) == size, 60, f"a plan of {size}")
        cluster.wait_step(job, view["step"] + 3)
        cluster.kill_coordinator()
        time.sleep(0.3 + RANDOM.random() * 0.7)
        cluster.start_coordinator()
        # Members are shown as they come back to it.
        after = cluster.wait(job, lambda v: v["state"] == "COMPLETED" or v["state"] == "RUNNING" and
                             v["step"] > view["step"] + 3 and len(v["plan"]["members"]) == size, 60,
                             f"steps by {size} after the coordinator's return")
        check(after["state"] == "RUNNING" and len(after["plan"]["members"]) == size,
              f"{size} workers at step {after['step']}, the coordinator killed and back")

    def shrink_and_grow(cluster, job):
        at_size(cluster, job, 5)
        for size in (4, 3, 2, 1):
            cluster.kill(RANDOM.choice(cluster.members(job)))
            at_size(cluster, job, size)
        for size in (2, 3, 4, 5):
            cluster.start_worker()
            at_size(cluster, job, size)

    def job(name, workers):
        """More leaves than elsewhere, so that the planner has work for each of five."""
        path = pathlib.Path(job_file(name, steps, workers, "", "20 steps"))
        path.write_text(path.read_text().replace("global: 16 sequences, micro: 1", "global: 64 sequences, micro: 2")
                        .replace("leaves: 8", "leaves: 32"))
        return str(path)

    alone = run("elastic-alone", job("elastic-alone", "1"), 1)
    check(alone["state"] == "COMPLETED", f"one worker alone: {alone['weights_hash']}")
    view = run("elastic", job("elastic", "1..5"), 5, shrink_and_grow)
    check(view["state"] == "COMPLETED" and view["weights_hash"] == alone["weights_hash"],
          f"five workers to one and back to five: {view['state']} {view['weights_hash']} {view.get('reason') or ''}")


def straggle(name, steps, stages, replicas, shares, words):
    """One of two workers is stopped for more than half of the time: shares (of a plan, by name) move away from it."""
    path = job_file(name, steps, "2", explicit(stages, replicas), f"{steps} steps")
    cluster = Cluster(f"straggle-{name}")
    ended = threading.Event()

    def hinder(worker):
        while not ended.is_set():
            worker.send_signal(signal.SIGSTOP)
            time.sleep(0.06)
            worker.send_signal(signal.SIGCONT)
            time.sleep(0.04)

    try:
        cluster.start_coordinator("--rebalance-after", "2")
        for _ in range(2):
            cluster.start_worker()
        job = cluster.submit(path)
        view = cluster.wait_step(job, 20)
        slow = cluster.members(job)[1]
        before = shares(view["plan"])[slow]
        thread = threading.Thread(target=hinder, args=(cluster.workers[slow],))
        thread.start()

        def share(view):
            return shares(view["plan"]).get(slow, before) if view.get("plan") else before
        moved = cluster.wait(job, lambda v: v["state"] == "COMPLETED" or
                             (share(v) < before and v["state"] == "RUNNING"), 60, f"fewer {words} for the slow one")
        check(share(moved) < before, f"the slow worker has fewer {words}: {share(moved)}, {before} before")
        check(moved["recoveries"] == 0 and moved["redone_steps"] == 0, "nobody was given up and no step done again")
        why = cluster.cli("why", job).stdout
        check(f"{slow} took" in why, f"why says it with figures: {why.strip()}")
        ended.set()
        thread.join()
        same(cluster.finish(job), steps, f"a run in which {words} moved")
        return [e["kind"] for e in cluster.call("GET", f"/jobs/{name}/events")["events"]]
    finally:
        ended.set()
        cluster.close()


def group_stragglers():
    """A slow replica gets fewer leaves, a slow stage fewer layers, and the hash is the same."""
    def leaves(plan):
        cuts = plan["leaf_cuts"]
        return {m["name"]: cuts[m["replica"] + 1] - cuts[m["replica"]] for m in plan["members"]}

    def units(plan):
        cuts = plan["unit_cuts"]
        return {m["name"]: cuts[m["stage"] + 1] - cuts[m["stage"]] for m in plan["members"]}

    straggle("slow", 400, 1, 2, leaves, "leaves")
    kinds = straggle("slow-stage", 500, 2, 1, units, "layers")
    check("feed_done" in kinds and "layers_moved" in kinds, f"the layers were fed while it ran: {sorted(set(kinds))}")


def group_trace():
    """Every instruction of every rank, on one clock, in a file that Perfetto reads."""
    steps, microbatches = 100, 8  # of a replica
    path = job_file("trace", steps, "8", explicit(4, 2), "never")
    cluster = Cluster("trace")
    try:
        cluster.start_coordinator()
        for _ in range(8):
            cluster.start_worker()
        job = cluster.submit(path)
        cluster.wait_step(job, 3)
        file = ROOT / "trace.json"
        done = cluster.cli("trace", job, "--next", "2", "--file", str(file))
        check(done.returncode == 0 and "ui.perfetto.dev" in done.stderr, f"trace: {done.stderr.strip()}")
        check_trace(json.loads(file.read_text()), 2, 4, 2, microbatches)
        passed = cluster.cli("trace", job, "--steps", "1:2", "--file", str(file))
        check(passed.returncode == 2 and "has passed" in passed.stderr, f"steps of the past: {passed.stderr.strip()}")
        same(cluster.finish(job), steps, "a run that was traced")
    finally:
        cluster.close()


def check_trace(trace, step_count, stages, replicas, microbatches):
    """Chrome's trace event format, as far as the file uses it; and what a pipeline's step must show."""
    events = trace["traceEvents"]
    wrong = [e for e in events
             if not {"ph", "pid", "tid", "name"} <= e.keys() or e["ph"] not in "MXsf"
             or not isinstance(e["pid"], int) or not isinstance(e["tid"], int)
             or (e["ph"] != "M" and (not isinstance(e["ts"], (int, float)) or e["ts"] < 0))
             or (e["ph"] == "X" and (not isinstance(e["dur"], (int, float)) or e["dur"] < 0))
             or (e["ph"] in "sf" and "id" not in e) or (e["ph"] == "f" and e.get("bp") != "e")]
    check(not wrong, f"each of {len(events)} events has what its kind needs: {wrong[:2]}")
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    check(len(names) == stages * replicas, f"a process for each rank: {sorted(names.values())}")
    slices = [e for e in events if e["ph"] == "X"]
    steps = [e for e in slices if e["cat"] == "step"]
    check(len(steps) == step_count * stages * replicas, f"{len(steps)} steps in all")
    inner = [e for e in slices if e["cat"] != "step"]
    stray = [e for e in inner if not any(s["pid"] == e["pid"] and s["ts"] <= e["ts"] + 1e-3 and
                                         e["ts"] + e["dur"] <= s["ts"] + s["dur"] + 1e-3 for s in steps)]
    check(not stray, f"each instruction lies in a step of its rank: {stray[:2]}")
    for letter in "FBW":
        count = sum(e["name"].startswith(letter + " ") for e in inner)
        check(count == step_count * stages * replicas * microbatches, f"{count} of {letter}")
    # An overlap of two instructions on one thread would be drawn as one inside the other.
    overlaps = 0
    for pid in names:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in inner if e["pid"] == pid)
        overlaps += sum(a[1] > b[0] + 1e-3 for a, b in zip(own, own[1:]))
    check(overlaps == 0, "no rank does two things at once")
    begins = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    arrows = step_count * replicas * (stages - 1) * 2 * microbatches
    check(begins.keys() == ends.keys() and len(begins) == arrows, f"{len(begins)} arrows of {arrows}")
    slack = 2 * trace["otherData"]["clocks_differ_by_us_at_most"] + 1
    early = [i for i in begins if i in ends and ends[i]["ts"] < begins[i]["ts"] - slack]
    check(not early, f"nothing arrives before it was sent, within {slack:.0f} us: {len(early)} do")
    check(trace["otherData"]["missing"] == [], "nothing is missing")


def group_links():
    """What carries a link changes no bit, and a peer's end is noticed as soon."""
    def begin(name, kinds):
        cluster = Cluster(name)
        cluster.start_coordinator()
        for kind in kinds:
            cluster.start_worker("--links", kind)
        return cluster

    def segments(cluster, worker):
        """Memories that a worker has mapped for links: two for each link."""
        maps = pathlib.Path(f"/proc/{cluster.workers[worker].pid}/maps").read_text(encoding="utf-8")
        return maps.count("/memfd:stagecoach-link")

    steps = 200
    for i, (kinds, expected) in enumerate([(["tcp"] * 4, [0, 0, 0, 0]), (["shared-memory"] * 4, [6, 6, 6, 6]),
                                           (["auto", "auto", "tcp", "auto"], [4, 4, 0, 4])]):
        cluster = begin(f"links{i}", kinds)
        try:
            job = cluster.submit(job_file(f"links{i}", steps, "4", explicit(2, 2)))
            cluster.wait_step(job, 5)
            found = [segments(cluster, worker) for worker in sorted(cluster.workers)]
            check(found == expected, f"memories of workers with links {kinds}: {found}")
            same(cluster.finish(job), steps, f"2 x 2 with links {kinds}")
        finally:
            cluster.close()

    for number in (signal.SIGKILL, signal.SIGSTOP):
        seconds = {}
        for kind in ("tcp", "shared-memory"):
            name = f"{kind}-{number.name.lower()}"
            cluster = begin(name, [kind] * 3)
            try:
                job = cluster.submit(job_file(name, steps, "2..3", explicit(1, 2), "50 steps"))
                generation = cluster.wait_step(job, 50)["generation"]
                victim = RANDOM.choice(cluster.members(job))
                began = time.monotonic()
                cluster.kill(victim, number)
                cluster.wait(job, lambda v: v["state"] in ("RUNNING", "COMPLETED") and v["generation"] > generation, 30,
                             "a generation without it")
                seconds[kind] = time.monotonic() - began
                if kind != "tcp":
                    others = [segments(cluster, worker) for worker in cluster.members(job)]
                    check(others == [2, 2], f"who is left has the memory of the new generation alone: {others}")
                if number == signal.SIGSTOP:
                    cluster.kill(victim, signal.SIGCONT)
                same(cluster.finish(job), steps, f"{number.name} of a member, links {kind}")
            finally:
                cluster.close()
        check(seconds["shared-memory"] < seconds["tcp"] + 1, f"{number.name} to the next generation, in s: {seconds}")


if __name__ == "__main__":
    sys.exit(main({"matrix": group_matrix, "faults": group_faults, "copies": group_copies, "feeds": group_feeds,
                   "sharded": group_sharded,
                   "restarts": group_restarts, "store": group_store, "deputy": group_deputy,
                   "compete": group_compete, "stragglers": group_stragglers, "elastic": group_elastic,
                   "trace": group_trace, "links": group_links}))
