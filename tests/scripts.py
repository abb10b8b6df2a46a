"""Calls of the scripts, in this process or as one of their own."""

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "main-vqvae": "--cpu --hps image_shape=1,64,48 --hps crop_size=32 --hps phantom_counts=4,2,2 "
    "--hps crops_per_image=2 --batch-size 4 --hps hidden_channels=16 --hps embed_dim=16 --hps nb_entries=16 "
    "--hps nb_levels=2 --hps scaling_rates=4,2 --hps warmup_steps=1 --hps checkpoint_frequency=1",
    "main-diffusion": "--cpu --hps crop_size=32 --hps crops_per_image=2 --batch-size 4 --hps in_channels=32 "
    "--hps out_channels=16 --hps model_channels=32 --hps num_head_channels=32 --hps ddim_steps=3 --hps fast_steps=2 "
    "--hps mean_epochs=1 --hps mean_channels=32 --hps warmup_steps=1 --hps checkpoint_frequency=1 --hps dropout=0.1",
    "main-latents": "--cpu",
    "main-restore": "--cpu --no-tqdm",
    "main-export": "",
    "benchmarks/quality": "",
    "benchmarks/detector": "--cpu --no-tqdm",
}


@dataclass
class Result:
    """What a call of a script leaves behind."""

    code: int
    out: str
    err: str


def arguments(script, line):
    return shlex.split(f"{FLAGS[script]} {line}")


def shell(script, line):
    """Run a script as a process of its own."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments(script, line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def load_script(script):
    """A script, by its path without suffix, as a module."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", script), ROOT / f"{script}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, line):
    """Run a script in this process; an exception that the script does not turn into an exit status goes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", [f"{script}.py", *arguments(script, line)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), argv:
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def succeed(script, line):
    result = call(script, line)
    assert result.code == 0, result.err
    return result


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
