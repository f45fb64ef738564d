"""What can be done to a model that is never loaded: read slices, preview a plan, cut its files and prove the result."""

from pathlib import Path

from llm_streamline.arch import check_architecture
from llm_streamline.config import Recipe
from llm_streamline.errors import ConfigError
from llm_streamline.estimates.preview import preview_plan
from llm_streamline.evaluation.size import model_size
from llm_streamline.export.reference import cut_original
from llm_streamline.export.slices import from_slices
from llm_streamline.export.stream import check_streamable, stream_plan
from llm_streamline.logs import get_logger
from llm_streamline.output import check_output, remove_manifest
from llm_streamline.plan import Plan
from llm_streamline.proof import Proof, prove_checkpoint
from llm_streamline.replacements.ship import needs_code
from llm_streamline.report.tables import Preview
from llm_streamline.runs.folder import finish, opened, protected
from llm_streamline.runtime import fits_in_memory, pick_dtype
from llm_streamline.runtimes import plan_warnings, with_warnings
from llm_streamline.sources import (
    ModelSource,
    load_config,
    load_skeleton,
    load_tokenizer,
    model_folder,
    resolve_model,
    stated_dtype,
)
from llm_streamline.sources.weights import read_weights
from llm_streamline.stages.original import facts_of

log = get_logger()


def read_slices(path: str | Path, source: ModelSource) -> Plan:
    """The plan that a file of mergekit's slices describes for a model.

    Raises:
        PlanError: the file says something else than which layers of one model stay.
        ArchitectureError: this family is not edited.
    """
    config = load_config(source)
    check_architecture(config)
    return with_warnings(config, from_slices(path, facts_of(source, load_skeleton(source))))


def preview_without_weights(source: ModelSource, plan: Plan, dtype: str = "auto") -> Preview:
    """Sizes and expected speed of a plan that trains nothing.

    Args:
        source: from `resolve_model`.
        plan: with edits of kind remove only.
        dtype: of the weights; auto is the checkpoint's own.
    """
    skeleton = load_skeleton(source)
    skeleton.to(pick_dtype(dtype, stated_dtype(skeleton.config, read_weights(model_folder(source)))))
    return preview_plan(skeleton, model_size(skeleton), plan, Recipe().training, seq_len=1, layer_seconds_per_token=0.0)


def apply_on_files(
    plan: Plan, model: str, out: str | Path, recipe: Recipe, *, fresh: bool = False
) -> tuple[Path, Preview, Proof]:
    """Cut a model's files tensor by tensor, then prove the result against the original, read one layer at a time.

    Args:
        plan: with edits of kind remove only.
        model: folder, Hub id, .gguf file or `demo`.
        out: output folder.
        recipe: dtype; the work is done on the CPU.
        fresh: start over.

    Raises:
        PlanError: the plan replaces layers, or was made for another model.
        ConfigError: a device other than the CPU is asked for.
        ProofError: the saved checkpoint does not behave like the original without those layers.
    """
    check_streamable(plan)
    if recipe.device not in ("auto", "cpu"):
        raise ConfigError(f"--stream cuts files and needs no device; got {recipe.device}: leave --device out")
    source = resolve_model(model)
    check_architecture(load_config(source))
    check_output(out, source=protected(source))
    skeleton = load_skeleton(source)
    plan.check_fits(facts_of(source, skeleton))
    weights = read_weights(model_folder(source))
    dtype = pick_dtype(recipe.dtype, stated_dtype(skeleton.config, weights))
    size = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    on_disk = not fits_in_memory(size)
    del skeleton
    for warning in plan_warnings(load_config(source), plan):
        log.warning("%s", warning)
    preview = preview_without_weights(source, plan, recipe.dtype)
    tokenizer = load_tokenizer(source)
    with opened(out, fresh, source) as run:
        with run.taken_back_if_refused(), cut_original(source, plan, dtype, run.folder) as reference:
            remove_manifest(run.out)
            log.info("cutting the files of %s", source.spec)
            stream_plan(source, plan, run.out, dtype=dtype)
            log.info("proving the checkpoint")
            proof = prove_checkpoint(
                run.out, reference, tokenizer, own_code=needs_code(reference), layers_on_disk=on_disk
            )
        proof.raise_if_failed()
        finish(run.out, plan, recipe, source, {"stage": "apply", "streamed": True})
    return run.out, preview, proof
