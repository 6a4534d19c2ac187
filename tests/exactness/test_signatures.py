"""What tells whether weights are still those of a curvature, against its definition."""

import pytest
import torch
from torch import Tensor, nn

import ekfac_rs as ek
from ekfac_rs.batchnorm.merging import merged_weight_of
from ekfac_rs.curvature import Signature
from ekfac_rs.curvature.curvature import signature_of
from ekfac_rs.layers import find_layers


def by_definition(weight: Tensor) -> tuple[float, float]:
    """Norm and projection on ``cos(i phase)``, entry by entry."""
    flat = weight.detach().double().flatten()
    waves = torch.arange(len(flat), dtype=torch.float64).mul(0.7390851).cos()
    return float(flat.norm()), float(flat @ waves)


def model(dtype: torch.dtype, bias: bool) -> nn.Sequential:
    """Layers of several kinds, with and without a BatchNorm after them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 6, 3, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2, bias=bias),
        nn.Flatten(),
        nn.Linear(16, 70_000 // 16, bias=bias),
        nn.Linear(70_000 // 16, 3, bias=bias),
    )
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_().abs_()
    return network.to(dtype)


@pytest.mark.parametrize("coordinates", ["merged", "raw"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_signature_is_that_of_the_whole_matrix(dtype, bias, coordinates):
    network = model(dtype, bias)
    layers = find_layers(
        network, coordinates=coordinates, example=torch.ones(2, 3, 6, 6, dtype=dtype)
    )
    assert len(layers) == (5 if coordinates == "merged" else 4)
    for layer in layers:
        whole = merged_weight_of(layer) if coordinates == "merged" else layer.raw_weight()
        # Sums of a row are in the dtype that sums have; weights agree up to 1e-4.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        norm, projection = by_definition(whole)
        for signature in (signature_of(layer, coordinates), Signature.of(whole)):
            assert signature.norm == pytest.approx(norm, rel=tolerance)
            assert signature.projection == pytest.approx(projection, abs=tolerance * norm)


def test_exchanged_rows_and_columns_and_signs_are_told():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    own = Signature.of(weight)
    assert own.agrees(Signature.of(weight.double()))
    assert own.agrees(Signature.of(weight * (1 + 1e-6)))
    swapped = list(range(30))
    swapped[3], swapped[4] = swapped[4], swapped[3]
    for other in (weight.flip(0), weight[:, swapped], -weight, 1.01 * weight, weight.roll(1, 1)):
        assert not own.agrees(Signature.of(other))


def test_a_signature_does_not_depend_on_the_layout():
    weight = torch.randn(50, 2000, generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        transposed = weight.to(dtype).T.contiguous().T
        own, other = Signature.of(weight.to(dtype)), Signature.of(transposed)
        assert other.norm == pytest.approx(own.norm, rel=tolerance)
        assert other.projection == pytest.approx(own.projection, abs=tolerance * own.norm)


def test_weights_whose_squares_overflow_have_a_signature():
    weight = 1e30 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    own = Signature.of(weight, torch.ones(4), torch.ones(4))
    assert own.agrees(Signature.of(weight.double(), torch.ones(4), torch.ones(4)))
    assert not own.agrees(Signature.of(1.01 * weight, torch.ones(4), torch.ones(4)))


def test_a_penalty_knows_the_weights_of_its_curvature():
    network = model(torch.float32, bias=True)
    x, y = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
    curvature = ek.estimate_curvature(network, [(x, y)])
    ek.QuadraticPenalty(network, curvature, ek.merged_weights(network, example=x)).close()
    with torch.no_grad():
        network[1].weight[0, 0, 0, 0] += 1.0
    moved = ek.merged_weights(network, example=x)
    with pytest.raises(ek.errors.EkfacError):
        ek.QuadraticPenalty(network, curvature, moved)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18])
def test_weights_whose_squares_vanish_have_a_signature(scale):
    weight = scale * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    own = Signature.of(weight)
    assert own.agrees(Signature.of(weight.double()))
    assert own.norm > 0.0
    assert not own.agrees(Signature.of(1.01 * weight))


def test_autocast_rounds_no_signature():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    own = Signature.of(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert Signature.of(weight) == own
