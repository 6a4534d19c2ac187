//! Bindings of `ekfac_core::gram` and `ekfac_core::strata`.

use std::collections::BTreeMap;

use ekfac_core::Result;
use ekfac_core::geometry::Geometry;
use ekfac_core::gram::{self, GramOptions};
use ekfac_core::strata::{Approximation, Role, Stratum};
use ekfac_core::units::{Note, Precision};
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
#[pyo3(signature = (x, out, approximation, role, append_one, scale, precision, note=None))]
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
    note: Option<RawNote>,
) -> PyResult<Vec<usize>> {
    run(py, |cancel| {
        let options = GramOptions {
            approximation: Approximation::from_name(approximation)?,
            role: Role::from_name(role)?,
            append_one,
            scale,
            precision: Precision::from_name(precision)?,
            note: noted(note, &x)?,
        };
        gram::accumulate(&x.view()?, &mut views(&mut out, &x)?, options, cancel)
    })
}

/// As `accumulate_gram` for the patches that a convolution sees.
#[pyfunction]
#[pyo3(signature = (
    x, out, approximation, kernel, stride, dilation, padding, append_one, scale, precision, note=None
))]
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
    note: Option<RawNote>,
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
            note: noted(note, &x)?,
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

/// A word on the device of the units, and the number of the mini-batch's first example.
type RawNote = (RawTensor, u64);

fn noted(note: Option<RawNote>, x: &RawTensor) -> Result<Option<Note>> {
    let Some((mut word, first_example)) = note else {
        return Ok(None);
    };
    check_disjoint(&[&word], [x])?;
    Ok(Some(Note::new(&mut word.view_mut()?, first_example)?))
}

/// The outputs, to be written to, none of which shares memory with `x`.
fn views<'a>(out: &'a mut [RawTensor], x: &RawTensor) -> Result<Vec<TensorViewMut<'a>>> {
    check_disjoint(&out.iter().collect::<Vec<_>>(), [x])?;
    out.iter_mut().map(RawTensor::view_mut).collect()
}
