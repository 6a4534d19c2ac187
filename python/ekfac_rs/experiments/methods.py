"""The methods that experiments compare; each experiment takes those that it has a use for."""

from ekfac_rs.experiments.settings import Method
from ekfac_rs.scales import SCALES

__all__ = ["METHODS", "methods_named", "rule_names", "with_rules"]

_PLAIN = {"lr": "plain_lrs", "epochs": "plain_epochs"}
_CURVED = {"lr": "lrs", "scale": "scales", "damping": "damping"}
_FROZEN = {**_CURVED, "lr": "frozen_lrs"}
_SCHEDULED = {**_CURVED, "lr": "scheduled_lrs"}
_DIAGONAL = {**_CURVED, "scale": "diagonal_scales"}

# In the order of tables. A key says, where it is not what everything else is: BatchNorm (frozen
# after the first task, or scheduled: 20 per cent of each task, then frozen), curvature, what
# happens to the weights when a task begins, step (explicit, or stable and by the present task's
# own curvature, too).
METHODS: dict[str, Method] = {
    "fine-tuning": Method("fine-tuning", {"curvature": "none"}, _PLAIN),
    "fine-tuning-frozen": Method(
        "fine-tuning, BN frozen", {"curvature": "none", "freeze_bn_after": 0.0}, _PLAIN
    ),
    # A penalty so weak that it does nothing: what putting the statistics back does alone.
    "fine-tuning-put-back": Method(
        "fine-tuning, statistics put back", {"curvature": "none", "damping": 1e-12}, _PLAIN
    ),
    "l2": Method("L2 to anchor", {"curvature": "none"}, {"lr": "lrs", "damping": "l2"}),
    "ewc": Method("diagonal Fisher (EWC)", {"curvature": "diagonal"}, _DIAGONAL),
    "kfac-frozen": Method(
        "K-FAC, BN frozen", {"curvature": "kfac-eval", "freeze_bn_after": 0.0}, _FROZEN
    ),
    "kfac-frozen-explicit": Method(
        "K-FAC, BN frozen, explicit steps",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.0, "step": "explicit"},
        _FROZEN,
    ),
    "kfac-frozen-own": Method(
        "K-FAC, BN frozen, steps by own curvature",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.0, "own": True},
        _CURVED,
    ),
    "kfac-eval": Method("K-FAC, eval factors", {"curvature": "kfac-eval"}, _CURVED),
    "kfac-train": Method("K-FAC, train factors", {"curvature": "kfac-train"}, _CURVED),
    "kfac-train-first": Method(
        "K-FAC, train factors, first norms",
        {"curvature": "kfac-train", "weights": "first"},
        _CURVED,
    ),
    "kfac-train-explicit": Method(
        "K-FAC, train factors, explicit steps",
        {"curvature": "kfac-train", "step": "explicit"},
        _CURVED,
    ),
    "xkfac": Method("XK-FAC", {"curvature": "xkfac"}, _CURVED),
    "xkfac-first": Method(
        "XK-FAC, first norms", {"curvature": "xkfac", "weights": "first"}, _CURVED
    ),
    "xkfac-explicit": Method(
        "XK-FAC, explicit steps", {"curvature": "xkfac", "step": "explicit"}, _CURVED
    ),
    "xkfac-merged": Method(
        "XK-FAC, W <- Wm, explicit steps",
        {"curvature": "xkfac", "weights": "merged", "step": "explicit"},
        _CURVED,
    ),
    "xkfac-raw": Method("XK-FAC, raw coordinates", {"curvature": "xkfac-raw"}, _CURVED),
    "xkfac-nested": Method("XK-FAC, nested", {"curvature": "xkfac-nested"}, _CURVED),
    "xkfac-nested-own": Method(
        "XK-FAC, nested, steps by own curvature",
        {"curvature": "xkfac-nested", "own": True},
        _CURVED,
    ),
    "xkfac-nested-first": Method(
        "XK-FAC, nested, first norms", {"curvature": "xkfac-nested", "weights": "first"}, _CURVED
    ),
    "xkfac-nested-explicit": Method(
        "XK-FAC, nested, explicit steps", {"curvature": "xkfac-nested", "step": "explicit"}, _CURVED
    ),
    "xkfac-nested-merged": Method(
        "XK-FAC, nested, W <- Wm, explicit steps",
        {"curvature": "xkfac-nested", "weights": "merged", "step": "explicit"},
        _CURVED,
    ),
    "scheduled-kfac": Method(
        "K-FAC, eval factors, BN 20 %",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.2},
        _SCHEDULED,
    ),
    "scheduled-kfac-first": Method(
        "K-FAC, eval factors, BN 20 %, first norms",
        {"curvature": "kfac-eval", "freeze_bn_after": 0.2, "weights": "first"},
        _SCHEDULED,
    ),
    "scheduled-kfac-first-own": Method(
        "K-FAC, eval factors, BN 20 %, first norms, steps by own curvature",
        {
            "curvature": "kfac-eval",
            "freeze_bn_after": 0.2,
            "weights": "first",
            "own": True,
        },
        _CURVED,
    ),
    "scheduled-xkfac": Method(
        "XK-FAC, BN 20 %", {"curvature": "xkfac", "freeze_bn_after": 0.2}, _SCHEDULED
    ),
    "scheduled-xkfac-first": Method(
        "XK-FAC, BN 20 %, first norms",
        {"curvature": "xkfac", "freeze_bn_after": 0.2, "weights": "first"},
        _SCHEDULED,
    ),
    "scheduled-xkfac-nested": Method(
        "XK-FAC, nested, BN 20 %", {"curvature": "xkfac-nested", "freeze_bn_after": 0.2}, _SCHEDULED
    ),
    "scheduled-xkfac-nested-own": Method(
        "XK-FAC, nested, BN 20 %, steps by own curvature",
        {"curvature": "xkfac-nested", "freeze_bn_after": 0.2, "own": True},
        _CURVED,
    ),
}


def methods_named(*keys: str) -> dict[str, Method]:
    """Return some of the methods, in the order of the table."""
    return {key: METHODS[key] for key in METHODS if key in keys}


def with_rules(key: str) -> dict[str, Method]:
    """Return a method once for each rule that chooses its scale, at a single learning rate.

    There is nothing to try then, which is what rules are for.

    Parameters
    ----------
    key
        Of a method with a curvature.
    """
    method = METHODS[key]
    axes = {**method.axes, "lr": "rule_lrs"}
    del axes["scale"]
    return {
        name: Method(f"{method.label}, scale by {rule}", {**method.fixed, "scale": rule}, axes)
        for rule, name in zip(SCALES, rule_names(key), strict=True)
    }


def rule_names(key: str) -> list[str]:
    """Return the names of what `with_rules` makes of a method."""
    return [f"{key}-{rule}" for rule in SCALES]
