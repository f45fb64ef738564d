"""When memory ends in an evaluation: the batch is halved, and the results are the same."""

import importlib.util

import numpy as np
import pytest
from folders import byte_tokenizer
from samples import prose, questions, tiny, write_rows
from scarcity import room_for

from llm_streamline.errors import OutOfMemoryError
from llm_streamline.evaluation import latency, subject
from llm_streamline.evaluation.choices import score_task
from llm_streamline.evaluation.generation import generate_texts
from llm_streamline.evaluation.items import read_choice_file
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.evaluation.perplexity import read_windows, scored_text
from llm_streamline.evaluation.speed import SpeedSetup
from llm_streamline.evaluation.tasks import run_choice_task

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="extra `tasks` not installed")


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


PROMPTS = ("The city", "The farm", "One ship", "Her lamp")  # of one length: all in one batch


def written(model, prompts=PROMPTS, **options):
    return [
        one.text for one in generate_texts(model, byte_tokenizer(), prompts, max_new_tokens=8, **options).continuations
    ]


def test_the_same_is_written_by_fewer_prompts_at_once(caplog):
    model = tiny()
    truth = written(model, samples=0)
    with room_for(model, 1) as given:
        assert written(model, samples=0) == truth
    assert given[:3] == [4, 2, 1]
    assert "out of memory in generation with 4 prompts at once; going on with 2" in caplog.text


def test_an_attempt_that_failed_takes_no_draws():
    """Whether memory ends at once or after some tokens: what is drawn afterwards is the same."""
    model, found = tiny(), []
    for after in (8, 12):  # the greedy turn is eight calls
        with room_for(model, 2, after=after):
            found.append(written(model, samples=1))
    assert found[0] == found[1]
    assert found[0] != written(model, samples=1)  # two at a time draw otherwise than four


def test_prompts_of_unlike_lengths_that_do_not_fit_together_are_written_one_by_one():
    model, prompts = tiny(), ("The city", "She opened the letter and")
    with room_for(model, 1) as given:
        found = written(model, prompts, samples=0)
    assert set(given[3:]) == {1}
    assert found == written(model, prompts, samples=0)


def test_a_prompt_that_does_not_fit_is_told_in_a_sentence():
    model = tiny()
    with room_for(model, 0), pytest.raises(OutOfMemoryError, match=r"generation .*1 prompts .*max_new_tokens") as told:
        written(model)
    assert "\n" not in str(told.value)


@needs_lm_eval
def test_the_harness_starts_over_with_fewer_rows(tmp_path, caplog):
    task, model = read_choice_file(write_rows(tmp_path / "quiz.jsonl", questions())), tiny()
    truth = run_choice_task(model, byte_tokenizer(), task, batch_size=2)
    with room_for(model, 3, after=1) as given:  # the first rows fit
        found = run_choice_task(model, byte_tokenizer(), task, batch_size=8)
    assert given[0] == 8
    assert given[-1] <= 2
    assert found.result.acc == truth.result.acc
    for mine, expected in zip(found.samples, truth.samples, strict=True):
        assert mine["filtered_resps"][0][0] == pytest.approx(expected["filtered_resps"][0][0], abs=1e-4)
    assert "with 8 rows at once; starting over with 4" in caplog.text
    with room_for(model, 0), pytest.raises(OutOfMemoryError, match=r"out of memory in the tasks .*--num-fewshot"):
        run_choice_task(model, byte_tokenizer(), task, batch_size=2)


def test_what_runs_alone_is_told_in_a_sentence():
    model, setup = tiny(), SpeedSetup(batch_size=4, prompt_tokens=8, new_tokens=2, rounds=1)
    with room_for(model, 3), pytest.raises(OutOfMemoryError, match=r"the speed measurement .*speed_batch_size"):
        subject._timed([model], setup)
    with room_for(model, 0), pytest.raises(OutOfMemoryError, match=r"measuring latency .*--layers"):
        latency.latency_ratio(model, 4)
