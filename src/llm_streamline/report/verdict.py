"""Was quality kept? A judgement by thresholds that stand beside it; the whole is only as good as its worst part."""

import math
from dataclasses import dataclass
from typing import Literal

from llm_streamline.report.accuracy import mean_accuracies
from llm_streamline.report.figures import Z
from llm_streamline.report.pair import Pair
from llm_streamline.report.words import decimal, listed, percent, points, times

Level = Literal["kept", "partly", "lost", "unclear"]
# (at least this is "kept", at least this is "partly", anything else is "lost"); for perplexity: at most
PERPLEXITY_RATIO = (1.10, 2.0)
ACCURACY_KEPT = (0.95, 0.80)  # share of the accuracy above chance
STABILITY = (0.90, 0.75)
ORDER: tuple[Level, ...] = ("kept", "unclear", "partly", "lost")
HEADLINES = {
    "kept": "Quality was kept",
    "unclear": "No loss was shown, but too little was measured to be sure",
    "partly": "Quality was partly lost",
    "lost": "Much quality was lost",
}
WORDS = {"kept": "kept", "unclear": "unclear", "partly": "partly lost", "lost": "lost"}


@dataclass(frozen=True)
class Part:
    """One thing that was judged."""

    name: str
    level: Level
    finding: str
    rule: str
    figure: str = ""  # the number alone, for a card

    @property
    def word(self) -> str:
        """The level in words."""
        return WORDS[self.level]


@dataclass(frozen=True)
class Verdict:
    """All parts, and the worst of them."""

    level: Level
    parts: tuple[Part, ...]

    @property
    def word(self) -> str:
        """The level in words."""
        return WORDS[self.level]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        return HEADLINES[self.level]

    @property
    def reason(self) -> str:
        """Which parts decided, as half a sentence; empty when everything was kept."""
        worst = [part.name.lower() for part in self.parts if part.level == self.level]
        return "" if self.level == "kept" else listed(worst)


def judge(pair: Pair) -> Verdict | None:
    """Judge a model against its original; None when the two were not compared."""
    if pair.both is None or pair.before is None:
        return None
    parts = tuple(part for part in (_perplexity(pair), _accuracy(pair), _stability(pair), _writing(pair)) if part)
    if not parts:
        return None
    return Verdict(max((part.level for part in parts), key=ORDER.index), parts)


def _grade(value: float, bounds: tuple[float, float]) -> Level:
    return "kept" if value >= bounds[0] else "partly" if value >= bounds[1] else "lost"


def _perplexity(pair: Pair) -> Part | None:
    if not pair.both.perplexity:
        return None
    ratio = math.exp(sum(p.nll_difference for p in pair.both.perplexity) / len(pair.both.perplexity))
    kept, partly = PERPLEXITY_RATIO
    level: Level = "kept" if ratio <= kept else "partly" if ratio <= partly else "lost"
    texts = len(pair.both.perplexity)
    over = "" if texts == 1 else f" (geometric mean of {texts} texts)"
    return Part(
        "Language modelling",
        level,
        f"perplexity is {times(ratio)} the original's{over}",
        f"kept up to {times(kept)}, partly lost up to {times(partly)}",
    )


def _accuracy(pair: Pair) -> Part | None:
    means = mean_accuracies(pair)
    if means is None:
        return None
    before, after, chance, stderr = means
    room = before - chance
    finding = f"mean accuracy {percent(before)} → {percent(after)} ({points(after - before)}"
    finding += ")" if stderr is None else f" ± {100 * Z * stderr:.1f})"
    bounds = (percent(ACCURACY_KEPT[0], 0), percent(ACCURACY_KEPT[1], 0))
    rule = f"kept from {bounds[0]} of the accuracy above chance, partly lost from {bounds[1]}"
    if room <= 0:
        return Part("Answers", "unclear", finding + "; the original itself is not better than chance", rule)
    kept = (after - chance) / room
    level = _grade(kept, ACCURACY_KEPT)
    finding += f", {percent(max(kept, 0), 0)} of what it had above chance"
    if level == "kept" and stderr is not None and Z * stderr > (1 - ACCURACY_KEPT[1]) * room:
        return Part("Answers", "unclear", finding + "; too few questions to see a loss that matters", rule)
    return Part("Answers", level, finding, rule)


def _stability(pair: Pair) -> Part | None:
    found = pair.both.stability
    if not found:
        return None
    sigma = "nll" if any(s.sigma == "nll" for s in found) else "ppl"
    averages = [a for a in pair.both.stability_averages if a.name == "all" and a.sigma == sigma]
    own = [s for s in found if s.sigma == sigma]
    value = averages[0].stability if averages else sum(s.stability for s in own) / len(own)
    match = averages[0].match_rate if averages else sum(s.match_rate for s in own) / len(own)
    return Part(
        "Stability",
        _grade(value, STABILITY),
        f"stability {percent(value)} (weighted by {sigma.upper()}), {percent(match)} of answers kept their correctness",
        f"kept from {percent(STABILITY[0], 0)}, partly lost from {percent(STABILITY[1], 0)}",
        percent(value),
    )


def _writing(pair: Pair) -> Part | None:
    found = pair.both.generation
    if found is None:
        return None
    rule = (
        "lost when, against the original, loops rise by a third of the texts, repeated 4-grams by 30 points or empty "
        "texts by 15, different 2-grams halve, texts are cut to a quarter or a quarter of them change script"
    )
    if found.ok:
        before, after = pair.before.generation, pair.after.generation
        rates = ""
        if before is not None and after is not None:
            rates = f": repeated 4-grams {percent(before.repetition_rate)} → {percent(after.repetition_rate)}, "
            rates += f"different 2-grams {percent(before.distinct_2)} → {percent(after.distinct_2)}"
        return Part("Writing", "kept", f"not degenerate where the original's is not{rates}", rule)
    return Part(
        "Writing", "lost", "; ".join(reason.rstrip(".") for reason in found.reasons) or "the text is degenerate", rule
    )


def thresholds() -> str:
    """The rules in one sentence, for readers of the verdict."""
    return (
        f"Perplexity: kept up to {times(PERPLEXITY_RATIO[0])}, partly lost up to {times(PERPLEXITY_RATIO[1])}. "
        f"Accuracy above chance: {percent(ACCURACY_KEPT[0], 0)} and {percent(ACCURACY_KEPT[1], 0)}. "
        f"Stability: {decimal(100 * STABILITY[0], 0)} % and {decimal(100 * STABILITY[1], 0)} %. "
        "The verdict is the worst of its parts; the thresholds are ours."
    )
