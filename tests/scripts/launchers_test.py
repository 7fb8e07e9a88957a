#!/usr/bin/env python3
"""Scripts that start the moraine binary: launchers_test.py BINARY CLAIM. Slurm and, where it says so, mpirun are stand-ins."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
BINARY = Path(sys.argv[1]).resolve()

RECIPE = """
name: tiny
method: flexmore
model:
  architecture: {vocab_size: 264, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, max_position_embeddings: 64}
  train: {steps: 2, batch_size: 2}
public_path: public.h5
domains: [{name: left, path: left.h5, rank: 2}]
seq_len: 32
train: {steps: 2, batch_size: 2}
router: {embedding_sequences: 2}
ranks: {candidates: [2]}
evaluation: {sequences: 2, validation_sequences: 2, batch_size: 2}
workers: {threads: THREADS}
"""
# Prints what it was started with, as JSON, in the place of mpirun.
RECORDING_MPIRUN = """#!/usr/bin/env python3
import json, sys
print("mpirun (Open MPI) 4.1" if sys.argv[1:] == ["--version"] else json.dumps(sys.argv[1:]))
sys.exit(CODE)
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def clean_environment(**more: str) -> dict:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MORAINE_", "SLURM_"))}
    return {**kept, **more}


class World:
    """A temporary directory with prepared text, a recipe and what a node of a Slurm job offers."""

    def __init__(self, directory: Path, threads: int = 1):
        self.directory = directory
        for name, alphabet in (("public", "etaoin shrdlu"), ("left", "abcdefg ")):
            rng = random.Random(name)
            text = directory / f"{name}.jsonl"
            text.write_text("".join(json.dumps({"text": "".join(rng.choice(alphabet) for _ in range(400))}) + "\n" for _ in range(40)))
            subprocess.run([sys.executable, SOURCE / "scripts/prepare_text.py", "--name", name, "--out", directory / f"{name}.h5",
                            "--validation", "0.2", "--test", "0.2", text], check=True, capture_output=True)
        (directory / "recipe.yaml").write_text(RECIPE.replace("THREADS", str(threads)))
        write_program(directory / "bin/scontrol", '#!/bin/sh\nif [ "$1" = show ]; then hostname; else echo "$@" >>scontrol.log; fi\n')

    def record_mpirun(self, code: int = 0) -> None:
        write_program(self.directory / "bin/mpirun", RECORDING_MPIRUN.replace("CODE", str(code)))

    def job(self, *arguments: str, cpus: int = 4, **variables: str) -> subprocess.CompletedProcess:
        """The Slurm script as the first node of a job of one node runs it."""
        environment = clean_environment(
            PATH=f"{self.directory / 'bin'}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(self.directory), SLURM_JOB_ID="1",
            SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="x", SLURM_CPUS_ON_NODE=str(cpus), MORAINE=str(BINARY), OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_MCA_btl_vader_single_copy_mechanism="none")
        environment.update(variables)
        return subprocess.run(["bash", SOURCE / "scripts/moraine.sbatch", *arguments], env=environment, cwd=self.directory, capture_output=True,
                              text=True, timeout=200, stdin=subprocess.DEVNULL)

    def recorded(self, *arguments: str, **options) -> list[str]:
        """What the Slurm script gave to mpirun."""
        done = self.job(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def variables_of_scripts() -> set[str]:
    """MORAINE_ variables that any script reads from its environment."""
    pattern = re.compile(r"\$\{(MORAINE_[A-Z_]+)|\$(MORAINE_[A-Z_]+)|environ(?:\.get\(|\[)[\"'](MORAINE_[A-Z_]+)")
    scripts = [path for path in (SOURCE / "scripts").iterdir() if path.is_file()]
    return {name for path in scripts for match in pattern.findall(path.read_text()) for name in match if name}


def variables_of_scripts_are_not_recipe_keys(directory: Path) -> None:
    World(directory)
    names = variables_of_scripts()
    assert {"MORAINE_THREADS", "MORAINE_WORKERS_PER_NODE", "MORAINE_CMAKE_FLAGS"} <= names, names
    plain = [BINARY, "validate", "--schema-only", "--format", "json", "recipe.yaml"]
    without = subprocess.run(plain, cwd=directory, env=clean_environment(), capture_output=True, text=True, check=True).stdout
    for name in sorted(names):
        done = subprocess.run(plain, cwd=directory, env=clean_environment(**{name: "1"}), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, without), f"{name}: {done.stderr}"


def a_slurm_job_runs_with_its_variables(directory: Path) -> None:
    world = World(directory)
    done = world.job("recipe.yaml", "--run-dir", "out", MORAINE_THREADS="2", MORAINE_WORKERS_PER_NODE="1")
    assert done.returncode == 0, done.stderr
    recipe = json.loads((directory / "out/recipe.json").read_text())
    assert recipe["workers"]["threads"] == 2, recipe["workers"]


def a_slurm_job_takes_threads_from_the_recipe(directory: Path) -> None:
    world = World(directory, threads=2)
    world.record_mpirun()
    line = world.recorded("recipe.yaml", "--run-dir", "out")
    assert line[line.index("-n") + 1] == "3", line   # four processors, two threads each, and the coordinator
    assert "OMP_NUM_THREADS=2" in line, line
    assert line[-4:] == ["run", "recipe.yaml", "--run-dir", "out"], line
    line = world.recorded("recipe.yaml", MORAINE_THREADS="4")
    assert (line[line.index("-n") + 1], line[-1]) == ("2", "workers.threads=4"), line
    line = world.recorded("recipe.yaml", "workers.threads=1", MORAINE_WORKERS_PER_NODE="3")
    assert line[line.index("-n") + 1] == "4", line
    line = world.recorded("recipe.yaml", SLURM_GPUS_ON_NODE="1")
    assert line[line.index("-n") + 1] == "2", line


def a_slurm_job_forwards_the_recipes_variables(directory: Path) -> None:
    world = World(directory)
    world.record_mpirun()
    line = world.recorded("recipe.yaml", MORAINE_TRAIN__STEPS="3", MORAINE_LOG="debug", MORAINE_THREADS="1", MORAINE_WORKERS_PER_NODE="1",
                          HDF5_USE_FILE_LOCKING="FALSE")
    forwarded = {line[i + 1] for i, word in enumerate(line) if word == "-x"}
    assert forwarded == {"OMP_NUM_THREADS=1", "MORAINE_TRAIN__STEPS", "MORAINE_LOG", "HDF5_USE_FILE_LOCKING"}, forwarded


def slurm_jobs_that_cannot_work_are_refused(directory: Path) -> None:
    world = World(directory)
    world.record_mpirun()
    for part, arguments, variables in (
            ("no recipe", (), {}), ("not a Slurm job", ("recipe.yaml",), {"SLURM_SUBMIT_DIR": ""}),
            ("no such program", ("recipe.yaml",), {"MORAINE": "build/none"}),
            ("MORAINE_THREADS must be a number", ("recipe.yaml",), {"MORAINE_THREADS": "two"}),
            ("MORAINE_WORKERS_PER_NODE must be a number", ("recipe.yaml",), {"MORAINE_WORKERS_PER_NODE": "0"}),
            ("both given", ("recipe.yaml", "workers.threads=1"), {"MORAINE_THREADS": "2"}),
            ("does not fit a node of 4", ("recipe.yaml",), {"MORAINE_THREADS": "5"}),
            ("how many processors", ("recipe.yaml",), {"SLURM_CPUS_ON_NODE": ""}),
            ("steppes", ("recipe.yaml", "train.steppes=1"), {}), ("none.yaml", ("none.yaml",), {})):
        done = world.job(*arguments, **variables)
        assert (done.returncode, part in done.stderr, done.stdout) == (2, True, ""), (part, done.returncode, done.stderr)
    world.record_mpirun(code=75)   # a stopped run queues itself again
    assert world.job("recipe.yaml").returncode == 75
    assert (directory / "scontrol.log").read_text() == "requeue 1\n"
    world.record_mpirun(code=4)
    assert world.job("recipe.yaml").returncode == 4


def a_job_starts_wherever_it_is_started(directory: Path) -> None:
    """More processes than cores, whoever the user is, from another directory, with output into a file."""
    world = World(directory)
    launch = [SOURCE / "scripts/launch", "-n", "5", "run", "recipe.yaml", "--run-dir", "out"]
    environment = clean_environment(MORAINE_BUILD_DIR=str(BINARY.parent), MORAINE_TRAIN__STEPS="3", HDF5_USE_FILE_LOCKING="FALSE")
    with (directory / "log").open("wb") as log:
        code = subprocess.run(launch, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=200).returncode
    assert code == 0, (directory / "log").read_text()
    assert json.loads((directory / "out/recipe.json").read_text())["train"]["steps"] == 3
    world.record_mpirun()
    line = json.loads(subprocess.run(launch, cwd=directory, env={**environment, "PATH": f"{directory / 'bin'}:{os.environ['PATH']}"},
                                     capture_output=True, text=True, check=True).stdout)
    assert "--oversubscribe" in line and ("--allow-run-as-root" in line) == (os.geteuid() == 0), line
    forwarded = {line[i + 1] for i, word in enumerate(line) if word == "-x"}
    assert {"MORAINE_TRAIN__STEPS", "HDF5_USE_FILE_LOCKING"} <= forwarded, line


def scripts_say_what_is_wrong(directory: Path) -> None:
    """In a checkout without set-up, then in one where nothing can be written; each time from another working directory."""
    shutil.copytree(SOURCE / "scripts", directory / "scripts")
    fetching, everything = ("fetch_domains", "fetch_images", "fetch_encoder"), ("fetch_domains", "fetch_images", "fetch_encoder", "setup")

    def expect(name: str, code: int, part: str, *arguments: str, **variables: str) -> None:
        done = subprocess.run([directory / "scripts" / name, *arguments], cwd="/", env=clean_environment(**variables), capture_output=True, text=True, timeout=60)
        assert (done.returncode, f"{name}: " in done.stderr, part in done.stderr) == (code, True, True), (name, done.returncode, done.stderr)

    for name in everything:
        expect(name, 2, "--none", "--none")
    for name in fetching:
        expect(name, 3, "run scripts/setup")
    (directory / ".venv").symlink_to(SOURCE / ".venv")
    (directory / ".cache").touch()   # in the place of the folder
    for name in everything:
        expect(name, 3, "then run it again")
    tools = directory / "tools"
    tools.mkdir()
    for program in ("bash", "dirname", "mkdir"):
        (tools / program).symlink_to(shutil.which(program))
    expect("build", 3, "cmake is not installed", PATH=str(tools))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        globals()[sys.argv[2]](Path(directory))


if __name__ == "__main__":
    main()
