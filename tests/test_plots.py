"""The house style: one colour for one kind of network, and text that a phone can show."""

import matplotlib as mpl
import pytest

from scconv.plots import COLOURS, colour_of, use_house_style


@pytest.mark.parametrize(
    ("model_name", "family"),
    [
        ("resnet50", "baseline"),
        ("densenet121", "baseline"),
        ("scconv_resnet50", "scconv"),
        ("resnet34_appended_scconv", "scconv"),
        ("sru_resnet20", "sru"),
        ("cru_resnet20", "cru"),
        ("cru_sru_resnet20", "cru_sru"),  # contains both of the others
        ("parallel_resnet20", "parallel"),
        ("published_scconv_resnet50", "published"),
    ],
)
def test_a_family_has_one_colour(model_name, family):
    assert colour_of(model_name) == COLOURS[family]


def test_no_two_families_share_a_colour():
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_text_is_legible_on_a_phone():
    with mpl.rc_context():
        use_house_style()
        width = mpl.rcParams["figure.figsize"][0]
        # A point is 1/72 inch. A page of 390 pixels leaves about 340 for the figure.
        assert mpl.rcParams["xtick.labelsize"] / 72 / width * 340 > 9
