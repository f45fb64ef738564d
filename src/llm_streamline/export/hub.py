"""A finished run on the Hugging Face Hub: model files, model card, plan, recipe and results; nothing else leaves."""

from pathlib import Path

from llm_streamline.errors import OutputError, SourceError
from llm_streamline.output import TOOL_FOLDER, is_complete, owned_files
from llm_streamline.sources.weights import PICKLE_SUFFIXES, read_weights

CARD = "README.md"
# What goes up from the tool's own folder: how the model was made and what it lost. Texts, statistics and training
# states stay: they may hold private data.
_RECORDS = ("plan.json", "recipe.yaml", "results.json", "proof.json", "report.html", "manifest.json")


def push(folder: str | Path, repo: str, private: bool = False, *, message: str | None = None) -> str:
    """Upload a model folder; the repository is created when it does not exist.

    Args:
        folder: a finished run, or any Hugging Face folder with a model card.
        repo: `name` or `user/name`.
        private: applies to a repository that is created now.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        SourceError: the folder holds no sound model, or no README.md.
        OutputError: the run is not finished, nobody is logged in, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    folder = Path(folder)
    names = files_to_push(folder)
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=names,
            commit_message=message or "Upload with llm-streamline",
        )
    except LocalTokenNotFoundError as error:
        raise OutputError("nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN") from error
    except HFValidationError as error:
        raise OutputError(f"{repo!r} is no name for a repository: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise OutputError(
                f"the Hub does not let you write to {repo} ({status}): run `hf auth login` with a token that may write"
            ) from error
        raise OutputError(f"the Hub refused {repo}: {_first_line(error)}") from error
    except (OfflineModeIsEnabled, OSError) as error:  # connection errors of any HTTP library are OSErrors
        raise OutputError(f"the Hub cannot be reached ({type(error).__name__}); go online, then push again") from error
    return str(commit)


def files_to_push(folder: str | Path) -> list[str]:
    """Names of the files that `push` uploads, relative to the folder.

    Raises:
        SourceError: the folder holds no sound model, or no README.md.
        OutputError: the run in it is not finished.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} holds no model: it has no config.json")
    read_weights(folder)
    ours = (folder / TOOL_FOLDER).is_dir()
    if ours and not is_complete(folder):
        raise OutputError(f"the run in {folder} is not finished; run the same command again, then push")
    if not (folder / CARD).is_file():
        raise SourceError(f"{folder} has no {CARD}: a model without a card is not pushed; write one beside config.json")
    names = owned_files(folder) if ours else [path.name for path in folder.iterdir() if path.is_file()]
    names = [name for name in {*names, CARD} if not name.endswith(PICKLE_SUFFIXES) and not name.startswith(".")]
    records = [f"{TOOL_FOLDER}/{name}" for name in _RECORDS if (folder / TOOL_FOLDER / name).is_file()]
    return sorted(names) + records


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
