//! Dense symmetric matrices on their own.

use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Storage};
use crate::view::{TensorView, TensorViewMut};

/// Divides the lower triangle of a square matrix, or of each one of a stack, and copies it to the
/// upper one: a sum of squares becomes a mean, whole.
///
/// # Errors
///
/// [`Error::Option`] unless the divisor is finite and not zero; [`Error::Shape`] if x is not square.
pub fn symmetrize(x: &mut TensorViewMut<'_>, divisor: f64) -> Result<()> {
    x.layout().expect_squares("x")?;
    if !divisor.is_finite() || divisor == 0.0 {
        return Err(Error::Option(format!(
            "divisor must be finite and not zero, got {divisor}"
        )));
    }
    on_device!(x.place(), backend => {
        with_real!(x.dtype(), T => backend.symmetrize(backend.matrices_mut::<T>(x)?, divisor))
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
