//! Bindings of `ekfac_core::kronecker`.

use ekfac_core::Result;
use ekfac_core::kronecker::{self, KroneckerSum};
use pyo3::prelude::*;

use crate::call::run;
use crate::tensor::{RawTensor, RawTerm, check_disjoint, factors};

/// The checked sum of these terms.
fn sum(terms: &[RawTerm]) -> Result<KroneckerSum<'_>> {
    let views = terms.iter().map(|(a, g)| Ok((a.view()?, g.view()?)));
    KroneckerSum::new(views.collect::<Result<_>>()?)
}

/// Flops of one product with everything in `v`.
fn product_flops(terms: &[RawTerm], v: &RawTensor) -> f64 {
    let sides = v.shape().iter().rev().take(2).sum::<usize>() as f64;
    2.0 * v.elements() * sides * terms.len() as f64
}

/// `out = sum_k G_k V A_k + damping * V`.
#[pyfunction]
pub fn kronecker_product(
    py: Python<'_>,
    terms: Vec<RawTerm>,
    v: RawTensor,
    mut out: RawTensor,
    damping: f64,
) -> PyResult<()> {
    run(py, product_flops(&terms, &v), |cancel| {
        check_disjoint(&[&out], factors(&terms).chain([&v]))?;
        sum(&terms)?.product(&v.view()?, &mut out.view_mut()?, damping, cancel)
    })
}

/// `sum_k <V, G_k V A_k>`.
#[pyfunction]
pub fn kronecker_quadratic(py: Python<'_>, terms: Vec<RawTerm>, v: RawTensor) -> PyResult<f64> {
    run(py, product_flops(&terms, &v), |cancel| {
        sum(&terms)?.quadratic(&v.view()?, cancel)
    })
}

/// The Frobenius inner product of two sums.
#[pyfunction]
pub fn kronecker_inner(py: Python<'_>, terms: Vec<RawTerm>, others: Vec<RawTerm>) -> PyResult<f64> {
    run(py, 0.0, |_| sum(&terms)?.inner(&sum(&others)?))
}

/// The diagonal as a `[D, K]` matrix.
#[pyfunction]
pub fn kronecker_diagonal(py: Python<'_>, terms: Vec<RawTerm>, mut out: RawTensor) -> PyResult<()> {
    run(py, 0.0, |_| {
        check_disjoint(&[&out], factors(&terms))?;
        sum(&terms)?.diagonal(&mut out.view_mut()?)
    })
}

/// The whole matrix, `[D K, D K]`.
#[pyfunction]
pub fn kronecker_dense(py: Python<'_>, terms: Vec<RawTerm>, mut out: RawTensor) -> PyResult<()> {
    run(py, 0.0, |_| {
        check_disjoint(&[&out], factors(&terms))?;
        sum(&terms)?.dense(&mut out.view_mut()?)
    })
}

/// The trace.
#[pyfunction]
pub fn kronecker_trace(py: Python<'_>, terms: Vec<RawTerm>) -> PyResult<f64> {
    run(py, 0.0, |_| sum(&terms)?.trace())
}

/// The largest eigenvalue of the damped sum.
#[pyfunction]
pub fn kronecker_top_eigenvalue(
    py: Python<'_>,
    terms: Vec<RawTerm>,
    damping: f64,
) -> PyResult<f64> {
    let cubes = factors(&terms).map(|factor| factor.elements().powf(1.5));
    let flops = 30.0 * cubes.sum::<f64>();
    run(py, flops, |cancel| {
        sum(&terms)?.top_eigenvalue(damping, cancel)
    })
}

/// A sum of terms packed for many products.
#[pyclass(frozen, module = "ekfac_rs._core")]
pub struct KroneckerOperator(kronecker::KroneckerOperator);

#[pymethods]
impl KroneckerOperator {
    #[new]
    fn new(py: Python<'_>, terms: Vec<RawTerm>) -> PyResult<Self> {
        run(py, 0.0, |_| {
            kronecker::KroneckerOperator::new(&sum(&terms)?)
        })
        .map(Self)
    }

    /// Writes the product and returns its inner product with `v`.
    fn apply(&self, py: Python<'_>, v: RawTensor, mut out: RawTensor) -> PyResult<f64> {
        run(py, self.0.flops() as f64, |_| {
            check_disjoint(&[&out], [&v])?;
            self.0.apply(&v.view()?, &mut out.view_mut()?)
        })
    }

    /// Floating-point operations of one product.
    #[getter]
    fn flops(&self) -> usize {
        self.0.flops()
    }
}
