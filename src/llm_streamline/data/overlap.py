"""Evaluation text must not have been calibrated or trained on: an overlap is an error, not a warning."""

from collections.abc import Sequence

from llm_streamline.data.text import open_text
from llm_streamline.data.windows import Windows
from llm_streamline.errors import TextError


def check_text_unseen(spec: str, used: Sequence[Windows]) -> None:
    """Refuse an evaluation text that shares a document with windows the run calibrates, trains or validates on.

    Raises:
        TextError: naming the text and how many of its documents were used.
    """
    seen = {row.tobytes() for windows in used for row in windows.document_hashes.numpy()}
    shared = sum(bytes.fromhex(document.hash) in seen for document in open_text(spec).documents())
    if shared:
        raise TextError(
            f"{shared} document(s) of the evaluation text {spec} are also in the calibration, training or validation "
            "text of this run, so its figures would flatter; evaluate on a text that --text does not contain"
        )
