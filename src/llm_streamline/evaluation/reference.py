"""What was measured of the original alone, kept in a file: it is the same for every model compared with it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llm_streamline import ranks
from llm_streamline.evaluation.answers import Answer, Answers
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.material import Material
from llm_streamline.evaluation.perplexity import WindowLosses
from llm_streamline.evaluation.result import GenerationResult, TaskResult
from llm_streamline.evaluation.subject import Subject
from llm_streamline.logs import get_logger
from llm_streamline.output import write_json
from llm_streamline.runtime import versions

_NO_PART = {"divergence", "speed", "gate", "bootstrap", "sigma", "batch_tokens"}  # of what the original alone is
log = get_logger()


def recall(path: Path | None, base: Subject, material: Material) -> bool:
    """Give `base` what an earlier evaluation measured of the same model on the same material.

    Args:
        path: file that `remember` wrote; None or missing: nothing is known.
        base: the original, taken up and not measured yet.
        material: texts and tasks.

    Returns:
        Whether it was known. A damaged file, or one about another model, text or version, counts as unknown.
    """
    found = ranks.from_main(lambda: _read(path, _key(base, material)))
    if found is None:
        return False
    base.tasks = tuple(TaskResult.model_validate(task) for task in found["tasks"])
    base.answers = {name: _answers(entry) for name, entry in found["answers"].items()}
    base.logs = found["logs"]
    base.generation = None if found["generation"] is None else GenerationResult.model_validate(found["generation"])
    base.losses = {
        name: WindowLosses(np.array(entry["nll"], np.float64), np.array(entry["tokens"]))
        for name, entry in found["losses"].items()
    }
    log.info("the original: measured before, taken from %s", path)
    return True


def remember(path: Path | None, base: Subject, material: Material) -> None:
    """Write what was measured of the original, for `recall`.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None or not ranks.is_main():
        return
    body = {
        "tasks": [task.model_dump(mode="json") for task in base.tasks],
        "answers": {name: asdict(answers) for name, answers in base.answers.items()},
        "logs": base.logs,
        "generation": None if base.generation is None else base.generation.model_dump(mode="json"),
        "losses": {
            name: {"nll": found.nll_W.tolist(), "tokens": found.tokens_W.tolist()}
            for name, found in base.losses.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": _key(base, material), "sha256": _digest(body), **body})


def _read(path: Path | None, key: str) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        same, digest = body.pop("key") == key, body.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return body if same and digest == _digest(body) else None


def _key(base: Subject, material: Material) -> str:
    config: EvaluationConfig = material.config
    return _digest(
        [
            base.loaded.source.fingerprint,
            str(base.loaded.dtype),
            str(base.loaded.device),
            getattr(base.model.config, "_attn_implementation", None),
            config.model_dump(mode="json", exclude=_NO_PART),
            {text.name: text.data_hash for text in base.texts},
            [task.data_hash for task in material.choice_tasks],
            versions() | material.harness_version,
        ]
    )


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _answers(entry: dict[str, Any]) -> Answers:
    items = tuple(Answer(**{**item, "nll": tuple(item["nll"])}) for item in entry["items"])
    return Answers(**{**entry, "items": items})
