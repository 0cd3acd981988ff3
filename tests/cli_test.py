#!/usr/bin/env python3
"""The command line as a user meets it: words, tables, JSON, exit codes; then what a small run leaves behind.

usage: cli_test.py PROGRAM
Python's standard library only. Everything runs on loopback in a temporary folder and is killed at the end.
"""
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time

PROGRAM = os.path.abspath(sys.argv[1])
EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "docs" / "examples"
ROOT = pathlib.Path(tempfile.mkdtemp(prefix="stagecoach-cli-"))
FAILURES = []
CHILDREN = []

COMMANDS = ("coordinator worker up train prove bench plan submit jobs status why logs events metrics pause resume cancel priority "
            "save wait workers drain undrain checkpoints hash export sample init presets data certs version").split()
NESTED = [("data", "inspect"), ("data", "tokenize"), ("certs", "init"), ("certs", "make"), ("certs", "show")]


def say(words):
    print(f"[{time.strftime('%H:%M:%S')}] {words}", flush=True)


def check(condition, words, more=""):
    if not condition:
        FAILURES.append(words)
    say(("ok      " if condition else "FAILED  ") + words + (f"\n    {more}" if more and not condition else ""))
    return condition


class Ran:
    def __init__(self, done):
        self.code, self.out, self.err = done.returncode, done.stdout.decode(), done.stderr.decode()

    def __str__(self):
        return f"exit {self.code}\n--- stdout\n{self.out[:2000]}\n--- stderr\n{self.err[:2000]}"

    def json(self):
        try:
            return json.loads(self.out)
        except ValueError:
            return None


def run(*arguments, within=120, text=None, environment=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith("STAGECOACH_") or k == "STAGECOACH_MAX_ISA"}
    env.update(environment or {})
    return Ran(subprocess.run([PROGRAM, *map(str, arguments)], input=(text or "").encode(), capture_output=True,
                              timeout=within, cwd=ROOT, env=env))


def expect(words, ran, code, *texts):
    """The exit code, and texts that must stand somewhere in the output."""
    missing = [t for t in texts if t not in ran.out + ran.err]
    return check(ran.code == code and not missing, words, f"expected exit {code} and {missing}; got {ran}")


def start(*arguments, log):
    file = open(ROOT / log, "ab")
    child = subprocess.Popen([PROGRAM, *map(str, arguments)], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                             cwd=ROOT)
    CHILDREN.append(child)
    return child


def until(condition, seconds, words):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return check(False, words)


def make_text(path, lines=400):
    """Words from a fixed rule: no file of this machine is needed."""
    words = "stage coach the wheel turns and road is long train on horses rest at dusk".split()
    source = random.Random(7)
    path.write_text("\n".join(" ".join(source.choice(words) for _ in range(12)) for _ in range(lines)) + "\n")


JOB = """version: 1
name: {name}
model: {{preset: tiny, init: {init}}}
data: {{tokenizer: bytes, train: [{{path: {text}, format: text}}]}}
batch: {{global: 8 sequences, micro: 1, sequence: 64 tokens, leaves: 8}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup: 1 steps}}
stop: {{steps: {steps}}}
elasticity: {{workers: 1..2}}
checkpoint: {{every: 3 steps, keep: {{last: 5}}}}
"""


def job_file(name, steps=6, init="{seed: 5}"):
    path = ROOT / f"{name}.yaml"
    path.write_text(JOB.format(name=name, text="text.txt", steps=steps, init=init))
    return path


# ---- words and exit codes -------------------------------------------------------------------------------------

def test_help():
    for words in [(c,) for c in COMMANDS] + NESTED:
        ran = run(*words, "--help")
        lines = ran.out.splitlines()
        good = (ran.code == 0 and lines and lines[0].startswith("Usage: stagecoach " + " ".join(words))
                and "examples:" in ran.out and f"  stagecoach {words[0]}" in ran.out
                and ran.out.index("examples:") < ran.out.index("Options:"))
        check(good, f"{' '.join(words)} --help starts with its usage and examples", ran)
    top = run("--help")
    check(top.code == 0 and all(f"\n  {c} " in top.out.replace(",", " ") for c in COMMANDS), "--help lists every command", top)
    check(run().out == top.out and run("help").out == top.out, "no arguments and help print the same", top)
    check(run("help", "train").out == run("train", "--help").out, "help CMD is CMD --help")


