#!/usr/bin/env python3
"""The peer of `stagecoach bench step`: the same GPT-2 training step in plain PyTorch on the CPU.

Forward, cross entropy over a padded vocabulary, backward, AdamW on all parameters with a tied head, one microbatch.
Prints one JSON line: {"ms": median, "best_ms": ..., "version": ...}.
"""
import argparse
import json
import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

parser = argparse.ArgumentParser()
for name, value in dict(layers=6, channels=384, heads=6, batch=4, tokens=256, vocab=50304, threads=2,
                        steps=5, warm=1).items():
    parser.add_argument("--" + name, type=int, default=value)
parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")  # bf16: autocast
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)


def attend(q, k, v, mask):
    if hasattr(functional, "scaled_dot_product_attention"):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    return functional.softmax(scores.masked_fill(mask, float("-inf")), -1) @ v


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x, mask):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, args.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(c, 2))
        x = x + self.out(attend(q, k, v, mask).transpose(1, 2).reshape(b, t, c))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        c = args.channels
        self.wte, self.wpe = nn.Embedding(args.vocab, c), nn.Embedding(1024, c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(args.layers))
        self.norm = nn.LayerNorm(c)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        mask = torch.triu(torch.ones(args.tokens, args.tokens, dtype=torch.bool), 1)
        self.register_buffer("mask", mask)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(args.tokens))
        for block in self.blocks:
            x = block(x, self.mask)
        logits = functional.linear(self.norm(x), self.wte.weight)
        return functional.cross_entropy(logits.view(-1, args.vocab), targets.view(-1))


model = Gpt()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
row = torch.randint(0, 50257, (args.batch, args.tokens + 1))
tokens, targets = row[:, :-1].contiguous(), row[:, 1:].contiguous()
times = []
for step in range(args.warm + args.steps):
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        loss = model(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step >= args.warm:
        times.append((time.perf_counter() - began) * 1e3)
print(json.dumps({"ms": statistics.median(times), "best_ms": min(times), "version": torch.__version__,
                  "threads": args.threads, "precision": args.precision, "loss": loss.item()}))
