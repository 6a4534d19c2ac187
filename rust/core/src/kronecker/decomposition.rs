//! Eigendecompositions, and what goes into them and comes out.

use crate::backend::Backend;
use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Storage};

/// A copy in double precision.
pub(super) fn widen<B: Backend, T: Real>(backend: &B, x: Matrix<'_, T>) -> Result<B::Matrix<f64>> {
    let mut wide = backend.zeros::<f64>(x.rows(), x.columns())?;
    backend.copy(x, wide.view_mut())?;
    Ok(wide)
}

/// The views of matrices.
pub(super) fn views<T: Real, M: Storage<T>>(x: &[M]) -> Vec<Matrix<'_, T>> {
    x.iter().map(Storage::view).collect()
}

/// Eigenvalues in ascending order, and eigenvectors as columns.
pub(super) type Decomposition<B, T> = (Vec<f64>, <B as Backend>::Matrix<T>);

/// Eigenvalues in ascending order and eigenvectors of each of these matrices of one size.
pub(super) fn decompose_all<B: Backend, T: Real>(
    backend: &B,
    x: &[Matrix<'_, T>],
) -> Result<Vec<Decomposition<B, T>>> {
    let vectors = x.iter().map(|x| backend.zeros::<T>(x.rows(), x.rows()));
    let mut vectors = vectors.collect::<Result<Vec<_>>>()?;
    let values = backend.eigh(x, vectors.iter_mut().map(Storage::view_mut).collect())?;
    Ok(values.into_iter().zip(vectors).collect())
}

/// Eigenvalues in ascending order and eigenvectors as columns.
pub(super) fn decompose<B: Backend, T: Real>(
    backend: &B,
    x: Matrix<'_, T>,
) -> Result<Decomposition<B, T>> {
    let mut all = decompose_all(backend, &[x])?;
    all.pop()
        .ok_or_else(|| Error::Internal("a decomposition was lost".to_owned()))
}
