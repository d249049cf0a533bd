"""Whether a MODEL exists, said before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from conserve.server.errors import BadInputError

CONFIG_FILES = ("config.json", "params.json")
"""Hugging Face's and Mistral's; a folder with neither holds no model vLLM reads."""


def is_local(model: str) -> bool:
    """Whether MODEL names something on this machine rather than on a hub."""
    return model.startswith(("/", "./", "../", "~")) or Path(model).exists()


def check_model(model: str, revision: str | None = None) -> None:
    """Raise BadInputError for a MODEL that is certainly not there.

    A hub that cannot be reached is an error only when the model is not in the local cache either.
    Other stores (s3://, gs://, ...) are left to vLLM.
    """
    if "://" in model:
        return
    if is_local(model):
        _check_folder(Path(model).expanduser())
    else:
        _check_hub(model, revision)


def num_parameters(model: str, revision: str | None = None) -> int | None:
    """How many numbers MODEL's weights hold, from the headers of its safetensors files; None where
    it has none, or where they cannot be reached."""
    folder = Path(model).expanduser()
    try:
        if folder.is_dir():
            found = huggingface_hub.get_local_safetensors_metadata(folder)
        elif is_local(model) or "://" in model or huggingface_hub.is_offline_mode():
            return None
        else:
            found = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    except Exception:  # every transport raises its own, and so does a damaged file
        return None
    return sum(found.parameter_count.values())


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise BadInputError(
            f"MODEL {str(path)!r} does not exist. Name a model folder or a name on the hub, "
            "or leave MODEL out for the default model."
        )
    if path.is_dir() and not any((path / name).is_file() for name in CONFIG_FILES):
        raise BadInputError(
            f"MODEL {str(path)!r} is no model folder: it has no {' or '.join(CONFIG_FILES)}."
        )


def _check_hub(model: str, revision: str | None) -> None:
    if any(_cached(model, name, revision) for name in CONFIG_FILES):
        return
    if huggingface_hub.is_offline_mode():
        raise BadInputError(
            f"MODEL {model!r} is neither a folder nor in the local cache, and HF_HUB_OFFLINE "
            "forbids to download it. Name a model folder, or unset HF_HUB_OFFLINE."
        )
    try:
        huggingface_hub.HfApi().model_info(model, revision=revision, timeout=10)
    except huggingface_hub.errors.HFValidationError as error:
        raise BadInputError(f"MODEL {model!r} is neither a folder nor a name: {error}") from error
    except (RepositoryNotFoundError, huggingface_hub.errors.RevisionNotFoundError) as error:
        raise BadInputError(
            f"MODEL {model!r} is neither a folder nor on the hub "
            "(or it is private and HF_TOKEN is not set)."
        ) from error
    except HfHubHTTPError:
        return  # the hub is there and says something else: vLLM's own attempt decides
    except Exception as error:  # every transport raises its own
        raise BadInputError(
            f"MODEL {model!r} is neither a folder nor in the local cache, and the hub cannot be "
            f"reached ({type(error).__name__})."
        ) from error


def _cached(model: str, file: str, revision: str | None) -> bool:
    try:
        return isinstance(
            huggingface_hub.try_to_load_from_cache(model, file, revision=revision), str
        )
    except huggingface_hub.errors.HFValidationError:
        return False
