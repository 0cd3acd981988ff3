#!/usr/bin/env python3
"""The peer of `stagecoach bench comm`: PyTorch's all_reduce over Gloo between two processes of this host.

Prints one JSON line: {"ms": [one a repetition, until both ranks are done], "version": ...}.
"""
import argparse
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WARM = 3


def rank_main(rank, store, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tensor = torch.ones(args.floats)
    times = []
    for repetition in range(WARM + args.repetitions):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        dist.barrier()
        if repetition >= WARM:
            times.append((time.perf_counter() - began) * 1e3)
    expected = 2.0 ** (WARM + args.repetitions)
    assert tensor[0].item() == expected and tensor[-1].item() == expected
    if rank == 0:
        print(json.dumps({"ms": times, "version": torch.__version__}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--floats", type=int, default=30_400_000)
    parser.add_argument("--repetitions", type=int, default=10)
    parsed = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, args=(folder + "/store", parsed), nprocs=2)
