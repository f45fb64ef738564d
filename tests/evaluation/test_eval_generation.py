import pytest
import torch
from folders import byte_tokenizer
from samples import tiny

from llm_streamline.errors import ConfigError, NumericsError
from llm_streamline.evaluation.generation import (
    _generate,
    distinct,
    ends_in_loop,
    generate_texts,
    judge_generation,
    main_script,
    repetition_rate,
)

PROMPTS = ("The city", "She opened the letter and", "def f(x):")


def written(model=None, **options):
    return generate_texts(model or tiny(), byte_tokenizer(), PROMPTS, **({"max_new_tokens": 12} | options))


def test_repetition_and_distinct():
    assert repetition_rate([1, 2, 3, 4, 5]) == 0
    assert repetition_rate([1] * 10) == pytest.approx(6 / 7)  # seven 4-grams, one kind
    assert repetition_rate([1, 2]) == 0
    assert distinct([1, 2, 1, 2, 1]) == 0.5
    assert distinct([7]) == 1


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([1, 2, 3] * 5, True),
        ([9, 8, 7, 6, 5] + [4] * 8, True),
        (list(range(30)), False),
        ([1, 2, 3, 1, 2, 3], False),  # twice is no loop
        ([*range(40), 1, 1, 1], False),  # 'no, no, no'
        ([*range(60), *([1, 2, 3, 4] * 3)], False),  # a fifth of the text
        ([], False),
    ],
)
def test_loops_at_the_end(tokens, loops):
    assert ends_in_loop(tokens) == loops


def test_scripts():
    assert main_script("The quick \u0444\u043e\u043a\u0441") == "LATIN"
    assert (
        main_script("\u041f\u0440\u0438\u0432\u0435\u0442 world \u043c\u0438\u0440\u043e\u0432\u043e\u0439")
        == "CYRILLIC"
    )
    assert main_script("\u4f60\u597d") == "CJK"
    assert main_script("12 + 3 = 15") == ""


def test_greedy_text_is_what_the_model_finds_likeliest_step_by_step():
    model, tokenizer = tiny(), byte_tokenizer()
    found = written(model, samples=0)
    for prompt, one in zip(PROMPTS, found.continuations, strict=True):
        ids = tokenizer.encode(prompt)
        start = len(ids)
        while len(ids) < start + 12 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ended = ids[-1] == tokenizer.eos_token_id
        assert one.text == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert (one.mode, one.ended, one.num_tokens) == ("greedy", ended, len(ids) - start - ended)


def test_padding_changes_nothing():
    model, tokenizer = tiny(), byte_tokenizer()
    encoded = [tokenizer.encode(prompt) for prompt in PROMPTS]
    greedy = {"ends": [2], "max_new_tokens": 10, "sampled": False, "temperature": 1.0, "top_p": 1.0}
    together = _generate(model, encoded, **greedy)
    for ids, row in zip(encoded, together, strict=True):
        alone = _generate(model, [ids], **greedy)[0]
        assert alone == row[: row.index(2) + 1 if 2 in row else None][:10]


def test_the_seed_decides_the_samples_and_nothing_outside_is_touched():
    before = torch.random.get_rng_state()
    found = written(samples=2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found == written(samples=2, seed=5)
    assert found != written(samples=2, seed=6)
    assert [one.mode for one in found.continuations[:3]] == ["greedy", "sampled", "sampled"]
    assert len(found.continuations) == 9


def test_the_models_own_generation_settings_are_not_used():
    plain, model = written(samples=1), tiny()
    model.generation_config.update(repetition_penalty=5.0, top_k=1, no_repeat_ngram_size=2, min_new_tokens=4)
    assert written(model, samples=1) == plain


def test_verdict_is_relative_to_the_original():
    sound = written(samples=1)
    assert judge_generation(sound, sound).ok
    looping = sound.model_copy(update={"loop_rate": 1.0, "repetition_rate": 0.9, "distinct_2": 0.01})
    verdict = judge_generation(
        sound.model_copy(update={"loop_rate": 0.0, "repetition_rate": 0.1, "distinct_2": 0.9}), looping
    )
    assert not verdict.ok
    assert len(verdict.reasons) == 3
    assert "100% of its texts end in a loop, of the original's 0%." in verdict.reasons
    assert judge_generation(looping, looping).ok  # the original does the same
    empty = sound.model_copy(update={"empty_rate": 1.0, "mean_tokens": 0.0})
    assert [reason[:4] for reason in judge_generation(sound.model_copy(update={"empty_rate": 0.0}), empty).reasons] == [
        "100%",
        "Its ",
    ]


def test_another_script_is_noticed():
    sound = written(samples=0)
    latin = tuple(one.model_copy(update={"script": "LATIN"}) for one in sound.continuations)
    cjk = tuple(one.model_copy(update={"script": "CJK"}) for one in sound.continuations)
    before, after = (sound.model_copy(update={"continuations": texts}) for texts in (latin, cjk))
    assert (
        "3 of its 3 texts are in another script than the original's (cjk)." in judge_generation(before, after).reasons
    )


def test_prompts_that_cannot_be():
    with pytest.raises(ConfigError, match="1 to 19 tokens"):
        generate_texts(tiny(), byte_tokenizer(), ["x" * 20], max_positions=20)
    with pytest.raises(ConfigError, match="1 to"):
        generate_texts(tiny(), byte_tokenizer(), [""])
    short = generate_texts(tiny(), byte_tokenizer(), ["x" * 15], max_positions=20, samples=0)
    assert short.max_new_tokens == 5


def test_not_a_number_is_told():
    model = tiny()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericsError, match="generation"):
        written(model, samples=1)
