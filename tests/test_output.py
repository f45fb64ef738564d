import errno
import json
import os
import stat
import subprocess

import pytest

from llm_streamline import files
from llm_streamline.errors import OutputError
from llm_streamline.output import (
    check_output,
    check_room,
    is_complete,
    open_output,
    owned_files,
    publish,
    read_manifest,
    replace_folder,
    saving,
    temporary_folder,
    write_bytes,
    write_json,
    write_manifest,
    write_text,
)


def tree(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def put(out, files: dict[str, str]) -> None:
    with temporary_folder(out) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)
        publish(staging, out, last="config.json")


def test_a_new_folder_and_its_marker(tmp_path):
    out = open_output(tmp_path / "a" / "b")
    marker = json.loads((out / "streamline" / "run.json").read_text())
    assert marker["tool"] == "llm-streamline"
    before = (out / "streamline" / "run.json").read_bytes()
    assert open_output(out) == out  # ours: opened again, unchanged
    assert (out / "streamline" / "run.json").read_bytes() == before


def test_an_empty_folder_becomes_ours(tmp_path):
    open_output(tmp_path)
    assert check_output(tmp_path) == tmp_path


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not made by llm-streamline"):
        open_output(tmp_path, fresh=True)
    assert tree(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("content", ["", "[]", '{"tool": "other"}', "\0"])
def test_a_marker_of_something_else_is_no_marker(tmp_path, content):
    (tmp_path / "streamline").mkdir()
    (tmp_path / "streamline" / "run.json").write_text(content)
    with pytest.raises(OutputError, match="not made by"):
        open_output(tmp_path)


def test_a_file_or_the_source_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        open_output(tmp_path / "file")
    with pytest.raises(OutputError, match="is a file"):
        open_output(tmp_path / "file" / "below")
    out = open_output(tmp_path / "out")
    with pytest.raises(OutputError, match="the model that is read"):
        open_output(out, source=out)
    for name in ("nul\0l", "x" * 5000, "~nobody-of-that-name/out"):
        with pytest.raises(OutputError, match="cannot use"):
            open_output(name)


def test_check_output_writes_nothing(tmp_path):
    check_output(tmp_path / "new")
    assert tree(tmp_path) == set()


def test_fresh_removes_ours_and_nothing_else(tmp_path):
    out = open_output(tmp_path / "out")
    put(out, {"model.safetensors": "w", "config.json": "{}"})
    write_text(out / "streamline" / "plan.json", "{}")
    (out / "notes.txt").write_text("the user's")
    open_output(out, fresh=True)
    assert tree(out) == {"notes.txt", "streamline", "streamline/run.json"}


def test_fresh_follows_no_name_out_of_the_folder(tmp_path):
    out = open_output(tmp_path / "out")
    (tmp_path / "precious").write_text("x")
    write_json(out / "streamline" / "files.json", ["../precious", str(tmp_path / "precious"), 3])
    open_output(out, fresh=True)
    assert (tmp_path / "precious").exists()


def test_leftovers_of_a_killed_run_are_swept(tmp_path):
    out = open_output(tmp_path / "out")
    (out / ".streamline-tmp-abc").mkdir()
    (out / ".streamline-tmp-abc" / "half").write_text("x")
    (out / "streamline" / ".streamline-tmp-def").write_text("x")
    open_output(out)
    assert tree(out) == {"streamline", "streamline/run.json"}


# --- writing


def test_files_appear_whole_with_ordinary_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        write_bytes(tmp_path / "a", b"1")
        write_text(tmp_path / "a", "größer")
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "größer"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert tree(tmp_path) == {"a"}


def test_json_has_no_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5], "y": ("é", None, True)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "y": ["é", None, True]}


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, step):
    write_text(tmp_path / "a", "old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OutputError, match="the disk is full"):
        write_text(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "disk is full"),
        (OSError(errno.EDQUOT, "x"), "disk is full"),
        (OSError(errno.EACCES, "Permission denied"), "not writable"),
        (OSError(errno.EROFS, "Read-only file system"), "not writable"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "disk is full"),
    ],
)
def test_what_the_system_says_becomes_a_sentence(tmp_path, error, words):
    with pytest.raises(OutputError, match=words) as caught, saving(tmp_path / "x"):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="ours"), saving("x"):
        raise RuntimeError("ours")


