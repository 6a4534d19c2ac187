//! Bindings of `ekfac_core::gram` and `ekfac_core::strata`.

use std::collections::BTreeMap;

use ekfac_core::Result;
use ekfac_core::gram::{self, GramOptions};
use ekfac_core::strata::{Approximation, Role, Stratum};
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
pub fn accumulate_gram(
    py: Python<'_>,
    x: RawTensor,
    mut out: Vec<RawTensor>,
    approximation: &str,
    role: &str,
    append_one: bool,
    scale: f64,
) -> PyResult<Vec<usize>> {
    let features = x.shape().last().map_or(0.0, |&features| features as f64);
    let flops = x.elements() * features * out.len() as f64;
    run(py, flops, |cancel| {
        let options = GramOptions {
            approximation: Approximation::from_name(approximation)?,
            role: Role::from_name(role)?,
            append_one,
            scale,
        };
        check_disjoint(&out.iter().collect::<Vec<_>>(), [&x])?;
        let mut out: Vec<_> = out
            .iter_mut()
            .map(RawTensor::view_mut)
            .collect::<Result<_>>()?;
        gram::accumulate(&x.view()?, &mut out, options, cancel)
    })
}
