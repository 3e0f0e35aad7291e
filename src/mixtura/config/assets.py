"""Where data and models that are set up once lie on this machine: the cache folder, and files inside packages."""

import importlib.util
import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MIXTURA_CACHE`, else `$XDG_CACHE_HOME/mixtura`, else `~/.cache/mixtura`; it need not exist."""
    if named := os.environ.get("MIXTURA_CACHE"):
        return Path(named).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, "mixtura")
    return Path("~/.cache/mixtura").expanduser()


def package_path(package: str, *parts: str) -> Path | None:
    """A file or folder inside an installed package, found without running the package; None where there is none."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders)), *parts) if folders else None
    return path if path is not None and path.exists() else None
