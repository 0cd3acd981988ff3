#!/usr/bin/env python3
"""Trains the same GPT-2 in PyTorch and compares the loss of each step with Stagecoach's.

  torch_parity.py --export DIR --losses FILE --batches FILE.bin --job job.json

DIR      Hugging Face style export of step 0: config.json and *.safetensors.
losses   one JSON object a line: {"step": 1.., "loss": mean per token, "lr": .., "norm": ..};
         lr and norm are compared too where they are there.
batches  int32 little endian; per step global_sequences x (T + 1) tokens in position order.
job      the resolved job: model, batch, optimizer, schedule, stop_steps.

Needs torch (1.12 or newer, CPU) and nothing else. Uses torch's own autograd, AdamW and clip_grad_norm_,
so that nothing of the arithmetic is shared. Exit status: 0 equal, 1 a difference above --tolerance,
2 an input that can't be used, 77 no torch (CTest's "skipped").
"""
import argparse
import json
import math
import pathlib
import struct
import sys

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("skipped: no torch here. fix: apt-get install python3-torch", file=sys.stderr)
    sys.exit(77)


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_safetensors(path):
    """All float32 tensors of one file. Format: u64 header length, JSON header, data."""
    data = path.read_bytes()
    if len(data) < 8:
        refuse(f"{path}: {len(data)} bytes; a safetensors file has at least 8")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if header_bytes > len(data) - 8:
        refuse(f"{path}: header of {header_bytes} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + header_bytes])
    body = 8 + header_bytes
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            refuse(f"{path}: {name} is {entry['dtype']}; expected F32")
        begin, end = entry["data_offsets"]
        values = torch.frombuffer(bytearray(data[body + begin : body + end]), dtype=torch.float32)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_export(folder):
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse(f"{folder}: no *.safetensors. fix: stagecoach export JOB@0 --to hf {folder}")
    tensors = {}
    for path in files:
        for name, value in read_safetensors(path).items():
            tensors[name.removeprefix("transformer.")] = value
    tensors.pop("lm_head.weight", None)  # tied to wte
    return tensors


def split_heads(x, head_count):
    batch, length, channels = x.shape
    return x.view(batch, length, head_count, channels // head_count).transpose(1, 2)


class Gpt2:
    """Pre-norm GPT-2 with learned positions, tanh GELU and a tied head, as GPT2LMHeadModel."""

    def __init__(self, tensors, layer_count, head_count):
        self.p = {name: value.clone().requires_grad_(True) for name, value in tensors.items()}
        self.layer_count = layer_count
        self.head_count = head_count

    def norm(self, x, name):
        gain = self.p[name + ".weight"]
        return F.layer_norm(x, gain.shape, gain, self.p[name + ".bias"], eps=1e-5)

    def linear(self, x, name):
        return x @ self.p[name + ".weight"] + self.p[name + ".bias"]  # [in, out], as Conv1D

    def attention(self, x, name):
        length, channels = x.shape[1], x.shape[2]
        query, key, value = self.linear(x, name + ".c_attn").split(channels, dim=2)
        query, key, value = (split_heads(part, self.head_count) for part in (query, key, value))
        scores = query @ key.transpose(2, 3) / math.sqrt(channels // self.head_count)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=3)
        merged = (weights @ value).transpose(1, 2).reshape(x.shape)
        return self.linear(merged, name + ".c_proj")

    def loss_sum(self, inputs, targets):
        x = self.p["wte.weight"][inputs] + self.p["wpe.weight"][: inputs.shape[1]]
        for layer in range(self.layer_count):
            h = f"h.{layer}"
            x = x + self.attention(self.norm(x, h + ".ln_1"), h + ".attn")
            wide = F.gelu(self.linear(self.norm(x, h + ".ln_2"), h + ".mlp.c_fc"), approximate="tanh")
            x = x + self.linear(wide, h + ".mlp.c_proj")
        logits = self.norm(x, "ln_f") @ self.p["wte.weight"].T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def learning_rate(job, step):
    """Linear warm-up to lr, then a cosine to min_lr that ends at decay_steps (counted from step 0)."""
    lr, schedule = job["optimizer"]["lr"], job["schedule"]
    warmup = schedule.get("warmup_steps", 0)
    if step <= warmup:
        return lr * step / warmup
    if schedule.get("type", "cosine") == "constant":
        return lr
    end = schedule.get("decay_steps", 0) or job["stop_steps"]
    floor = schedule.get("min_lr", 0.0)
    if step >= end:
        return floor
    return floor + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup))) * (lr - floor)


