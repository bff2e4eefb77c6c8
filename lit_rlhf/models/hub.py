"""Where models come from, a folder or the hub: what cannot be loaded is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' weight bars and load reports; what matters in them, we check and say ourselves."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:  # transformers has switched these off too, but a download of gigabytes should be seen
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_path(name: str) -> bool:
    """Say whether a name means a place on disk: it exists, or no hub id (``model`` or ``owner/model``) looks so."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def check_folder(name: str) -> None:
    """Refuse a model folder that cannot be loaded; names that can only be hub ids pass.

    Raises:
        FileNotFoundError: no such folder, or one without a model in it.
        ValueError: the folder holds only pickled weights or only adapters.
    """
    if not is_path(name):
        return
    folder = Path(name).expanduser()
    if not name.strip() or not folder.is_dir():
        raise FileNotFoundError(f"no such model folder: {name or repr(name)}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{name} holds only adapters; name a folder with the whole model (export with merge=True)")
        raise FileNotFoundError(f"{name} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{name} has its weights only as .bin; those are pickles, which can run code when opened. "
                "Convert them to safetensors (transformers' save_pretrained writes it)"
            )
        raise FileNotFoundError(f"{name} has a config.json but no *.safetensors weights")


@contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """Turn the hub's and transformers' long loading errors into one line that names what was asked for."""
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = "in that folder" if Path(name).expanduser().is_dir() else "as a folder here or on the Hugging Face hub"
        raise FileNotFoundError(f"found no {what} named {name!r} {place}: {reason[:300]}") from None
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} cannot be read ({error}): is the download complete?") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever transformers and tokenizers raise over files that they cannot make sense of
        reason = " ".join(str(error).split())
        if len(reason) > 400:  # what to do tends to stand at the end
            reason = f"{reason[:200]} … {reason[-200:]}"
        raise ValueError(f"the {what} {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error
