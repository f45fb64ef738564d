import pytest
import torch
from folders import byte_tokenizer
from samples import pairs, questions, tiny, two_contexts, write_rows
from tiny import TINY_ROWS, tiny_model

from llm_streamline.errors import NumericsError, TaskError
from llm_streamline.evaluation.choices import Choice, _packed_inputs, _packed_row, can_pack, encode_items, score_task
from llm_streamline.evaluation.items import read_choice_file
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.evaluation.outcome import item_rows, task_result

# families whose states depend on more than what a mask can say: every choice must get a row of its own
NOT_PACKABLE = {"mamba", "lfm2", "bloom", "bloom_post_norm", "falcon_alibi"}
# with something of their own in masks, positions or after the head; the other families are of the same kinds
QUICK = {"llama", "gemma2", "gpt2", "opt_post_norm", "cohere", "granite", "mamba", "falcon_alibi", "deepseek_v3"}
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TINY_ROWS)]


@pytest.fixture(params=[questions, two_contexts, pairs], ids=["contexts", "two contexts", "no context"])
def task(request, tmp_path):
    return read_choice_file(write_rows(tmp_path / "quiz.jsonl", request.param()))


def one_by_one(model, tokenizer, task):
    """The definition: each choice alone through the model's own forward."""
    found = []
    for item in task.items:
        sums = []
        for context, choice in zip(item.contexts, item.continuations, strict=True):
            head = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
            tokens = head + tokenizer.encode(choice)
            log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
            sums.append(sum(float(log_probs[i - 1, tokens[i]]) for i in range(len(head), len(tokens))))
        found.append(sums)
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_scores_are_those_of_each_choice_alone(task, pack):
    model, tokenizer = tiny(), byte_tokenizer()
    reader = LogitReader(model)
    truth = one_by_one(model, tokenizer, task)
    for limits in ({"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 10_000}):
        scored = score_task(task, reader, tokenizer, pack=pack, **limits)
        for one, expected in zip(scored, truth, strict=True):
            assert one.loglikelihoods == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_is_used_only_where_it_is_exact(name):
    reader = LogitReader(tiny_model(name))
    if not can_pack(reader, 6):  # windows of attention are 8 tokens here: most families that have one end here
        return
    assert name not in NOT_PACKABLE
    prefix, rests = (5, 6, 7), ((8, 9), (10, 11, 12), (8, 13))
    row = _packed_row(0, [Choice((*prefix, *rest, 0), 1) for rest in rests])
    states = reader.states(**_packed_inputs([row], reader))[0]
    for (place, _, number), rest in zip(row.scored, rests, strict=True):
        alone = reader.states(torch.tensor([prefix + rest]))[0, -1]
        torch.testing.assert_close(states[place], alone, atol=2e-3, rtol=1e-3, msg=f"choice {number}")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt", "qwen3", "olmo2"])
def test_packing_is_used_where_it_can_be_and_windows_bound_it(name):
    settings = {"sliding_window": 40} if "sliding_window" in TINY_ROWS[name].config else {}
    reader = LogitReader(tiny_model(name, **settings))
    assert can_pack(reader, 40)
    assert can_pack(reader, 41) == (not settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_in_pieces_gives_the_models_own_logits(name, monkeypatch):
    monkeypatch.setattr("llm_streamline.evaluation.logits._CHUNK_LOGITS", 500)  # three positions at once
    model = tiny_model(name)
    reader = LogitReader(model)
    ids = torch.randint(3, 150, (2, 10), generator=torch.Generator().manual_seed(0))
    states = reader.states(ids)
    logits = torch.cat([piece for _, piece in reader.chunks(states.flatten(0, 1))])
    torch.testing.assert_close(logits, model(ids).logits.flatten(0, 1).float())
    assert reader._after is not None  # every family here is understood; others would work, with more memory


def test_a_head_that_is_not_understood_gives_its_logits_itself():
    model = tiny()
    plain = LogitReader(model)
    forward = model.forward

    def twisted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits**3 / 10
        return output

    model.forward = twisted
    reader = LogitReader(model)
    ids = torch.arange(3, 20)[None]
    expected = (plain.logits(plain.states(ids)[0]) ** 3 / 10).log_softmax(dim=-1)[range(16), ids[0, 1:]]
    torch.testing.assert_close(reader.log_probs(reader.states(ids)[0, :-1], ids[0, 1:]), expected)


def test_long_contexts_lose_their_beginning(tmp_path):
    rows = [questions(1)[0] | {"context": "x" * 100}, questions(2)[1]]
    task = read_choice_file(write_rows(tmp_path / "long.jsonl", rows))
    tokenizer = byte_tokenizer()
    for choices in encode_items(task.items, tokenizer, 60):
        assert all(len(choice.inputs) <= 60 for choice in choices)
    whole = score_task(task, LogitReader(tiny()), tokenizer, max_length=60)
    assert len(whole) == 2
    with pytest.raises(TaskError, match=r"'q0': a choice has \d+ tokens after its context"):
        score_task(task, LogitReader(tiny()), tokenizer, max_length=3)


def test_accuracies_and_logs(tmp_path):
    task = read_choice_file(write_rows(tmp_path / "pairs.jsonl", pairs()))
    scored = score_task(task, LogitReader(tiny()), byte_tokenizer())
    result, rows = task_result(task, scored), item_rows(task, scored)
    right = [row["correct"] for row in rows]
    assert result.acc == sum(right) / 4
    assert result.acc_stderr == pytest.approx((result.acc * (1 - result.acc) / 3) ** 0.5)
    assert result.chance == 0.5
    assert result.subtasks == {"even": sum(right[::2]) / 2, "odd": sum(right[1::2]) / 2}
    first = rows[0]
    assert first["prediction"] == (0 if first["loglikelihood"][0] >= first["loglikelihood"][1] else 1)
    assert first["chars"] == [len(choice) - 1 for choice in pairs()[0]["choices"]]
    assert first["tokens"] == [length + 1 for length in first["chars"]]  # a token per byte, the space too
    norms = [ll / chars for ll, chars in zip(first["loglikelihood"], first["chars"], strict=True)]
    assert first["prediction_norm"] == norms.index(max(norms))


def test_no_length_norm_where_the_contexts_differ(tmp_path):
    task = read_choice_file(write_rows(tmp_path / "wino.jsonl", two_contexts()))
    result = task_result(task, score_task(task, LogitReader(tiny()), byte_tokenizer()))
    assert result.acc is not None
    assert result.acc_norm is None


def test_a_model_that_yields_nan_is_named(tmp_path):
    task = read_choice_file(write_rows(tmp_path / "quiz.jsonl", questions()))
    model = tiny()
    reader = LogitReader(model)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericsError, match="task quiz, question 'q"):
        score_task(task, reader, byte_tokenizer())
    with pytest.raises(NumericsError, match="a text of 5 tokens"):
        LogitReader(model)
