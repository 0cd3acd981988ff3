#!/usr/bin/env python3
"""The peer of `stagecoach bench elastic --peer`: torchrun + DDP + Gloo under the same seeded list of kills.

A GPT of the same shape and batch (d4/64, 64 sequences of 64 tokens), two processes, a checkpoint every 20 steps, and
torchrun --standalone with --max-restarts: what a user gets who follows PyTorch's own documents, with one help: the
workers' store is not the agent's. PyTorch 2.15 shares it, a restarted Gloo then finds the dead workers' addresses there
and waits for them for its whole timeout (30 minutes). First undisturbed, then with kill -9 of a worker at each moment. Prints one JSON line: recovery seconds, steps lost per kill, and whether
the last weights have the same hash as the undisturbed run's.

usage: bench_peer_elastic.py --steps N --kills "0.31:0 0.72:1 ..."     seconds of calm before each kill, and whom
       (with torchrun's variables set it is one of the workers)
"""
import argparse
import datetime
import hashlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--kills", default="")
parser.add_argument("--processes", type=int, default=2)
parser.add_argument("--save-every", type=int, default=20)
parser.add_argument("--folder", default="")
arguments = parser.parse_args()
CHANNELS, LAYERS, HEADS, TOKENS, SEQUENCES, VOCABULARY = 64, 4, 4, 64, 64, 256


def work():
    import torch
    import torch.distributed
    from torch import nn
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            c = CHANNELS
            self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
            self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
            self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(c, 2))
            x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                             .transpose(1, 2).reshape(b, t, c))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(VOCABULARY, CHANNELS), nn.Embedding(TOKENS, CHANNELS)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.LayerNorm(CHANNELS)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(TOKENS))
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.wte.weight)
            return functional.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))

    torch.set_num_threads(1)
    torch.manual_seed(1234)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder = pathlib.Path(arguments.folder)
    (folder / f"pid{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"pid{rank}.tmp").rename(folder / f"pid{rank}")
    text = torch.randint(0, VOCABULARY, (100_000,), generator=torch.Generator().manual_seed(7))
    model = Gpt()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    saved = folder / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    log = open(folder / "steps", "a", buffering=1) if rank == 0 else None
    mine = SEQUENCES // count
    for step in range(first, arguments.steps):
        source = torch.Generator().manual_seed(step)
        begins = torch.randint(0, len(text) - TOKENS - 1, (SEQUENCES,), generator=source)[rank * mine:(rank + 1) * mine]
        rows = torch.stack([text[b:b + TOKENS + 1] for b in begins])
        optimizer.zero_grad(set_to_none=True)
        replica(rows[:, :-1], rows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if log:
            log.write(f"{step + 1} {time.time()}\n")
            if (step + 1) % arguments.save_every == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                           folder / "checkpoint.tmp")
                (folder / "checkpoint.tmp").rename(saved)
    if rank == 0:
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        (folder / "hash").write_text(digest.hexdigest()[:32])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def steps_of(folder):
    rows = [line.split() for line in (folder / "steps").read_text().splitlines()] if (folder / "steps").exists() else []
    return [(int(row[0]), float(row[1])) for row in rows if len(row) == 2]


def run(kills):
    """(hash, [(seconds to the next new step, steps lost)], usual seconds of a step)"""
    with tempfile.TemporaryDirectory(prefix="stagecoach-peer-") as name:
        folder = pathlib.Path(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={arguments.processes}", f"--max-restarts={len(kills) + 3}",
                   "--monitor-interval=0.1", __file__, "--steps", str(arguments.steps), "--save-every",
                   str(arguments.save_every), "--folder", name]
        with open(folder / "log", "w") as log:
            job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                   env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        events = []
        try:
            for calm, whom in kills:
                before = len(steps_of(folder))
                while len(steps_of(folder)) < before + 3 and job.poll() is None:
                    time.sleep(0.01)
                time.sleep(calm)
                done = steps_of(folder)
                if job.poll() is not None or done[-1][0] >= arguments.steps - 5:
                    break
                pids = [int((folder / f"pid{r}").read_text()) for r in range(arguments.processes)]
                struck = time.time()
                os.kill(pids[whom % len(pids)], signal.SIGKILL)
                # A step already under way may still be written by the survivor; the restart begins below or at it.
                while job.poll() is None:
                    now = steps_of(folder)
                    again = [(s, t) for i, (s, t) in enumerate(now) if i and s <= now[i - 1][0] and t > struck]
                    if again:
                        newest = max(s for s, t in now if t < again[0][1])
                        events.append((again[0][1] - struck, newest - again[0][0] + 1))
                        break
                    if now[-1][1] > struck + 0.5 and len(now) > len(done) + 1:  # restarted exactly at the newest step
                        first = next(t for s, t in now[len(done):] if t > struck + 0.5)
                        events.append((first - struck, 0))
                        break
                    time.sleep(0.005)
            job.wait(600)
            if job.returncode != 0:
                sys.exit("the peer failed:\n" + (folder / "log").read_text()[-2000:])
            rows = steps_of(folder)
            usual = statistics.median(b[1] - a[1] for a, b in zip(rows, rows[1:]))
            return (folder / "hash").read_text(), events, usual
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()


def main():
    import torch
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers are stopped too
    kills = [(float(word.split(":")[0]), int(word.split(":")[1])) for word in arguments.kills.split()]
    calm, _, usual = run([])
    stormy, events, _ = run(kills)
    print(json.dumps({"version": torch.__version__, "kills": len(events), "seconds": [e[0] for e in events],
                      "lost": [e[1] for e in events], "step_s": usual, "hash_calm": calm, "hash_storm": stormy}))


if "TORCHELASTIC_RUN_ID" in os.environ:
    work()
else:
    main()
