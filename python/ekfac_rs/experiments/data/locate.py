"""Where data lie that are not part of the package."""

import os
from os import PathLike
from pathlib import Path

from ekfac_rs.errors import OptionError

__all__ = ["DATA_VARIABLE", "find_data"]

DATA_VARIABLE = "EKFAC_DATA"
SHARED_FOLDER = Path("..", "shared", "data")


def find_data(name: str, data_dir: str | PathLike[str] | None = None) -> Path:
    """Find a file or folder among the data.

    Looked up in `data_dir`, else in the folder named by the environment variable ``EKFAC_DATA``,
    else in ``../shared/data``.

    Parameters
    ----------
    name
        Its name there.
    data_dir
        Folder to look in, and then only there.

    Raises
    ------
    OptionError
        If it is not there.
    """
    named = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    path = Path(SHARED_FOLDER if named is None else named, name)
    if not path.exists():
        raise OptionError(
            f"data_dir: no {name} in {str(path.parent)!r}; "
            f"give the folder that holds it by --data-dir or {DATA_VARIABLE}"
        )
    return path
