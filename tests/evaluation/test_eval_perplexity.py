import math

import numpy as np
import pytest
import torch
from folders import byte_tokenizer
from samples import prose, tiny

from llm_streamline.data.windows import Windows
from llm_streamline.errors import ConfigError, NumericsError, TextError
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.evaluation.perplexity import (
    ScoredText,
    ScoredWindow,
    compare_losses,
    divergence_result,
    packed_text,
    perplexity_result,
    ratio_stderr,
    read_windows,
    scored_text,
)

TEXT = prose(60)  # some 300 bytes, a token each


def text_of(context=50, stride=None, tokens=None, text=TEXT):
    return scored_text("prose", text, byte_tokenizer(), context, stride, tokens)


def test_losses_are_those_of_the_models_own_forward():
    model, text = tiny(), text_of()
    losses, _, _ = read_windows(text, LogitReader(model))
    total, count = 0.0, 0
    for window in text.windows:
        log_probs = model(window.ids[None]).logits[0].double().log_softmax(dim=-1)
        for place in range(1, len(window.ids)):
            total -= float(log_probs[place - 1, window.ids[place]])
            count += 1
    found = perplexity_result(text, losses, "float32")
    assert found.num_tokens == count
    assert found.nll == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2), rel=1e-6)  # a token is a byte here
    assert (found.context, found.stride, found.bos) == (50, 50, "none")


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = tiny()
    model.lm_head.weight.data.zero_()
    text = text_of()
    losses, _, _ = read_windows(text, LogitReader(model))
    found = perplexity_result(text, losses, "float32")
    assert found.perplexity == pytest.approx(272, rel=1e-5)
    assert found.nll_stderr == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("limits", [{"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 120}])
def test_batches_and_pieces_change_nothing(limits, monkeypatch):
    model, original, text = tiny(), tiny(seed=1), text_of()
    whole = read_windows(text, LogitReader(model), LogitReader(original))
    monkeypatch.setattr("llm_streamline.evaluation.logits._CHUNK_LOGITS", 272 * 7)
    parts = read_windows(text, LogitReader(model), LogitReader(original), **limits)
    np.testing.assert_allclose(parts[0].nll_W, whole[0].nll_W, rtol=1e-5)
    np.testing.assert_allclose(parts[1].nll_W, whole[1].nll_W, rtol=1e-5)
    for part, one in zip(parts[2].kl, whole[2].kl, strict=True):
        np.testing.assert_allclose(part, one, rtol=1e-3, atol=1e-5)


def test_a_stride_scores_every_token_once_with_more_context():
    text = text_of(context=50, stride=25)
    assert sum(window.num_scored for window in text.windows) == len(TEXT) - 1
    losses, _, _ = read_windows(text, LogitReader(tiny()))
    assert perplexity_result(text, losses, "float32").stride == 25


def test_divergence_is_kl_of_the_original_from_the_model():
    model, original, text = tiny(seed=1), tiny(), text_of()
    _, _, found = read_windows(text, LogitReader(model), LogitReader(original))
    kl, same = [], []
    for window in text.windows:
        p = original(window.ids[None]).logits[0, :-1].double().log_softmax(dim=-1)
        q = model(window.ids[None]).logits[0, :-1].double().log_softmax(dim=-1)
        kl.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1))
        same.append(p.argmax(dim=-1) == q.argmax(dim=-1))
    result = divergence_result("prose", found)
    kl_N = torch.cat(kl).numpy()
    assert result.kl_mean == pytest.approx(kl_N.mean(), rel=1e-4)
    assert result.kl_p99 == pytest.approx(np.quantile(kl_N, 0.99), rel=1e-4)
    assert result.kl_max == pytest.approx(kl_N.max(), rel=1e-4)
    assert result.top1_agreement == pytest.approx(torch.cat(same).double().mean().item())


def test_a_model_does_not_diverge_from_itself():
    reader, text = LogitReader(tiny()), text_of()
    own, other, found = read_windows(text, reader, reader)
    result = divergence_result("prose", found)
    assert result.kl_max == pytest.approx(0, abs=1e-5)
    assert result.top1_agreement == 1
    pair = compare_losses("prose", other, own)
    assert (pair.ratio, pair.nll_difference, pair.nll_difference_stderr) == (1, 0, 0)


def test_the_standard_error_is_the_usual_one_for_equal_windows():
    sums, tokens = np.array([3.0, 5.0, 4.0, 8.0]), np.array([2, 2, 2, 2])
    assert ratio_stderr(sums, tokens) == pytest.approx(np.std(sums / 2, ddof=1) / 2)
    assert ratio_stderr(sums[:1], tokens[:1]) is None


def test_pairing_over_windows_tightens_the_difference():
    text = text_of(context=20)
    model = tiny()
    near = tiny()
    near.lm_head.weight.data.mul_(1.01)
    own, other, _ = read_windows(text, LogitReader(near), LogitReader(model))
    pair = compare_losses("prose", other, own)
    assert pair.nll_difference_stderr < 0.5 * perplexity_result(text, other, "float32").nll_stderr


def test_packed_windows_leave_special_tokens_out():
    ids = torch.tensor([[1, 70, 71, 72, 2, 1, 73, 74]], dtype=torch.int32)
    text = packed_text("held-out", Windows(ids), byte_tokenizer())
    assert text.windows[0].scored.tolist() == [[False, True, True, True, False, False, True, True]][0]
    assert text.num_bytes == 5
    assert text.context == 8


def test_protocol_that_cannot_be():
    with pytest.raises(TextError, match="prose: the text gives 1 token"):
        text_of(text="x")
    with pytest.raises(ConfigError, match="stride must be from 1 to 50"):
        text_of(stride=60)
    window = ScoredWindow(torch.tensor([5, 6]), torch.tensor([False, False]))
    text = ScoredText("empty", (window,), 0, 2, 2, "none", "as it stands")
    with pytest.raises(TextError, match="no token to score"):
        perplexity_result(text, read_windows(text, LogitReader(tiny()))[0], "float32")


def test_not_a_number_is_named_by_window():
    model = tiny()
    reader = LogitReader(model)
    model.model.embed_tokens.weight.data[byte_tokenizer().encode("g")[0]] = float("nan")
    with pytest.raises(NumericsError, match=r"text prose, window \d: the model gives not-a-number"):
        read_windows(text_of(), reader)
