"""Invalid arguments are answered with one line that names the argument."""

from collections.abc import Iterable


def one_line(words: object) -> str:
    return " ".join(str(words).split())


def check_choice(argument: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}={value!r}: must be one of {', '.join(allowed)}")


def check_at_least(least: int, **values: float | None) -> None:
    """None is an argument that was not given."""
    for argument, value in values.items():
        if value is not None and not value >= least:  # not <, which lets NaN pass
            raise ValueError(f"{argument}={value}: must be at least {least}")
