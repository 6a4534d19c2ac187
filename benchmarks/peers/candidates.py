"""All candidates by name; a library is imported where its candidate is asked for."""

from importlib import import_module

from peers.base import Peer

BARE = "bare forward + backward"
FLOOR = "forward and input gradients"
OURS = "ekfac_rs, K-FAC"

_PLACES = {
    BARE: ("base", "Bare"),
    FLOOR: ("base", "Floor"),
    "torch, written by hand": ("with_torch", "WithTorch"),
    OURS: ("with_ekfac_rs", "WithEkfacRs"),
    "ekfac_rs, XK-FAC": ("with_ekfac_rs", "WithStrata"),
    "ekfac_rs, XK-FAC nested": ("with_ekfac_rs", "WithNestedStrata"),
    "curvlinops": ("with_curvlinops", "WithCurvlinops"),
    "nngeometry": ("with_nngeometry", "WithNNGeometry"),
    "asdfghjkl": ("with_asdfghjkl", "WithAsdfghjkl"),
    "kronfluence": ("with_kronfluence", "WithKronfluence"),
    "backpack": ("with_backpack", "WithBackPACK"),
    "laplace": ("with_laplace", "WithLaplace"),
}

NAMES = tuple(_PLACES)


def candidate(name: str) -> type[Peer]:
    """Class of a candidate.

    Raises
    ------
    ImportError
        Its library is not there, or does not work with this torch.
    """
    module, kind = _PLACES[name]
    found: type[Peer] = getattr(import_module(f"peers.{module}"), kind)
    return found
