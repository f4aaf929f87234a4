"""`record` writes on request, and otherwise fails on each number that has moved."""

import json

import pytest

from scconv.reporting.recorded import record

MEASURED = {"gate": {"mean": 0.5, "n": 3}, "curve": [1.0, 2.0], "reading": "soft"}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("SCCONV_RECORD", "1")
    record("page", MEASURED, noisy={"seconds": 1.0}, folder=tmp_path)
    monkeypatch.delenv("SCCONV_RECORD")
    return tmp_path


def test_writes_what_it_was_given(recorded):
    content = json.loads((recorded / "notebooks" / "page.json").read_text())
    assert content["measured"] == MEASURED
    assert content["noisy"] == {"seconds": 1.0}
    assert not list(recorded.rglob("*.tmp"))


def test_agrees_within_tolerance_and_ignores_noise(recorded):
    close = {**MEASURED, "curve": [1.004, 2.0]}
    assert "agrees" in record("page", close, noisy={"seconds": 9.0}, folder=recorded)


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({**MEASURED, "curve": [1.0, 2.1]}, "curve.1 was 2 and is 2.1"),
        ({**MEASURED, "reading": "hard"}, "reading was 'soft' and is 'hard'"),
        ({key: value for key, value in MEASURED.items() if key != "gate"}, "gate was"),
        ({**MEASURED, "new": 1}, "new was None"),
        ({**MEASURED, "curve": [1.0]}, "curve was"),
    ],
)
def test_a_moved_missing_or_new_number_is_named(recorded, changed, where):
    with pytest.raises(ValueError, match=r"page\.json differs") as error:
        record("page", changed, folder=recorded)
    assert where in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_new_of_a_network_is_named_in_few_words(recorded):
    with pytest.raises(ValueError, match=r"network was None and is \[\[0, .* …$") as error:
        record("page", {**MEASURED, "network": [[n, n] for n in range(1000)]}, folder=recorded)
    assert len(str(error.value)) < 200


def test_without_a_file_there_is_nothing_to_compare(tmp_path):
    assert "Nothing to compare" in record("page", MEASURED, folder=tmp_path)
    assert not list(tmp_path.iterdir())
