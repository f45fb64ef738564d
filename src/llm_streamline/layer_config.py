"""Per-layer settings of a config, cut and reordered together with the layers they belong to.

A Hugging Face config says what each layer is in about twenty ways: lists with one entry a layer, lists of layer
indices, counts, thresholds and "every n-th layer" rules. `edited_config` turns all of them into what the edited model
needs, makes rules explicit that counted layers, and refuses what cannot be expressed. L layers before, N after.
"""

import copy
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from llm_streamline.errors import ArchitectureError
from llm_streamline.families import FAMILIES
from llm_streamline.logs import get_logger

# Names of the number of layers; those a config really has are all kept equal.
COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# One entry a layer.
LIST_KEYS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "no_rope_layers",
    "attention_layers",
    "sliding_window_list",
)
# Indices of the layers that have a property.
INDEX_KEYS = (
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "global_attn_idxs",
    "full_attention_layers",
    "cross_attention_layers",
)
# Settings of single layers in a dictionary, by index.
CODE_KEY = "streamline_mlp_layers"  # ours: the MLP that an earlier run put in a layer's place
MAP_KEY = "streamline_maps"  # ours: kind of the map behind a layer
INDEX_DICT_KEYS = (CODE_KEY, MAP_KEY)
# Lists whose length may be L by chance.
NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "keys_to_ignore_at_inference")

Rule = Callable[[Any, Any, Sequence[int]], None]  # (old text config, new text config, sources): edits the new one


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of `config` that describes the language model: `config` itself, or what a multimodal wrapper nests."""
    return config.get_text_config(decoder=True)


def mlp_width(config: PreTrainedConfig) -> int | None:
    """Width of the dense MLP's inner state, in channels; None when the family has no dense MLP or no row."""
    text = text_config(config)
    family = FAMILIES.get(text.model_type)
    for key in family.width if family else ():
        if getattr(text, key, None) is not None:
            return int(getattr(text, key))
    return 4 * text.hidden_size if family and family.width else None  # the default of GPT-2 and its kin


def layer_kinds(config: PreTrainedConfig) -> list[tuple[str, ...]]:
    """What the config says each layer is, beside its number: equal entries are layers of one kind."""
    text = text_config(config)
    num_layers, settings = text.num_hidden_layers, vars(text)
    lists = [settings[key] for key in LIST_KEYS if isinstance(settings.get(key), (list, tuple))]
    indices = [settings[key] for key in INDEX_KEYS if isinstance(settings.get(key), (list, tuple))]
    return [
        (*(str(values[i]) for values in lists if len(values) >= num_layers), *(str(i in found) for found in indices))
        for i in range(num_layers)
    ]


def edited_config(config: PreTrainedConfig, sources: Sequence[int]) -> PreTrainedConfig:
    """The config of the model whose layer i is a copy of layer `sources[i]` of the model of `config`.

    Args:
        config: of the original model, possibly a multimodal wrapper; not changed.
        sources: N original layer indices, each in [0, L); an index may appear twice or not at all.

    Returns:
        A new config that survives saving and loading unchanged.

    Raises:
        ArchitectureError: if the settings of the chosen layers cannot be expressed; the message says which.
    """
    old = text_config(config)
    check_sources(sources, old.num_hidden_layers)
    new_root = copy.deepcopy(config)
    new = text_config(new_root)
    if list(sources) != list(range(old.num_hidden_layers)):
        _check_cache_kinds(old, sources)
        _check_quantization(config)
        for rule in _RULES:
            rule(old, new, sources)
    _check_round_trip(config, new_root)
    return new_root


def check_sources(sources: Sequence[int], num_layers: int) -> None:
    """Raise ArchitectureError unless `sources` names at least one layer and only layers in [0, num_layers)."""
    if not sources:
        raise ArchitectureError("no layer would be left; keep at least one")
    wrong = [source for source in sources if not 0 <= source < num_layers]
    if wrong:
        raise ArchitectureError(f"layer {wrong[0]} does not exist: the model has layers 0 to {num_layers - 1}")


