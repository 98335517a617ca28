"""Prompts to and from the Hugging Face hub, or the mirror that HF_ENDPOINT names.

Pushed are the four files of a prompt folder and nothing else, after a check, with nothing in them that names a place on this machine;
pulled are the same four files, checked before they are put in place.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softprompt.artifact import FILES, check_prompt, find_prompt
from softprompt.atomic import new_folder
from softprompt.card import Card, model_card
from softprompt.errors import ArtifactError, ConfigError, Error
from softprompt.hub import hub


def push(path: str | Path, repo_id: str, *, private: bool = False, base_id: str | None = None) -> str:
    """Puts a prompt into a model repository, which is made where it is missing, as one commit; returns its address.

    `base_id`: the hub id of a base that lay in a local folder. Raises ConfigError for a wrong id, ArtifactError for a prompt that is
    damaged or a hub that refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = find_prompt(path)
    card = check_prompt(folder)
    _check_id(repo_id, "is no repository of the hub")
    local = f"is the base's place on this machine: say by --base-id OWNER/NAME which base of the hub {folder} belongs to"
    _check_id(base_id or card.base.name, local if base_id is None else "is no base of the hub")
    with tempfile.TemporaryDirectory() as place:
        staged = _staged(folder, Path(place), card, repo_id, base_id or card.base.name)
        with _asking(repo_id, "be pushed to"):
            hub = HfApi()
            address = hub.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not hub.model_info(repo_id).private:
                raise ArtifactError(f"{repo_id} exists and is public: choose another repository, or leave out --private")
            files = [CommitOperationAdd(file.name, file) for file in staged]
            hub.create_commit(repo_id, files, commit_message=f"A soft prompt of {card.num_virtual_tokens} virtual tokens")
    return str(address)


def pull(repo_id: str, out: Path, revision: str | None = None) -> Card:
    """Writes the prompt of a repository into the new folder `out`; returns its card.

    Raises ConfigError where the folder exists or the id is wrong, ArtifactError where there is no such prompt, or one that is damaged.
    """
    from huggingface_hub import snapshot_download

    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another folder")
    _check_id(repo_id, "is no repository of the hub")
    with _asking(repo_id, "be pulled from"):
        cached = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
    try:
        card = check_prompt(cached)
    except ArtifactError as error:
        raise ArtifactError(f"{repo_id}: {error}") from None
    with new_folder(out) as draft:
        for file in (cached / name for name in FILES if (cached / name).is_file()):
            shutil.copyfile(file, draft / file.name)
    return card


def _staged(folder: Path, place: Path, card: Card, repo_id: str, base_id: str) -> list[Path]:
    """The files to push, written to `place`. Raises ArtifactError where one of them names the user's home."""
    card = card.model_copy(update={"base": card.base.model_copy(update={"name": base_id})})
    texts = {"card.json": card.model_dump_json(indent=2) + "\n", "README.md": model_card(card, repo_id)}
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        texts["adapter_config.json"] = json.dumps(adapter | {"base_model_name_or_path": base_id}, indent=2) + "\n"
    home = Path.home()
    for name, text in texts.items():
        if len(home.parts) > 1 and str(home) in text:
            raise ArtifactError(f"{folder / name} names {home}, a place on this machine: take it out and push again")
        (place / name).write_text(text, encoding="utf-8", newline="\n")
    for name in set(FILES) - {"card.json", "README.md", "adapter_config.json"}:
        shutil.copyfile(folder / name, place / name)
    return sorted(place.iterdir())


def _check_id(name: str, wrong: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(f"{name} {wrong}") from None


@contextmanager
def _asking(repo_id: str, what: str) -> Iterator[None]:
    """Whatever the hub or the way to it refuses, as one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    login = "log in with hf auth login, or set HF_TOKEN"
    with hub() as address:
        failed = f"{repo_id} cannot {what} {address} (HF_ENDPOINT sets a mirror)"
        try:
            yield
        except Error:
            raise
        except RevisionNotFoundError:
            raise ArtifactError(f"{failed}: it has no such revision") from None
        except RepositoryNotFoundError:
            raise ArtifactError(f"{failed}: there is no such repository, or it is not for you: {login}") from None
        except Exception as error:  # the hub's libraries let errors of their own HTTP library through, which differs by version
            if constants.HF_HUB_OFFLINE:
                raise ArtifactError(f"{failed}: it does not answer, or HF_HUB_OFFLINE is set") from None
            if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
                raise ArtifactError(f"{failed}: you may not: {login}") from None
            cause = error.__cause__ or error
            raise ArtifactError(f"{failed}: {(str(cause).strip().splitlines() or [type(cause).__name__])[0]}") from None
