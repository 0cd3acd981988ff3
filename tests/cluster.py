"""What the tests with real processes share: a cluster on loopback, small jobs, their golden hash, checks.

usage of a test that imports it: TEST PROGRAM GROUP
Python's standard library only. Everything runs in a temporary folder and is killed at the end.
"""
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import live_cluster
from live_cluster import make_text

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


def explicit(stages, replicas, schedule="zb-h1"):
    return f"parallelism: {{mode: explicit, stages: {stages}, replicas: {replicas}, schedule: {schedule}}}"


class Cluster(live_cluster.Cluster):
    """A cluster in a folder of this test's own."""

    def __init__(self, name, environment=None, identity=None):
        super().__init__(PROGRAM, ROOT / name, environment, identity)


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
