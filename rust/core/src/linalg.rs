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
    x.expect_cpu()?;
    with_real!(x.dtype(), T => write_eigh::<T>(x, values, vectors))
}

fn write_eigh<T: Real>(
    x: &TensorView<'_>,
    values: &mut TensorViewMut<'_>,
    vectors: &mut TensorViewMut<'_>,
) -> Result<()> {
    let (x, vectors) = (x.matrices::<T>()?, vectors.matrices::<T>()?);
    let mut values = values.as_rows();
    let mut values = values.matrix::<T>()?;
    let cpu = Cpu::current();
    for &x in &x {
        cpu.check_finite(x, "x")?;
    }
    for (row, (x, vectors)) in x.into_iter().zip(vectors).enumerate() {
        for (column, value) in cpu.eigh(x, vectors)?.into_iter().enumerate() {
            values[(row, column)] = T::from_f64(value);
        }
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
