#!/usr/bin/env python3
"""Every command under the same circumstances: sweep_test.py BINARY CLAIM. Exit code 77 = skipped."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from run_test import BINARY, SOURCE, World, expect_in, mpirun


def call(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([BINARY, *arguments], capture_output=True, timeout=300, stdin=subprocess.DEVNULL, **options)


def commands() -> list[str]:
    """Names of all commands, as completion knows them."""
    line = re.search(r'arguments="([a-z -]+)" ;;', call("completion", "bash").stdout.decode())
    return line.group(1).split()


class Finished(World):
    """A finished run, and one line that succeeds for every command. `fresh` numbers outputs, which must not exist."""

    def __init__(self, directory: Path):
        super().__init__(directory, steps=2)
        self.run("run")
        self.fresh = 0
        call("export", directory / "run", directory / "lora", "--to", "peft")
        (directory / "merge.yaml").write_text("experts: [{run: run, expert: left}, {run: run, expert: right}]\n")

    def new(self) -> Path:
        self.fresh += 1
        return self.directory / f"new{self.fresh}"

    def lines(self) -> dict[str, list]:
        here, run = self.directory, self.directory / "run"
        return {
            "run": ["run", self.recipe, "--run-dir", run], "validate": ["validate", self.recipe], "params": ["params", self.recipe],
            "report": ["report", run], "ls": ["ls", run], "compare": ["compare", run, run], "inspect": ["inspect", run / "mixture"],
            "cat": ["cat", run, "train/left"], "cp": ["cp", run, "train/left", self.new()], "config-schema": ["config-schema", "flexmore"],
            "export": ["export", run, self.new(), "--to", "peft"], "import": ["import", here / "lora/left", self.new()],
            "merge": ["merge", here / "merge.yaml", self.new()], "completion": ["completion", "bash"], "env": ["env"],
            "eval": ["eval", run, "--data", here / "left.h5", "--seq-len", "32", "--sequences", "1"], "help": ["help"],
        }

    def writing_on(self) -> list:
        """The command that prints before it knows everything."""
        return ["eval", self.directory / "run", "--prompt", "ab", "--generate", "3"]

    def takes_format(self) -> list[str]:
        return [name for name in commands() if b"--format" in call(name, "--help").stdout]


def output_that_cannot_be_written_is_an_error(world: Finished) -> None:
    assert set(world.lines()) == set(commands()), set(world.lines()) ^ set(commands())
    for name, line in [*world.lines().items(), ("eval", world.writing_on())]:
        with open("/dev/full", "wb") as full:
            done = subprocess.run([BINARY, *line], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        assert done.returncode == 3, f"{name}: {done.returncode}\n{done.stderr}"
        expect_in(done.stderr, "standard output cannot be written: No space left on device", "hint: ")
        if name == "run":
            expect_in(done.stderr, "the run is finished and kept")
    for line in (["env"], ["--version"], ["cat", world.directory / "run", "train/left"]):
        closed = subprocess.run([BINARY, *line], stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(1))
        assert closed.returncode == 3, closed
    quiet = subprocess.run([BINARY, "env"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    assert quiet.returncode == 0 and quiet.stdout, "an error stream that is closed does not matter"


def a_reader_that_leaves_ends_commands_quietly(world: Finished) -> None:
    for name, line in [*world.lines().items(), ("eval", world.writing_on())]:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([BINARY, *line], stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
        os.close(write)
        assert "moraine:" not in done.stderr, f"{name}\n{done.stderr}"
        assert done.returncode == (0 if name == "run" else 141), f"{name}: {done.returncode}"   # a run's work is done


def json_is_json_on_success_and_on_error(world: Finished) -> None:
    formats = world.takes_format()
    assert {"validate", "params", "report", "ls", "compare", "inspect", "cat", "eval", "env"} <= set(formats), formats
    for name in formats:
        done = call(*world.lines()[name], "--format", "json")
        assert done.returncode == 0, (name, done.stderr)
        json.loads(done.stdout)
        for wrong in ([name, "--format", "json", "--no-such-option"], [name, "--format=json", world.directory / "absent", *["x"] * (name in ("compare", "cat"))]):
            done = call(*wrong)
            assert done.returncode == 2 and done.stdout == b"", (wrong, done)
            error = json.loads(done.stderr.decode().splitlines()[-1])["error"]
            assert error["code"] == done.returncode and error["message"] and isinstance(error["hint"], str), error


def mistyped_lines_are_named_with_what_is_near(world: World) -> None:
    def refused(*line: str) -> str:
        done = call(*line)
        assert done.returncode == 2 and done.stdout == b"", (line, done)
        return done.stderr.decode()

    expect_in(refused("vaildate", "r.yaml"), "no command 'vaildate'", "did you mean 'validate'?")
    expect_in(refused(), "a command is missing", "validate")
    expect_in(refused("run", "r.yaml", "--rundir", "x"), "run: no option '--rundir'", "did you mean '--run-dir'?")
    expect_in(refused("ls", "--fromat=json"), "ls: no option '--fromat'", "did you mean '--format'?")
    expect_in(refused("run", "r.yaml", "--train.steps=5"), "without dashes: train.steps=value")
    expect_in(refused("inspect"), "path is required", "moraine inspect --help")
    expect_in(refused("completion", "tcsh"), "tcsh")
    assert call("--version").stdout.startswith(b"moraine ")
    for name in commands():
        if name != "help":
            assert call("help", name).stdout == call(name, "--help").stdout != b"", name
    assert call("help").stdout == call("--help").stdout != b""
    (world.directory / "other.yaml").write_text("defualts: [recipe.yaml]\nname: x\n")
    expect_in(refused("validate", str(world.directory / "other.yaml")), "other.yaml:1:1: defualts: unknown key", "did you mean 'defaults'?", "method: is missing")
    (world.directory / "other.yaml").write_text("defualts: [recipe.yaml]\nname: x\nmethod: flexmore\n")
    expect_in(refused("validate", str(world.directory / "other.yaml")), "defualts: unknown key (did you mean 'defaults'?)")


def bytes_that_are_not_utf8_are_refused_or_carried(world: Finished) -> None:
    odd = os.fsencode(world.directory) + b"/gr\xfcn"
    os.mkdir(odd)
    recipe = world.recipe.read_bytes()
    for name in ("left", "right", "public"):
        os.link(world.directory / f"{name}.h5", odd + b"/" + os.fsencode(name) + b".h5")
    for file, text in ((odd + b"/recipe.yaml", recipe), (odd + b"/name.yaml", recipe.replace(b"tiny", b"gr\xfcn")),
                       (odd + b"/key.yaml", recipe + b"gr\xfcn: 1\n")):
        Path(os.fsdecode(file)).write_bytes(text)
    os.symlink(world.directory / "run", odd + b"/run")
    names, run = world.lines(), odd + b"/run"
    at = lambda name, *line: (name, *line)
    lines = [
        at("validate", odd + b"/name.yaml"), at("validate", odd + b"/key.yaml"), at("validate", odd + b"/recipe.yaml"), at("validate", odd + b"/absent.yaml"),
        at("validate", world.recipe, b"name=gr\xfcn"), at("validate", world.recipe, b"gr\xfcn=1"), at("params", world.recipe, b"public_path=gr\xfcn.h5"),
        at("run", odd + b"/recipe.yaml", "--run-dir", odd + b"/new"), at("run", world.recipe, "--run-dir", odd + b"/same"),
        at("run", world.recipe, "--run-dir", odd + b"/other", b"name=gr\xfcn"),
        at("report", run), at("ls", odd), at("ls", run), at("compare", run, run), at("inspect", run), at("inspect", odd + b"/left.h5"), at("inspect", run, b"gr\xfcn"),
        at("cat", run, b"gr\xfcn"), at("cat", run, "train/left", "--tensor", b"gr\xfcn"), at("cp", run, "train/left", odd + b"/copy"), at("cp", run, "mixture", odd + b"/copies"),
        at("export", run, odd + b"/lora", "--to", "peft"), at("export", run, odd + b"/hf", "--to", "hf", "--what", b"gr\xfcn"),
        at("import", world.directory / "lora/left", odd + b"/imported"), at("merge", world.directory / "merge.yaml", odd + b"/merged"),
        at("merge", world.directory / "merge.yaml", world.new(), b"base=gr\xfcn"), at("eval", run, "--data", odd + b"/left.h5", "--seq-len", "32", "--sequences", "1"),
        at("eval", run, "--data", odd + b"/left.h5", "--experts", b"gr\xfcn"), at("config-schema", b"gr\xfcn"), at("completion", b"gr\xfcn"), at("env", b"gr\xfcn"), at(b"gr\xfcn"),
        at("help", b"gr\xfcn"),
    ]
    formats = world.takes_format()
    assert set(names) <= {line[0] for line in lines}, set(names) - {line[0] for line in lines}
    for line in lines:
        done = call(*line, *(["--format", "json"] if line[0] in formats else []))
        assert done.returncode in (0, 2), (line, done.returncode, done.stderr)
        if line[0] in formats and done.returncode == 0:
            json.loads(done.stdout.decode("utf-8"))
        done.stderr.decode("utf-8")   # whatever a message quotes
    for works in (["validate", odd + b"/recipe.yaml", "--schema-only"], ["inspect", odd + b"/left.h5"], ["ls", run], ["cp", run, "train/left", odd + b"/copy2"]):
        if works[0] != "validate":   # its paths would have to be stored
            assert call(*works).returncode == 0, works
    done = call("validate", world.recipe, env={**os.environb, b"MORAINE_NAME": b"gr\xfcn"})
    assert done.returncode == 2 and b"MORAINE_NAME" in done.stderr, done


def outputs_never_replace_inputs(world: Finished) -> None:
    here, run = world.directory, world.directory / "run"
    artefact = max((run / "artefacts").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.link(here / "left.h5", here / "twin.h5")
    (here / "link").symlink_to(run)
    (here / "weights").symlink_to(run / "mixture/model.safetensors")
    evaluate = ["eval", run, "--data", here / "left.h5", "--seq-len", "32", "--sequences", "1", "--logits"]
    lines = [
        ["cp", run, "train/left", artefact, "--force"], ["cp", run, "mixture", run / "mixture", "--force"], ["cp", here / "link", "mixture", run / "mixture", "--force"],
        ["cp", run, "mixture", run / "public_model", "--force"], ["cp", run, "train/left", run / "journal/000001.log", "--force"],
        ["cp", run, "train/left", here / "weights", "--force"],
        [*evaluate, here / "left.h5"], [*evaluate, here / "twin.h5"], [*evaluate, run / "mixture/model.safetensors"], [*evaluate, here / "weights"],
        [*evaluate, here / "lora/left/adapter_model.safetensors", "--adapter", here / "lora/left"],
        ["export", run, run, "--to", "peft"], ["export", run / "mixture", run / "mixture", "--to", "hf"], ["export", artefact, artefact, "--to", "peft"],
        ["import", here / "lora/left", here / "lora/left"], ["import", here / "lora/left", here / "lora/left/adapter_model.safetensors"],
        ["merge", here / "merge.yaml", here / "merge.yaml"], ["merge", here / "merge.yaml", run], ["merge", here / "merge.yaml", run / "mixture"],
        ["run", world.recipe, "--run-dir", here], ["run", world.recipe, "--run-dir", world.recipe], ["run", world.recipe, "--run-dir", run / "mixture"],
    ]
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and path.name != "lock"}
    for line in lines:
        done = call(*line)
        assert done.returncode == 2, (line, done.returncode, done.stderr)
        for path, content in before.items():
            assert path.read_bytes() == content, f"{line} changed {path}"
    assert {path for path in here.rglob("*") if path.is_file() and path.name != "lock"} == set(before)
    done = call("cp", run, "train/left", here / "misspelt/directory/file.safetensors")
    assert done.returncode == 2 and b"mkdir -p" in done.stderr and not (here / "misspelt").exists(), done


def what_a_run_published_is_checked_when_it_is_copied(world: Finished) -> None:
    run, new = world.directory / "run", world.new()
    done = call("cp", run, "mixture", new)
    assert done.returncode == 0 and (new / "model.safetensors").read_bytes() == (run / "mixture/model.safetensors").read_bytes(), done
    facts = json.loads(call("cat", run, "mixture", "--format", "json").stdout)
    assert facts["id"] == world.hash("run") and facts["metadata"]["kind"] == "mixture", facts["id"]
    weights = run / "mixture/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    done = call("cp", run, "mixture", world.new())
    assert done.returncode == 2 and b"is not what the run published" in done.stderr and not (world.directory / "new2").exists(), done
    weights.unlink()
    expect_in(call("cp", run, "mixture", world.new()).stderr.decode(), "model.safetensors is missing", "publishes it again")
    world.run("run")
    assert call("cp", run, "mixture", world.new()).returncode == 0


def runs_with_odd_files_are_named(world: Finished) -> None:
    run = world.directory / "run"
    recipe, inputs = (run / "recipe.json").read_text(), (run / "inputs.json").read_text()
    changes = [("recipe.json", text) for text in ("null", "[]", "{", '{"method": 5}', recipe.replace('"left"', '"lfet"'), recipe.replace("flexmore", "flexmoer"),
                                                  re.sub(r'"top_k": \d+', '"top_k": "two"', recipe), recipe.replace('"seq_len"', '"seqlen"'))]
    changes += [("inputs.json", text) for text in ("null", "{}", '{"inputs": null, "resolved": []}', '{"inputs": [], "resolved": 5}', inputs.replace("left", "lfet"), "")]
    for file, text in changes:
        (run / "recipe.json").write_text(recipe)
        (run / "inputs.json").write_text(inputs)
        (run / file).write_text(text)
        for line in (["report", run], ["ls", run], ["ls", world.directory], ["compare", run, run], ["export", run, world.new(), "--to", "peft"],
                     ["cat", run, "mixture"], ["inspect", run], ["cp", run, "mixture", world.new()]):
            done = call(*line)
            assert done.returncode in (0, 2), (file, text[:60], line, done.returncode, done.stderr.decode()[-400:])


def somebody_elses_run_can_be_reported(world: Finished) -> None:
    if os.geteuid() == 0:
        print("skipped: root may write everywhere")
        sys.exit(77)
    os.chmod(world.directory / "run", 0o500)
    done = call("report", world.directory / "run")
    os.chmod(world.directory / "run", 0o700)
    assert done.returncode == 0 and b"left" in done.stdout and b"report.html not written" in done.stderr, done


def a_job_can_be_launched_and_colours_stay_out_of_files(world: World) -> None:
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)
    world.run("local")
    launch = [str(SOURCE / "scripts/launch"), "-n", "3", "run", str(world.recipe), "--run-dir"]
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("CLICOLOR") and k != "NO_COLOR"}, "MORAINE": BINARY, "TERM": "xterm"}
    for name, line in (("launched", launch), ("mpirun", mpirun(3) + [BINARY, *launch[3:]])):
        with open(world.directory / f"{name}.txt", "w+") as out:
            done = subprocess.run([*line, str(world.directory / name)], stdout=out, stderr=subprocess.PIPE, text=True, timeout=300, env=environment)
            assert done.returncode == 0, done.stderr
            out.seek(0)
            text = out.read()
        assert "\x1b" not in text + done.stderr and world.hash("local") in text, text
        assert world.hash(name) == world.hash("local")
    for line, part in ((["run", "r.yaml"], "usage"), (["-n", "0", "run"], "usage"), (["--np", "2", "run"], "no option --np")):
        done = subprocess.run([launch[0], *line], capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and part in done.stderr, done
    done = subprocess.run(launch, capture_output=True, text=True, env={**environment, "MORAINE": "absent"})
    assert done.returncode == 2 and "scripts/build" in done.stderr, done


def sources(*endings: str) -> list[Path]:
    tracked = subprocess.run(["git", "-C", SOURCE, "ls-files"], capture_output=True, text=True)
    if tracked.returncode != 0:
        print("skipped: no git checkout")
        sys.exit(77)
    return [SOURCE / name for name in tracked.stdout.splitlines() if name.endswith(endings) and (SOURCE / name).is_file()]


def nothing_else_writes_to_standard_output(_: Path) -> None:
    """cli/output.h notices what cannot be written; a printf() beside it would not."""
    for path in sources(".cpp", ".h"):
        if path.relative_to(SOURCE).parts[0] in ("tests", "bench") or path.name == "output.cpp":
            continue
        found = re.search(r"\bstdout\b|STDOUT_FILENO|std::cout|(?<![\w])(?:std::)?(?:printf|puts|putchar)\(", path.read_text())
        assert not found, f"{path.relative_to(SOURCE)}: {found.group(0)}"


def environment_variables_are_documented_and_exist(_: Path) -> None:
    """Every MORAINE_* variable that a document names is read somewhere, and every one that is read is documented."""
    name = re.compile(r"(?<![A-Z_])MORAINE_[A-Z][A-Z0-9_]*[A-Z0-9]")
    code = {path: path.read_text() for path in sources(".cpp", ".h", ".py", ".sh", ".sbatch", "CMakeLists.txt", ".cmake") + [p for p in sources("") if p.parent.name == "scripts" and not p.suffix]
            if "tests" not in path.parts}
    read = set()
    for path, text in code.items():
        if path.suffix in (".cpp", ".h"):
            read |= set(re.findall(r'getenv\("(MORAINE_[A-Z_]+)"\)', text))
        elif path.name != "CMakeLists.txt" and path.suffix != ".cmake":
            read |= {v for v in re.findall(r"\$\{?(MORAINE_[A-Z_]+)", text)} | set(re.findall(r'environ(?:\.get)?[\[(]"(MORAINE_[A-Z_]+)"', text))
    switches = {found for path, text in code.items() if path.name == "CMakeLists.txt" or path.suffix == ".cmake" for found in name.findall(text)}
    documented = {found: path for path in sources(".md") if "results" not in path.parts for found in name.findall(path.read_text())}
    page = (SOURCE / "docs/formats.md").read_text()
    for variable in sorted(read):
        assert f"`{variable}`" in page, f"{variable} is read but docs/formats.md does not name it"
    keys = call("config-schema", "--format", "markdown").stdout.decode()
    for variable, path in documented.items():
        if variable.startswith("MORAINE_TEST"):
            continue
        key = variable.removeprefix("MORAINE_").lower().replace("__", ".")
        macro = any(re.search(rf"\b{variable}\b", text) for text in code.values())
        assert variable in read | switches or macro or f"`{key}`" in keys, f"{path} names {variable}, which nothing reads"


def options_and_keys_named_somewhere_exist(_: Path) -> None:
    """What a hint, a help text or a document tells people to type can be typed."""
    every = call("--help-all").stdout.decode()
    ours = set(re.findall(r"--[a-z][a-z0-9_-]*", every))
    for path in sources(""):
        if path.parent.name == "scripts":   # what the scripts take, and what they hand to other programs
            ours |= set(re.findall(r"--[a-z][a-z0-9_-]*", path.read_text(errors="replace")))
    others = {"--allow-run-as-root", "--oversubscribe", "--hostfile", "--requeue", "--nodes", "--signal", "--map-by", "--mpi", "--quiet", "--gtest_filter", "--logdir"}   # of mpirun, sbatch, srun, clang-tidy, googletest, tensorboard
    wrong = []
    for path in sources(".cpp", ".h"):
        if "tests" in path.parts or "bench" in path.parts:
            continue
        if path.name == "html_style.cpp":   # CSS has names of that form
            continue
        for text in re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text()):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9](?![\w-])", text):
                if option not in ours | others:
                    wrong.append(f"{path.relative_to(SOURCE)}: {option} in: {text}")
    for path in sources(".md"):
        if path.parts[-2] in ("results",) or "bench" in path.parts:
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9](?![\w-])", path.read_text()):
            if option not in ours | others:
                wrong.append(f"{path.relative_to(SOURCE)}: {option}")
    schema = json.loads(call("config-schema").stdout)
    tops = {key for branch in schema["allOf"] for key in branch["then"]["properties"]}
    for path in sources(".md"):
        for key in re.findall(r"`((?:logging|workers|train|router|ranks|evaluation|clients|server|lora)\.[a-z_]+)", path.read_text()):
            group, name = key.split(".", 1)
            if group not in tops:
                wrong.append(f"{path.relative_to(SOURCE)}: {key}: no method has '{group}'")
    assert not wrong, "named, but does not exist:\n" + "\n".join(wrong)


if __name__ == "__main__":
    claim = globals()[sys.argv[2]]
    kind = claim.__annotations__[next(iter(claim.__annotations__))]
    with tempfile.TemporaryDirectory(prefix="moraine-cli-") as temporary:
        claim(kind(Path(temporary)))
