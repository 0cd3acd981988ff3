#!/usr/bin/env python3
"""Silent corruption with real processes: a planted flip is found, the worker named, the run ends with the golden hash.

usage: audit_test.py PROGRAM GROUP     GROUP: vote | replay | patrol
Python's standard library only. Everything runs on loopback in a temporary folder and is killed at the end.
"""
import json
import pathlib
import sys
import time

sys.dont_write_bytecode = True
from cluster import Cluster, check, explicit, golden, job_file, main, same, say


def corruption_of(cluster, job):
    """What the job's events say of silent corruption: [(found by, workers)]."""
    events = cluster.call("GET", f"/jobs/{job}/events")["events"]
    return [(e["fields"].get("found_by"), e["fields"].get("workers")) for e in events
            if e["kind"] == "silent_corruption"]


def flipped(name, path, workers, injected, fault):
    """A run in which worker number `injected` has a fault; returns (view, corruption, drained workers)."""
    cluster = Cluster(name)
    try:
        cluster.start_coordinator()
        for n in range(1, workers + 1):
            cluster.start_worker(*(["--inject", fault] if n == injected else []))
            if n == 1:
                time.sleep(0.3)  # the first has the first seat, which saves
        job = cluster.submit(path)
        view = cluster.finish(job)
        drained = [w["name"] for w in cluster.call("GET", "/workers")["workers"] if w["state"] == "DRAINED"]
        return view, corruption_of(cluster, job), drained
    finally:
        cluster.close()


def group_vote():
    steps = 120
    cases = [
        ("three replicas outvote the flipped one", 3, 2, "flip@60", explicit(1, 3), [("vote", "w2")]),
        ("three replicas of two stages, whose first and last share a matrix", 6, None, "flip@60", explicit(2, 3), None),
        ("two replicas: the steps done again tell who was wrong", 2, 2, "flip@60", explicit(1, 2), None),
        ("a flip after the last step", 3, 3, f"flip@{steps}", explicit(1, 3), [("vote", "w3")]),
        ("a flip after the last step in the one that saves", 3, 1, f"flip@{steps}", explicit(1, 3), [("vote", "w1")]),
    ]
    for i, (words, workers, injected, fault, parallelism, expected) in enumerate(cases):
        path = job_file(f"audit{i}", steps, f"1..{workers}", parallelism, "20 steps")
        if injected is None:
            injected = 4
        view, found, drained = flipped(f"audit{i}", path, workers, injected, fault)
        # A flip in the step of a save is in that checkpoint too, which is then refused; that names nobody.
        found = [f for f in found if f[1]]
        same(view, steps, words)
        name = f"w{injected}"
        check(found and name in found[-1][1].split(", "), f"{words}: named {found}")
        check(drained == [name], f"{words}: {drained} is out of service")
        if expected:
            check(found == expected, f"{words}: found {found}")

    # Who was wrong is not known yet when the coordinator dies: its successor finds out.
    words = "two replicas, and the coordinator killed while the case is open"
    cluster = Cluster("audit-open")
    try:
        cluster.start_coordinator()
        for n in (1, 2):
            cluster.start_worker(*(["--inject", "flip@60"] if n == 2 else []))
        job = cluster.submit(job_file("audit-open", steps, "1..2", explicit(1, 2), "20 steps"))
        until = time.time() + 60
        while time.time() < until and not corruption_of(cluster, job):
            time.sleep(0.005)
        cluster.kill_coordinator()
        cluster.start_coordinator()
        same(cluster.finish(job), steps, words)
        found = [f for f in corruption_of(cluster, job) if f[1]]
        # Ranks may have changed hands, and with them the order of the two names.
        check([(how, sorted(who.split(", "))) for how, who in found] == [("vote", ["w1", "w2"]), ("redo", ["w2"])],
              f"{words}: found {found}")
        drained = [w["name"] for w in cluster.call("GET", "/workers")["workers"] if w["state"] == "DRAINED"]
        check(drained == ["w2"], f"{words}: {drained} is out of service")
    finally:
        cluster.close()


