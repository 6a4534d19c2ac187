//! Sums of Kronecker products `H = sum_k G_k (x) A_k`, acting on matrices as
//! `V -> sum_k G_k V A_k`.
//!
//! V is `[D, K]` and `vec` is row-major; each A is `[K, K]`, each G is `[D, D]`, all symmetric and
//! stored in full.
//!
//! Factors A `[groups, K, K]` and G `[groups, D / groups, D / groups]` make the operator block
//! diagonal: each group of `D / groups` consecutive rows of V has terms of its own. Whatever is
//! computed is then computed group by group.

use std::ops::Range;

use faer::{MatMut, MatRef};

use crate::backend::{Backend, Spectrum, Storage, on_device};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::linalg::expect_squares;
use crate::view::{Dtype, Place, Real, TensorView, TensorViewMut, with_real};

mod compress;
mod conjugate;
mod eigenvalue;
mod inverse;
mod operator;
mod root;

pub use self::conjugate::{Convergence, Stopping};
pub use self::inverse::KroneckerInverse;
pub use self::operator::KroneckerOperator;
pub use self::root::KroneckerRoot;

/// A term as matrices (A, G).
pub type Pair<'a, T> = (MatRef<'a, T>, MatRef<'a, T>);

/// The rows of V that one group acts on, and its terms.
pub struct Group<'a, T> {
    /// Consecutive rows.
    pub rows: Range<usize>,
    /// Terms (A, G).
    pub terms: Vec<Pair<'a, T>>,
}

impl<T: Real> Group<'_, T> {
    /// The rows of this group.
    pub(crate) fn of<'v>(&self, v: MatRef<'v, T>) -> MatRef<'v, T> {
        v.subrows(self.rows.start, self.rows.len())
    }

    /// The rows of this group, to be written to.
    pub(crate) fn of_mut<'v>(&self, v: MatMut<'v, T>) -> MatMut<'v, T> {
        v.subrows_mut(self.rows.start, self.rows.len())
    }
}

/// A borrowed, checked sum of Kronecker products.
#[derive(Debug, Clone)]
pub struct KroneckerSum<'a> {
    terms: Vec<(TensorView<'a>, TensorView<'a>)>,
    groups: usize,
    inputs: usize,
    outputs: usize,
    dtype: Dtype,
    place: Place,
}

impl<'a> KroneckerSum<'a> {
    /// Checks that all terms (A, G) agree in shape, dtype and device.
    pub fn new(terms: Vec<(TensorView<'a>, TensorView<'a>)>) -> Result<Self> {
        let Some((first_a, first_g)) = terms.first() else {
            return Err(Error::Option(
                "a sum of Kronecker products needs at least one term".to_owned(),
            ));
        };
        let (groups, inputs) = expect_squares("A of term 0", first_a.shape())?;
        let (groups_g, outputs) = expect_squares("G of term 0", first_g.shape())?;
        if groups != groups_g || first_a.shape().len() != first_g.shape().len() {
            return Err(Error::Shape(format!(
                "A and G must have the same groups, got shapes {:?} and {:?}",
                first_a.shape(),
                first_g.shape()
            )));
        }
        let dtype = first_a.dtype();
        for (index, (a, g)) in terms.iter().enumerate() {
            for (name, factor, first) in [("A", a, first_a), ("G", g, first_g)] {
                if factor.shape() != first.shape() {
                    return Err(Error::Shape(format!(
                        "{name} of term {index} must be {:?} like that of term 0, got shape {:?}",
                        first.shape(),
                        factor.shape()
                    )));
                }
                if factor.dtype() != dtype {
                    return Err(Error::Dtype(format!(
                        "{name} of term {index} must be {dtype} like the first factor, got {}",
                        factor.dtype()
                    )));
                }
                factor.layout().expect_device(first_a.layout().device)?;
            }
        }
        Ok(Self {
            groups,
            inputs,
            outputs: groups * outputs,
            dtype,
            place: first_a.place(),
            terms,
        })
    }

    /// Number of terms.
    pub fn len(&self) -> usize {
        self.terms.len()
    }

    /// Whether there is no term; never true of a checked sum.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// Number of groups of rows of V; 1 where all rows share their terms.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// K, the size of every A.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// D, the size of every G times the number of groups.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Device and stream of the factors.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Floating-point operations of one product with a single V.
    pub fn flops(&self) -> f64 {
        let (inputs, outputs) = (self.inputs as f64, self.outputs as f64);
        2.0 * inputs * outputs * (inputs + outputs / self.groups as f64) * self.len() as f64
    }

