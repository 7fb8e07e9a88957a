#!/usr/bin/env python3
"""Which instructions compute, on one machine made to look like others: arithmetic_test.py BINARY CLAIM. Exit code 77 = skipped."""
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from run_test import BINARY, World, expect_in

MODEL = Path(__file__).resolve().parents[2] / "recipes/models/tiny-public"
# Another machine, as far as libraries can be talked into it: no AVX at all.
OTHER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def environment() -> dict:
    return json.loads(subprocess.run([BINARY, "env", "--format", "json"], capture_output=True, text=True, check=True).stdout)["arithmetic"]


def need_portable() -> None:
    if not environment()["portable"].startswith("available"):
        print("skipped:", environment()["portable"])
        sys.exit(77)


def units(world: World, run: str) -> dict[str, str]:
    """Artefacts by label."""
    listing = subprocess.run([BINARY, "ls", str(world.directory / run), "--format", "json"], capture_output=True, text=True, check=True)
    return {row["unit"]: row["artefact"] for row in json.loads(listing.stdout)}


def ids(world: World, run: str) -> set[bytes]:
    files = (file for file in (world.directory / run / "journal").rglob("*") if file.is_file())
    return {unit for file in files for unit in re.findall(rb'"unit":"([0-9a-f]{64})"', file.read_bytes())}


def portable_bits_do_not_depend_on_the_machine(world: World) -> None:
    need_portable()
    world.run("here", "workers.arithmetic=portable")
    world.run("there", "workers.arithmetic=portable", env=OTHER)
    assert units(world, "here") == units(world, "there"), "every artefact, evaluations included"
    world.run("native", env=OTHER)
    assert world.hash("native") != world.hash("here"), "the environment of the other machine must make a difference"


def native_arithmetic_is_part_of_every_unit(world: World) -> None:
    narrowed = {"ATEN_CPU_CAPABILITY": "default"}
    world.run("here")
    world.run("there", env=narrowed)
    assert ids(world, "here") and not ids(world, "here") & ids(world, "there")
    recorded = json.loads((world.directory / "here" / "recipe.json").read_text())["workers"]["arithmetic"]
    assert recorded == environment()["native"], recorded
    expect_in(world.run("here", env=narrowed, expect=2).stderr, "workers.arithmetic", "ATEN_CPU_CAPABILITY=default", "hint")
    expect_in(world.run("named", f"workers.arithmetic={recorded} MKL_CBWR=AVX", expect=2).stderr, "workers.arithmetic", "portable")
    expect_in(world.run("wrong", "workers.arithmetic=portabel", expect=2).stderr, "portable or native")


def machines_of_different_kinds_never_mix_their_bits(world: World) -> None:
    need_portable()
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)

    def mixed(run: str, *overrides: str) -> subprocess.CompletedProcess:
        line = world.command(run, *overrides, processes=2)
        different = [f"{name}={value}" for name, value in OTHER.items()]
        line += [":", "-n", "1", "env", *different, *world.command(run, *overrides)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    mixed_native = mixed("native")
    if "unit failed" in mixed_native.stderr:   # the other kind may come too late to be asked for anything
        expect_in(mixed_native.stderr, "processors of different kinds in one run")
    if mixed_native.returncode == 0:   # all units went to the process of the coordinator's kind in the end
        world.run("native_alone")
        assert units(world, "native") == units(world, "native_alone"), "bits of two kinds in one run"
    agreed = mixed("portable", "workers.arithmetic=portable")
    assert agreed.returncode == 0, agreed.stderr
    world.run("alone", "workers.arithmetic=portable")
    assert units(world, "portable") == units(world, "alone")


def more_threads_than_the_system_gives_are_refused(world: World) -> None:
    for count in ("1025", "1000000"):
        expect_in(world.run("threads", f"workers.threads={count}", expect=2).stderr, "workers.threads", "1024")
    done = subprocess.run([BINARY, "eval", MODEL, "--data", world.directory / "left.h5", "--threads", "1000000"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    expect_in(done.stderr, "at most 1024 threads")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moraine-cli-") as temporary:
        globals()[sys.argv[2]](World(Path(temporary)))
