"""What the README and the first pages tell a reader to type works, and what they name exists."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Set

from .runs import BIN, ROOT, run, run_well

FLAG = re.compile(r"--[a-z][a-z0-9-]+")
HELPS = """  # of scripts, in one process
import runpy, sys
for script in sys.argv[1:]:
    print("script", script)
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        pass
"""
PAGES = ["README.md"]
PAGES += [f"docs/{name}.md" for name in ("start", "pretraining", "stale", "usage", "glue")]
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
SETTINGS = (ROOT / "docs/settings.md").read_text(encoding="utf-8")


def blocks(language: str = "") -> List[str]:
    """The fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for of, block in found if of == language]


def ten_lines() -> str:
    """README's example of the core."""
    return next(block for block in blocks("python") if "MemoryUsage" in block)


def test_the_core_in_ten_lines_runs() -> None:
    assert "'top1_usage'" in run_well(sys.executable, "-c", ten_lines()).output


def test_the_first_training_command_logs_the_lines_to_expect(
    data_bin: Path, tmp_path: Path
) -> None:
    (block,) = [block for block in blocks() if "--save-dir runs/first" in block]
    words = shlex.split(block.replace("\\\n", " "))
    command = words[words.index(".venv/bin/fairseq-train") :]
    replaced = {
        ".venv/bin/fairseq-train": str(BIN / "fairseq-train"),
        "demo_out/data/bin": str(data_bin),
        "runs/first": str(tmp_path),
        "200": "4",
        "50": "2",
    }
    assert replaced.keys() <= set(command)
    done = run_well(*(replaced.get(word, word) for word in command))
    assert len(done.logged("train_inner")) == 2
    (expected,) = [block for block in blocks() if "| train_inner |" in block]
    valid = done.logged("valid")[-1]
    assert set(re.findall(r'"(valid_\w+)":', expected)) <= valid.keys()


def test_every_flag_that_is_named_exists_and_every_memory_flag_is_named() -> None:
    options = ["--task", "pkm_masked_lm", "--optimizer", "pkm_adam"]
    options += ["--criterion", "pkm_sentence_prediction"]  # has all of pkm_masked_lm's and more
    options += ["--arch", "pkm_roberta", "--user-dir", ROOT / "pkm_fairseq", "--no-such-flag"]
    usage = run(BIN / "fairseq-train", "data", *options).output  # names every flag
    known = set(FLAG.findall(usage)) - {"--no-such-flag"}
    of_ours = {flag for flag in known if flag.startswith("--memory-")}
    of_ours -= {"--memory-efficient-fp16", "--memory-efficient-bf16"}  # fairseq's
    named = set(FLAG.findall(README + SETTINGS))
    assert of_ours | {"--init-from"} <= named
    assert len(of_ours) == 41
    others = {"--help", "--model-overrides", "--random-source", "--build-arg", "--rm", "--no-deps"}
    assert named - known <= others.union(*flags_of_scripts().values())


def test_the_readmes_commands_give_scripts_only_flags_they_have() -> None:
    given = {
        (script, flag)
        for line in "\n".join(blocks()).replace("\\\n", " ").splitlines()
        for script in re.findall(r"(scripts/\w+\.py)", line)
        for flag in FLAG.findall(line)
    }
    known = flags_of_scripts()
    assert len({script for script, _ in given}) >= 5
    assert not [(script, flag) for script, flag in given if flag not in known[script]]


@functools.cache
def flags_of_scripts() -> Dict[str, Set[str]]:
    """The flags that each script of the README names in its help."""
    scripts = sorted(set(re.findall(r"scripts/\w+\.py", README)))
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    printed = run_well(sys.executable, "-c", HELPS, *scripts, env={"PYTHONPATH": path}).output
    parts = [part.partition("\n") for part in printed.split("script scripts/")[1:]]
    return {f"scripts/{name}": set(FLAG.findall(text)) for name, _, text in parts}


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)\b", README, re.MULTILINE))
    assert {"demo", "test", "install"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_page_and_file_that_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:user_dir_examples|docs|scripts)/[\w/.]+|[A-Z]+\.md|LICENSE)`", text)
    assert len(links) > 10 and named
    assert not [name for name in [*links, *named] if not (ROOT / name).exists()]
    assert len(text.splitlines()) < 150


def test_the_package_says_where_it_is_what_it_found_and_how_to_get_the_rest() -> None:
    printed = run_well(sys.executable, "-m", "pkm_fairseq").output
    assert f"--user-dir {ROOT / 'pkm_fairseq'}\n" in printed
    for package in ("torch", "ve-fairseq", "numba", "faiss-cpu"):
        assert re.search(rf" found: (.*, )?{package} [\d.]+", printed), package
    about = json.loads(run_well(sys.executable, "-m", "pkm_fairseq", "--json").output)
    assert about["user_dir"] == str(ROOT / "pkm_fairseq")
    assert about["parts"]["core"]["packages"]["torch"].startswith("torch 2.")
    assert about["parts"]["kernels"]["missing"] == [] and about["problem"] is None
    hide = "import sys; sys.modules['numba'] = None; import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda n: None if n == 'numba' else f(n); sys.argv = ['x']; "
    hide += "from pkm_fairseq.__main__ import main; main()"
    missing = run_well(sys.executable, "-c", hide).output
    assert f"missing: numba; pip install -e '{ROOT}[kernels]'\n" in missing


def test_a_torchaudio_of_another_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so')")
    environment = {"PYTHONPATH": str(tmp_path)}
    printed = run_well(sys.executable, "-m", "pkm_fairseq", env=environment).output
    assert printed.endswith("pip uninstall torchaudio\n")
