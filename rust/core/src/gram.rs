//! Factors of the curvature: sums of squares and products of each stratum of a mini-batch.

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::strata::{Approximation, Role, Stratum};
use crate::view::{Dtype, Real, TensorView, TensorViewMut};

/// A stratum and the number its sum of squares and products is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StratumWeight {
    /// Which sum of squares and products.
    pub stratum: Stratum,
    /// Its weight; 0 where the stratum has no degrees of freedom.
    pub weight: f64,
}

/// How [`accumulate`] reads a mini-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GramOptions {
    /// Which strata to keep.
    pub approximation: Approximation,
    /// Inputs or gradients, which are normalised differently.
    pub role: Role,
    /// Whether a constant 1 is appended to each unit, for the bias; inputs only.
    pub append_one: bool,
    /// The weight of this mini-batch per example.
    pub scale: f64,
}

/// Adds `scale * N * F_k` to the lower triangle of `out[k]` for each stratum k, where N is the
/// number of examples and `F_k` the stratum's factor of this mini-batch.
///
/// `x` is `[N, K]` or `[N, T, K]`; the outputs are `[K', K']` with K' = K, or K + 1 if a one is
/// appended. For inputs `F_k` is the sum of squares and products divided by the number of units U,
/// for gradients multiplied by `U / (dof_k N)` (0 without degrees of freedom). Their product is
/// that of the analysis of variance; divided this way both factors keep their size as N varies, so
/// that they may be averaged separately over mini-batches of different sizes. Half-precision input
/// is accumulated in the outputs' dtype. Strata are centred before they are squared, with means in
/// double precision.
///
/// Returns the degrees of freedom of each stratum in this mini-batch: one without any says nothing
/// about its gradients, and counts for nothing in their mean.
///
/// # Errors
///
/// Nothing is written if `x` contains NaN or infinity, or if any shape, dtype or option does not
/// fit. After [`Error::Interrupted`] the outputs are partly written.
pub fn accumulate(
    x: &TensorView<'_>,
    out: &mut [TensorViewMut<'_>],
    options: GramOptions,
    cancel: &Cancel,
) -> Result<Vec<usize>> {
    let x = x.as_examples();
    let &[examples, locations, features] = x.shape() else {
        return Err(Error::Shape(format!(
            "x must be [N, K] or [N, T, K], got shape {:?}",
            x.shape()
        )));
    };
    if examples * locations * features == 0 {
        return Err(Error::Shape(format!(
            "x must have at least one example, location and feature, got shape {:?}",
            x.shape()
        )));
    }
    if options.append_one && options.role == Role::Gradient {
        return Err(Error::Option(
            "append_one is for inputs: gradients have no constant coordinate".to_owned(),
        ));
    }
    if !options.scale.is_finite() {
        return Err(Error::Option(format!(
            "scale must be finite, got {}",
            options.scale
        )));
    }
    let size = features + usize::from(options.append_one);
    check_outputs(out, options.approximation, size)?;
    let strata = weights(options, examples, locations);
    match out.first().map(TensorViewMut::dtype) {
        Some(Dtype::Float32) => run::<f32>(&x, out, &strata, options.append_one, cancel)?,
        Some(Dtype::Float64) => run::<f64>(&x, out, &strata, options.append_one, cancel)?,
        other => {
            return Err(Error::Dtype(format!(
                "outputs must be float32 or float64, got {}",
                other.map_or_else(|| "none".to_owned(), |dtype| dtype.to_string())
            )));
        }
    }
    let strata = options.approximation.strata().iter();
    Ok(strata
        .map(|stratum| stratum.degrees_of_freedom(examples, locations))
        .collect())
}

fn run<T: Real>(
    x: &TensorView<'_>,
    out: &mut [TensorViewMut<'_>],
    strata: &[StratumWeight],
    append_one: bool,
    cancel: &Cancel,
) -> Result<()> {
    x.expect_cpu()?;
    let out = out
        .iter_mut()
        .map(TensorViewMut::matrix::<T>)
        .collect::<Result<_>>()?;
    Cpu::current().accumulate_gram(x, out, strata, append_one, cancel)
}

fn check_outputs(
    out: &[TensorViewMut<'_>],
    approximation: Approximation,
    size: usize,
) -> Result<()> {
    let expected = approximation.strata().len();
    if out.len() != expected {
        return Err(Error::Shape(format!(
            "{} has {expected} strata, got {} outputs",
            approximation.name(),
            out.len()
        )));
    }
    for (index, tensor) in out.iter().enumerate() {
        if tensor.shape() != [size, size] {
            return Err(Error::Shape(format!(
                "output {index} must be [{size}, {size}], got shape {:?}",
                tensor.shape()
            )));
        }
        if tensor.dtype() != out[0].dtype() {
            return Err(Error::Dtype(format!(
                "all outputs must have one dtype, got {} and {}",
                out[0].dtype(),
                tensor.dtype()
            )));
        }
    }
    Ok(())
}

/// The weight of each sum of squares and products, so that `scale * N * F_k` results.
///
/// The sums of [`Stratum::ExampleTotals`] are taken over locations for both roles; inputs are
/// averaged instead, hence the extra division.
fn weights(options: GramOptions, examples: usize, locations: usize) -> Vec<StratumWeight> {
    let per_example = options.scale * examples as f64;
    let weigh = |stratum: Stratum| {
        let (rows, averaging) = match stratum {
            Stratum::ExampleTotals => (examples, (locations as f64).powi(2)),
            _ => (examples * locations, 1.0),
        };
        match (
            options.role,
            stratum.degrees_of_freedom(examples, locations),
        ) {
            (_, 0) => 0.0,
            (Role::Input, _) => per_example / rows as f64 / averaging,
            (Role::Gradient, dof) => options.scale * rows as f64 / dof as f64,
        }
    };
    let strata = options.approximation.strata().iter();
    strata
        .map(|&stratum| StratumWeight {
            stratum,
            weight: weigh(stratum),
        })
        .collect()
}
