"""Spectra of every kind of block against its dense matrix, and the picture of them."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import ekfac_rs as ek
from cases import NETWORKS, estimate
from ekfac_rs.curvature import spectrum
from ekfac_rs.errors import IncompatibleError, MissingPackageError, OptionError


def factor(size, *stack):
    X = torch.randn(*stack, size, size + 1, dtype=torch.float64)
    return X @ X.mT


def kronecker(terms, D=3, K=4, groups=()):
    rows = D // (groups[0] if groups else 1)
    return ek.KroneckerSum([(factor(K, *groups), factor(rows, *groups)) for _ in range(terms)])


def columnwise(terms):
    columns = [torch.rand(5, dtype=torch.float64) for _ in range(terms)]
    return ek.ColumnwiseSum([(a, factor(3)) for a in columns])


def eigenbasis(terms):
    blocks = [ek.EigenbasisSum.near(kronecker(2)) for _ in range(terms)]
    return sum(blocks[1:], start=blocks[0])


def thin():
    roots = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    return ek.ThinKroneckerSum([roots], kronecker(1))


BLOCKS = {
    "diagonal": lambda: ek.DiagonalBlock(torch.rand(3, 4, dtype=torch.float64)),
    "Kronecker": lambda: kronecker(1),
    "Kronecker, groups": lambda: kronecker(1, D=6, groups=(2,)),
    "columnwise": lambda: columnwise(1),
    "eigenbasis": lambda: eigenbasis(1),
    "Kronecker, terms": lambda: kronecker(3),
    "columnwise, terms": lambda: columnwise(2),
    "eigenbasis, terms": lambda: eigenbasis(2),
    "thin, terms": thin,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_eigenvalues_or_no_more_than_they_are(kind):
    torch.manual_seed(0)
    block = BLOCKS[kind]()
    found = spectrum(block)
    expected = torch.linalg.eigvalsh(block.dense()).flip(0)
    assert found.values.shape == expected.shape
    assert found.exact == ("terms" not in kind)
    if found.exact:
        assert torch.allclose(found.values, expected, rtol=1e-9, atol=1e-9 * float(expected[0]))
        return
    assert torch.equal(found.values, found.values.sort(descending=True).values)
    sums, most = found.values.cumsum(0), expected.cumsum(0)
    assert bool((sums <= most * (1.0 + 1e-9)).all())
    assert float(sums[-1]) == pytest.approx(block.trace(), rel=1e-9)
    # They are those of the block, and not of its trace alone.
    assert float(sums[0]) > 0.5 * float(most[0])


# --- pictures -------------------------------------------------------------------------------------


def described(**options):
    network = NETWORKS["mlp-bn"]
    model, loss = network.make(), "cross_entropy"
    curvature = estimate(model, network.batches(loss, (5, 3)), loss, **options)
    return model, curvature, ek.describe(model, curvature)


def texts_inside(figure):
    """Titles and labels of a figure; all of them lie within its edges."""
    figure.canvas.draw()
    whole = figure.bbox.padded(1.0)
    found = [*figure.texts, *(text for axes in figure.axes for text in (axes.title, *axes.texts))]
    found = [text for text in found if text.get_text()]
    for text in found:
        box = text.get_window_extent()
        assert whole.contains(box.x0, box.y0), text
        assert whole.contains(box.x1, box.y1), text
    return [text.get_text().replace("\n", "") for text in found]


@pytest.mark.parametrize("approximation", ["xkfac", "diagonal"])
def test_a_picture_has_a_panel_for_each_layer_and_cuts_nothing_off(approximation, tmp_path):
    pytest.importorskip("matplotlib")
    _, curvature, description = described(approximation=approximation)
    assert description.approximation == approximation
    figure = description.figure()
    texts = texts_inside(figure)
    for name in curvature:
        assert name in texts
    curves = [axes.lines[0] for axes in figure.axes if axes.lines]
    assert len(curves) == len(curvature)
    dashed = [line.get_linestyle() == "--" for line in curves]
    assert dashed == [not found.exact for found in description.spectra().values()]
    description.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes()[:4] == b"\x89PNG"


def test_names_of_any_length_are_broken_and_zero_blocks_say_so():
    pytest.importorskip("matplotlib")
    long = "a_module_whose_name_is_longer_than_any_panel_is_wide.and_has_another_one_inside_it"
    inner = nn.Module()
    inner.add_module(long.split(".")[1], nn.Linear(3, 2))
    model = nn.Sequential()
    model.add_module(long.split(".")[0], inner)
    inner.forward = lambda x: getattr(inner, long.split(".")[1])(x)
    x = torch.randn(4, 3)
    curvature = ek.estimate_curvature(model, [(x, torch.zeros(4).long())])
    figure = ek.describe(model, curvature, example=x).figure()
    assert long in texts_inside(figure)
    zero = {name: block * 0.0 for name, block in curvature.items()}
    figure = ek.describe(model, replace(curvature, blocks=zero), example=x).figure()
    assert "all zero" in texts_inside(figure)


def test_what_does_not_go_together_is_refused():
    model, curvature, _ = described()
    with pytest.raises(OptionError, match="approximation: expected 'xkfac-nested'"):
        ek.describe(model, curvature, approximation="xkfac")
    with pytest.raises(OptionError, match="curvature: expected the one"):
        ek.describe(model).plot("nowhere.png")
    with pytest.raises(IncompatibleError, match="layer '0': expected .* got one of shape"):
        ek.describe(nn.Sequential(nn.Linear(2, 2)), curvature)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    _, _, description = described()
    with pytest.raises(MissingPackageError, match=r"pip install 'ekfac-rs\[experiments\]'"):
        description.plot("nowhere.png")
