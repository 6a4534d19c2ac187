//! Eigendecompositions and Cholesky factors.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::{cholesky::llt, evd, triangular_solve};
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::blas::cut_rows;
use super::elements;
use super::team::Team;
use crate::element::Real;
use crate::error::{Error, Result};

/// Eigenvalues in ascending order, and eigenvectors as columns.
pub(super) fn eigh<T: Real>(
    team: &Team,
    x: MatRef<'_, T>,
    vectors: MatMut<'_, T>,
) -> Result<Vec<f64>> {
    let size = x.nrows();
    let mut values = Mat::<T>::zeros(size, 1);
    let mut columns = Mat::<T>::zeros(size, size);
    let flops = 10.0 * (size as f64).powi(3);
    let mut decompose = |par: Par| {
        let request = evd::self_adjoint_evd_scratch::<T>(
            size,
            evd::ComputeEigenvectors::Yes,
            par,
            Default::default(),
        );
        let mut memory = MemBuffer::new(request);
        evd::self_adjoint_evd(
            x,
            values.as_mut().col_mut(0).as_diagonal_mut(),
            Some(columns.as_mut()),
            par,
            MemStack::new(&mut memory),
            Default::default(),
        )
    };
    let outcome = if team.pieces(flops) > 1 {
        team.within_pool(decompose)
    } else {
        decompose(Par::Seq)
    };
    outcome.map_err(|_| {
        Error::Numerical(format!(
            "the eigendecomposition of a {size} x {size} matrix did not converge"
        ))
    })?;
    elements::copy(columns.as_ref(), vectors);
    Ok(values
        .as_ref()
        .col(0)
        .iter()
        .map(|value| value.to_f64())
        .collect())
}

/// Columns that are factored on one thread before all that is right of them is updated on many.
const PANEL: usize = 128;

/// Replaces the lower triangle by its Cholesky factor and zeroes the strict upper one, or returns
/// the index of the first pivot that is not positive.
///
/// By panels of columns: what is below a panel's triangle is solved for, and what is right of it
/// updated, in strips of rows for the threads of the team.
pub(super) fn cholesky<T: Real>(team: &Team, mut x: MatMut<'_, T>) -> Option<usize> {
    let size = x.nrows();
    let mut start = 0;
    while start < size {
        let width = PANEL.min(size - start);
        let rest = x
            .as_mut()
            .submatrix_mut(start, start, size - start, size - start);
        let (mut triangle, _, mut below, right) = rest.split_at_mut(width, width);
        if let Some(index) = cholesky_of_panel(triangle.as_mut()) {
            return Some(start + index);
        }
        let triangle = triangle.as_ref();
        team.run(cut_rows(below.as_mut(), PANEL), |(_, strip)| {
            let strip = strip.transpose_mut();
            triangular_solve::solve_lower_triangular_in_place(triangle, strip, Par::Seq);
        });
        update_lower(team, right, below.as_ref());
        start += width;
    }
    for j in 1..size {
        x.as_mut().submatrix_mut(0, j, j, 1).fill(T::default());
    }
    None
}

/// Factors a small matrix, or returns the index of the first pivot that is not positive.
fn cholesky_of_panel<T: Real>(x: MatMut<'_, T>) -> Option<usize> {
    let request =
        llt::factor::cholesky_in_place_scratch::<T>(x.nrows(), Par::Seq, Default::default());
    let mut memory = MemBuffer::new(request);
    let outcome = llt::factor::cholesky_in_place(
        x,
        llt::factor::LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    );
    outcome.err().map(|error| match error {
        llt::factor::LltError::NonPositivePivot { index } => index,
    })
}

/// Subtracts `b b^T` from the lower triangle of `x`.
fn update_lower<T: Real>(team: &Team, x: MatMut<'_, T>, b: MatRef<'_, T>) {
    let mut strips = cut_rows(x, PANEL);
    strips.reverse(); // the longest first, so that no thread ends long after the others
    let minus_one = T::from_f64(-1.0);
    team.run(strips, |(start, strip)| {
        let rows = b.subrows(start, strip.nrows());
        let (before, diagonal) = strip.split_at_col_mut(start);
        let others = b.subrows(0, start).transpose();
        matmul(before, Accum::Add, rows, others, minus_one, Par::Seq);
        triangular::matmul(
            diagonal.subcols_mut(0, rows.nrows()),
            BlockStructure::TriangularLower,
            Accum::Add,
            rows,
            BlockStructure::Rectangular,
            rows.transpose(),
            BlockStructure::Rectangular,
            minus_one,
            Par::Seq,
        );
    });
}
