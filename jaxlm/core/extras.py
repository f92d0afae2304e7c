"""Libraries that are installed on request only: the extras of pyproject.toml."""

from importlib.util import find_spec


def require(module: str, extra: str) -> None:
    """Raises ModuleNotFoundError, naming the extra to install, where a top-level module is not there."""
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"{module} is not installed; pip install 'jaxlm[{extra}]' brings it", name=module)
