"""Where models are: directories here, and repositories of the Hugging Face hub."""

from pathlib import Path


def find(path: str | Path, *, fetch: bool = True) -> Path:
    """The directory itself, or a snapshot of a hub repository: safetensors, configs and tokenizer files only.

    Args:
      fetch: whether a repository that is not in the cache is asked for.

    Raises:
      FileNotFoundError: neither.
      ValueError: a file.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; a model is a directory with config.json and model.safetensors")
    if not isinstance(path, str) or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no directory {path} (working directory {Path.cwd()})")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, local_files_only=not fetch))
    except Exception as error:  # the client raises many kinds, most of them about the network
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not fetch:
            raise FileNotFoundError(
                f"{path}, the base of an adapter, is not on this machine; load it by that name once, or give it: "
                "load(…, base=…)"
            ) from error
        raise FileNotFoundError(
            f"{path} is no directory here, and the Hugging Face hub did not give it: {first}"
        ) from error
