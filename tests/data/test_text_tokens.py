import tracemalloc

import numpy as np
import pytest
import torch
from texts import document, documents, tiny_tokenizer

from llm_streamline.data.tokens import Boundaries, encode_documents, tokenizer_hash
from llm_streamline.data.windows import Windows, WindowWriter, check_disjoint
from llm_streamline.errors import OutputError, TextError

HASHES = [f"{n:064x}" for n in range(100)]


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, True), (False, False), (True, False)])
def test_documents_get_the_bos_the_tokenizer_gives_them_or_else_an_eos(bos, eos):
    tokenizer = tiny_tokenizer(bos, eos)
    boundaries = Boundaries.of(tokenizer)
    texts = documents(5)
    for ids, text in zip(encode_documents(texts, tokenizer, boundaries), texts, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer(text)["input_ids"] + ([2] if eos and not bos else [])
        assert (ids[0] == 1) == bos
    record = boundaries.record(tokenizer)
    assert record["bos"]["tokenizer_adds_it"] == bos
    assert record["bos"]["placed"] == ("before every document" if bos else "nowhere")
    assert record["eos"]["placed"] == ("after every document" if eos and not bos else "nowhere")
    assert record["eos"]["tokens"] == (["</s>"] if eos and not bos else [])


def test_the_tokenizers_hash_sees_its_vocabulary_and_its_manners_and_not_its_last_call():
    tokenizer = tiny_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(documents(2), padding=True, truncation=True, max_length=8)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(tiny_tokenizer())
    others = [tiny_tokenizer(bos=True), tiny_tokenizer(eos=False), tiny_tokenizer(vocab_size=300)]
    assert len({before, *map(tokenizer_hash, others)}) == 4


def ids_of(number, length):
    return np.arange(length, dtype=np.int32) + 1000 * number


def pack(lengths, seq_len, num_windows=10**6, across=True, folder=None):
    writer = WindowWriter(seq_len, num_windows, folder, across)
    for number, length in enumerate(lengths):
        writer.add(ids_of(number, length), HASHES[number], number % 2)
    return writer


def test_packing_runs_on_across_documents_and_keeps_their_boundaries():
    windows = pack([3, 5, 2, 9, 1], seq_len=4).finish({})
    stream = np.concatenate([ids_of(n, length) for n, length in enumerate([3, 5, 2, 9, 1])])
    assert windows.input_ids.tolist() == stream.reshape(5, 4).tolist()
    assert windows.document_ids.flatten().tolist() == [0] * 3 + [1] * 5 + [2] * 2 + [3] * 9 + [4]
    assert [bytes(row).hex() for row in windows.document_hashes.numpy()] == HASHES[:5]
    assert windows.input_ids.dtype == windows.document_ids.dtype == torch.int32
    assert (len(windows), windows.seq_len, windows.num_tokens) == (5, 4, 20)


def test_what_does_not_fill_a_window_is_dropped_and_not_counted():
    writer = pack([3, 5, 2, 9, 1], seq_len=6)
    windows = writer.finish({})
    assert len(windows) == 3
    assert len(windows.document_hashes) == windows.document_ids.max() + 1 == writer.num_documents == 4
    assert writer.tokens_of_source == {0: 3 + 2, 1: 5 + 8}
    assert writer.documents_of_source == {0: 2, 1: 2}


def test_packing_stops_at_the_windows_asked_for():
    writer = pack([3, 5, 2, 9, 1], seq_len=2, num_windows=3)
    assert writer.is_full
    assert writer.finish({}).document_ids.tolist() == [[0, 0], [0, 1], [1, 1]]


def test_packing_within_documents_starts_each_in_a_window_of_its_own():
    windows = pack([3, 8, 2, 9], seq_len=4, across=False).finish({})
    assert windows.input_ids.tolist() == [[1000, 1001, 1002, 1003], [1004, 1005, 1006, 1007], *[
        [3000, 3001, 3002, 3003], [3004, 3005, 3006, 3007]]]  # fmt: skip
    assert windows.document_ids[:, 0].tolist() == [0, 0, 1, 1]
    assert [bytes(row).hex() for row in windows.document_hashes.numpy()] == [HASHES[1], HASHES[3]]


def test_packing_on_disk_equals_packing_in_memory_and_saving_it(tmp_path):
    lengths = [7, 1, 30, 12, 4]
    in_memory = pack(lengths, 5).finish({"role": "train"})
    on_disk = pack(lengths, 5, folder=tmp_path / "new").finish({"role": "train"}, tmp_path / "new" / "train")
    in_memory.save(tmp_path / "saved")
    for other in (on_disk, Windows.load(tmp_path / "saved"), Windows.load(tmp_path / "new" / "train.safetensors")):
        assert torch.equal(other.input_ids, in_memory.input_ids)
        assert torch.equal(other.document_ids, in_memory.document_ids)
        assert torch.equal(other.document_hashes, in_memory.document_hashes)
        assert other.provenance == in_memory.provenance
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["train.json", "train.safetensors"]


def test_windows_read_by_others_are_a_plain_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    windows = pack([7, 1, 30], 5, folder=tmp_path).finish({}, tmp_path / "a")
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["input_ids"], windows.input_ids)