def _counts(old, new, sources):
    for key in COUNT_KEYS:
        if vars(old).get(key) == old.num_hidden_layers:
            setattr(new, key, len(sources))


def _lists(old, new, sources):
    num_layers = old.num_hidden_layers
    for key, value in vars(old).items():
        if not isinstance(value, (list, tuple)) or key in NOT_PER_LAYER or key in INDEX_KEYS:
            continue
        if key in LIST_KEYS:
            if len(value) < num_layers:
                raise ArchitectureError(
                    f"config.{key} has {len(value)} entries for {num_layers} layers; the config contradicts itself"
                )
        elif len(value) == num_layers and num_layers > 1:
            _tell_once(key)
        else:
            continue
        setattr(new, key, type(value)(value[source] for source in sources))


@cache
def _tell_once(key: str) -> None:  # a search edits the same config hundreds of times
    get_logger().warning("config.%s has one entry a layer and is cut with the layers", key)


def _index_lists(old, new, sources):
    for key in INDEX_KEYS:
        value = vars(old).get(key)
        if isinstance(value, (list, tuple)):
            setattr(new, key, type(value)(place for place, source in enumerate(sources) if source in value))


def _index_dicts(old, new, sources):
    for key in INDEX_DICT_KEYS:
        value = vars(old).get(key)
        if isinstance(value, dict):
            kept = {str(p): copy.deepcopy(value[str(s)]) for p, s in enumerate(sources) if str(s) in value}
            setattr(new, key, kept)
            if not kept:
                delattr(new, key)


def _sparse_step(old, new, sources):
    """Every n-th layer is a mixture of experts (Qwen2-MoE, Qwen3-MoE): say it by index, because deleting shifts it."""
    step = vars(old).get("decoder_sparse_step")
    if step is None or "mlp_only_layers" not in vars(old):
        return
    dense = {i for i in range(old.num_hidden_layers) if i in (old.mlp_only_layers or ()) or (i + 1) % step != 0}
    new.decoder_sparse_step = 1
    new.mlp_only_layers = [place for place, source in enumerate(sources) if source in dense]


def _first_dense(old, new, sources):
    """The first k layers are dense (DeepSeek-V3 and kin): the dense ones that stay must still come first."""
    first = vars(old).get("first_k_dense_replace")
    if first is None or vars(old).get("mlp_layer_types") is not None:  # the list wins
        return
    dense = [source < first for source in sources]
    if dense != sorted(dense, reverse=True):
        raise ArchitectureError(
            f"dense layers (the first {first}) would stand behind mixture-of-experts layers, which "
            "config.first_k_dense_replace cannot say; keep the dense layers first"
        )
    new.first_k_dense_replace = sum(dense)


def _sparse_range(old, new, sources):
    """Experts in every n-th layer between two bounds (ERNIE 4.5 MoE): look for bounds that say the same."""
    if "moe_layer_start_index" not in vars(old):
        return

    def sparse(index, start, end, interval):
        return (index + 1) % interval == 0 and start <= index <= end

    rule = (old.moe_layer_start_index, old.moe_layer_end_index, old.moe_layer_interval)
    wanted = [sparse(source, *rule) for source in sources]
    places = [place for place, is_sparse in enumerate(wanted) if is_sparse] or [len(sources)]
    for interval in (old.moe_layer_interval, 1):
        if wanted == [sparse(place, places[0], places[-1], interval) for place in range(len(sources))]:
            new.moe_layer_start_index, new.moe_layer_end_index = places[0], places[-1]
            new.moe_layer_interval = interval
            return
    raise ArchitectureError(
        "the mixture-of-experts layers kept are neither one run nor every n-th layer, and the config "
        "(moe_layer_start_index, moe_layer_end_index, moe_layer_interval) can say nothing else"
    )


def _extra_heads(old, new, sources):
    """Multi-token prediction layers stand behind the last layer, in the checkpoint only: they do not fit a cut."""
    for key in ("num_mtp_layers", "num_nextn_predict_layers"):
        if vars(old).get(key):
            setattr(new, key, 0)


