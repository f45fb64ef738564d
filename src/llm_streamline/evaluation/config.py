"""What `evaluate` measures and how. Every field is an option of the command and a key of a recipe. No torch here."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llm_streamline.schema import FrozenModel


class EvaluationConfig(FrozenModel):
    """Settings of an evaluation. Nothing is measured that is not asked for, but sizes."""

    perplexity: tuple[str, ...] = Field((), description="texts to take perplexity (and divergence) on: paths or specs")
    context: PositiveInt | None = Field(
        None,
        description="tokens in a window of perplexity, BOS included; none: 1024, or the model's positions if fewer",
    )
    stride: PositiveInt | None = Field(None, description="tokens between window starts; none: windows do not overlap")
    tokens: PositiveInt | None = Field(None, description="tokens of each text at most; none: all of it")
    divergence: bool = Field(True, description="KL and top-1 agreement with the original on the same windows")

    tasks: tuple[str, ...] = Field(
        (),
        description="multiple-choice files, `continuation[:TEXT]`, or names, groups, YAML folders of lm-eval",
    )
    scorer: Literal["auto", "light", "lm-eval"] = Field(
        "auto", description="who scores local multiple-choice files; auto is our light scorer"
    )
    limit: PositiveInt | None = Field(None, description="items of each task at most, from the first")
    num_fewshot: int = Field(0, ge=0, description="worked examples before each question; 0: as a task of lm-eval says")
    batch_size: PositiveInt | None = Field(None, description="sequences in a forward pass; none: by token budget")
    batch_tokens: PositiveInt = Field(4096, description="token budget of a forward pass when batch_size is none")

    sigma: tuple[Literal["nll", "ppl"], ...] = Field(
        ("nll", "ppl"), description="spreads that stability is weighted by; the first is the one to quote"
    )
    bootstrap: int = Field(1000, ge=0, description="bootstrap samples of the intervals; 0: no intervals")

    generation: bool = Field(True, description="let the models write, and judge the text relative to the original's")
    prompts: tuple[str, ...] = Field((), description="prompts of the generation check; none: six fixed ones")
    max_new_tokens: PositiveInt = Field(64, description="tokens written for each prompt")
    samples: int = Field(1, ge=0, description="sampled continuations of each prompt, beside the greedy one")
    temperature: PositiveFloat = Field(0.8, description="of sampled continuations")
    top_p: float = Field(0.95, gt=0, le=1, description="of sampled continuations")

    speed: bool = Field(True, description="measure prefill and decode, in turns with the original")
    speed_batch_size: PositiveInt = Field(1, description="sequences in the speed measurement")
    speed_prompt_tokens: PositiveInt | None = Field(
        None, description="prompt length in the speed measurement; none: 256, or what the model's positions leave"
    )
    speed_new_tokens: PositiveInt = Field(16, description="decode steps in the speed measurement")
    speed_rounds: PositiveInt = Field(5, description="rounds of the speed measurement; the median is reported")

    gate: bool = Field(False, description="fail the command when the generation verdict is bad")
    seed: int = Field(0, ge=0, description="of the continuation task, sampling, bootstrap and random prompts")
