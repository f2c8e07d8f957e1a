"""Flags: a dataclass defines a command's flags and its --help. No JAX."""

import argparse
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from llb.files import UserError

MOST = 10**7  # of most whole numbers: far above any use, below what JAX or NumPy fails at without a word of help
# in place of a default: a flag that may be given several times; the command's words that are no flag's, at least one;
# the same, and there may be none
SEVERAL, WORDS, MAYBE_WORDS = (), ("",), ("", "")
LISTS = (SEVERAL, WORDS, MAYBE_WORDS)


@dataclass(frozen=True)
class Number:
    """A parser for numbers of a kind between two bounds; `open_below` leaves the lower one out, `words` are more values
    that are taken."""

    kind: type
    lowest: float
    highest: float
    open_below: bool = False
    words: tuple[str, ...] = ()

    @property
    def bounds(self) -> str:
        return f"{'above' if self.open_below else 'from'} {self.lowest} to {self.highest}"

    def __call__(self, text: str) -> Any:
        if text in self.words:
            return text
        try:
            value = self.kind(text)
        except ValueError:
            value = float("nan")  # fits nowhere
        if not self.lowest <= value <= self.highest or (self.open_below and value == self.lowest):
            name = f"a {'whole ' if self.kind is int else ''}number {self.bounds}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {' or '.join((*self.words, name))}")
        return value


def whole(minimum: int, maximum: int = MOST) -> Number:
    """A parser for whole numbers."""
    return Number(int, minimum, maximum)


def real(lowest: float, highest: float, open_below: bool = False) -> Number:
    """A parser for numbers between two bounds; `open_below` leaves the lower one out."""
    return Number(float, lowest, highest, open_below)


def filled(text: str) -> str:
    """A parser for text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty (an unset variable?): give one, or leave the flag out")
    return text


def flag(default: Any, text: str, parse=filled, choices=None, shown: str | None = None, affects: bool = True):
    """A dataclass field that becomes a flag. shown: the default in --help, if it depends on other settings.

    default: one of LISTS makes the setting a list.
    affects: whether results depend on the setting; if so, a run with another value is refused.
    """
    about = {"help": text, "parse": parse, "choices": choices, "shown": shown, "affects": affects}
    return field(default=default, metadata=about)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str):
        line = UserError(message.removeprefix("argument "))
        self.exit(2, f"error: {line} (--help lists every flag)\n")


def flag_of(name: str) -> str:
    """The flag of a setting, as a person types it."""
    return "--" + name.replace("_", "-")


def parse_flags(settings: type, argv: list[str] | None = None):
    """Read the flags of one of the dataclasses above; argv: None for the command line's."""
    parser = Parser(description=settings.__doc__, allow_abbrev=False)
    for item in dataclasses.fields(settings):
        about, name = item.metadata, flag_of(item.name)
        shown = about["shown"] or ("no" if item.default is False else item.default)
        bounds = f"; {about['parse'].bounds}" if isinstance(about["parse"], Number) else ""
        text = f"{about['help']} (default: {shown}{bounds})".replace("%", "%%")
        if item.default is False:
            parser.add_argument(name, action="store_true", help=text)
        elif item.default in LISTS:
            how = (
                {"action": "append", "default": []}
                if item.default == SEVERAL
                else {"nargs": "+*"[len(item.default) - 1]}
            )
            name = name if item.default == SEVERAL else item.name
            parser.add_argument(name, type=about["parse"], metavar=item.name.upper(), help=about["help"], **how)
        else:
            metavar = None if about["choices"] else item.name.rsplit("_")[-1].upper()
            parser.add_argument(
                name, default=item.default, type=about["parse"], choices=about["choices"], metavar=metavar, help=text
            )
    given = vars(parser.parse_args(argv))
    for item in dataclasses.fields(settings):
        name, value = item.name, given[item.name]
        if isinstance(value, list) and item.default not in LISTS:  # argparse makes it of "--steps=--"
            parser.error(f"--{name.replace('_', '-')}: expected one argument")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.encode(errors="replace").decode() != text:
                parser.error(f"--{name.replace('_', '-')} {ascii(text)}: the name is not UTF-8; rename it")
    return settings(**given)


def typed_flags(settings, names: Collection[str] | None = None) -> list[str]:
    """The words that a person would type after the command for these settings: what is at its default is left out.

    names: only these settings; None for all.
    """
    words = []
    for item in dataclasses.fields(settings):
        name, value = flag_of(item.name), getattr(settings, item.name)
        if value != item.default and value != [] and (names is None or item.name in names):
            words += [name] if value is True else [name, str(value)]
    return words


def influential(settings) -> dict[str, Any]:
    """The settings that results depend on, by name."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.metadata["affects"]}
