//! Dense symmetric matrices on their own.

use faer::Mat;

use crate::backend::{Backend, Storage, on_device};
use crate::error::{Error, Result};
use crate::view::{Real, TensorView, TensorViewMut, with_real};

/// Copies the lower triangle of a square matrix, or of each one of a stack, to its upper one.
pub fn symmetrize(x: &mut TensorViewMut<'_>) -> Result<()> {
    expect_squares("x", x.shape())?;
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
    expect_squares("x", x.shape())?;
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
    let found = Mat::from_fn(values.nrows(), values.ncols(), |row, column| {
        T::from_f64(found[row][column])
    });
    backend.copy(backend.upload(found.as_ref())?.view(), values)
}

/// Number and size of non-empty square matrices: one (`[n, n]`), or a stack (`[groups, n, n]`).
pub(crate) fn expect_squares(name: &str, shape: &[usize]) -> Result<(usize, usize)> {
    match *shape {
        [rows, columns] if rows == columns && rows > 0 => Ok((1, rows)),
        [groups, rows, columns] if rows == columns && groups * rows > 0 => Ok((groups, rows)),
        _ => Err(Error::Shape(format!(
            "{name} must be a square matrix or a stack of them, got shape {shape:?}"
        ))),
    }
}