    /// `out = sum_k G_k V A_k + damping * V` for V of shape `[D, K]` or `[S, D, K]`.
    pub fn product(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        check_stack("v", v.shape(), self.outputs, self.inputs)?;
        check_like_v(v.shape(), out.shape())?;
        self.check_dtypes(&[("v", v.dtype()), ("out", out.dtype())])?;
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let (v, mut out) = (backend.matrices::<T>(v)?, backend.matrices_mut::<T>(out)?);
            for group in self.by_group::<_, T>(backend)? {
                let v: Vec<_> = v.iter().map(|&v| group.of(v)).collect();
                let out = out.iter_mut().map(|out| group.of_mut(out.as_mut())).collect();
                backend.kronecker_product(&group.terms, &v, out, damping, cancel)?;
            }
            Ok(())
        }))
    }

    /// `sum_k <V, G_k V A_k>`, summed over the stack if V is `[S, D, K]`.
    pub fn quadratic(&self, v: &TensorView<'_>, cancel: &Cancel) -> Result<f64> {
        check_stack("v", v.shape(), self.outputs, self.inputs)?;
        self.check_dtypes(&[("v", v.dtype())])?;
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let v = backend.matrices::<T>(v)?;
            let mut total = 0.0;
            for group in self.by_group::<_, T>(backend)? {
                for &v in &v {
                    total += quadratic(backend, &group.terms, group.of(v), cancel)?;
                }
            }
            Ok(total)
        }))
    }

    /// The Frobenius inner product with another sum of the same sizes.
    pub fn inner(&self, other: &KroneckerSum<'_>) -> Result<f64> {
        let sizes = |sum: &KroneckerSum<'_>| (sum.groups, sum.outputs, sum.inputs);
        if sizes(self) != sizes(other) {
            return Err(Error::Shape(format!(
                "both sums must have the same groups, D and K, got {:?} and {:?}",
                sizes(self),
                sizes(other)
            )));
        }
        self.check_dtypes(&[("the other sum", other.dtype)])?;
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let groups = self.by_group::<_, T>(backend)?;
            let others = other.by_group::<_, T>(backend)?;
            let pairs = groups.iter().zip(&others);
            pairs.map(|(group, other)| inner(backend, &group.terms, &other.terms)).sum()
        }))
    }

    /// The trace, `sum_k tr(A_k) tr(G_k)` of every group.
    pub fn trace(&self) -> Result<f64> {
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let traces = |x| -> Result<Vec<f64>> {
                let diagonals = backend.diagonals(&backend.matrices::<T>(x)?)?;
                Ok(diagonals.iter().map(|diagonal| diagonal.iter().sum()).collect())
            };
            let mut total = 0.0;
            for (a, g) in &self.terms {
                let pairs = traces(a)?.into_iter().zip(traces(g)?);
                total += pairs.map(|(a, g)| a * g).sum::<f64>();
            }
            Ok(total)
        }))
    }

    /// Writes the diagonal as a `[D, K]` matrix.
    pub fn diagonal(&self, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.check_shape("out", out.shape(), [self.outputs, self.inputs])?;
        self.check_dtypes(&[("out", out.dtype())])?;
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let mut out = backend.matrix_mut::<T>(out)?;
            for group in self.by_group::<_, T>(backend)? {
                let terms = group.terms.iter();
                let pairs = terms.map(|&(a, g)| Ok((backend.diagonal(g)?, backend.diagonal(a)?)));
                let diagonal = Spectrum { constant: 0.0, pairs: pairs.collect::<Result<_>>()? };
                backend.write_spectrum(&diagonal, group.of_mut(out.as_mut()))?;
            }
            Ok(())
        }))
    }

    /// Writes the whole `[D K, D K]` matrix; row and column indices are `d * K + k`. It is zero
    /// between rows of different groups.
    pub fn dense(&self, out: &mut TensorViewMut<'_>) -> Result<()> {
        let size = self.outputs * self.inputs;
        self.check_shape("out", out.shape(), [size, size])?;
        self.check_dtypes(&[("out", out.dtype())])?;
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let mut out = backend.matrix_mut::<T>(out)?;
            let groups = self.by_group::<_, T>(backend)?;
            if groups.len() > 1 {
                backend.write_spectrum(&Spectrum::default(), out.as_mut())?;
            }
            for Group { rows, terms } in groups {
                let (start, size) = (rows.start * self.inputs, rows.len() * self.inputs);
                let block = out.as_mut().submatrix_mut(start, start, size, size);
                backend.dense_kronecker(&terms, block)?;
            }
            Ok(())
        }))
    }

    /// The largest eigenvalue of the sum plus `damping`, the largest of all groups: exact for one
    /// term and for small groups, otherwise by Lanczos iterations, from below, to a relative
    /// accuracy of about 1e-4 or better.
    pub fn top_eigenvalue(&self, damping: f64, cancel: &Cancel) -> Result<f64> {
        on_device!(self.place, backend => with_real!(self.dtype, T => {
            let groups = self.finite_by_group::<_, T>(backend)?;
            Ok(eigenvalue::top(backend, &groups, cancel)? + damping)
        }))
    }

    /// The terms of each group.
    pub(crate) fn by_group<B: Backend, T: Real>(&self, backend: &B) -> Result<Vec<Group<'a, T>>> {
        let height = self.outputs / self.groups;
        let group = |index: usize| Group {
            rows: index * height..(index + 1) * height,
            terms: Vec::with_capacity(self.len()),
        };
        let mut groups: Vec<_> = (0..self.groups).map(group).collect();
        for (a, g) in &self.terms {
            let pairs = backend
                .matrices::<T>(a)?
                .into_iter()
                .zip(backend.matrices::<T>(g)?);
            for (group, pair) in groups.iter_mut().zip(pairs) {
                group.terms.push(pair);
            }
        }
        Ok(groups)
    }

    /// The terms, after making sure that decompositions will not meet NaN or infinity.
    fn finite_by_group<B: Backend, T: Real>(&self, backend: &B) -> Result<Vec<Group<'a, T>>> {
        for (term, (a, g)) in self.terms.iter().enumerate() {
            for (factor, name) in [(a, "A"), (g, "G")] {
                backend.check_finite::<T>(&backend.matrices(factor)?, &|group| {
                    format!("{name} of term {term}{}", self.name_of_group(group))
                })?;
            }
        }
        self.by_group(backend)
    }

    /// What error messages add to say which group is meant.
    fn name_of_group(&self, group: usize) -> String {
        if self.groups == 1 {
            String::new()
        } else {
            format!(" of group {group}")
        }
    }

    fn check_shape(&self, name: &str, shape: &[usize], expected: [usize; 2]) -> Result<()> {
        if shape == expected {
            Ok(())
        } else {
            Err(Error::Shape(format!(
                "{name} must be {expected:?}, got shape {shape:?}"
            )))
        }
    }

    fn check_dtypes(&self, given: &[(&str, Dtype)]) -> Result<()> {
        match given.iter().find(|(_, dtype)| *dtype != self.dtype) {
            None => Ok(()),
            Some((name, dtype)) => Err(Error::Dtype(format!(
                "{name} must be {} like the terms, got {dtype}",
                self.dtype
            ))),
        }
    }
}