def test_usage():
    expect("an unknown command has a suggestion", run("cancl", "x"), 2, 'unknown command "cancl"', '"cancel"')
    expect("an unknown flag is named", run("jobs", "--al"), 2, "--al", "stagecoach jobs --help")
    expect("a missing argument is named", run("train"), 2, "FILE")
    expect("an unknown output form is refused", run("jobs", "-o", "xml"), 2, "xml")
    expect("a coordinator that is no address is refused", run("jobs", "--coordinator", "head:port"), 2, "HOST:PORT")
    expect("JOB@STEP wants a number", run("hash", "my-job@last"), 2, "JOB@STEP")
    expect("export knows its forms", run("export", "my-job", "--to", "onnx", "x"), 2, "hf")
    expect("certs wants a subcommand", run("certs"), 2)


def test_unreachable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    for words in (["jobs"], ["workers"], ["status", "a"], ["hash", "a"], ["checkpoints", "a"], ["drain", "w1"],
                  ["events"]):
        expect(f"{words[0]} without a coordinator: exit 4", run(*words, "--coordinator", nobody), 4, nobody)
    ran = run("jobs", "--coordinator", nobody, "-o", "json")
    check(ran.code == 4 and (ran.json() or {}).get("error", {}).get("code") == "unreachable", "the same as JSON", ran)
    ran = run("jobs", environment={"STAGECOACH_COORDINATOR": nobody})
    expect("STAGECOACH_COORDINATOR names the coordinator", ran, 4, nobody)


def test_job_files():
    bad = ROOT / "bad.yaml"
    bad.write_text("version: 1\nname: Bad Name\nmodel: {preset: tinny}\ndata: {tokenizer: bytes, train: text.txt}\n"
                   "batch: {global: 7 sequences, micro: 2}\nstop: {steps: 010}\nelasticty: {workers: 2}\n")
    ran = run("plan", bad)
    places = [line for line in ran.err.splitlines() if line.startswith(f"{bad}:") and "error[E" in line]
    check(ran.code == 3 and len(places) >= 4, "all errors of a job file at once, exit 3", ran)
    check(all(p[len(str(bad)):].split(":")[1].isdigit() and p[len(str(bad)):].split(":")[2].isdigit() for p in places),
          "each with line and column", ran)
    expect("unknown keys and presets have suggestions", ran, 3, "elasticity", "tiny")
    ran = run("plan", bad, "-o", "json")
    problems = (ran.json() or {}).get("problems", [])
    check(ran.code == 3 and len(problems) == len(places) and all(p["line"] > 0 and p["column"] > 0 for p in problems),
          "the same problems as JSON", ran)
    expect("a job file that is not there", run("train", "nowhere.yaml"), 3, "nowhere.yaml", "stagecoach init")
    expect("a bad override is named", run("plan", job_file("over"), "--set", "batch.mirco=8"), 3, "batch.mirco")
    expect("options may stand before the file", run("plan", "--set", "stop.steps=9", "--set", "name=other", ROOT / "over.yaml"),
           0, "9 steps")
    expect("data that is not there is named before anything trains",
           run("train", job_file("nodata"), "--workers", "1", "--state", ROOT / "nodata", "--set",
               "data.train.0.path=nowhere.txt"), 3, "nowhere.txt")


def test_init_and_plan():
    names = [p["name"] for p in run("presets", "-o", "json").json() or []]
    check("gpt2" in names and "kogpt2" in names, "presets lists the shapes", names)
    rows = {p["name"]: p for p in run("presets", "-o", "json").json() or []}
    check(rows.get("gpt2", {}).get("parameters") == 124439808, "gpt2 has 124,439,808 parameters", rows.get("gpt2"))
    for name in ["", *names]:
        ran = run("init", *([name] if name else []))
        plan = run("plan", "-", text=ran.out)
        if not check(ran.code == 0 and plan.code == 0, f"init {name or '(default)'} gives a job that plan takes",
                     f"{ran}\n{plan}"):
            continue
    ran = run("init", "tiny", "--data", "text.txt", "--name", "mine")
    (ROOT / "mine.yaml").write_text(ran.out)
    plan = run("plan", "mine.yaml", "-o", "json").json()
    check(plan is not None and plan["name"] == "mine" and plan["layouts"][0]["workers"] == 1,
          "init --data --name, and plan -o json is JSON", plan)
    expect("init suggests a preset", run("init", "gtp2"), 2, "gpt2")
    resolved = run("plan", "mine.yaml", "--resolved")
    again = run("plan", "-", "--resolved", text=resolved.out)
    check(resolved.code == 0 and again.out == resolved.out, "a resolved job resolves to itself", f"{resolved}{again}")
    for example in sorted(EXAMPLES.glob("*.yaml")):
        expect(f"docs/examples/{example.name} is a good job file", run("plan", example), 0, "ok:")


