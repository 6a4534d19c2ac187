"""What is said where a package is missing that not everybody needs."""

from ekfac_rs.errors import MissingPackageError


def missing(error: ImportError, module: str, package: str, extra: str) -> ImportError:
    """Return what to raise where importing another library's module failed.

    Parameters
    ----------
    error : ImportError
    module : str
        The library's, as it is imported.
    package : str
        As it is installed.
    extra : str
        Of ours, which installs it.

    Returns
    -------
    ImportError
        A `MissingPackageError` that says what to install; where the library is there and fails by
        itself, its own error.
    """
    if error.name is None or error.name.partition(".")[0] != module:
        return error
    return MissingPackageError(
        f"{module}: expected the package {package}, which this module works with, got none "
        f"installed: pip install 'ekfac-rs[{extra}]'",
        name=error.name,
    )
