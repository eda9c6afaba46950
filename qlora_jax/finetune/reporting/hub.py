"""The Hugging Face hub: the repository is checked before the run, and gets the adapter after it.

Who uploads is whoever `hf auth login` or HF_TOKEN names. What can be wrong with a token or a repository would otherwise show
after hours of training; so the repository is made, or found to be writable, first.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

# That of the library's HTTP client, which is another package in another version of the library.
from huggingface_hub.errors import HTTPError  # isort: skip  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id


def check_repository(repository: str, *, private: bool) -> None:
    """Makes the repository where there is none.

    Args:
        repository: USER/NAME or ORGANISATION/NAME.
        private: make it a private one, and take no public one.

    Raises:
        ValueError: no such name, no token, or one that may not write there; a public repository where a private one is
            asked.
        ConnectionError: the hub cannot be reached or refuses.
    """
    place = f"push_to_hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{place}: expected USER/NAME, found: {error}") from error
    owner, _, name = repository.partition("/")
    if not name:
        raise ValueError(f"{place}: expected USER/NAME, found no user")
    api = HfApi()
    try:
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"{place}: expected a token that may write, found one of {user['name']} that may only read")
        owners = [user["name"], *[organisation["name"] for organisation in user.get("orgs", [])]]
        if owner not in owners:
            raise ValueError(f"{place}: expected a repository of {' or '.join(owners)}, found one of {owner}")
        api.create_repo(repository, private=private or None, exist_ok=True)
        # A repository that was there keeps what it is, whatever is asked.
        if private and not api.model_info(repository).private:
            raise ValueError(f"{place}: expected a private repository, found a public one that exists")
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"{place}: expected to be logged in, found no token; run `hf auth login` or set HF_TOKEN"
        ) from error
    except (HTTPError, OSError) as error:
        raise ConnectionError(f"{place}: cannot be used: {error}") from error


def upload(folder: Path, repository: str) -> str:
    """Uploads the folder of an adapter; returns the address.

    Raises:
        ConnectionError: it was not uploaded; the message says how to do that later.
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
