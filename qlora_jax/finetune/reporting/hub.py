"""The Hugging Face hub: the repository is checked before the run, and the adapter is uploaded after it.

The user is the one that `hf auth login` or HF_TOKEN names. The repository is made, or found to be writable, before training,
because an error with the token or the repository would otherwise appear after hours of training.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

# That of the library's HTTP client, which is another package in another version of the library.
from huggingface_hub.errors import HTTPError  # isort: skip  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id

from qlora_jax.errors import OptionError


def check_repository(repository: str, *, private: bool) -> None:
    """Make the repository where there is none.

    Args:
        repository: USER/NAME or ORGANISATION/NAME.
        private: make it a private one, and take no public one.

    Raises:
        OptionError: no such name, no token, or one that may not write there; a public repository where a private one is
            asked.
        ConnectionError: the hub cannot be reached or refuses.
    """
    place = f"push_to_hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(f"{place}: expected USER/NAME, found: {error}") from error
    owner, _, name = repository.partition("/")
    if not name:
        raise OptionError(f"{place}: expected USER/NAME, found no user")
    api = HfApi()
    try:
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise OptionError(f"{place}: expected a token that may write, found one of {user['name']} that may only read")
        owners = [user["name"], *[organisation["name"] for organisation in user.get("orgs", [])]]
        if owner not in owners:
            raise OptionError(f"{place}: expected a repository of {' or '.join(owners)}, found one of {owner}")
        api.create_repo(repository, private=private or None, exist_ok=True)
        # A repository that was there keeps what it is, whatever is asked.
        if private and not api.model_info(repository).private:
            raise OptionError(f"{place}: expected a private repository, found a public one that exists")
    except LocalTokenNotFoundError as error:
        raise OptionError(
            f"{place}: expected to be logged in, found no token; run `hf auth login` or set HF_TOKEN"
        ) from error
    except (HTTPError, OSError) as error:
        raise ConnectionError(f"{place}: cannot be used: {error}") from error


def upload(folder: Path, repository: str) -> str:
    """Upload the folder of an adapter and return its address.

    Raises:
        ConnectionError: the folder was not uploaded; the message says how to do that later.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload adapter", ignore_patterns=".*"
        )
    except (HTTPError, OSError) as error:
        raise ConnectionError(
            f"push_to_hub {repository}: the adapter was saved, and not uploaded: {error}. "
            f"Later: hf upload {repository} {folder}"
        ) from error
    return str(commit.repo_url)
