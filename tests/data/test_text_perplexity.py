import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import documents, tiny_tokenizer
from tiny import tiny_model

from llm_streamline.data import perplexity_windows
from llm_streamline.errors import ConfigError, TextError

TEXT = "\n\n".join(documents(6)) + " – naïve café, 日本語, 🙂 done\n"
PLAIN, BOS = tiny_tokenizer(), tiny_tokenizer(bos=True)


def scored_ids(windows):
    return windows.input_ids[windows.scored].tolist()


def test_with_a_bos_every_token_of_the_text_is_scored_once():
    ids = BOS(TEXT, add_special_tokens=False)["input_ids"]
    windows = perplexity_windows(TEXT, BOS, 33)
    assert scored_ids(windows) == ids
    assert (windows.input_ids[:, 0] == 1).all()
    assert windows.protocol["num_tokens"] == windows.protocol["tokens"] == len(ids)
    assert windows.protocol["num_bytes"] == windows.protocol["text_bytes"] == len(TEXT.encode())


def test_without_a_bos_windows_are_the_text_cut_up_and_first_tokens_are_context():
    ids = PLAIN(TEXT)["input_ids"]
    windows = perplexity_windows(TEXT, PLAIN, 32)
    rows = [row[:length].tolist() for row, length in zip(windows.input_ids, windows.lengths, strict=True)]
    assert [token for row in rows for token in row] == ids
    assert scored_ids(windows) == [token for n, token in enumerate(ids) if n % 32]
    assert windows.protocol["bos"] == "none"


@pytest.mark.parametrize("tokenizer", [PLAIN, BOS])
def test_with_a_stride_tokens_have_more_context_and_count_once(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = perplexity_windows(TEXT, tokenizer, 32, stride=8)
    assert scored_ids(windows) == (ids if tokenizer is BOS else ids[1:])
    first = windows.scored.float().argmax(dim=1)
    assert first[0] == 1
    assert (first[1:] >= 32 - 8).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(3, 70), st.data(), st.booleans(), st.integers(1, 400))
def test_no_token_is_scored_twice_and_bytes_add_up(context, data, bos, limit):
    tokenizer = BOS if bos else PLAIN
    stride = data.draw(st.one_of(st.none(), st.integers(1, context - bos)))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:limit]
    if not bos and len(ids) < 2:
        return
    windows = perplexity_windows(TEXT, tokenizer, context, stride=stride, max_tokens=limit)
    places = []
    step = windows.protocol["stride"]
    starts = range(0, len(ids), step)[: len(windows)]
    for start, mask in zip(starts, windows.scored, strict=True):
        places += [start + int(n) - bos for n in mask.nonzero()]
    assert len(set(places)) == len(places) == windows.protocol["num_tokens"]
    assert [ids[place] for place in places] == scored_ids(windows)
    unscored = sorted(set(range(len(ids))) - set(places))
    if bos or step < context:
        assert unscored == ([] if bos else [0])
    assert not windows.scored[:, 0].any()
    assert windows.protocol["num_bytes"] <= windows.protocol["text_bytes"]
    if not unscored:
        assert windows.protocol["num_bytes"] == windows.protocol["text_bytes"]


def test_bytes_are_those_of_the_scored_tokens():
    for text in ("ab cd " * 50, "日本" * 40, "é" * 64):
        ids = PLAIN(text)["input_ids"]
        first = [PLAIN.decode(ids[: 16 * n + 1]) for n in range(-(-len(ids) // 16))]
        windows = perplexity_windows(text, PLAIN, 16)
        if all("\ufffd" not in piece for piece in first):  # a token that is whole characters can be checked by decoding
            skipped = sum(len(PLAIN.decode(ids[16 * n]).encode()) for n in range(len(first)))
            assert windows.protocol["num_bytes"] == len(text.encode()) - skipped
        else:
            assert abs(windows.protocol["num_bytes"] - len(text.encode()) * 15 / 16) <= 3 * len(first)


def test_perplexity_equals_the_models_own_loss():
    """One window over the whole text: the sum of losses is what the model itself computes from labels."""
    model = tiny_model("llama", vocab_size=len(PLAIN), max_position_embeddings=512)
    windows = perplexity_windows(TEXT, PLAIN, 400, max_tokens=300)
    assert len(windows) == 1
    ids = windows.input_ids.long()
    nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert nll[windows.scored[0, 1:]].mean().item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_the_limit_takes_the_texts_first_tokens_as_the_whole_text_gives_them():
    text = "\n\n".join(documents(300))
    ids = PLAIN(text)["input_ids"]
    windows = perplexity_windows(text, PLAIN, 64, max_tokens=200)
    rows = zip(windows.input_ids, windows.lengths, strict=True)
    assert [token for row, length in rows for token in row[:length].tolist()] == ids[:200]
    assert windows.protocol["tokens"] == windows.protocol["tokens_limit"] == 200
    assert perplexity_windows("x" + " " * 60_000 + "y z", PLAIN, 64, max_tokens=3).protocol["tokens"] == 3


def test_a_last_window_with_nothing_to_score_is_left_out():
    ids = PLAIN(TEXT)["input_ids"]
    assert len(perplexity_windows(TEXT, PLAIN, 32, max_tokens=65)) == 2
    assert len(perplexity_windows(TEXT, PLAIN, 32, max_tokens=66)) == 3
    assert len(ids) > 66


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(TextError, match="give more text"):
        perplexity_windows("", PLAIN, 32)
    with pytest.raises(TextError, match="give more text"):
        perplexity_windows("x", PLAIN, 32)
    assert len(perplexity_windows("x", BOS, 32)) == 1
    with pytest.raises(ConfigError, match="too short"):
        perplexity_windows(TEXT, BOS, 2)
    for stride in (0, 33):
        with pytest.raises(ConfigError, match="stride must be from 1 to 32"):
            perplexity_windows(TEXT, PLAIN, 32, stride=stride)
    with pytest.raises(ConfigError, match="max_tokens"):
        perplexity_windows(TEXT, PLAIN, 32, max_tokens=0)
