"""Upload of an exported folder to the Hugging Face hub."""

import logging
from pathlib import Path

from cpo_pipe.data.errors import InputError, RunError, cause

log = logging.getLogger(__name__)


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a data set on the hub.

    Raises:
        InputError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo}: not a hub name, such as me/my-pairs") from error


def upload(out: Path, repo: str, public: bool) -> None:
    """Upload an exported folder to the Hugging Face hub; create the data set where it does not exist.

    Raises:
        InputError: the data set exists and is public, and `public` is false.
        RunError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    later = f"{out} is written; `hf upload {repo} {out} --repo-type dataset` uploads it"
    try:
        url = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        private = api.dataset_info(url.repo_id).private
        if private or public:
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=out,
                repo_type="dataset",
                commit_message="cpo-pipe export",
                delete_patterns="data/train-*.parquet",  # of an export before, or else both would be read
            )
            if private and public:  # only once it is complete
                api.update_repo_settings(url.repo_id, private=False, repo_type="dataset")
    except Exception as error:  # the hub client's failures have no common type: offline, no token, no rights, …
        raise RunError(f"--push {repo}: the hub did not take it ({cause(error)}); {later}") from error
    if not private and not public:
        raise InputError(f"--push {repo}: the data set exists and is public; add --public if that is meant; {later}")
    log.info("export: uploaded to %s", url)
