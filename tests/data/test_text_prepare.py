import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from texts import documents, tiny_tokenizer, write_jsonl

from llm_streamline.data import ROLES, WindowNeed, check_disjoint, prepare_windows, role_of
from llm_streamline.data.document import document_hash
from llm_streamline.data.text import open_text
from llm_streamline.errors import ConfigError, OutputError, TextError

TOKENIZER = tiny_tokenizer()
NEEDS = {role: WindowNeed(640, 32) for role in ROLES}


def hashes(windows):
    return {bytes(row).hex() for row in windows.document_hashes.numpy()}


def texts_in(windows):
    """The documents' texts, read back from the tokens."""
    ids, numbers = windows.input_ids.flatten(), windows.document_ids.flatten()
    return [TOKENIZER.decode(ids[numbers == n], skip_special_tokens=True) for n in range(int(numbers.max()) + 1)]


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl.gz", documents(600))


def test_roles_share_no_document_and_each_document_is_where_its_hash_puts_it(corpus):
    made = prepare_windows([str(corpus)], TOKENIZER, NEEDS)
    assert list(made) == list(NEEDS)
    for role, windows in made.items():
        assert tuple(windows.input_ids.shape) == (20, 32)
        assert {role_of(value) for value in hashes(windows)} == {role}
        for other in made:
            if other != role:
                check_disjoint(windows, made[other])
        whole = texts_in(windows)[:-1]  # the last one is cut where the need is met
        assert set(whole) <= set(documents(600))
        assert [document_hash(text) for text in whole] == [
            bytes(row).hex() for row in windows.document_hashes.numpy()[:-1]
        ]


def test_what_a_role_gets_does_not_depend_on_other_roles_and_grows_with_its_budget(corpus):
    made = prepare_windows([str(corpus)], TOKENIZER, NEEDS)
    for role in ROLES:
        alone = prepare_windows([str(corpus)], TOKENIZER, {role: WindowNeed(1280, 32)})[role]
        assert torch.equal(alone.input_ids[:20], made[role].input_ids)
    more = prepare_windows([str(corpus)], TOKENIZER, NEEDS | {"train": WindowNeed(5000, 32)})
    for role in set(ROLES) - {"train"}:
        assert torch.equal(more[role].input_ids, made[role].input_ids)


def test_the_seed_chooses_what_is_learned_from_and_not_what_is_judged_on(corpus):
    zero, again, one = (prepare_windows([str(corpus)], TOKENIZER, NEEDS, seed=seed) for seed in (0, 0, 1))
    for role in ROLES:
        same = torch.equal(zero[role].input_ids, one[role].input_ids)
        assert torch.equal(zero[role].input_ids, again[role].input_ids)
        assert same == (role in ("validation", "evaluation"))


