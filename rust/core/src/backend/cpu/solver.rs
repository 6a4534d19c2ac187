//! Eigendecompositions and Cholesky factors.

use faer::linalg::{cholesky::llt, evd};
use faer::{Mat, MatMut, MatRef, Par};

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
        let mut memory = faer::dyn_stack::MemBuffer::new(request);
        evd::self_adjoint_evd(
            x,
            values.as_mut().col_mut(0).as_diagonal_mut(),
            Some(columns.as_mut()),
            par,
            faer::dyn_stack::MemStack::new(&mut memory),
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

/// Replaces the lower triangle by its Cholesky factor and zeroes the strict upper one, or returns
/// the index of the first pivot that is not positive.
pub(super) fn cholesky<T: Real>(team: &Team, mut x: MatMut<'_, T>) -> Result<Option<usize>> {
    let size = x.nrows();
    let outcome = team.within_pool(|par| {
        let request = llt::factor::cholesky_in_place_scratch::<T>(size, par, Default::default());
        let mut memory = faer::dyn_stack::MemBuffer::new(request);
        llt::factor::cholesky_in_place(
            x.as_mut(),
            llt::factor::LltRegularization::default(),
            par,
            faer::dyn_stack::MemStack::new(&mut memory),
            Default::default(),
        )
    });
    for j in 1..size {
        for i in 0..j {
            x[(i, j)] = T::default();
        }
    }
    match outcome {
        Ok(_) => Ok(None),
        Err(llt::factor::LltError::NonPositivePivot { index }) => Ok(Some(index)),
    }
}
