"""When memory ends in an evaluation: the batch is halved, and the results are the same."""

import numpy as np
import pytest
from folders import byte_tokenizer
from samples import prose, questions, tiny, write_rows
from scarcity import room_for

from llm_streamline.errors import OutOfMemoryError
from llm_streamline.evaluation.choices import score_task
from llm_streamline.evaluation.items import read_choice_file
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.evaluation.perplexity import read_windows, scored_text


@pytest.mark.parametrize("pair", [False, True])
def test_perplexity_and_divergence_are_the_same(pair, caplog):
    model = tiny()
    original = LogitReader(tiny(seed=1)) if pair else None
    text = scored_text("prose", prose(90), byte_tokenizer(), 40, 20, None)
    truth = read_windows(text, LogitReader(model), original, batch_size=2)
    reader = LogitReader(model)
    with room_for(model, 3, after=1):  # the first batch fits: nothing of it is lost
        found = read_windows(text, reader, original, batch_size=4)
    np.testing.assert_allclose(found[0].nll_W, truth[0].nll_W, rtol=1e-6)
    if pair:
        np.testing.assert_allclose(found[1].nll_W, truth[1].nll_W, rtol=1e-6)
        np.testing.assert_allclose(np.concatenate(found[2].kl), np.concatenate(truth[2].kl), rtol=1e-3, atol=1e-5)
        assert found[2].same_top == truth[2].same_top
    assert caplog.text.count("out of memory in perplexity on prose with 4 windows at once; going on with 2") == 1


@pytest.mark.parametrize("pack", [True, False])
def test_scores_of_choices_are_the_same(pack, tmp_path, caplog):
    model, tokenizer = tiny(), byte_tokenizer()
    task = read_choice_file(write_rows(tmp_path / "quiz.jsonl", questions()))
    reader = LogitReader(model)
    truth = score_task(task, reader, tokenizer, pack=pack, batch_size=1)
    with room_for(model, 2) as given:
        found = score_task(task, reader, tokenizer, pack=pack, batch_size=4)
    assert given[0] == 4
    for one, expected in zip(found, truth, strict=True):
        assert one.loglikelihoods == pytest.approx(expected.loglikelihoods, abs=2e-4)
    assert "out of memory in task quiz" in caplog.text


def test_a_context_that_does_not_fit_is_told_in_a_sentence():
    model = tiny()
    reader = LogitReader(model)
    text = scored_text("prose", prose(60), byte_tokenizer(), 50, None, None)
    with room_for(model, 0), pytest.raises(OutOfMemoryError, match=r"perplexity on prose .*--context"):
        read_windows(text, reader)
