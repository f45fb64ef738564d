"""A full disk at any write: one sentence, exit code 2, nothing lost; with room again the same bits."""

import builtins
import errno
import io
import itertools
import json
import os
import subprocess
import tempfile

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from small_run import attempt, bits, in_child, make_place, run, wait

from llm_streamline.errors import OutputError
from llm_streamline.runs.ledger import Ledger

FULL = "No space left on device"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def truth(place):
    run(place, place / "out")
    return bits(place / "out")


class Disk:
    """Counts what is written below a folder, and is full from the `room`-th write on."""

    def __init__(self, folder, room):
        self._folder, self._room, self.writes = str(folder), room, 0

    def use(self, path):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder):
            self.writes += 1
            return self.writes > self._room
        return False

    def check(self, path):
        if self.use(path):
            raise OSError(errno.ENOSPC, FULL, os.fspath(path))

    def install(self):
        """Every way in which Python, safetensors (Rust) and torch (C++) make a file; for good: in a child process."""
        for module, name in itertools.product([os], ["mkdir", "replace", "rename", "link"]):
            self._wrap(module, name, lambda args: args[-1] if len(args) > 1 and isinstance(args[1], str) else args[0])
        self._wrap(os, "open", lambda args: args[0] if len(args) > 1 and args[1] & os.O_CREAT else None)
        for module in (builtins, io):
            self._wrap(module, "open", lambda args: args[0] if len(args) > 1 and set("wax+") & set(args[1]) else None)
        self._wrap(tempfile, "mkstemp", lambda args: self._folder)
        rust, cpp = safetensors.torch.serialize_file, torch.save

        def serialize_file(tensors, path, *args, **kwargs):
            if self.use(path):
                raise safetensors.SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")
            return rust(tensors, path, *args, **kwargs)

        def save(value, path, *args, **kwargs):
            if self.use(path):
                raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
            return cpp(value, path, *args, **kwargs)

        safetensors.torch.serialize_file, torch.save = serialize_file, save

    def _wrap(self, module, name, path_of):
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            mode = args if "mode" not in kwargs else (*args, kwargs["mode"])
            self.check(path_of(mode))
            return real(*args, **kwargs)

        setattr(module, name, wrapped)


def run_on(place, out, room, log):
    """The exit code of a run on a disk that is full after `room` writes."""

    def action():
        Disk(out, room).install()
        attempt(place, out)

    return wait(in_child(action, log))


def sentence(log):
    """What the run said at its end."""
    return [line for line in log.read_text().splitlines() if "Error" in line]


def is_sound(out):
    """Whether nothing under a real name is half a file."""
    for path in out.rglob("*"):
        if path.is_file() and ".streamline-tmp-" not in str(path) and "/checkpoints/" not in str(path):
            if path.suffix == ".json" and path.name != "lock.json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors" and path.parent.name != "windows":
                load_file(path)
    ledger = Ledger(out / "streamline")
    done = [stage for stage in ("text", "measure", "plan", "train") if ledger.key(stage)]
    return not done or ledger.is_intact(done)


def number_of_writes(place, folder, tmp_path):
    def action():
        disk = Disk(folder, 10**9)
        disk.install()
        run(place, folder)
        with open(tmp_path / "writes", "w") as file:
            file.write(str(disk.writes))

    assert wait(in_child(action, tmp_path / "log")) == 0
    return int((tmp_path / "writes").read_text())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.85])
def test_a_full_disk_is_one_sentence_and_costs_nothing(place, truth, tmp_path, share):
    out, log = tmp_path / "out", tmp_path / "log"
    code = run_on(place, out, round(share * 130), log)
    assert code == 2, log.read_text()
    assert len(sentence(log)) == 1
    assert sentence(log)[0].startswith("OutputError: the disk is full")
    assert not out.exists() or is_sound(out)
    run(place, out)
    assert bits(out) == truth


@pytest.mark.slow
def test_a_full_disk_at_every_write(place, truth, tmp_path):
    total = number_of_writes(place, tmp_path / "count", tmp_path)
    assert total > 100
    log = tmp_path / "log"
    for room in range(total):
        out = tmp_path / str(room) / "out"  # a run is called as its folder
        assert run_on(place, out, room, log) == 2, (room, log.read_text())
        assert len(sentence(log)) == 1
        assert "the disk is full" in sentence(log)[0], (room, sentence(log))
        assert not out.exists() or is_sound(out)
        if room % 8 == 0:
            run(place, out)
            assert bits(out) == truth, room


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_small_real_disk(place, truth, tmp_path):
    """A disk that grows by 64 KiB whenever it is full: each start goes a little further, the last one to the end."""
    disk, log, sizes = tmp_path / "disk", tmp_path / "log", []
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        for size in range(64, 4096, 64):
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            code = wait(in_child(lambda: attempt(place, disk / "out"), log))
            if code == 0:
                break
            assert code == 2, log.read_text()
            assert "the disk is full" in sentence(log)[0]
            sizes.append(size)
        assert len(sizes) > 3
        assert bits(disk / "out") == truth
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_folder_is_one_sentence(place, tmp_path, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: not mode & os.W_OK and real(path, mode, **more))
    with pytest.raises(OutputError, match="not writable: choose another folder"):
        run(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_half_written_shard_is_written_again(place, truth, tmp_path, caplog):
    out = tmp_path / "out"
    run(place, out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run(place, out)
    assert f"save was done before, but {weights} is damaged or missing" in caplog.text
    assert bits(out) == truth