def test_version():
    v = run("version", "-o", "json").json() or {}
    check(v.get("protocol", 0) >= 1 and {"onednn", "caf", "boost", "rocksdb"} <= set(v.get("libraries", {})),
          "version -o json names protocol and libraries", v)
    check(run("version", "-q").out.strip() == v.get("version"), "version -q is the number alone")


def test_data():
    text = (ROOT / "text.txt").read_bytes()
    found = run("data", "inspect", "text.txt", "-o", "json").json() or {}
    check(found.get("format") == "text" and found.get("tokens") == len(text) == found.get("bytes"),
          "data inspect counts a text's bytes", found)
    expect("data inspect for people", run("data", "inspect", "text.txt"), 0, "vocab_size must be at least")
    expect("data tokenize", run("data", "tokenize", "text.txt", "text.bin", "--tokenizer", "bytes"), 0,
           "format: llmc")
    raw = (ROOT / "text.bin").read_bytes()
    header = struct.unpack("<256i", raw[:1024])
    check(header[:3] == (20240520, 1, len(text)), "the token file has llm.c's header", header[:3])
    check(bytes(struct.unpack(f"<{len(text)}H", raw[1024:])) == text, "and the text's bytes as u16")
    found = run("data", "inspect", "text.bin", "-o", "json").json() or {}
    check(found.get("format") == "llmc" and found.get("tokens") == len(text)
          and found.get("first_tokens") == list(text[:16]) and found.get("max_token") == max(text),
          "data inspect reads it back", found)
    expect("tokenize overwrites nothing", run("data", "tokenize", "text.txt", "text.bin", "--tokenizer", "bytes"), 6,
           "--yes")
    (ROOT / "short.bin").write_bytes(raw[:1000])
    expect("a truncated header is named", run("data", "inspect", "short.bin", "--format", "llmc"), 3, "short.bin")
    (ROOT / "cut.bin").write_bytes(raw[:-7])
    expect("a truncated token file is named", run("data", "inspect", "cut.bin"), 3, "cut.bin")
    expect("a file that is not there", run("data", "inspect", "nowhere.bin"), 5, "nowhere.bin")
    expect("an unknown tokenizer is refused", run("data", "tokenize", "text.txt", "x.bin", "--tokenizer", "bpe"), 2,
           "sentencepiece:MODEL")


def test_certs():
    expect("certs init", run("certs", "init", "pki"), 0, "ca.crt")
    key = ROOT / "pki" / "ca.key"
    check(key.exists() and stat.S_IMODE(key.stat().st_mode) == 0o600, "only its owner reads the CA's key")
    expect("certs init overwrites nothing", run("certs", "init", "pki"), 6)
    made = run("certs", "make", "pki", "--role", "worker", "--name", "w1", "--host", "10.0.0.11", "--host", "w1.lan",
               "--days", "30", "-o", "json")
    check(made.code == 0 and pathlib.Path(ROOT, (made.json() or {}).get("certificate", "")).name == "w1.crt",
          "certs make", made)
    shown = run("certs", "show", "pki/w1.crt", "-o", "json").json() or {}
    check(shown.get("role") == "worker" and shown.get("name") == "w1" and not shown.get("is_expired")
          and {"10.0.0.11", "w1.lan", "127.0.0.1", "localhost"} <= set(shown.get("hosts", [])), "certs show", shown)
    check((run("certs", "show", "pki/ca.crt", "-o", "json").json() or {}).get("is_ca") is True, "certs show of the CA")
    run("certs", "make", "pki", "--role", "reader", "--name", "old", "--days", "-1")
    check((run("certs", "show", "pki/old.crt", "-o", "json").json() or {}).get("is_expired") is True,
          "an expired certificate says so")
    expect("no CA there", run("certs", "make", "elsewhere", "--role", "worker", "--name", "w"), 5)
    expect("an unknown role", run("certs", "make", "pki", "--role", "king", "--name", "w"), 2, "king")
    expect("a file that is no certificate", run("certs", "show", "text.txt"), 3, "text.txt")