def test_shares_are_of_tokens_though_documents_differ_in_length(tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", documents(300, 300))
    short = write_jsonl(tmp_path / "short.jsonl", documents(4000, 10, start=10_000))
    needs = {"train": WindowNeed(20_000, 32), "calibration": WindowNeed(5_000, 32)}
    made = prepare_windows([f"0.3*{long}", f"0.7*{short}"], TOKENIZER, needs)
    for windows in made.values():
        first, second = windows.provenance["sources"]
        assert first["asked_share"] == pytest.approx(0.3)
        assert first["realised_share"] == pytest.approx(0.3, abs=0.06)  # half a long document
        assert first["tokens"] + second["tokens"] == windows.num_tokens == windows.provenance["tokens"]
        assert second["documents"] > 10 * first["documents"]
        shorts = {document_hash(text) for text in documents(4000, 10, start=10_000)}
        numbers = [n for n, row in enumerate(windows.document_hashes.numpy()) if bytes(row).hex() in shorts]
        assert int(np.isin(windows.document_ids, numbers).sum()) == second["tokens"]


def test_a_source_that_runs_dry_leaves_its_share_to_the_others_and_it_is_said(tmp_path, caplog):
    few = write_jsonl(tmp_path / "few.jsonl", documents(20))
    many = write_jsonl(tmp_path / "many.jsonl", documents(600, start=1000))
    with caplog.at_level(logging.WARNING, logger="llm_streamline"):
        windows = prepare_windows([str(few), str(many)], TOKENIZER, {"train": WindowNeed(9000, 32)})["train"]
    few_source, many_source = windows.provenance["sources"]
    assert few_source["ran_dry"]
    assert not many_source["ran_dry"]
    assert few_source["realised_share"] < 0.3
    assert len(windows) == windows.provenance["asked_windows"]
    assert "few.jsonl ran dry" in caplog.text


def test_copies_count_once_within_and_between_sources(tmp_path):
    texts = documents(100)
    once = write_jsonl(tmp_path / "once.jsonl", texts)
    thrice = write_jsonl(
        tmp_path / "thrice.jsonl", [*texts, *("  " + t.replace(" ", "\n") for t in texts), *texts, "x"]
    )
    need = {role: WindowNeed(100_000, 32) for role in ROLES}
    alone = prepare_windows([str(once)], TOKENIZER, need)
    for specs in ([str(thrice)], [str(thrice), f"3*{once}"]):
        made = prepare_windows(specs, TOKENIZER, need)
        for role, windows in made.items():
            assert len(windows.document_hashes) == len(hashes(windows))
            assert abs(len(hashes(windows)) - len(hashes(alone[role]))) <= 1  # the last window's remainder may differ
        lost = [windows.provenance["left_out"] for windows in made.values()]
        assert sum(count["duplicates"] for count in lost) == 100 * (2 if len(specs) == 1 else 3)
        assert sum(count["near_empty"] for count in lost) == 1


def test_a_short_text_gives_what_there_is_and_says_how_often_it_must_be_repeated(corpus, caplog):
    with caplog.at_level(logging.WARNING, logger="llm_streamline"):
        windows = prepare_windows([str(corpus)], TOKENIZER, {"train": WindowNeed(10**6, 32)})["train"]
    history = windows.provenance
    assert history["asked_windows"] == 31250
    assert history["passes"] == pytest.approx(31250 / len(windows))
    assert "training goes through it" in caplog.text
    enough = prepare_windows([str(corpus)], TOKENIZER, {"train": WindowNeed(320, 32)})["train"]
    assert enough.provenance["passes"] == 1


def test_too_little_text_for_a_role_is_one_sentence_with_numbers(tmp_path):
    path = write_jsonl(tmp_path / "tiny.jsonl", documents(3, 20))
    with pytest.raises(TextError, match=r"too little text for one \w+ window: 4096 tokens are needed.*hold \d+ "):
        prepare_windows([str(path)], TOKENIZER, {role: WindowNeed(1, 4096) for role in ROLES})


def test_a_small_text_file_serves_every_role(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("\n\n".join(documents(120, 40)))
    made = prepare_windows([str(path)], TOKENIZER, {role: WindowNeed(64, 32) for role in ROLES})
    assert all(len(windows) == 2 for windows in made.values())


def test_the_history_says_where_tokens_are_from_and_how_they_were_cut(corpus):
    history = prepare_windows([f"2*{corpus}#text"], tiny_tokenizer(bos=True), NEEDS, seed=3)["train"].provenance
    assert history["specs"] == [f"2*{corpus}#text"]
    assert history["seed"] == 3
    assert history["bos"]["tokenizer_adds_it"]
    assert history["eos"]["placed"] == "nowhere"
    assert history["role"] == "train"
    assert history["split"]["shares"]["train"] == 0.65
    assert len(history["sha256"]) == 64
    json.dumps(history)


def test_windows_within_documents_hold_one_each(corpus):
    windows = prepare_windows([str(corpus)], TOKENIZER, NEEDS, across_documents=False)["train"]
    assert (windows.document_ids == windows.document_ids[:, :1]).all()
    with pytest.raises(TextError, match="tokens in one document are needed"):
        prepare_windows([str(corpus)], TOKENIZER, {"train": WindowNeed(1, 4096)}, across_documents=False)


def test_a_folder_keeps_windows_and_gives_them_again_until_the_request_changes(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "windows"
    in_memory = prepare_windows([str(corpus)], TOKENIZER, NEEDS)
    first = prepare_windows([str(corpus)], TOKENIZER, NEEDS, folder=folder)
    for role in ROLES:
        assert torch.equal(first[role].input_ids, in_memory[role].input_ids)
        assert first[role].provenance == in_memory[role].provenance
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(times) == {f"{role}.{kind}" for role in ROLES for kind in ("json", "safetensors")}

    def changed(tokenizer=TOKENIZER, needs=NEEDS, **options):
        prepare_windows([str(corpus)], tokenizer, needs, folder=folder, **options)
        now = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        found = {name.split(".")[0] for name in now if now[name] != times[name]}
        times.update(now)
        return found

    assert changed() == set()
    assert changed(seed=1) == {"calibration", "train"}
    assert changed() == {"calibration", "train"}
    assert changed(needs=NEEDS | {"train": WindowNeed(320, 32)}) == {"train"}
    assert changed(tokenizer=tiny_tokenizer(bos=True)) == set(ROLES)
    assert changed() == set(ROLES)
    write_jsonl(corpus, documents(601))
    assert changed() == set(ROLES)
    (folder / "validation.safetensors").write_bytes(b"half")
    (folder / "train.json").unlink()
    assert changed() == {"validation", "train"}


def test_another_text_of_the_same_request_is_not_confused(corpus, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", documents(600, start=5000))
    folder = tmp_path / "windows"
    first = prepare_windows([str(corpus)], TOKENIZER, NEEDS, folder=folder)["train"].input_ids.clone()
    second = prepare_windows([str(other)], TOKENIZER, NEEDS, folder=folder)["train"].input_ids
    assert not torch.equal(first, second)


def test_a_killed_run_leaves_no_windows_that_pass_for_whole(corpus, tmp_path):
    script = f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from texts import tiny_tokenizer
        from llm_streamline.data import WindowNeed, prepare_windows, windows
        add, calls = windows.WindowWriter.add, []
        def dying(self, *args):
            calls.append(1)
            if len(calls) == 40:
                os.kill(os.getpid(), 9)
            add(self, *args)
        windows.WindowWriter.add = dying
        needs = {{"train": WindowNeed(20000, 32)}}
        prepare_windows([{str(corpus)!r}], tiny_tokenizer(), needs, folder=Path({str(tmp_path / "w")!r}))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    assert list((tmp_path / "w").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        prepare_windows([str(corpus)], TOKENIZER, NEEDS, folder=tmp_path / "file" / "windows")


@pytest.mark.parametrize("needs", [{"testing": WindowNeed(64, 32)}, {"train": (0, 32)}, {"train": (64, 1)}])
def test_impossible_needs_are_refused(corpus, needs):
    with pytest.raises(ConfigError, match=r"roles are|windows need"):
        prepare_windows(
            [str(corpus)], TOKENIZER, {r: n if isinstance(n, WindowNeed) else WindowNeed(*n) for r, n in needs.items()}
        )


def test_no_text_at_all_is_refused():
    with pytest.raises(ConfigError, match="no text given"):
        prepare_windows([], TOKENIZER, NEEDS)


def test_contents_count_and_times_do_not(tmp_path):
    """Clocks jump, and a copy of a file may have any time: only what is in it is looked at."""
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    os.utime(path, (10, 10))
    before = open_text(str(path)).fingerprint
    os.utime(path, (2**32, 2**32))
    assert open_text(str(path)).fingerprint == before
    path.write_text("one two eight")  # as long as before
    os.utime(path, (10, 10))
    assert open_text(str(path)).fingerprint != before