def relative(a, b):
    return abs(a - b) / max(abs(b), 1e-12)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("export", "losses", "batches", "job"):
        parser.add_argument("--" + name, type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=50, help="compare at most this many")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    job = json.loads(options.job.read_text())
    job = job.get("spec", job)
    batch, optimizer = job["batch"], job["optimizer"]
    tensors = read_export(options.export)
    config = json.loads((options.export / "config.json").read_text())
    model = Gpt2(tensors, config["n_layer"], config["n_head"])
    expected_count = 2 + 12 * config["n_layer"] + 2
    if len(tensors) != expected_count:
        refuse(f"{options.export}: {len(tensors)} tensors; a GPT-2 of {config['n_layer']} blocks has {expected_count}")

    records = {}
    for line in options.losses.read_text().splitlines():
        if line.strip():
            record = json.loads(line)
            records[record["step"]] = record
    sequences, tokens = batch["global_sequences"], batch["sequence_tokens"]
    raw = bytearray(options.batches.read_bytes())
    step_values = sequences * (tokens + 1)
    if len(raw) % (4 * step_values):
        refuse(f"{options.batches}: {len(raw)} bytes; expected a multiple of {4 * step_values} ({sequences} x {tokens + 1} int32)")
    batches = torch.frombuffer(raw, dtype=torch.int32).reshape(-1, sequences, tokens + 1).long()
    step_count = min(options.steps, len(batches))
    missing = [s for s in range(1, step_count + 1) if s not in records]
    if step_count == 0 or missing:
        refuse(f"{options.losses}: no loss for step {missing[0] if missing else 1}; expected 1..{step_count}")

    groups = [
        {"params": [p for p in model.p.values() if p.dim() >= 2], "weight_decay": optimizer["weight_decay"]},
        {"params": [p for p in model.p.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=1.0, betas=(optimizer["beta1"], optimizer["beta2"]), eps=optimizer["eps"]
    )
    worst = {"loss": (0.0, 0), "lr": (0.0, 0), "norm": (0.0, 0)}
    micro = batch.get("micro_sequences") or sequences
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {step_count} steps")
    print(f"{'step':>5} {'stagecoach':>12} {'torch':>12} {'relative':>10} {'norm':>10}")
    for step in range(1, step_count + 1):
        record, data = records[step], batches[step - 1]
        total = 0.0
        adamw.zero_grad()
        for part in data.split(micro):
            loss = model.loss_sum(part[:, :-1], part[:, 1:])
            (loss / (sequences * tokens)).backward()
            total += loss.item()
        clip = optimizer.get("grad_clip", 0.0)
        norm = torch.nn.utils.clip_grad_norm_(model.p.values(), clip if clip > 0 else float("inf")).item()
        lr = learning_rate(job, step)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        ours = {"loss": total / (sequences * tokens), "lr": lr, "norm": norm}
        for key, value in ours.items():
            if record.get(key) is not None:
                difference = relative(float(record[key]), value)
                if not difference <= worst[key][0]:  # a NaN is the worst
                    worst[key] = (difference, step)
        print(f"{step:5} {record['loss']:12.7f} {ours['loss']:12.7f} "
              f"{relative(record['loss'], ours['loss']):10.2e} {norm:10.4f}")
    for key, (difference, step) in worst.items():
        print(f"max relative difference of {key}: {difference:.3e} (step {step})")
    if not worst["loss"][0] <= options.tolerance:
        print(f"FAILED: above {options.tolerance:g}")
        return 1
    print(f"ok: within {options.tolerance:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
