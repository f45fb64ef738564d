"""Text from the Hugging Face Hub, streamed through `datasets`: only what is used is fetched, and no code is run."""

from collections.abc import Iterator

from llm_streamline.data.document import Document
from llm_streamline.data.files import text_of_record
from llm_streamline.data.spec import TextSpec
from llm_streamline.data.text import TextSource
from llm_streamline.errors import TextError


class HubText(TextSource):
    """Documents of one split of a Hub data set (or of a local folder in a Hub data set's form)."""

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        import datasets

        try:
            builder = datasets.load_dataset_builder(spec.source, spec.config)
            streams = builder.as_streaming_dataset()
        except (OSError, ValueError, NotImplementedError, datasets.exceptions.DatasetsError) as problem:
            raise TextError(f"text '{spec.text}': cannot open the data set: {_first_line(problem)}") from problem
        if spec.split not in streams:
            raise TextError(f"text '{spec.text}': no split '{spec.split}'; there are {', '.join(map(str, streams))}")
        self._stream, self._hash = streams[spec.split], builder.hash
        features = self._stream.features or builder.info.features
        if features is not None and spec.field not in features:
            raise TextError(
                f"text '{spec.text}': no column '{spec.field}'; there are {', '.join(features)}; name one after '#'"
            )

    @property
    def fingerprint(self) -> str:
        """What was asked for, and the hash that `datasets` takes over the files' commit (or time of change)."""
        return f"{self.spec.key} {self._hash}"

    def records(self) -> Iterator[Document]:
        """Documents in the data set's order."""
        import datasets
        import pyarrow

        unreadable = (OSError, ValueError, RuntimeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
        name, field = self.spec.source, self.spec.field
        rows = enumerate(self._stream, start=1)
        while True:
            try:
                number, record = next(rows)
            except StopIteration:
                return
            except unreadable as problem:
                raise TextError(f"text '{self.spec.text}': reading stopped: {_first_line(problem)}") from problem
            yield Document.of(text_of_record(record, field, f"{name}, row {number}"), f"{name}: row {number}")


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
