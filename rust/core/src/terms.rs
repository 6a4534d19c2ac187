//! Sums of Kronecker products as matrices: terms, and groups of rows with terms of their own.

use std::ops::Range;

use crate::matrix::{Matrix, MatrixMut};

/// A term (A, G) of a sum of Kronecker products `G (x) A`.
pub type Term<'a, T> = (Matrix<'a, T>, Matrix<'a, T>);

/// The rows of V that one group acts on, and its terms.
#[derive(Debug)]
pub struct Group<'a, T> {
    /// Consecutive rows.
    pub rows: Range<usize>,
    /// The terms of these rows.
    pub terms: Vec<Term<'a, T>>,
}

impl<T> Group<'_, T> {
    /// The rows of this group.
    pub(crate) fn of<'v>(&self, v: Matrix<'v, T>) -> Matrix<'v, T> {
        v.subrows(self.rows.start, self.rows.len())
    }

    /// The rows of this group, to be written to.
    pub(crate) fn of_mut<'v>(&self, v: MatrixMut<'v, T>) -> MatrixMut<'v, T> {
        v.subrows(self.rows.start, self.rows.len())
    }
}