def group_replay():
    steps = 120

    def replay(cluster, *arguments):
        done = cluster.cli("replay", *arguments)
        say(f"replay {' '.join(arguments)}: {done.returncode} {done.stdout.strip()} {done.stderr.strip()}")
        return done

    # Killed and laid out anew in between: every window is identical on other layouts.
    cluster = Cluster("replay-kills")
    try:
        cluster.start_coordinator()
        for _ in range(4):
            cluster.start_worker()
        job = cluster.submit(job_file("replay-kills", steps, "1..4", explicit(2, 2), "20 steps", keep=10))
        cluster.wait_step(job, 45)
        cluster.kill(cluster.members(job)[1])
        cluster.wait_step(job, 85)
        cluster.kill_coordinator()
        cluster.start_coordinator()
        same(cluster.finish(job), steps, "a run with kills")
        for arguments in (["--steps", "1:120"], ["--steps", "50:120", "--stages", "2", "--replicas", "2"],
                          ["--steps", "35:58", "--workers", "3"]):
            done = replay(cluster, job, *arguments)
            first, last = arguments[1].split(":")
            check(done.returncode == 0 and done.stdout.startswith(f"identical: steps {first} to {last}, "),
                  f"replay {' '.join(arguments)} is identical")
        done = replay(cluster, job, "--steps", "100:130")
        check(done.returncode == 5 and "no step 130" in done.stderr, "a window beyond the log is refused")
        done = replay(cluster, job, "--steps", "9:3")
        check(done.returncode == 2, "a window that ends before it begins is refused")
    finally:
        cluster.close()

    # A flip that no vote can see: one pipeline.
    cases = [("one worker, flip at a checkpoint", 1, 1, "flip@60:h.2.attn.c_attn.weight", 60, "h.2.attn.c_attn.weight"),
             ("two stages, flip between checkpoints", 2, 2, "flip@50:h.3.mlp.c_fc.weight", 50, None)]
    for i, (words, stages, injected, fault, step, tensor) in enumerate(cases):
        cluster = Cluster(f"replay{i}")
        try:
            cluster.start_coordinator()
            # Attached one by one, so that stages are seated in this order.
            for n in range(1, stages + 1):
                cluster.start_worker(*(["--inject", fault] if n == injected else []))
                time.sleep(0.5)
            job = cluster.submit(job_file(f"replay{i}", steps, str(stages), explicit(stages, 1), "20 steps", keep=10))
            view = cluster.finish(job)
            check(view["state"] == "COMPLETED" and view["weights_hash"] != golden(steps), f"{words}: nobody noticed")
            done = replay(cluster, job, "--steps", "41:80", "--workers", "2", "-o", "json")
            found = json.loads(done.stdout)
            check(done.returncode == 1 and not found["identical"] and found["step"] == step, f"{words}: step {step}")
            check(found["workers"] == [f"w{injected}"], f"{words}: held by {found['workers']}")
            if tensor:
                check(found["tensors"] == [tensor] and found["checkpoint"] == step, f"{words}: {found['tensors']}")
            check(replay(cluster, job, "--steps", "1:40").returncode == 0, f"{words}: before it all is identical")
        finally:
            cluster.close()


def patrolled(name, workers, parallelism, steps, every="40 steps"):
    path = job_file(name, steps, workers, parallelism, every, keep=3)
    text = pathlib.Path(path).read_text().replace(f"elasticity: {{workers: {workers}}}", f"elasticity: {{workers: {workers}, patrol: true}}")
    pathlib.Path(path).write_text(text)
    return path


def group_patrol():
    steps = 240
    # One worker trains, the other has nothing to do and computes again what the first did.
    cluster = Cluster("patrol-calm")
    try:
        cluster.start_coordinator()
        for _ in range(2):
            cluster.start_worker()
        job = cluster.submit(patrolled("patrol-calm", "1", explicit(1, 1), steps))
        same(cluster.finish(job), steps, "a patrolled run")
        until = time.time() + 240
        windows = []
        while time.time() < until and (not windows or windows[-1] != str(steps)):
            windows = [e["fields"]["to"] for e in cluster.call("GET", f"/jobs/{job}/events")["events"]
                       if e["kind"] == "window_audited"]
            time.sleep(0.2)
        check(windows and windows[-1] == str(steps), f"all of an undisturbed run was found identical: to {windows}")
        check(corruption_of(cluster, job) == [], "and nobody was accused")
    finally:
        cluster.close()

    cluster = Cluster("patrol-flip")
    try:
        cluster.start_coordinator()
        cluster.start_worker("--inject", "flip@60:h.1.attn.c_attn.weight")
        time.sleep(0.5)
        path = patrolled("patrol-flip", "1", explicit(1, 1), steps)
        job = cluster.submit(path)
        cluster.wait_step(job, 10)
        cluster.start_worker()
        # The patrol yields to everything else on its host: it is given time on a loaded one.
        cluster.wait_step(job, 100)
        cluster.cli("pause", job)
        until = time.time() + 240
        while time.time() < until and not corruption_of(cluster, job):
            time.sleep(0.2)
        cluster.cli("resume", job)
        same(cluster.finish(job), steps, "a flip in the only worker, found by the idle one")
        found = corruption_of(cluster, job)
        check(("patrol", "w1") in found, f"the patrol named the worker: {found}")
        drained = [w["name"] for w in cluster.call("GET", "/workers")["workers"] if w["state"] == "DRAINED"]
        check(drained == ["w1"], f"{drained} is out of service")
        rolled = [e["text"] for e in cluster.call("GET", f"/jobs/{job}/events")["events"] if e["kind"] == "rolled_back"]
        check(len(rolled) == 1, f"the job went back: {rolled}")
    finally:
        cluster.close()


if __name__ == "__main__":
    sys.exit(main({"vote": group_vote, "replay": group_replay, "patrol": group_patrol}))
