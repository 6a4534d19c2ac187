//! Bindings of `ekfac_core::linalg`.

use ekfac_core::linalg;
use pyo3::prelude::*;

use crate::call::run;
use crate::tensor::{RawTensor, check_disjoint};

/// Divides the lower triangle and copies it to the upper one, in place; of each matrix of a stack.
#[pyfunction]
pub fn symmetrize(py: Python<'_>, mut x: RawTensor, divisor: f64) -> PyResult<()> {
    run(py, |_| linalg::symmetrize(&mut x.view_mut()?, divisor))
}

/// Eigenvalues in ascending order, eigenvectors as columns; of each matrix of a stack.
#[pyfunction]
pub fn eigh(
    py: Python<'_>,
    x: RawTensor,
    mut values: RawTensor,
    mut vectors: RawTensor,
) -> PyResult<()> {
    run(py, |_| {
        check_disjoint(&[&values, &vectors], [&x])?;
        linalg::eigh(
            &x.view()?,
            &mut values.view_mut()?,
            &mut vectors.view_mut()?,
        )
    })
}