def test_replace_folder_swaps_or_keeps(tmp_path):
    target = tmp_path / "checkpoint"
    for text in ("one", "two"):
        with replace_folder(target) as staging:
            (staging / "a").write_text(text)
    assert (target / "a").read_text() == "two"

    def break_off():
        with replace_folder(target) as staging:
            (staging / "a").write_text("three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert (target / "a").read_text() == "two"
    assert tree(tmp_path) == {"checkpoint", "checkpoint/a"}


def test_room_is_checked_before_anything_is_written(tmp_path):
    check_room(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(OutputError, match="MB are free"):
        check_room(tmp_path, 2**60)


# --- publishing and the manifest


def test_publish_replaces_what_it_wrote_and_drops_what_is_left_over(tmp_path):
    out = open_output(tmp_path / "out")
    put(out, {"model-1.safetensors": "1", "model-2.safetensors": "2", "config.json": "old"})
    put(out, {"model.safetensors": "1", "config.json": "new"})
    assert tree(out) == {
        "model.safetensors",
        "config.json",
        "streamline",
        "streamline/run.json",
        "streamline/files.json",
    }
    assert (out / "config.json").read_text() == "new"
    assert owned_files(out) == ["config.json", "model.safetensors"]


def test_publish_never_overwrites_what_it_did_not_write(tmp_path):
    out = open_output(tmp_path / "out")
    (out / "config.json").write_text("the user's")
    with pytest.raises(OutputError, match="was not written by"):
        put(out, {"config.json": "ours", "a": "x"})
    assert (out / "config.json").read_text() == "the user's"
    assert not (out / "a").exists()


def test_a_run_killed_while_publishing_can_be_repeated(tmp_path, monkeypatch):
    out = open_output(tmp_path / "out")
    moved = []

    def replace_once(source, target):
        if str(target).endswith(("a", "b", "config.json")):
            if moved:
                raise KeyboardInterrupt
            moved.append(target)
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        put(out, {"a": "1", "b": "1", "config.json": "{}"})
    assert not (out / "config.json").exists()  # the file without which it is no model comes last
    monkeypatch.undo()
    put(out, {"a": "2", "b": "2", "config.json": "{}"})
    assert (out / "a").read_text() == "2"


def test_the_manifest_tells_whether_all_is_there(tmp_path):
    out = open_output(tmp_path / "out")
    assert not is_complete(out)
    with pytest.raises(OutputError, match="no finished run"):
        read_manifest(out)
    put(out, {"model.safetensors": "weights", "config.json": "{}"})
    write_manifest(out, {"seed": 1})
    assert is_complete(out)
    assert read_manifest(out)["seed"] == 1
    assert read_manifest(out)["files"] == {"config.json": 2, "model.safetensors": 7}
    (out / "model.safetensors").write_text("w")
    assert not is_complete(out)
    put(out, {"model.safetensors": "weights", "config.json": "{}"})
    assert not is_complete(out)  # the manifest goes as soon as anything changes
    (out / "streamline" / "manifest.json").write_text("[]")
    with pytest.raises(OutputError, match="not a manifest"):
        read_manifest(out)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="not writable"):
        open_output(tmp_path / "locked" / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KB, where this machine lets us mount one."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # a traceback may still hold a file open


def test_a_disk_that_is_really_full(small_disk):
    out = open_output(small_disk / "out")
    write_text(out / "a", "old")
    before = tree(small_disk)
    with pytest.raises(OutputError, match="the disk is full"):
        write_bytes(out / "a", b"x" * 400_000)
    assert (out / "a").read_text() == "old"
    assert tree(small_disk) == before


def test_safetensors_on_a_full_disk(small_disk):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(OutputError, match="the disk is full"), saving(small_disk / "w.safetensors"):
        save_file({"a": torch.zeros(100_000)}, small_disk / "w.safetensors")
    (small_disk / "w.safetensors").unlink(missing_ok=True)
    with pytest.raises(OutputError, match="the disk is full"), saving(small_disk / "w.pt"):
        torch.save({"a": torch.zeros(100_000)}, small_disk / "w.pt")
