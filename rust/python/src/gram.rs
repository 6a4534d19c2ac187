//! Bindings of `ekfac_core::gram` and `ekfac_core::strata`.

use std::collections::BTreeMap;

use ekfac_core::Result;
use ekfac_core::geometry::Geometry;
use ekfac_core::gram::{self, GramOptions};
use ekfac_core::strata::{Approximation, Role, Stratum};
use ekfac_core::units::Precision;
use ekfac_core::view::TensorViewMut;
use pyo3::prelude::*;

use crate::call::run;
use crate::tensor::{RawTensor, check_disjoint};

/// The names of the strata of each approximation, in the order of their factors.
#[pyfunction]
pub fn strata() -> BTreeMap<&'static str, Vec<&'static str>> {
    let names = |approximation: Approximation| {
        let strata = approximation.strata().iter();
        strata.map(|stratum: &Stratum| stratum.name()).collect()
    };
    Approximation::ALL
        .into_iter()
        .map(|approximation| (approximation.name(), names(approximation)))
        .collect()
}

/// Adds `scale * N * F_k` of this mini-batch to the lower triangle of each output; returns the
/// degrees of freedom of the strata.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the signature of the contract")]
pub fn accumulate_gram(
    py: Python<'_>,
    x: RawTensor,
    mut out: Vec<RawTensor>,
    approximation: &str,
    role: &str,
    append_one: bool,
    scale: f64,
    precision: &str,
) -> PyResult<Vec<usize>> {
    run(py, |cancel| {
        let options = GramOptions {
            approximation: Approximation::from_name(approximation)?,
            role: Role::from_name(role)?,
            append_one,
            scale,
            precision: Precision::from_name(precision)?,
        };
        gram::accumulate(&x.view()?, &mut views(&mut out, &x)?, options, cancel)
    })
}

/// As `accumulate_gram` for the patches that a convolution sees.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the signature of the contract")]
pub fn accumulate_patch_gram(
    py: Python<'_>,
    x: RawTensor,
    mut out: Vec<RawTensor>,
    approximation: &str,
    kernel: Vec<usize>,
    stride: Vec<usize>,
    dilation: Vec<usize>,
    padding: Vec<(usize, usize)>,
    append_one: bool,
    scale: f64,
    precision: &str,
) -> PyResult<Vec<usize>> {
    let geometry = Geometry {
        kernel,
        stride,
        dilation,
        padding,
    };
    run(py, |cancel| {
        let options = GramOptions {
            approximation: Approximation::from_name(approximation)?,
            role: Role::Input,
            append_one,
            scale,
            precision: Precision::from_name(precision)?,
        };
        let x_view = x.view()?;
        gram::accumulate_patches(
            &x_view,
            &geometry,
            &mut views(&mut out, &x)?,
            options,
            cancel,
        )
    })
}

/// The outputs, to be written to, none of which shares memory with `x`.
fn views<'a>(out: &'a mut [RawTensor], x: &RawTensor) -> Result<Vec<TensorViewMut<'a>>> {
    check_disjoint(&out.iter().collect::<Vec<_>>(), [x])?;
    out.iter_mut().map(RawTensor::view_mut).collect()
}
