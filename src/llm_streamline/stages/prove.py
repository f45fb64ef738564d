"""The stage that saves and proves: what was trained is put into the model, the checkpoint reloaded and compared."""

from pathlib import Path

from llm_streamline import ranks
from llm_streamline.checkpoint import prove_checkpoint, save_checkpoint
from llm_streamline.logs import get_logger
from llm_streamline.plan import Plan
from llm_streamline.proof import Proof
from llm_streamline.replacements.build import install_plan
from llm_streamline.replacements.ship import needs_code, shipped_files
from llm_streamline.sources import LoadedModel, load_model
from llm_streamline.stages.train import Trained
from llm_streamline.training.sharding import is_sharded

log = get_logger()


def install_and_prove(
    loaded: LoadedModel,
    plan: Plan,
    trained: Trained,
    out: Path,
    texts: list[str],
    accept_degenerate_text: bool = False,
) -> Proof:
    """Put what was trained into the model, save it, and show that the saved checkpoint behaves like it: rank 0 does.

    Raises:
        ProofError: it does not; degenerate text alone is let pass, with a warning, where that is accepted.
    """
    return ranks.from_main(lambda: _install_and_prove(loaded, plan, trained, out, texts, accept_degenerate_text))


def _install_and_prove(
    loaded: LoadedModel,
    plan: Plan,
    trained: Trained,
    out: Path,
    texts: list[str],
    accept_degenerate_text: bool,
) -> Proof:
    log.info("saving and proving the checkpoint")
    if is_sharded(loaded.model):  # of what lies on other ranks nothing can be saved: the weights are on the disk
        loaded = load_model(loaded.source, str(loaded.dtype).removeprefix("torch."), str(loaded.device))
    model = loaded.model
    install_plan(model, plan, trained.replacements, trained.healed)
    save_checkpoint(model, loaded.tokenizer, out, extra_files=shipped_files(model))
    proof = prove_checkpoint(out, model, loaded.tokenizer, against_text=texts, own_code=needs_code(model))
    proof.raise_if_failed(accept_degenerate_text)
    return proof
