#!/usr/bin/env python3
"""The loss curve beside PyTorch's, from the same weights and batches, through the product's own commands.

  run_parity.py STAGECOACH PARITY_BATCHES [--python PYTHON_WITH_TORCH] [--text FILE] [--steps 50]

Trains a small GPT-2 (4 layers, 128 channels, byte tokens) with `train`, exports step 0 with `export`, writes the batches,
and lets torch_parity.py train the same. Exit status: torch_parity.py's (0 equal, 1 over tolerance, 77 no torch).
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("stagecoach")
parser.add_argument("parity_batches")
parser.add_argument("--python", default=sys.executable)
parser.add_argument("--text", default="/usr/share/common-licenses/GPL-3")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

JOB = f"""version: 1
name: parity
model: {{n_layer: 4, d_model: 128, n_head: 4, vocab_size: 256, context: 128}}
data: {{tokenizer: bytes, train: [{{path: {pathlib.Path(args.text).absolute()}, format: text}}]}}
batch: {{global: 16 sequences, micro: 2, sequence: 128, leaves: 8}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup: 10 steps}}
stop: {{steps: {args.steps}}}
elasticity: {{workers: 2}}
checkpoint: {{every: never}}
"""

with tempfile.TemporaryDirectory(prefix="stagecoach-parity-") as folder:
    root = pathlib.Path(folder)
    (root / "job.yaml").write_text(JOB)
    processes = []
    try:
        processes.append(subprocess.Popen(
            [args.stagecoach, "coordinator", "--state", str(root / "state"), "--listen", "127.0.0.1:0", "--port-file",
             str(root / "port"), "--log-file", str(root / "coordinator.log")]))
        while not (root / "port").exists():
            time.sleep(0.02)
        address = f"127.0.0.1:{int((root / 'port').read_text())}"
        for i in (1, 2):
            processes.append(subprocess.Popen(
                [args.stagecoach, "worker", "--coordinator", address, "--name", f"w{i}", "--threads", "1", "--log-file",
                 str(root / f"w{i}.log")]))
        cli = lambda *words: subprocess.run([args.stagecoach, *words, "--coordinator", address], check=True,
                                            capture_output=True, text=True).stdout
        cli("submit", str(root / "job.yaml"), "-d")
        cli("wait", "parity", "--timeout", "10m")
        cli("export", "parity@0", "--to", "hf", str(root / "step0"))
        with urllib.request.urlopen(f"http://{address}/api/v1/jobs/parity/series") as reply:
            steps = json.load(reply)["steps"]
        (root / "losses.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    subprocess.run([args.parity_batches, str(root / "job.yaml"), str(args.steps), str(root / "batches.bin"),
                    str(root / "job.json")], check=True)
    here = pathlib.Path(__file__).parent
    sys.exit(subprocess.run(
        [args.python, str(here / "torch_parity.py"), "--export", str(root / "step0"), "--losses", str(root / "losses.jsonl"),
         "--batches", str(root / "batches.bin"), "--job", str(root / "job.json")]).returncode)
