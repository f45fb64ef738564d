"""The stage of text: the recipe's sources become windows of tokens, one set for each role."""

from itertools import combinations
from pathlib import Path

from llm_streamline import ranks
from llm_streamline.config import Recipe
from llm_streamline.data.prepare import WindowNeed, prepare_windows
from llm_streamline.data.windows import Windows, check_disjoint
from llm_streamline.logs import get_logger
from llm_streamline.memory_limits import free_memory
from llm_streamline.sources import LoadedModel

log = get_logger()


def make_windows(
    loaded: LoadedModel, recipe: Recipe, roles: tuple[str, ...], folder: Path | None
) -> dict[str, Windows]:
    """Make the windows of some roles; kept in `folder` and used again when nothing they depend on has changed."""
    seq_len = recipe.text.seq_len
    budgets = {
        "calibration": recipe.calibration.tokens,
        "train": max(recipe.training.tokens, recipe.replacement.fit_tokens),
        "validation": max(recipe.training.validation_tokens, recipe.selection.verify_tokens),
        "evaluation": min(recipe.evaluation.tokens or 16_384, 16_384),
    }
    needs = {role: WindowNeed(max(budgets[role], seq_len), seq_len) for role in roles}

    def prepare() -> dict[str, Windows] | None:
        made = prepare_windows(
            recipe.text.sources, loaded.tokenizer, needs, seed=recipe.seed, folder=folder, model=loaded.model
        )
        for first, second in combinations(made.values(), 2):
            check_disjoint(first, second)
        kept.append(made)
        free_memory()  # reading and cutting text leaves much freed that the allocator would hold on to
        return made if folder is None else None  # what lies in the folder need not be sent

    kept: list[dict[str, Windows]] = []
    sent = ranks.from_main(prepare)
    windows = kept[0] if kept else sent or {role: Windows.load(folder / role) for role in roles}
    for role, found in windows.items():
        log.info("%s text: %s tokens in %d windows", role, f"{found.num_tokens:,}", len(found))
    return windows
