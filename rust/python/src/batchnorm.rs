//! Bindings of `ekfac_core::batchnorm`.

use ekfac_core::Result;
use ekfac_core::batchnorm::{
    self, Backward, Gradients, InputGradient, InputMoments, Layer, Merged,
};
use pyo3::prelude::*;

use crate::call::run;
use crate::tensor::{RawTensor, check_disjoint};

/// x `[N, C, S]`; where its mean and its variance by channel go.
type RawMoments = (RawTensor, RawTensor, RawTensor);

/// Writes mean and population variance by channel of each of these, of one type.
#[pyfunction]
pub fn batch_moments(py: Python<'_>, mut inputs: Vec<RawMoments>) -> PyResult<()> {
    run(py, |_| {
        let outputs = inputs
            .iter()
            .flat_map(|(_, mean, variance)| [mean, variance]);
        check_disjoint(&outputs.collect::<Vec<_>>(), inputs.iter().map(|(x, ..)| x))?;
        let views = inputs.iter_mut().map(|(x, mean, variance)| {
            Ok(InputMoments {
                x: x.view()?,
                mean: mean.row_mut()?,
                variance: variance.row_mut()?,
            })
        });
        batchnorm::moments(views.collect::<Result<_>>()?)
    })
}

/// Writes what the gradients of mean and variance, where there are such, become in the input x
/// `[N, C, S]`, or adds it to what is in `out`.
#[pyfunction]
pub fn moments_backward(
    py: Python<'_>,
    x: RawTensor,
    mean: RawTensor,
    of_mean: Option<RawTensor>,
    of_variance: Option<RawTensor>,
    mut out: RawTensor,
    keep: bool,
) -> PyResult<()> {
    run(py, |_| {
        let rows = [&x, &mean].into_iter().chain(&of_mean).chain(&of_variance);
        check_disjoint(&[&out], rows)?;
        batchnorm::moments_backward(InputGradient {
            x: x.view()?,
            mean: mean.row()?,
            of_mean: of_mean.as_ref().map(RawTensor::row).transpose()?,
            of_variance: of_variance.as_ref().map(RawTensor::row).transpose()?,
            keep,
            out: out.view_mut()?,
        })
    })
}

/// Weight, bias, gamma, mean, variance, epsilon.
type RawLayer = (
    RawTensor,
    Option<RawTensor>,
    Option<RawTensor>,
    RawTensor,
    RawTensor,
    f64,
);

fn layer(raw: &RawLayer) -> Result<Layer<'_>> {
    let (weight, bias, gamma, mean, variance, epsilon) = raw;
    Ok(Layer {
        weight: weight.view()?,
        bias: bias.as_ref().map(RawTensor::row).transpose()?,
        gamma: gamma.as_ref().map(RawTensor::row).transpose()?,
        mean: mean.row()?,
        variance: variance.row()?,
        epsilon: *epsilon,
    })
}

fn tensors(raw: &RawLayer) -> impl Iterator<Item = &RawTensor> {
    let (weight, bias, gamma, mean, variance, _) = raw;
    [weight, mean, variance]
        .into_iter()
        .chain(bias)
        .chain(gamma)
}

/// A layer, beta, the anchor, and where the result goes.
type RawMerged = (RawLayer, Option<RawTensor>, RawTensor, RawTensor);

/// Writes for each of these how far the weights merged with the BatchNorm are from the anchor.
#[pyfunction]
pub fn merge(py: Python<'_>, mut layers: Vec<RawMerged>) -> PyResult<()> {
    run(py, |_| {
        let outputs: Vec<_> = layers.iter().map(|(.., out)| out).collect();
        let inputs = layers
            .iter()
            .flat_map(|(raw, beta, anchor, _)| tensors(raw).chain(beta).chain([anchor]));
        check_disjoint(&outputs, inputs)?;
        let views = layers.iter_mut().map(|(raw, beta, anchor, out)| {
            Ok(Merged {
                layer: layer(raw)?,
                beta: beta.as_ref().map(RawTensor::row).transpose()?,
                anchor: anchor.view()?,
                out: out.view_mut()?,
            })
        });
        batchnorm::merge(views.collect::<Result<_>>()?)
    })
}

/// Where the gradients of weight, bias, gamma, beta, mean and variance go, as far as wanted.
type RawGradients = Vec<Option<RawTensor>>;

/// A layer, the gradient of its merged weights, and where those of their parts go.
type RawBackward = (RawLayer, RawTensor, RawGradients);

/// Writes for each of these what the gradient of the merged weights becomes.
#[pyfunction]
pub fn merge_backward(py: Python<'_>, mut layers: Vec<RawBackward>) -> PyResult<()> {
    run(py, |_| {
        let outputs: Vec<_> = layers
            .iter()
            .flat_map(|(.., out)| out.iter().flatten())
            .collect();
        let inputs = layers
            .iter()
            .flat_map(|(raw, gradient, _)| tensors(raw).chain([gradient]));
        check_disjoint(&outputs, inputs)?;
        let views = layers.iter_mut().map(|(raw, gradient, out)| {
            Ok(Backward {
                layer: layer(raw)?,
                gradient: gradient.view()?,
                out: gradients(out)?,
            })
        });
        batchnorm::merge_backward(views.collect::<Result<_>>()?)
    })
}

fn gradients(raw: &mut RawGradients) -> Result<Gradients<'_>> {
    let mut out = raw.iter_mut();
    let weight = match out.next() {
        Some(Some(weight)) => Some(weight.view_mut()?),
        _ => None,
    };
    let mut rows = [const { None }; 5];
    for (target, raw) in rows.iter_mut().zip(out) {
        if let Some(raw) = raw {
            *target = Some(raw.row_mut()?);
        }
    }
    Ok(Gradients { weight, rows })
}
