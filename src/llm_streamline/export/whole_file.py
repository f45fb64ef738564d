"""One large output file that appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_streamline.errors import OutputError
from llm_streamline.files import TEMP_PREFIX, saving, sync_folder


@contextmanager
def new_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it is renamed to `path` when the block ends without error.

    Args:
        path: the file to make; its folder is created.
        overwrite: replace a file that is there.

    Raises:
        OutputError: something is there already, the disk is full, or the folder is not writable.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give the name of a file in it")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already: choose another name, or remove it first")
    temporary = None
    with saving(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=path.suffix, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
