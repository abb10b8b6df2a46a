"""How fast are training and restoring on this GPU? Steps, evaluations and samples at the values of task cbis-ddsm.

No data is needed: batches are random, and models untrained. Times are medians, of CUDA events; FLOPs are those that run, what
checkpointing computes again among them. Another checkout is measured in alternation with this one, for ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helper import UserError, explained, format_table
from running.command_line import Parser, path_argument, positive_int
from running.scripts import finish_batch, run_script
from running.writing import write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("gpu_rows.py")  # measures a checkout, in a process of its own
ROWS = {
    "stage1": "stage 1, step, batch 4, AMP",
    "stage1-no-amp": "  without AMP",
    "stage1-batch16": "  batch 16",
    "stage1-compiled": "  compiled",
    "mean": "stage 2, step of the posterior mean, batch 4, AMP, checkpointing",
    "mean-no-checkpoint": "  without checkpointing",
    "mean-compiled": "  checkpointing, compiled",
    "diffusion": "stage 2, step of the diffusion, batch 4, AMP, checkpointing",
    "diffusion-no-checkpoint": "  without checkpointing",
    "unet-float32": "UNet, evaluation of an image, float32",
    "unet-tf32": "  matrix products in TF32",
    "unet-bf16": "  bfloat16",
    "unet-fp16": "  float16",
    "sample": "image restored, 50 evaluations, default precision",
    "sample-float32": "  float32",
}
COMPILED = [name for name in ROWS if name.endswith("-compiled")]
GIB, TERA = 2**30, 1e12

Result = dict[str, Any]


def measured(checkout: Path, names: Sequence[str]) -> Result:
    """What `gpu_rows.py` finds about a checkout; if its process fails, no row and its exit status as an error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(SCRIPT), str(checkout.resolve()), str(path), *names]
        quiet = {"KINETO_LOG_LEVEL": "99"} | os.environ  # the profiler's own lines
        status = subprocess.run(command, env=quiet, check=False).returncode
        if status or not path.is_file():
            return {"rows": {}, "errors": {"measurement": f"ended with exit status {status}"}}
        return json.loads(path.read_text(encoding="utf-8"))


def alternate(measure: Callable[[Path], Result], checkouts: Sequence[Path], rounds: int) -> list[list[Result]]:
    """The results of every checkout, a list each, measured one after the other in every round."""
    results: list[list[Result]] = [[] for _ in checkouts]
    for number in range(rounds):
        for checkout, own in zip(checkouts, results, strict=True):
            print(f"measuring {checkout}, round {number + 1} of {rounds}", file=sys.stderr)
            own.append(measure(checkout))
    return results


def summary(results: Sequence[Result]) -> Result:
    """A checkout's rounds as one: medians of times and rates, the greatest memory, and with them FLOP/s and MFU by row.

    MFU is the share of the rate of a bf16 matrix product on this card that the row's FLOPs reach.
    """
    rated = [result for result in results if "matrix_rate" in result]
    own: Result = {key: value for result in rated for key, value in result.items()}
    own |= {key: statistics.median(result[key] for result in rated) for key in ("matrix_rate", "copy_rate") if rated}
    own |= {"rows": {}, "errors": {name: line for result in results for name, line in result["errors"].items()}}
    for name in ROWS:
        rounds = [result["rows"][name] for result in results if name in result["rows"]]
        if not rounds:
            continue
        row = own["rows"][name] = dict(rounds[0])
        row["seconds"] = statistics.median(each["seconds"] for each in rounds)
        peaks = [each["peak_bytes"] for each in rounds if each["peak_bytes"] is not None]
        row["peak_bytes"] = max(peaks, default=None)
        row["flops_per_second"] = row["flops"] / row["seconds"]
        row["mfu"] = row["flops_per_second"] / own["matrix_rate"]
    return own


def ratios(own: Sequence[Result], other: Sequence[Result]) -> dict[str, Result]:
    """By row: this checkout's time over the other's in the same round, median, least and most; and so its memory."""
    found = {}
    for name in ROWS:
        pairs = [(a["rows"][name], b["rows"][name]) for a, b in zip(own, other, strict=True)
                 if name in a["rows"] and name in b["rows"]]  # fmt: skip
        if not pairs:
            continue
        times = [a["seconds"] / b["seconds"] for a, b in pairs]
        peaks = [a["peak_bytes"] / b["peak_bytes"] for a, b in pairs if a["peak_bytes"] and b["peak_bytes"]]
        found[name] = {"seconds": statistics.median(times), "least": min(times), "most": max(times)}
        found[name]["peak_bytes"] = statistics.median(peaks) if peaks else None
    return found


