"""CITATION.cff names this software, and the paper as the book's bibliography has it."""

import tomllib
from pathlib import Path

import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_has_what_the_format_requires():
    """Citation File Format 1.2.0: these four, and an author is a person or has a name."""
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["message"]
    assert CITATION["title"]
    assert CITATION["authors"] == [{"name": "The SCConv reproduction authors"}]


def test_agrees_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert str(CITATION["version"]) == project["version"]
    assert CITATION["license"] == project["license"]


def test_paper_is_the_one_of_the_bibliography():
    entry = parse_file(ROOT / "book" / "references.bib").entries["li2023scconv"]
    (paper,) = CITATION["references"]
    assert paper["title"] == entry.fields["title"].replace("{", "").replace("}", "")
    assert paper["conference"]["name"] == entry.fields["booktitle"]
    assert (str(paper["year"]), paper["doi"]) == (entry.fields["year"], entry.fields["doi"])
    assert f"{paper['start']}--{paper['end']}" == entry.fields["pages"]
    people = [(" ".join(person.first_names), " ".join(person.last_names)) for person in entry.persons["author"]]
    assert [(author["given-names"], author["family-names"]) for author in paper["authors"]] == people
