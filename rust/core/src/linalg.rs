//! Dense symmetric matrices on their own.

use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Storage};
use crate::view::{TensorView, TensorViewMut};

/// Copies the lower triangle of a square matrix, or of each one of a stack, to its upper one.
pub fn symmetrize(x: &mut TensorViewMut<'_>) -> Result<()> {
    x.layout().expect_squares("x")?;
    on_device!(x.place(), backend => {
        with_real!(x.dtype(), T => backend.symmetrize(backend.matrices_mut::<T>(x)?))
    })
}

/// Eigenvalues in ascending order (`values`, `[n]`) and eigenvectors as columns (`vectors`,
/// `[n, n]`) of a symmetric matrix, of which the lower triangle is read; of each one of a stack, if
/// all three have a leading dimension more.
pub fn eigh(
    x: &TensorView<'_>,
    values: &mut TensorViewMut<'_>,
    vectors: &mut TensorViewMut<'_>,
) -> Result<()> {
    x.layout().expect_squares("x")?;
    let rows = &x.shape()[..x.shape().len() - 1];
    if values.shape() != rows || vectors.shape() != x.shape() {
        return Err(Error::Shape(format!(
            "values and vectors must be {rows:?} and {:?}, got shapes {:?} and {:?}",
            x.shape(),
            values.shape(),
            vectors.shape()
        )));
    }
    on_device!(x.place(), backend => {
        with_real!(x.dtype(), T => write_eigh::<_, T>(backend, x, values, vectors))
    })
}

fn write_eigh<B: Backend, T: Real>(
    backend: &B,
    x: &TensorView<'_>,
    values: &mut TensorViewMut<'_>,
    vectors: &mut TensorViewMut<'_>,
) -> Result<()> {
    let x = backend.matrices::<T>(x)?;
    let vectors = backend.matrices_mut::<T>(vectors)?;
    let mut values = values.as_rows();
    let values = backend.matrix_mut::<T>(&mut values)?;
    backend.check_finite(&x, &|_| "x".to_owned())?;
    let found = backend.eigh(&x, vectors)?;
    let found = HostMatrix::from_fn(values.rows(), values.columns(), |row, column| {
        T::from_f64(found[row][column])
    });
    backend.copy(backend.upload(&found)?.view(), values)
}
