//! Sums of Kronecker products as matrices: terms, and groups of rows with terms of their own; terms
//! whose factors are known by their roots.

use std::ops::Range;

use crate::error::{Error, Result};
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

/// A symmetric factor, as it is or by what it is made of; M is a matrix of some storage.
#[derive(Debug, Clone, Copy)]
pub enum Factor<M> {
    /// All of it.
    Whole(M),
    /// `root root^T + shift I`.
    Rooted {
        /// As many rows as the factor has.
        root: M,
        /// What is on the diagonal beside.
        shift: f64,
    },
    /// The identity.
    Identity,
}

impl<M> Factor<M> {
    /// The root, if that is all there is, or else the factor as it was.
    fn thin(self) -> std::result::Result<M, Self> {
        match self {
            Self::Rooted { root, shift: 0.0 } => Ok(root),
            other => Err(other),
        }
    }
}

/// A term (A, G) whose factors may be known by their roots.
pub type FactoredTerm<'a, T> = (Factor<Matrix<'a, T>>, Factor<Matrix<'a, T>>);

/// How a product with a term G (x) A is computed: `L M`, of which one comes from V.
#[derive(Debug)]
pub enum Way<M> {
    /// `G (V A)`.
    Whole {
        /// A.
        a: M,
        /// G.
        g: M,
    },
    /// `Q ((Q^T V) A)` where `G = Q Q^T`.
    ThroughG {
        /// Q.
        root: M,
        /// A.
        other: Factor<M>,
    },
    /// `(G (V S)) S^T` where `A = S S^T`.
    ThroughA {
        /// S.
        root: M,
        /// G.
        other: Factor<M>,
    },
}

impl<M> Way<M> {
    /// The cheapest way, for V of this size.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] where a factor that is not whole meets another that is no mere root: to be
    /// looked for before.
    pub fn of(
        a: Factor<M>,
        g: Factor<M>,
        [rows, columns]: [usize; 2],
        width: impl Fn(&M) -> usize,
    ) -> Result<Self> {
        match (a.thin(), g.thin()) {
            (Ok(s), Ok(q)) => {
                let (by_s, by_q) = (width(&s), width(&q));
                let by_a = by_s * (rows * columns + rows * by_q);
                let by_g = by_q * (rows * columns + columns * by_s);
                Ok(if by_g < by_a {
                    let other = Factor::Rooted {
                        root: s,
                        shift: 0.0,
                    };
                    Self::ThroughG { root: q, other }
                } else {
                    let other = Factor::Rooted {
                        root: q,
                        shift: 0.0,
                    };
                    Self::ThroughA { root: s, other }
                })
            }
            (Ok(root), Err(other)) => Ok(Self::ThroughA { root, other }),
            (Err(other), Ok(root)) => Ok(Self::ThroughG { root, other }),
            (Err(Factor::Whole(a)), Err(Factor::Whole(g))) => Ok(Self::Whole { a, g }),
            _ => Err(Error::Internal(
                "a term without a way to its product".to_owned(),
            )),
        }
    }
}

/// What is made of a product with a sum: `scale * sum + damping * V`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Combination {
    /// Of the product.
    pub scale: f64,
    /// Of V.
    pub damping: f64,
}

/// A product with V, and what is made of it.
#[derive(Debug)]
pub struct Multiplied<'a, T> {
    /// V.
    pub v: Matrix<'a, T>,
    /// The product; what is wanted takes its place.
    pub out: MatrixMut<'a, T>,
    /// What is wanted.
    pub wanted: Combination,
    /// Where the inner products with V of the product itself, and of V, go: `[1, 2]`.
    pub inner: MatrixMut<'a, f64>,
}

impl Combination {
    /// The product itself.
    pub const PRODUCT: Self = Self {
        scale: 1.0,
        damping: 0.0,
    };
}
