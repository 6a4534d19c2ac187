//! Dense symmetric matrices on their own.

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use crate::view::{Real, TensorView, TensorViewMut, with_real};

/// Copies the lower triangle of a square matrix, or of each one of a stack, to its upper one.
pub fn symmetrize(x: &mut TensorViewMut<'_>) -> Result<()> {
    expect_squares("x", x.shape())?;
    x.expect_cpu()?;
    with_real!(x.dtype(), T => {
        let cpu = Cpu::current();
        x.matrices::<T>()?.into_iter().for_each(|x| cpu.symmetrize(x));
        Ok(())
    })
}

/// Eigenvalues in ascending order (`values`, `[n]`) and eigenvectors as columns (`vectors`,
/// `[n, n]`) of a symmetric matrix, of which the lower triangle is read.
pub fn eigh(
    x: &TensorView<'_>,
    values: &mut TensorViewMut<'_>,
    vectors: &mut TensorViewMut<'_>,
) -> Result<()> {
    let size = expect_square("x", x.shape())?;
    if values.shape() != [size] || vectors.shape() != [size, size] {
        return Err(Error::Shape(format!(
            "values and vectors must be [{size}] and [{size}, {size}], got shapes {:?} and {:?}",
            values.shape(),
            vectors.shape()
        )));
    }
    x.expect_cpu()?;
    with_real!(x.dtype(), T => write_eigh::<T>(x, values, vectors))
}

fn write_eigh<T: Real>(
    x: &TensorView<'_>,
    values: &mut TensorViewMut<'_>,
    vectors: &mut TensorViewMut<'_>,
) -> Result<()> {
    let (x, mut values) = (x.matrix::<T>()?, values.column::<T>()?);
    let vectors = vectors.matrix::<T>()?;
    let cpu = Cpu::current();
    cpu.check_finite(x, "x")?;
    for (index, value) in cpu.eigh(x, vectors)?.into_iter().enumerate() {
        values[(index, 0)] = T::from_f64(value);
    }
    Ok(())
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

/// The size of a square, non-empty matrix.
pub(crate) fn expect_square(name: &str, shape: &[usize]) -> Result<usize> {
    match *shape {
        [rows, columns] if rows == columns && rows > 0 => Ok(rows),
        _ => Err(Error::Shape(format!(
            "{name} must be a square matrix, got shape {shape:?}"
        ))),
    }
}
