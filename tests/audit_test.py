#!/usr/bin/env python3
"""Silent corruption with real processes: a planted flip is found, the worker named, the run ends with the golden hash.

usage: audit_test.py PROGRAM GROUP     GROUP: vote
Python's standard library only. Everything runs on loopback in a temporary folder and is killed at the end.
"""
import sys

sys.dont_write_bytecode = True
from cluster import Cluster, check, explicit, job_file, main, same


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
        ("three replicas of two stages, a flip in the middle of stage 1", 6, None, "flip@60:h.3.mlp.c_fc.weight",
         explicit(2, 3), None),
        ("two replicas: the steps done again tell who was wrong", 2, 2, "flip@60", explicit(1, 2), None),
        ("a flip after the last step", 3, 3, f"flip@{steps}", explicit(1, 3), [("vote", "w3")]),
    ]
    for i, (words, workers, injected, fault, parallelism, expected) in enumerate(cases):
        path = job_file(f"audit{i}", steps, f"1..{workers}", parallelism, "20 steps")
        if injected is None:
            injected = 4
        view, found, drained = flipped(f"audit{i}", path, workers, injected, fault)
        same(view, steps, words)
        name = f"w{injected}"
        check(found and name in found[-1][1].split(", "), f"{words}: named {found}")
        check(drained == [name], f"{words}: {drained} is out of service")
        if expected:
            check(found == expected, f"{words}: found {found}")


if __name__ == "__main__":
    sys.exit(main({"vote": group_vote}))