def time_of(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.3f} s"


def table(own: Result, against: dict[str, Result] | None = None) -> str:
    """Times, memory and rates by row, with the ratios to the other checkout, if there is one."""
    header = ["", "time", "peak, GiB", "TFLOP", "TFLOP/s", "MFU", "launches"]
    header += ["ratio (least, most)", "of memory"] if against is not None else []
    rows = []
    for name, row in own["rows"].items():
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
        work, rate = row["flops"] / TERA, row["flops_per_second"] / TERA
        launches = f"{row['launches']:.0f}" if "launches" in row else ""
        cells = [ROWS[name], time_of(row["seconds"]), peak, f"{work:.2f}", f"{rate:.0f}", f"{row['mfu']:.3f}", launches]
        if against is not None:
            ratio = against.get(name)
            cells += ["", ""] if ratio is None else [
                f"{ratio['seconds']:.3f} ({ratio['least']:.3f}, {ratio['most']:.3f})",
                "" if ratio["peak_bytes"] is None else f"{ratio['peak_bytes']:.3f}",
            ]  # fmt: skip
        rows.append(cells)
    return format_table(header, rows)


def profile_table(own: Result) -> str:
    """Where the kernels' time goes, by row: their sum and the share of every kind of operator in it."""
    profiles = {name: row for name, row in own["rows"].items() if "profile" in row}
    kinds = [kind for kind in next(iter(profiles.values()), {"profile": {}})["profile"]
             if any(row["profile"][kind] for row in profiles.values())]  # fmt: skip
    rows = [[ROWS[name], time_of(row["kernel_seconds"]), *(f"{100 * row['profile'][kind]:.0f} %" for kind in kinds)]
            for name, row in profiles.items()]  # fmt: skip
    return format_table(["kernels", "time", *kinds], rows)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        metavar="ROW",
        help=f"what to measure: {', '.join(ROWS)} (default: all but compiled)",
    )
    add("--compile", action="store_true", help=f"measure the compiled steps too: {', '.join(COMPILED)}")
    add("--against", type=path_argument, metavar="DIR", help="another checkout, measured in alternation with this one")
    add("--rounds", type=positive_int, default=3, help="with --against: measurements of both (default: 3)")
    add("--out", type=path_argument, help="folder of gpu.json (default: none is written)")
    return parser.parse_args()


def check_output(folder: Path) -> None:
    """Raises UserError if no file can be written to the folder, which is made."""
    with explained(f"--out {folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def main() -> None:
    args = parse_arguments()
    if args.against and not (args.against / "trainer.py").is_file():
        raise UserError(f"--against {args.against}: holds no trainer.py; name the root of another checkout")
    import torch  # after the flags: a wrong one is answered at once

    if not torch.cuda.is_available():
        raise UserError("no CUDA device found, and this measures nothing else; on a CPU run benchmarks/steps.py")
    if args.out:
        check_output(args.out)
    wanted = set(args.rows or set(ROWS) - set(COMPILED)) | set(COMPILED if args.compile else [])
    names = [name for name in ROWS if name in wanted]
    checkouts = [ROOT, args.against] if args.against else [ROOT]
    results = alternate(lambda checkout: measured(checkout, names), checkouts, args.rounds if args.against else 1)
    own, *others = [summary(rounds) for rounds in results]
    for other in others:
        own["against"] = {"checkout": str(args.against), **other, "ratios": ratios(*results)}
        for name, line in other["errors"].items():  # an older one need not have every row
            print(f"warning: {args.against}: {name}: {line}", file=sys.stderr)
    if own["rows"]:
        print(table(own, own["against"]["ratios"] if others else None) + "\n\n" + profile_table(own))
        print(
            f"\n{own['device']}, torch {own['torch']}: a bf16 matrix product reaches {own['matrix_rate'] / TERA:.0f} TFLOP/s, "
            f"which MFU is a share of; a copy {own['copy_rate'] / TERA:.2f} TB/s"
        )
        if args.out:
            write_json(args.out / "gpu.json", own)
            print(f"\ngpu.json written to {args.out}")
    finish_batch([f"{name}: {line}" for name, line in own["errors"].items()], len(own["rows"]))


if __name__ == "__main__":
    run_script(main)
