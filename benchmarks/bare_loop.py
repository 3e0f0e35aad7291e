"""The loop that a careful user writes by hand: the model, tokens and steps of `mixtura train` without its Trainer.

Fused AdamW, clipping, warm-up and cosine, one checkpoint at the end; no evaluation, no metrics file, nothing to resume.
`benchmarks/runs.py` starts it in a process of its own and reads the JSON that it prints last.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.training.process import keep_freed_memory


def main() -> None:
    """Trains as the JSON in the first argument says."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    clock = time.process_time if asked["threads"] == 1 else lambda: time.perf_counter() - asked["started"]
    keep_freed_memory()
    sequences_NL = np.load(asked["tokens"], mmap_mode="r")
    torch.manual_seed(0)
    model = MixtureForCausalLM(MixtureConfig(**asked["config"])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked["rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps, batch = asked["steps"], asked["batch"]
    warmup = max(1, round(0.05 * steps))
    order = np.random.default_rng(0).permutation(len(sequences_NL))
    seconds = []
    for step in range(steps):
        started = clock()
        rows = [order[row % len(order)] for row in range(step * batch, (step + 1) * batch)]
        ids_BL = torch.from_numpy(sequences_NL[rows].astype(np.int64))
        progress = (step + 1 - warmup) / max(1, steps - warmup)
        factor = (step + 1) / warmup if step + 1 < warmup else 0.55 + 0.45 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = asked["rate"] * factor
        optimizer.zero_grad()
        loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(clock() - started)
    folder = Path(asked["out"])
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    print(json.dumps({"steps": seconds, "to_checkpoint": clock()}))


if __name__ == "__main__":
    main()