# ---- a small run and what it leaves ---------------------------------------------------------------------------

def read_safetensors(path):
    """By hand, after the format's description: u64 length, JSON, data without holes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    meta = header.pop("__metadata__", {})
    data = raw[8 + length:]
    at = 0
    tensors = {}
    for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        begin, end = t["data_offsets"]
        assert begin == at and t["dtype"] == "F32", (name, t)
        assert end - begin == 4 * math.prod(t["shape"]), (name, t)
        tensors[name] = (t["shape"], struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]))
        at = end
    assert at == len(data), "the file ends with its last tensor"
    return meta, tensors


def gpt2_logits(config, tensors, tokens):
    """GPT2LMHeadModel's forward pass in double precision, from its definition; logits after the last token."""
    width, heads, eps = config["n_embd"], config["n_head"], config["layer_norm_epsilon"]
    size = width // heads

    def tensor(name):
        return tensors["transformer." + name][1]

    def norm(x, name):
        gain, bias = tensor(name + ".weight"), tensor(name + ".bias")
        mean = sum(x) / width
        scale = 1 / math.sqrt(sum((v - mean) ** 2 for v in x) / width + eps)
        return [(v - mean) * scale * g + b for v, g, b in zip(x, gain, bias)]

    def linear(x, name):
        w, b = tensor(name + ".weight"), tensor(name + ".bias")
        n = len(b)
        out = list(b)
        for k, v in enumerate(x):
            row = w[k * n:(k + 1) * n]
            out = [o + v * r for o, r in zip(out, row)]
        return out

    def gelu(v):
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))

    wte, wpe = tensor("wte.weight"), tensor("wpe.weight")
    rows = [[a + b for a, b in zip(wte[t * width:(t + 1) * width], wpe[i * width:(i + 1) * width])]
            for i, t in enumerate(tokens)]
    for layer in range(config["n_layer"]):
        h = f"h.{layer}."
        qkv = [linear(norm(x, h + "ln_1"), h + "attn.c_attn") for x in rows]
        for i, x in enumerate(rows):
            merged = []
            for head in range(heads):
                at = head * size
                q = qkv[i][at:at + size]
                scores = [sum(a * b for a, b in zip(q, qkv[j][width + at:width + at + size])) / math.sqrt(size)
                          for j in range(i + 1)]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                total = sum(weights)
                merged += [sum(w * qkv[j][2 * width + at + d] for j, w in enumerate(weights)) / total
                           for d in range(size)]
            x = [a + b for a, b in zip(x, linear(merged, h + "attn.c_proj"))]
            inner = [gelu(v) for v in linear(norm(x, h + "ln_2"), h + "mlp.c_fc")]
            rows[i] = [a + b for a, b in zip(x, linear(inner, h + "mlp.c_proj"))]
    last = norm(rows[-1], "ln_f")
    return [sum(a * b for a, b in zip(last, wte[v * width:(v + 1) * width])) for v in range(config["vocab_size"])]


def compare_with_transformers(folder, tokens, ours):
    """Only where both libraries are; says so where not."""
    script = ("import sys, json, torch, transformers\n"
              "m = transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval()\n"
              "with torch.no_grad(): print(json.dumps(m(torch.tensor([json.loads(sys.argv[2])])).logits[0, -1].tolist()))\n")
    for python in ("python3", "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-c", script, str(folder), json.dumps(tokens)], capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            theirs = json.loads(done.stdout)
            worst = max(abs(a - b) for a, b in zip(ours, theirs))
            check(len(theirs) == len(ours) and worst < 1e-4, f"transformers computes the same logits (worst {worst:.1e})")
            return
        if b"ModuleNotFoundError" not in done.stderr and b"ImportError" not in done.stderr:
            check(False, "transformers opens the exported folder", done.stderr.decode()[-1500:])
            return
    say("skipped  logits of transformers: torch and transformers are not both there")


