"""GitHub's workflows parse, run what the README says, and ask for no more rights than they need."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in FOLDER.glob("*.yml")}
BUILD, TEST = re.findall(r"```bash\n(pip install -r .*)\n```", (ROOT / "README.md").read_text("utf-8"))
each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def events(name):
    return WORKFLOWS[name][True]  # YAML 1.1 reads the key "on" as a truth value


def steps(name):
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def commands(name):
    return [step["run"] for step in steps(name) if "run" in step]


def test_the_three_are_there():
    assert WORKFLOWS.keys() == {"test", "book", "weekly"}


def test_every_push_is_tested_on_each_python():
    assert "push" in events("test")
    assert WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert {"python-version": "${{ matrix.python }}"} in [step.get("with") for step in steps("test")]
    assert f"{TEST} --junit-xml=reports/pytest.xml" in commands("test")


def test_main_is_built_and_deployed():
    assert events("book")["push"] == {"branches": ["main"]}
    assert f"{BUILD} -W -n --keep-going" in commands("book")
    assert WORKFLOWS["book"]["jobs"]["deploy"]["needs"] == "build"
    assert WORKFLOWS["book"]["jobs"]["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}
    uploaded = next(step for step in steps("book") if "upload-pages-artifact" in step.get("uses", ""))
    assert uploaded["with"]["path"] == "_build/html"


def test_every_week_all_checks_run_from_clean():
    assert [len(entry["cron"].split()) for entry in events("weekly")["schedule"]] == [5]
    assert commands("weekly") == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@each_workflow
def test_reports_are_kept_when_it_fails(name):
    kept = [step for step in steps(name) if "actions/upload-artifact" in step.get("uses", "")]
    assert [step["if"] for step in kept] == ["failure()"]
    assert kept[0]["with"]["path"] == ("reports/" if name == "test" else "_build/html/reports/")


@each_workflow
def test_rights_and_time_are_limited(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert all(0 < job["timeout-minutes"] <= 120 for job in WORKFLOWS[name]["jobs"].values())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps(name) if "uses" in step)


@each_workflow
def test_commands_are_sound_shell_without_pasted_values(name):
    for command in commands(name):
        assert "${{" not in command, "a value from outside comes by the environment, not into the text of a command"
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_a_fork_learns_that_its_notebooks_clone_another_repository(tmp_path):
    step = next(step for step in steps("book") if "book/colab.py" in step.get("run", ""))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "book").mkdir()
    shutil.copy(ROOT / "book" / "colab.py", tmp_path / "book")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    environ = {**os.environ, "ADDRESS": "https://github.com/someone/fork", "PYTHONPATH": ":".join(sys.path)}
    environ["PATH"] = f"{bin_folder}:{environ['PATH']}"

    def commit():
        subprocess.run([*git, "add", "book", "notebooks"], cwd=tmp_path, check=True)
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
