"""Flags are bounded where they are read, and --help states the bounds."""

import dataclasses

import pytest

from llb.config import Evaluate, Stage1, Stage2
from llb.defaults import resolve, resolve_final
from llb.flags import Number, parse_flags, typed_flags

NUMBERS = [
    (settings, item.name, item.metadata["parse"])
    for settings in (Stage1, Stage2, Evaluate)
    for item in dataclasses.fields(settings)
    if isinstance(item.metadata["parse"], Number)
]
# command line → what the line must mention
REFUSED = {
    "--steps 1.5": "--steps: '1.5' is not a whole number from 1 to 10000000",
    f"--batch-size {2**63}": "--batch-size",
    f"--steps {'9' * 5000}": "'9999999999999999999999999999999999999999' is not",  # int() itself refuses it
    "--learning-rate nan": "--learning-rate",
    "--learning-rate 0": "above 0 to 1000",
    "--keep best": "auto or mirror or a number above 0 to 1",
    "--steps --": "--steps: expected one argument",
    "--steps=--": "--steps: expected one argument",
    "--data=": "--data: the value is empty",
    "--out=  ": "--out: the value is empty",
    "--layout=": "--layout: the value is empty",
    "--ste 3": "unrecognized arguments: --ste 3",
    "--a\nb\x1b": "unrecognized arguments: --a\\nb\\x1b",
    f"--a{'b' * 10**5}": "bbb … bbb",
}


def refused(settings, capsys, *line) -> str:
    with pytest.raises(SystemExit, match="2"):
        parse_flags(settings, line)
    (message,) = capsys.readouterr().err.splitlines()
    return message


@pytest.mark.parametrize("line", REFUSED)
def test_a_value_that_does_not_fit_its_flag_is_refused_in_one_line(line, capsys):
    name, blank, value = line.partition(" ") if "=" not in line else (line, "", "")
    assert REFUSED[line] in refused(Stage1, capsys, name, *[value] * bool(blank))


@pytest.mark.parametrize(("settings", "name", "number"), NUMBERS)
def test_every_number_is_bounded_and_help_says_how(settings, name, number, capsys):
    name = "--" + name.replace("_", "-")
    assert number.bounds in refused(settings, capsys, name, str(2**63))
    assert number.bounds in refused(settings, capsys, name, "-1")
    assert getattr(parse_flags(settings, [name, str(number.highest)]), name[2:].replace("-", "_")) == number.highest
    with pytest.raises(SystemExit):
        parse_flags(settings, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    default = shown.split(f" {name} ")[-1].split("(default: ")[1]
    assert default.split(")")[0].endswith(number.bounds)


def test_help_says_whose_the_defaults_are():
    def shown(settings: type) -> dict[str, str]:
        return {item.name: item.metadata["shown"] for item in dataclasses.fields(settings)}

    stage1 = resolve(Stage1(data="D", detector="simplenet", encoder="wide_resnet50_2"), "mvtec")
    final = resolve_final(Stage2(detector="padim"), vars(stage1))
    values = {"image_size": 288, "resize": 329, "batch_size": 8}  # simplenet's as published, not the encoder's own
    assert {name: getattr(stage1, name) for name in values} == values
    assert all(shown(Stage1)[name].startswith("the detector's") for name in values)
    for name in ("set", "image_score", "batch_size", "learning_rate"):
        assert getattr(final, name) != getattr(stage1, name)
        assert shown(Stage2)[name] == "stage 1's; of another detector its own"


def test_settings_are_typed_as_the_flags_that_give_them():
    line = ["--data", "a b", "--keep", "0.8", "--submodels", "5", "--set", "power=1", "--no-cache"]
    assert sorted(typed_flags(parse_flags(Stage1, line))) == sorted(line)
    assert typed_flags(Stage1()) == []