def test_run():
    state = ROOT / "trained"
    ran = run("train", job_file("small"), "--workers", "2", "--state", state, "-q")
    trained = ran.out.strip()
    if not check(ran.code == 0 and len(trained) == 32, "train on two workers, -q prints the hash alone", ran):
        return
    here = ("--state", state)
    expect("hash of the run, asked of its store", run("hash", "small", *here), 0, trained)
    recomputed = run("hash", "small@6", "--recompute", *here, "-o", "json").json() or {}
    check(recomputed.get("weights_hash") == trained and recomputed.get("step") == 6,
          "the hash computed from the values is the recorded one", recomputed)
    rows = run("checkpoints", "small", *here, "-o", "json").json() or []
    check([r["step"] for r in rows] == [6, 3, 0], "checkpoints of steps 0, 3 and 6, newest first", rows)
    expect("one of them in words", run("checkpoints", "small@3", "show", *here), 0, "Weights", "Part")
    expect("no such step: exit 5", run("checkpoints", "small@4", *here), 5)
    expect("no such step to hash: exit 5", run("hash", "small@4", *here), 5)
    expect("no such job: exit 5", run("hash", "other", *here), 5, "other")
    expect("verify --deep", run("checkpoints", "small", "verify", "--deep", *here), 0, "3 good, 0 bad")
    shown = run("checkpoints", "small@6", "show", *here, "-o", "json").json() or {}
    parts = [pathlib.Path(p["folder"]) / p["file"] for p in shown.get("parts", [])]
    if check(parts and all(p.exists() for p in parts), "the manifest names parts that are there", shown):
        damaged = ROOT / "damaged"
        shutil.copytree(parts[0].parent, damaged)
        expect("a folder is checked without a coordinator", run("checkpoints", "verify", "--deep", "--folder", damaged),
               0, "0 bad")
        expect("and hashed", run("hash", damaged), 0, trained)
        raw = bytearray((damaged / parts[0].name).read_bytes())
        raw[-5] ^= 1
        (damaged / parts[0].name).write_bytes(raw)
        expect("one flipped bit is found: exit 1", run("checkpoints", "verify", "--deep", "--folder", damaged), 1,
               "1 bad", parts[0].name)

    # Interchange: out, checked by hand, and in again.
    out = ROOT / "exported"
    expect("export", run("export", "small", "--to", "hf", out, *here), 0, trained, "from_pretrained")
    expect("export overwrites nothing", run("export", "small", "--to", "hf", out, *here), 6, "--yes")
    config = json.loads((out / "config.json").read_text())
    check(config["model_type"] == "gpt2" and config["n_layer"] == 4 and config["n_embd"] == 64, "config.json", config)
    meta, tensors = read_safetensors(out / "model.safetensors")
    check(meta.get("format") == "pt" and len(tensors) == 2 + 4 * 12 + 2
          and tensors["transformer.wte.weight"][0] == [256, 64]
          and tensors["transformer.h.0.attn.c_attn.weight"][0] == [64, 192], "model.safetensors, read by hand",
          sorted(tensors))
    expect("hash of the exported folder is the job's", run("hash", out), 0, trained)
    prompt = "the wheel turns"
    for what, extra in (("small", here), (out, ())):
        ours = run("sample", what, "--prompt", prompt, "--logits", *extra).json() or {}
        if what == "small":
            want = gpt2_logits(config, tensors, list(prompt.encode()))
        got = ours.get("logits", [])
        worst = max((abs(a - b) for a, b in zip(got, want)), default=9)
        check(len(got) == 256 and worst < 1e-4, f"logits of {what if what == 'small' else 'the folder'}: as GPT-2's "
              f"definition in double precision (worst {worst:.1e})", ours)
    compare_with_transformers(out, list(prompt.encode()), got)
    greedy = ("--prompt", prompt, "--tokens", "24", "--temperature", "0")
    first, second = run("sample", "small", *greedy, *here), run("sample", out, *greedy)
    check(first.code == 0 and first.out == second.out and first.out.startswith(prompt), "sample from job and folder",
          f"{first}\n{second}")
    as_json = run("sample", out, *greedy, "-o", "json").json() or {}
    check(len(as_json.get("tokens", [])) == 24 and prompt + as_json.get("text", "") + "\n" == first.out,
          "sample -o json has the same text", as_json)
    control = run("sample", out, "--prompt", "a\x1b[31mb", "--tokens", "8", "--temperature", "5", "--top-k", "0", "-o",
                  "table")
    check(control.code == 0 and not any(ord(c) < 32 and c not in "\n\t" for c in control.out)
          and "a\\x1b[31mb" in control.out, "sampled control bytes can't steer a terminal", repr(control.out))
    expect("a folder that is no model", run("sample", ROOT / "pki", "--prompt", "x"), 5)

    # Step 0 of a job that starts from the folder has the exported weights, bit for bit.
    ran = run("train", job_file("second", steps=1, init=f'"hf:{out}"'), "--workers", "1", "--state", ROOT / "second-state",
              "-q")
    check(ran.code == 0, "a job starts from the exported folder", ran)
    expect("and its step 0 has the same bits", run("hash", "second@0", "--state", ROOT / "second-state"), 0, trained)
    expect("which can be exported too",
           run("export", "second@0", "--to", "hf", ROOT / "again", "--state", ROOT / "second-state"), 0, trained)
    check((ROOT / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes(),
          "to the same file, byte for byte")
    expect("no store there: exit 5", run("hash", "small", "--state", ROOT / "pki"), 5)


def test_interrupt():
    """Ctrl-C saves and stops; the same command goes on; so it does after everything was killed."""
    job = job_file("broken", steps=400)
    calm = run("train", job, "--workers", "1", "--state", ROOT / "calm", "-q").out.strip()
    again = ("train", job, "--workers", "2", "--state", ROOT / "stop")
    for how in (signal.SIGINT, signal.SIGKILL):
        child = start(*again, log="stop.log")
        said = lambda: (ROOT / "stop.log").read_text().count("| loss")
        before = said() if (ROOT / "stop.log").exists() else 0
        until(lambda: said() > before + 2, 20, "it trains")
        child.send_signal(how)
        code = child.wait(timeout=30)
        time.sleep(0.3)  # the children of a killed parent end a moment later
        if how == signal.SIGINT:
            check(code == 130 and "goes on from there" in (ROOT / "stop.log").read_text(), "Ctrl-C: exit 130, and words",
                  code)
    ran = run(*again)
    check(ran.code == 0 and "goes on (it was" in ran.out and calm and calm in ran.out,
          "after Ctrl-C and kill -9 of everything: the same command, the same hash", f"{calm}\n{ran}")
    child = start(*again, log="other.log")
    until(lambda: (ROOT / "other.log").exists() and "| loss" in (ROOT / "other.log").read_text(), 20, "it trains again")
    child.kill()
    child.wait()
    time.sleep(0.3)
    expect("another job under an unfinished one's name is refused: exit 6", run(*again, "--set", "optimizer.lr=0.1"), 6,
           "not this one")


def test_cluster():
    """A coordinator and a worker by hand: tables, words and codes of a live cluster."""
    port_file = ROOT / "port"
    start("coordinator", "--state", ROOT / "live", "--listen", "127.0.0.1:0", "--port-file", port_file, log="head.log")
    if not until(port_file.exists, 20, "the coordinator wrote its port file"):
        return
    at = ("--coordinator", f"127.0.0.1:{port_file.read_text().strip()}")
    expect("no workers: an empty table with a head", run("workers", *at), 0, "NAME", "HEARTBEAT")
    check(run("jobs", *at, "-o", "json").json() == [], "no jobs: an empty list")
    for words in (["status", "nobody"], ["why", "nobody"], ["pause", "nobody"], ["cancel", "nobody"], ["logs", "nobody"],
                  ["wait", "nobody"], ["checkpoints", "nobody"], ["hash", "nobody"], ["metrics", "nobody"],
                  ["drain", "nobody"], ["sample", "nobody"], ["export", "nobody", "--to", "hf", "x"]):
        expect(f"{words[0]} of what is not there: exit 5", run(*words, *at), 5, "nobody")
    submitted = run("submit", job_file("queued"), "-d", *at)
    expect("submit -d without workers", submitted, 0, "job/queued submitted")
    expect("why says what is missing", run("why", "queued", *at), 0, "worker")
    expect("a priority is changed while it waits", run("priority", "queued", "7", *at), 0, "priority 7")
    expect("why shows the place in the queue", run("why", "queued", *at), 0, "place 1 of 1, priority 7")
    expect("a priority out of range: exit 2", run("priority", "queued", "1000001", *at), 2)
    expect("the same name again: exit 6", run("submit", job_file("queued"), "-d", *at), 6, "queued")
    expect("wait runs out: exit 8", run("wait", "queued", "--timeout", "300ms", *at), 8)
    start("worker", *at, "--name", "hand-1", "--threads", "1", log="hand-1.log")
    expect("wait for the end", run("wait", "queued", "--timeout", "60s", *at), 0, "COMPLETED")
    table = run("workers", *at).out.splitlines()
    check(len(table) == 2 and table[1].split()[0] == "hand-1" and table[1].split()[1] == "IDLE"
          and len(table[0].split()) == len(table[1].split()), "the workers' table: one word per column", table)
    wide = run("workers", *at, "-o", "wide").out.splitlines()
    check(len(wide) == 2 and len(wide[0].split()) == len(wide[1].split()), "the wide one too", wide)
    status = run("status", "queued", *at)
    expect("status in words", status, 0, "COMPLETED", "6 / 6 steps", "Saved", "Events")
    hashes = {run("hash", "queued", *at).out.strip(), (run("status", "queued", *at, "-o", "json").json() or {}).get(
        "weights_hash")}
    check(len(hashes) == 1 and all(hashes), "hash and status agree", hashes)
    series = run("metrics", "queued", *at, "-o", "csv").out.splitlines()
    check(len(series) == 7 and series[0].startswith("step,loss"), "metrics -o csv: a line per step", series)
    events = run("events", "queued", *at, "-o", "jsonl").out.splitlines()
    check(events and all("kind" in json.loads(line) for line in events), "events -o jsonl: an object per line", events)
    expect("a finished job can't be paused: exit 6", run("pause", "queued", *at), 6)
    expect("drain an idle worker", run("drain", "hand-1", "--reason", "new fan", *at), 0, "hand-1")
    until(lambda: (run("workers", *at, "-o", "json").json() or [{}])[0].get("state") == "DRAINED", 10,
          "the worker is drained")
    expect("the reason stands in the table", run("workers", *at), 0, "new-fan")
    run("submit", job_file("held"), "-d", *at)
    time.sleep(0.5)
    held = run("status", "held", *at, "-o", "json").json() or {}
    check(held.get("state") == "PENDING", "a drained worker gets no work", held.get("state"))
    expect("undrain", run("undrain", "hand-1", *at), 0, "hand-1")
    expect("and the job runs", run("wait", "held", "--timeout", "60s", *at), 0, "COMPLETED")
    check(len(run("jobs", "--all", *at).out.splitlines()) == 3, "jobs --all lists both")
    expect("a job of the same bits has the same hash", run("hash", "held", *at), 0, next(iter(hashes)) or "?")
    expect("a second coordinator on the store is refused: exit 6", run("coordinator", "--state", ROOT / "live",
                                                                       "--listen", "127.0.0.1:0", within=20), 6)
    expect("a wide port without TLS is refused", run("coordinator", "--state", ROOT / "wide", "--listen", "0.0.0.0:0",
                                                     within=20), 2, "--insecure")


def main():
    make_text(ROOT / "text.txt")
    tests = [test_help, test_usage, test_unreachable, test_job_files, test_init_and_plan, test_version, test_data,
             test_certs, test_run, test_interrupt, test_cluster]
    chosen = sys.argv[2:]
    for test in tests:
        if chosen and test.__name__[5:] not in chosen:
            continue
        say(f"-- {test.__name__[5:]}")
        try:
            test()
        except Exception as problem:  # one broken test must not hide the others
            check(False, f"{test.__name__}: {type(problem).__name__}: {problem}")


def clean_up():
    for child in CHILDREN:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
    if FAILURES:
        say(f"{len(FAILURES)} failed: {'; '.join(FAILURES)}\nfiles are kept in {ROOT}")
    else:
        shutil.rmtree(ROOT, ignore_errors=True)
        say("all passed")


if __name__ == "__main__":
    try:
        main()
    finally:
        clean_up()
    sys.exit(1 if FAILURES else 0)