def _attention_types(old, new, sources):
    """GPT-Neo stores [[kinds], repeats] and derives one kind a layer from it."""
    if isinstance(vars(old).get("attention_types"), list) and isinstance(vars(old).get("attention_layers"), list):
        new.attention_types = [[[old.attention_layers[source]], 1] for source in sources]


def _per_layer_config(old, new, sources):
    """Heterogeneous models (one dictionary of overrides a layer, keyed by index)."""
    if not getattr(old, "is_heterogeneous", False):
        return
    overrides = old._heterogeneity_spec.per_layer_overrides
    new.per_layer_config = None
    kept = {place: copy.deepcopy(overrides[source]) for place, source in enumerate(sources) if source in overrides}
    if kept:
        new.per_layer_config = kept


def _modulo_rules(old, new, sources):
    """Rules that count layers and have no explicit form: only a cut that leaves their pattern in place will do."""
    for period_key, offset_key in _MODULO_KEYS:
        period = vars(old).get(period_key)
        if not period or period == 1:
            continue
        offset = vars(old).get(offset_key) or 0
        if any((source - offset) % period != (place - offset) % period for place, source in enumerate(sources)):
            raise ArchitectureError(
                f"config.{period_key} = {period} picks layers by counting, and has no explicit form; "
                f"remove whole groups of {period} layers"
            )


_MODULO_KEYS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
    ("global_attn_every_n_layers", ""),
    ("cross_attention_interval", ""),
)
_RULES: tuple[Rule, ...] = (
    _counts,
    _lists,
    _index_lists,
    _index_dicts,
    _sparse_step,
    _first_dense,
    _sparse_range,
    _extra_heads,
    _attention_types,
    _per_layer_config,
    _modulo_rules,
)


def _check_cache_kinds(old, sources):
    family = FAMILIES.get(old.model_type)
    kinds = getattr(old, "layer_types", None)
    if family is None or not family.cache_kinds or kinds is None:
        return
    if not any(kinds[source] in family.cache_kinds for source in sources):
        raise ArchitectureError(
            f"no {' or '.join(family.cache_kinds)} layer would be left in this {old.model_type} model, and generation "
            "reads the length of the text from such a layer's cache; keep at least one"
        )


def _check_quantization(config) -> None:
    """Quantisation settings may name modules by their layer's number; after a cut they would mean other layers."""
    settings = getattr(config, "quantization_config", None)
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    named = re.search(r"\b(layers|h|blocks)\.\d+\b", str(settings or ""))
    if named:
        raise ArchitectureError(
            f"config.quantization_config names modules by layer number ({named.group()}); "
            "cut the model before it is quantised"
        )


def _check_round_trip(old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Raise ArchitectureError when saving and loading would change the config: some rule regenerated what we cut.

    What changes in the original config too is no doing of ours.
    """
    try:
        changed = _changed_by_loading(new)
    except (ValueError, TypeError, KeyError, IndexError) as error:  # transformers' own validation
        raise ArchitectureError(f"transformers refuses the edited {new.model_type} config: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("huggingface_hub"):  # StrictDataclassError wraps what validators raise
            raise ArchitectureError(f"transformers refuses the edited {new.model_type} config: {error}") from error
        raise
    if changed:
        known = _changed_by_loading(old)
        changed = [key for key in changed if key not in known]
    if changed:
        raise ArchitectureError(
            f"config.{changed[0]} of this {new.model_type} model comes back changed after saving and loading; "
            "the edit cannot be expressed in its config"
        )


def _changed_by_loading(config: PreTrainedConfig) -> list[str]:
    saved = config.to_dict()
    return _differing_keys(saved, type(config).from_dict(copy.deepcopy(saved)).to_dict())


def _differing_keys(saved: dict, loaded: dict, prefix: str = "") -> list[str]:
    names = []
    for key in sorted(saved.keys() | loaded.keys()):
        if key in ("transformers_version", "_name_or_path"):
            continue
        left, right = saved.get(key), loaded.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += _differing_keys(left, right, f"{prefix}{key}.")
        elif left != right and not (isinstance(left, (list, tuple)) and list(left) == list(right or ())):
            names.append(prefix + key)
    return names
