"""The page "Teach it": each exercise's check refuses its starter code and wrong answers, and accepts its solution.

The page's cells run in order in one namespace, as for a student; starter, check and solution are read from the page.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "book" / "teach.md").read_text("utf-8")
LESSONS, TASKS = PAGE.split("\n## Exercises\n")
SETUP, *EXERCISES = re.split(r"^### Exercise \d+: .*\n", TASKS, flags=re.MULTILINE)
NUMBERS = range(1, len(EXERCISES) + 1)


def cells(text: str) -> list[tuple[bool, str]]:
    """Each executed cell: whether it is folded, and its code."""
    found = re.findall(r"```\{code-cell\} ipython3\n((?::[^\n]*\n)*)(.*?)```", text, re.DOTALL)
    return [("hide-cell" in options, code) for options, code in found]


def run(code: str, names: dict) -> str:
    """Execute `code` in `names`; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "teach.md", "exec"), names)
    return printed.getvalue()


def exercise(number: int) -> tuple[dict, str, str]:
    """The names once setup and check have run, the starter and the solution."""
    text = EXERCISES[number - 1]
    (starter,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (solution,) = [code for folded, code in cells(text) if folded]
    names = {}
    for folded, code in cells(SETUP) + cells(text.split(solution)[0]):
        assert not folded
        run(code, names)
    return names, starter, solution


@pytest.mark.parametrize("number", NUMBERS)
def test_the_check_refuses_the_starter_in_words_and_accepts_the_solution(number):
    names, starter, solution = exercise(number)
    assert "..." in starter
    with pytest.raises(AssertionError) as error:
        run(starter, dict(names))
    assert str(error.value)
    assert f"{number} is right\n" in run(solution, dict(names))


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_is_the_starter_with_its_gaps_filled(number):
    _, starter, solution = exercise(number)
    assert not re.search(r"\.\.\.", solution)
    lines = iter(solution.splitlines())
    kept = [line for line in starter.splitlines() if line.strip() and "..." not in line]
    missing = [line for line in kept if line not in lines]  # in the same order: `in` moves the iterator on
    assert missing == []


WRONG = [
    (1, "correction=0", "correction=1"),  # n - 1
    (1, "gamma / gamma.sum()", "gamma"),
    (1, "+ beta.view(-1, 1, 1)", ""),
    (1, "groups, -1)", "x.shape[1], -1)"),  # a norm for each channel
    (2, "mean - std", "mean + std"),
    (2, "beta / gamma", "beta / gamma.abs()"),
    (2, "- std * beta / gamma", ""),
    (3, "x11 + x22, x21 + x12", "x11 + x21, x22 + x12"),  # plain addition
    (3, "x11 + x22, x21 + x12", "x21 + x12, x11 + x22"),
    (4, "c2 // g", "c2"),
    (4, "(c2 - low // r)", "c2"),
    (4, "up * (up // r)", "up * up"),
    (5, "assert_close(fuse(y, y), y)", "assert_close(fuse(y, y), fuse(y, y))"),  # a test that passes everything
    (5, "assert_close(fuse(y, y), y)", "assert_close(fuse(y, y), 2 * y)"),  # one that refuses everything
    (5, "torch.softmax(pooled, dim=0)", "torch.softmax(pooled, dim=2)"),
    (5, "beta1 * y1 + beta2 * y2", "beta2 * y1 + beta1 * y2"),
    (6, " + 2 * c1", ""),
    (6, "conv.kernel_size == (3, 3) and ", ""),
    (6, " and c1 % 8 == 0", ""),
    (7, "    ours(), base()  # to warm up\n", ""),
    (7, "median(ours_seconds) / median(base_seconds)", "sum(ours_seconds) / sum(base_seconds)"),
    (7, "(seconds(ours))\n", "(seconds(ours))\n    for _ in range(rounds):\n"),  # all of one, then all of the other
]


@pytest.mark.parametrize(("number", "right", "wrong"), WRONG)
def test_the_check_refuses_wrong_answers(number, right, wrong):
    names, _, solution = exercise(number)
    assert right in solution
    with pytest.raises(AssertionError):
        run(solution.replace(right, wrong), names)


def test_the_published_fusion_is_the_layers_global_one():
    names, _, _ = exercise(5)
    torch.manual_seed(0)
    y1, y2 = torch.randn(2, 2, 8, 5, 5).unbind()
    beta1, beta2 = names["CRU"](8, 8, fusion="global").fusion_weights(y1, y2)
    torch.testing.assert_close(names["fuse_as_published"](y1, y2), beta1 * y1 + beta2 * y2)


def test_the_page_runs_in_its_order_and_measures_a_ratio():
    names = {}
    printed = [run(code, names) for _, code in cells(TASKS)]
    assert re.fullmatch(r"SCConv takes \d+\.\d\d of the 3×3's time on this machine\n", printed[-1])


def test_lessons_take_90_minutes_and_have_every_exercise():
    lessons = re.split(r"^## Lesson ", LESSONS.split("## Mistakes")[0], flags=re.MULTILINE)[1:]
    assert [sum(map(int, re.findall(r"^\| (\d+) \|", lesson, re.MULTILINE))) for lesson in lessons] == [90] * 3
    used = [int(number) for lesson in lessons for number in re.findall(r"[Ee]xercise (\d)(?! of)", lesson)]
    assert used == list(NUMBERS)