def test_batches_are_int64_in_order():
    windows = pack([64], 4).finish({})
    batches = list(windows.batches(3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 4)] * 5 + [(1, 4)]
    assert torch.cat(batches).flatten().tolist() == list(range(64))
    assert batches[0].dtype == torch.int64


def test_windows_made_by_hand_hold_a_document_each():
    windows = Windows(torch.zeros(3, 4, dtype=torch.int32))
    assert windows.document_ids.tolist() == [[0] * 4, [1] * 4, [2] * 4]


@pytest.mark.parametrize("damage", ["truncate", "no json", "no tensors", "half json", "other tensors"])
def test_damaged_windows_are_refused(tmp_path, damage):
    pack([7, 1, 30], 5).finish({}).save(tmp_path / "a")
    pack([9, 1, 30], 5).finish({}).save(tmp_path / "b")
    tensors, history = tmp_path / "a.safetensors", tmp_path / "a.json"
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif damage == "no json":
        history.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "half json":
        history.write_text(history.read_text()[:20])
    else:  # killed between the two files
        (tmp_path / "b.safetensors").replace(tensors)
    with pytest.raises(TextError, match=str(tmp_path)):
        Windows.load(tmp_path / "a")


def test_a_failed_write_leaves_nothing_and_the_old_file_whole(tmp_path, monkeypatch):
    pack([7, 1, 30], 5).finish({}).save(tmp_path / "a")
    before = (tmp_path / "a.safetensors").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        pack([9, 9, 30], 5).finish({}).save(tmp_path / "a")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_sets_that_share_a_document_are_refused():
    a, b = pack([8, 8], 4).finish({"role": "train"}), pack([8, 8, 8], 4).finish({"role": "validation"})
    with pytest.raises(TextError, match="train and validation share 2 documents"):
        check_disjoint(a, b)
    c = WindowWriter(4, 9)
    c.add(ids_of(0, 9), HASHES[50])
    check_disjoint(a, c.finish({}))


def test_a_document_longer_than_many_windows_is_one_document():
    tokenizer = tiny_tokenizer()
    ids = encode_documents([document(1, 900)], tokenizer, Boundaries.of(tokenizer))[0]
    writer = WindowWriter(16, 10**6)
    writer.add(ids, HASHES[0])
    windows = writer.finish({})
    assert tokenizer.decode(windows.input_ids.flatten()) == tokenizer.decode(ids[: windows.num_tokens])
    assert not windows.document_ids.any()


def test_memory_does_not_grow_with_tokens_when_they_go_to_disk(tmp_path):
    tracemalloc.start()
    writer = WindowWriter(512, 10**6, tmp_path)
    for number in range(2000):
        writer.add(ids_of(number, 2000), HASHES[0])  # 4 M tokens: 32 MB of ids and document numbers
    windows = writer.finish({}, tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert windows.num_tokens == 512 * (4_000_000 // 512)
    assert (tmp_path / "a.safetensors").stat().st_size > 8 * windows.num_tokens
    assert peak < 2_000_000
