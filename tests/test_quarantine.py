"""Quarantine: images go aside and come back byte for byte, whatever ends the command; all else is one line."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from helpers import LATER, TILE, command, refuse, rows_of, succeed

from llb.files import UserError, digest_of_file, move_file, write_csv
from llb.runfiles import read_config, write_config

NAME = "llb.quarantine"


class Killed(BaseException):
    """What no handler stops, as of a signal 9."""


@pytest.fixture(scope="module")
def dropping(tmp_path_factory, finished, data):
    """The finished run with a share of the images dropped."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("dropping") / "run")
    succeed("stage1_partition", "--data", data, "--out", run, *TILE, "--keep", "0.7")
    return run


@pytest.fixture
def own(tmp_path, dropping, data):
    """The run, and its images, as copies of which the run knows."""
    run, images = tmp_path / "run", tmp_path / "my images"
    shutil.copytree(data, images)
    shutil.copytree(dropping, run)
    write_config(run, read_config(run, "", "") | {"data": str(images)})
    return run, images


def state(*folders: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and time of every file, without those that a killed command may leave."""
    files = [file for folder in folders for file in folder.rglob("[!.]*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def dropped(run: Path) -> list[str]:
    rows = sorted(rows_of(run / "tile" / "scores.csv"), key=lambda row: int(row["rank"]))
    return [row["path"] for row in rows if row["kept"] == "0"]


def test_the_dropped_images_go_aside_and_come_back_and_masks_stay(own):
    run, images = own
    start, before, paths = state(run, images), state(images), dropped(run)
    assert paths and f"{len(paths)} of {len(paths)} images to move" in succeed(NAME, "--run", run)
    assert state(run, images) == start, "a dry run changes nothing"
    out = succeed(NAME, "--run", run, "--go")
    assert f"--data '{images}' --out NEW" in out.splitlines()[-1]
    aside = {str(run.parent / "run-quarantine" / path): before.pop(str(images / path)) for path in paths}
    assert state(images, run.parent / "run-quarantine") == before | aside
    assert [row["path"] for row in rows_of(run / "quarantine.csv")] == paths
    for script in LATER:
        assert "its images" in refuse(script, "--run", run), script
    config = read_config(run, "", "")
    write_config(run, config | {"categories": ["another"]})  # as after stage 1 --overwrite --category another
    assert "has tile" in refuse(NAME, "--run", run, "--undo", "--category", "another")
    assert f"{len(paths)} images are back" in succeed(NAME, "--run", run, "--undo")
    assert state(images) == before | {f.replace("run-quarantine", "my images"): s for f, s in aside.items()}
    assert not (run.parent / "run-quarantine").exists()
    assert "no image" in refuse(NAME, "--run", run, "--undo")


def test_the_images_marked_as_defects_go_aside_and_no_other(own):
    run, images = own
    assert "0 of 0 images to move" in succeed(NAME, "--run", run, "--reviewed"), "nothing is marked"
    paths = [row["path"] for row in rows_of(run / "tile" / "scores.csv")]
    named, fine = sorted({paths[0], *paths} - {*dropped(run)})[:1] + dropped(run)[:1], dropped(run)[1:]
    write_csv(
        run / "tile" / "marks.csv",
        ["path", "verdict"],
        [[path, "defect" if path in named else "fine"] for path in named + fine],
    )
    succeed(NAME, "--run", run, "--reviewed", "--go")
    assert {row["path"] for row in rows_of(run / "quarantine.csv")} == set(named)
    assert f"{len(dropped(run)) - 1} of {len(dropped(run))} images to move" in succeed(NAME, "--run", run), "the others"
    assert not any((images / path).exists() for path in named) and all((images / path).exists() for path in fine)
    succeed(NAME, "--run", run, "--undo")
    assert all((images / path).exists() for path in named)


def test_an_image_that_was_deleted_in_quarantine_holds_back_no_other(own):
    run, images = own
    gone, *others = paths = dropped(run)
    undo = (NAME, "--run", run, "--undo")
    succeed(NAME, "--run", run, "--go")
    (run.parent / "run-quarantine" / gone).unlink()
    assert f"0 of {len(others)} images to move" in succeed(NAME, "--run", run, "--go")
    out = succeed(*undo)
    assert f"{len(others)} images are back" in out and f"1 of {len(paths)} images are neither in quarantine" in out
    assert f"({gone})" in out and f"delete their lines in {run / 'quarantine.csv'}" in out
    assert all((images / path).exists() for path in others)
    assert [row["path"] for row in rows_of(run / "quarantine.csv")] == [gone]
    assert f"({gone})" in refuse(*undo), "nothing is put back"


def test_an_image_whose_place_another_one_has_taken_stays_aside_and_holds_back_no_other(own):
    run, images = own
    first, second, *others = paths = dropped(run)
    undo, aside = (NAME, "--run", run, "--undo"), run.parent / "run-quarantine"
    succeed(NAME, "--run", run, "--go")
    before = {str(aside / path): state(aside)[str(aside / path)] for path in (first, second)}
    (images / first).write_bytes(b"new")
    (images / second).symlink_to(images / first)
    out = succeed(*undo)
    assert f"{len(others)} images are back" in out and f"2 of {len(paths)} images stay in quarantine: " in out
    assert f"{images / first}, {images / second} hold other images: move them away and undo again" in out
    assert all((images / path).exists() for path in others) and (images / first).read_bytes() == b"new"
    assert state(aside) == before and [row["path"] for row in rows_of(run / "quarantine.csv")] == [first, second]
    (images / second).unlink()
    assert "1 images are back" in succeed(*undo)
    assert f"{images / first} holds another image: move it away and undo again" in refuse(*undo)
    (images / first).unlink()
    succeed(*undo)
    assert not aside.exists() and (images / first).read_bytes() == before[str(aside / first)][0]


def test_a_new_image_with_the_name_of_one_in_quarantine_is_not_taken_for_it(own):
    run, images = own
    first, go = dropped(run)[0], (NAME, "--run", run, "--go")
    aside = run.parent / "run-quarantine" / first
    succeed(*go)
    (images / first).write_bytes(b"new")
    rows = rows_of(run / "tile" / "images.csv")  # as of a run that began anew
    changed = {"bytes": 3, "sha256": digest_of_file(images / first)}
    rows = [row | changed if row["path"] == first else row for row in rows]
    write_csv(run / "tile" / "images.csv", [*rows[0]], [[*row.values()] for row in rows])
    line = refuse(*go)
    assert f"{first}: another image of this name is in quarantine at {aside}: rename one of the two" in line
    assert (images / first).read_bytes() == b"new" != aside.read_bytes()
    aside.rename(aside.with_name("renamed.png"))
    assert "1 of " in succeed(*go) and aside.read_bytes() == b"new"
    succeed(NAME, "--run", run, "--undo")
    assert (images / first).read_bytes() == b"new"


def test_images_of_another_folder_are_not_moved_out_of_it(own, tmp_path):
    run, images = own
    (images / "tile").rename(tmp_path / "theirs")
    (images / "tile").symlink_to(tmp_path / "theirs")
    before, go = state(tmp_path / "theirs"), (NAME, "--run", run, "--go")
    assert "by the link tile/: give --copy" in refuse(*go)
    assert state(tmp_path / "theirs") == before and not (run / "quarantine.csv").exists()
    succeed(*go, "--copy")
    assert state(tmp_path / "theirs") == before and len(state(tmp_path / "run-quarantine")) == len(dropped(run))
    succeed(NAME, "--run", run, "--undo")
    assert state(tmp_path / "theirs") == before and not (tmp_path / "run-quarantine").exists()


def test_images_that_are_in_quarantine_are_not_said_to_go_to_another_place(own, tmp_path):
    run, images = own
    go, before = (NAME, "--run", run, "--go"), state(images)
    succeed(*go, "--copy", "--to", tmp_path / "first")
    copied = state(tmp_path / "first")
    line = refuse(*go, "--to", tmp_path / "second")
    assert f"{dropped(run)[0]} is in quarantine at {tmp_path / 'first'}: --undo first, or leave --to out" in line
    assert state(images) == before and not (tmp_path / "second").exists()
    assert f"from {images} to {tmp_path / 'first'}: " in succeed(*go)  # the same images, without --copy
    assert state(tmp_path / "first") == copied and not (tmp_path / "run-quarantine").exists()
    succeed(NAME, "--run", run, "--undo")
    assert state(images) == before


@pytest.mark.parametrize("how", ["on one disk", "to another disk", "copied"])
def test_a_command_that_is_killed_anywhere_is_given_again_or_undone(own, how, monkeypatch, tmp_path):
    run, images = own
    undo = (NAME, "--run", run, "--undo")
    go = (NAME, "--run", run, "--top", 3, "--to", tmp_path / "to", "--go", *(["--copy"] if how == "copied" else []))
    left = [0]  # file operations until the command is killed

    def counted(function):
        def act(*paths, **named):
            if {"my images", "to", "quarantine.csv"} & {*Path(paths[0]).parts, *Path(paths[-1]).parts}:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            return function(*paths, **named)

        return act

    def refused(*paths):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(Path, "rename", refused if how == "to another disk" else counted(Path.rename))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))

    before = state(images)
    succeed(*go)
    aside = state(images, tmp_path / "to")
    assert len(aside) == len(before) + 3 * (how == "copied") and aside != before
    kills = 0
    for first, then in ((go, go), (go, undo), (undo, undo), (undo, go)):
        for number in range(1, 99):
            start = (aside, before)[first == go]
            if state(images, tmp_path / "to") != start:
                succeed(*(undo if first == go else go))
            assert state(images, tmp_path / "to") == start
            left[0], killed = number, False
            try:
                command(*first)
            except Killed:
                killed = True
            left[0] = 0
            command(*then)  # refused if nothing had been moved yet
            if not killed:
                break
            kills += 1
            assert state(images, tmp_path / "to") == (aside, before)[then == undo], (first, then, number)
    assert kills > 15


@pytest.mark.parametrize("copy", [False, True])
def test_an_image_is_not_deleted_while_its_new_place_holds_something_else(tmp_path, copy):
    image, place = tmp_path / "image.png", tmp_path / "to" / "image.png"
    place.parent.mkdir()
    for file in (image, place):
        file.write_bytes(file.parent.name.encode())
    with pytest.raises(UserError, match="has other contents, and nothing is overwritten"):
        move_file(image, place, digest_of_file(image), 0, copy)
    assert image.read_bytes() != place.read_bytes() == b"to"


def test_what_cannot_be_moved_safely_is_refused_before_anything_moves(own, tmp_path, monkeypatch):
    run, images = own
    first, last = images / dropped(run)[0], images / dropped(run)[-1]
    content, to, go = last.read_bytes(), tmp_path / "run-quarantine", (NAME, "--run", run, "--go")

    def refused(mention: str, *line):
        before = state(images, to)
        assert mention in refuse(*(line or go))
        assert state(images, to) == before

    last.write_bytes(content[:-1] + b"x")
    refused("not the image that stage 1 saw")
    last.unlink()
    refused("is not there")
    last.symlink_to(first)
    refused("is a link")
    last.unlink()
    last.write_bytes(content)
    (to / dropped(run)[0]).parent.mkdir(parents=True)
    (to / dropped(run)[0]).touch()
    refused("is there already, and nothing is overwritten")
    shutil.rmtree(to)
    refused("lies in the folder of images", *go, "--to", images / "aside")
    with monkeypatch.context() as patch:
        patch.setattr("llb.quarantine.os.access", lambda folder, _: folder != last.parent)
        refused(f"{last.parent} cannot be written: grant access to it, or give --copy")
    refused("exclude each other", *go, "--dropped", "--top", "1")
    refused("exclude each other", *go, "--reviewed", "--undo")
    refused("--to says how images are taken out, and --undo puts them back", *go, "--undo", "--to", to)
    refused("run has tile", *go, "--category", "bottle")
    refused("config.json cannot be read", NAME, "--run", images)

    (run / "tile" / "purified.txt").write_text(f"{dropped(run)[0]}\n")  # edited by hand: all others go
    assert "11 of 11 images to move" in succeed(*go)
    (to / dropped(run)[-1]).write_bytes(b"")
    refused("not the image that stage 1 saw", NAME, "--run", run, "--undo")
    with open(run / "quarantine.csv", "a") as manifest:
        manifest.write('"x"\n')
    refused("mend it by hand", NAME, "--run", run, "--undo")
    (run / "quarantine.csv").write_text("category,path\n1,2\n")
    refused("mend it by hand", NAME, "--run", run, "--undo")
    write_config(run, read_config(run, "", "") | {"data": None, "data_given": None})
    refused("which llb draws")