fn quadratic<B: Backend, T: Real>(
    backend: &B,
    terms: &[Pair<'_, T>],
    v: MatRef<'_, T>,
    cancel: &Cancel,
) -> Result<f64> {
    let mut product = backend.zeros::<T>(v.nrows(), v.ncols())?;
    backend.kronecker_product(terms, &[v], vec![product.view_mut()], 0.0, cancel)?;
    backend.dot(v, product.view())
}

fn inner<B: Backend, T: Real>(
    backend: &B,
    terms: &[Pair<'_, T>],
    others: &[Pair<'_, T>],
) -> Result<f64> {
    let product = |&(a, g): &Pair<'_, T>, &(other_a, other_g): &Pair<'_, T>| {
        Ok(backend.dot(a, other_a)? * backend.dot(g, other_g)?)
    };
    terms
        .iter()
        .flat_map(|term| others.iter().map(move |other| product(term, other)))
        .sum()
}

/// A copy in double precision.
fn widen<B: Backend, T: Real>(backend: &B, x: MatRef<'_, T>) -> Result<B::Matrix<f64>> {
    let mut wide = backend.zeros::<f64>(x.nrows(), x.ncols())?;
    backend.copy(x, wide.view_mut())?;
    Ok(wide)
}

fn views<T: Real, M: Storage<T>>(x: &[M]) -> Vec<MatRef<'_, T>> {
    x.iter().map(Storage::view).collect()
}

/// Eigenvalues in ascending order, and eigenvectors as columns.
type Decomposition<B, T> = (Vec<f64>, <B as Backend>::Matrix<T>);

/// Eigenvalues in ascending order and eigenvectors of each of these matrices of one size.
fn decompose_all<B: Backend, T: Real>(
    backend: &B,
    x: &[MatRef<'_, T>],
) -> Result<Vec<Decomposition<B, T>>> {
    let vectors = x.iter().map(|x| backend.zeros::<T>(x.nrows(), x.nrows()));
    let mut vectors = vectors.collect::<Result<Vec<_>>>()?;
    let values = backend.eigh(x, vectors.iter_mut().map(Storage::view_mut).collect())?;
    Ok(values.into_iter().zip(vectors).collect())
}

/// Eigenvalues in ascending order and eigenvectors as columns.
fn decompose<B: Backend, T: Real>(backend: &B, x: MatRef<'_, T>) -> Result<Decomposition<B, T>> {
    let mut all = decompose_all(backend, &[x])?;
    all.pop()
        .ok_or_else(|| Error::Numerical("a decomposition was lost".to_owned()))
}

fn check_stack(name: &str, shape: &[usize], outputs: usize, inputs: usize) -> Result<()> {
    match shape {
        [.., rows, columns] if shape.len() <= 3 && (*rows, *columns) == (outputs, inputs) => Ok(()),
        _ => Err(Error::Shape(format!(
            "{name} must be [{outputs}, {inputs}] or [S, {outputs}, {inputs}], got shape {shape:?}"
        ))),
    }
}

fn check_like_v(v: &[usize], out: &[usize]) -> Result<()> {
    if v == out {
        Ok(())
    } else {
        Err(Error::Shape(format!(
            "out must have the shape of v, {v:?}, got shape {out:?}"
        )))
    }
}
