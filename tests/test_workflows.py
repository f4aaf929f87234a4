"""The commands of GitHub's workflows, run or checked here."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in FOLDER.glob("*.yml")}
each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def steps(name):
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def commands(name):
    return [step["run"] for step in steps(name) if "run" in step]


@each_workflow
def test_commands_are_sound_shell_without_pasted_values(name):
    for command in commands(name):
        assert "${{" not in command, "a value from outside comes by the environment, not into the text of a command"
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_lowest_versions_are_those_of_the_package(tmp_path):
    """What the job `lowest` installs."""
    (command,) = [command for command in commands("test") if "lowest.txt" in command]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    found = subprocess.run(["bash", "-c", command.splitlines()[0]], cwd=tmp_path, capture_output=True, text=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["models"]]
    lowest = [f"{name}=={version}.*" for name, mark, version in (line.partition(">=") for line in wanted) if mark]
    assert found.stdout.splitlines() == lowest
    assert len(lowest) == 2


@pytest.mark.slow
def test_a_fork_learns_that_another_repository_is_written_in_it(tmp_path):
    step = next(step for step in steps("book") if "book/colab.py" in step.get("run", ""))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "book").mkdir()
    for file in (
        "book/colab.py",
        "book/use.md",
        "_config.yml",
        "CITATION.cff",
        "README.md",
        "README.zh-TW.md",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / file, tmp_path / file)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    environ = {**os.environ, "ADDRESS": "https://github.com/someone/fork", "PYTHONPATH": ":".join(sys.path)}
    environ["PATH"] = f"{bin_folder}:{environ['PATH']}"

    def commit():
        subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "as it is"], cwd=tmp_path, check=True)

    def check():
        command = ["bash", "-e", "-c", step["run"]]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)

    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    commit()
    found = check()
    assert found.returncode == 1
    assert "::error::Run python book/colab.py https://github.com/someone/fork and commit" in found.stdout
    commit()
    assert check().returncode == 0
