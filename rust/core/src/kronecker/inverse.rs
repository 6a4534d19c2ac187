//! Exact inverses: of one damped term, and of a sum of two terms.

use super::basis::{DiagonalInBasis, Map, check_damping};
use super::decomposition::{decompose, decompose_all, views, widen};
use super::kept::{Keep, Kept};
use super::sum::{KroneckerSum, check_like_v, check_stack};
use crate::backend::dispatch::on_device;
use crate::backend::{Backend, Triangle};
use crate::cancel::Cancel;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Matrix, MatrixMut, Storage};
use crate::place::{Device, Place};
use crate::spectrum::Spectrum;
use crate::terms::Group;
use crate::view::{TensorView, TensorViewMut};

/// The inverse of `G (x) A + damping * I`, or of `G_1 (x) A_1 + G_2 (x) A_2`, ready to be applied.
///
/// Both are diagonal in a basis `P_G (x) P_A`: for one term of eigenvectors or, without damping, of
/// the inverse Cholesky factors, and for two terms of the vectors that diagonalise `A_1` and `A_2`
/// (and `G_1` and `G_2`) at once. Everything is kept and applied in double precision, whatever the
/// dtype of the terms. Each group has an inverse of its own.
pub struct KroneckerInverse {
    /// (D, K).
    size: (usize, usize),
    logdet: f64,
    inverse: Kept<Map, ()>,
}

impl KroneckerInverse {
    /// Decomposes one or two terms.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for more than two terms, and for two terms with damping, which have no
    /// closed form; [`Error::Numerical`] if the sum is singular or indefinite.
    pub fn new(sum: &KroneckerSum<'_>, damping: f64, cancel: &Cancel) -> Result<Self> {
        check_damping(damping)?;
        if sum.len() > 2 {
            return Err(Error::Option(format!(
                "only sums of one or two terms have an exact inverse, got {} terms: use conjugate \
                 gradients, or compress the sum to two terms first",
                sum.len()
            )));
        }
        if sum.len() == 2 && damping != 0.0 {
            return Err(Error::Option(format!(
                "a sum of two terms is inverted exactly only without damping, got {damping}: use \
                 conjugate gradients, or damp the factors themselves"
            )));
        }
        on_device!(sum.place(), backend => with_real!(sum.dtype(), T => {
            let groups = sum.finite_by_group::<_, T>(backend)?;
            Self::diagonalise(backend, &groups, damping, sum.place(), cancel)
        }))
    }

    fn diagonalise<B: Backend + 'static, T: Real>(
        backend: &B,
        groups: &[Group<'_, T>],
        damping: f64,
        home: Place,
        cancel: &Cancel,
    ) -> Result<Self> {
        // On a GPU a launch takes longer than a small matrix: many are decomposed together.
        let one_by_one = groups.len() == 1 || backend.device() == Device::Cpu;
        let groups = match groups[0].terms.len() {
            1 if damping == 0.0 && one_by_one => each(groups, cancel, |group| {
                undamped_term(backend, group, cancel)
            })?,
            1 => one_term(backend, groups, damping)?,
            _ => each(groups, cancel, |group| two_terms(backend, group, cancel))?,
        };
        groups
            .iter()
            .try_for_each(DiagonalInBasis::expect_positive)?;
        let (outputs, inputs) = groups[0].size();
        Ok(Self {
            size: (groups.len() * outputs, inputs),
            logdet: groups.iter().map(DiagonalInBasis::logdet).sum(),
            inverse: Kept::new(Inverse { groups }, backend, home)?,
        })
    }

    /// Writes `H^-1 V` for V of shape `[D, K]` or `[S, D, K]`.
    pub fn solve(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        cancel: &Cancel,
    ) -> Result<()> {
        self.map(v, out, Map::Inverse, cancel)
    }

    /// Maps standard normal noise to samples from N(0, H^-1); shapes as in [`Self::solve`].
    pub fn sample(
        &self,
        noise: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        cancel: &Cancel,
    ) -> Result<()> {
        self.map(noise, out, Map::InverseRoot, cancel)
    }

    /// The natural logarithm of the determinant of H.
    pub fn logdet(&self) -> f64 {
        self.logdet
    }

    fn map(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        map: Map,
        cancel: &Cancel,
    ) -> Result<()> {
        let (outputs, inputs) = self.size;
        check_stack("v", v.shape(), outputs, inputs)?;
        check_like_v(v.shape(), out.shape())?;
        if out.dtype() != v.dtype() {
            return Err(Error::Dtype(format!(
                "out must be {} like v, got {}",
                v.dtype(),
                out.dtype()
            )));
        }
        self.inverse.apply(v, out, map, cancel)
    }
}

/// The inverse of each group.
struct Inverse<B: Backend> {
    groups: Vec<DiagonalInBasis<B>>,
}

impl<B: Backend + 'static> Keep for Inverse<B> {
    type On = B;
    type Task = Map;
    type Answer = ();

    fn apply(
        &self,
        backend: &B,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        map: Map,
        cancel: &Cancel,
    ) -> Result<()> {
        with_real!(v.dtype(), T => {
            let (v, out) = (backend.matrices::<T>(v)?, backend.matrices_mut::<T>(out)?);
            backend.check_finite(&v, &|_| "v".to_owned())?;
            let mut pairs = v.into_iter().zip(out);
            pairs.try_for_each(|(v, out)| self.apply_once(backend, v, out, map, cancel))
        })
    }
}

impl<B: Backend> Inverse<B> {
    fn apply_once<T: Real>(
        &self,
        backend: &B,
        v: Matrix<'_, T>,
        mut out: MatrixMut<'_, T>,
        map: Map,
        cancel: &Cancel,
    ) -> Result<()> {
        let height = v.rows() / self.groups.len();
        for (index, group) in self.groups.iter().enumerate() {
            cancel.check()?;
            let start = index * height;
            let wide = widen(backend, v.subrows(start, height))?;
            let result = group.apply(backend, &wide, map)?;
            backend.copy(result.view(), out.as_mut().subrows(start, height))?;
        }
        Ok(())
    }
}

/// The inverse of each group, one after another.
fn each<'a, 'b, B: Backend, T: Real>(
    groups: &'a [Group<'b, T>],
    cancel: &Cancel,
    invert: impl Fn(&'a Group<'b, T>) -> Result<DiagonalInBasis<B>>,
) -> Result<Vec<DiagonalInBasis<B>>> {
    let checked = |group| {
        cancel.check()?;
        invert(group)
    };
    groups.iter().map(checked).collect()
}

/// `G (x) A` is the identity in the basis `L_G^-T (x) L_A^-T`, with `G = L_G L_G^T` and A likewise.
fn undamped_term<B: Backend, T: Real>(
    backend: &B,
    group: &Group<'_, T>,
    cancel: &Cancel,
) -> Result<DiagonalInBasis<B>> {
    let (a, g) = group.terms[0];
    let (basis_a, volume_a) = whitening(backend, "A", a, cancel)?;
    let (basis_g, volume_g) = whitening(backend, "G", g, cancel)?;
    Ok(DiagonalInBasis {
        basis_a,
        basis_g,
        spectrum: Spectrum {
            constant: 1.0,
            pairs: Vec::new(),
        },
        log_volumes: [volume_a, volume_g],
    })
}

/// Columns of the basis that are solved for at once: those above it are zero.
const STRIP: usize = 256;

/// `L^-T` of `X = L L^T`, and the logarithm of its determinant.
fn whitening<B: Backend, T: Real>(
    backend: &B,
    name: &str,
    x: Matrix<'_, T>,
    cancel: &Cancel,
) -> Result<(B::Matrix<f64>, f64)> {
    let mut l = widen(backend, x)?;
    let log_volume = cholesky(backend, name, &mut l)?;
    let size = x.rows();
    let identity = HostMatrix::from_fn(size, size, |i, j| if i == j { 1.0 } else { 0.0 });
    let mut basis = backend.upload(&identity)?;
    for start in (0..size).step_by(STRIP) {
        cancel.check()?;
        let end = size.min(start + STRIP);
        let l = l.view().subrows(0, end).subcolumns(0, end);
        let strip = basis
            .view_mut()
            .subrows(0, end)
            .subcolumns(start, end - start);
        backend.solve_triangular(l, Triangle::LowerTransposed, strip)?;
    }
    Ok((basis, log_volume))
}

/// Replaces a positive definite matrix by its Cholesky factor L, and returns `log |det L^-1|`.
fn cholesky<B: Backend>(backend: &B, name: &str, x: &mut B::Matrix<f64>) -> Result<f64> {
    let diagonal = backend.diagonal(x.view())?;
    let largest = diagonal.iter().copied().fold(0.0, f64::max);
    if backend.cholesky(x.view_mut())?.is_some() {
        return Err(singular(name, 0.0, largest));
    }
    let pivots = backend.diagonal(x.view())?;
    let squares = pivots.iter().map(|pivot| pivot * pivot);
    let smallest = squares.fold(f64::INFINITY, f64::min);
    if smallest <= f64::EPSILON * diagonal.len() as f64 * largest {
        return Err(singular(name, smallest, largest));
    }
    Ok(-pivots.iter().map(|pivot| pivot.ln()).sum::<f64>())
}

fn one_term<B: Backend, T: Real>(
    backend: &B,
    groups: &[Group<'_, T>],
    damping: f64,
) -> Result<Vec<DiagonalInBasis<B>>> {
    let (mut a, mut g) = (Vec::new(), Vec::new());
    for group in groups {
        let (term_a, term_g) = group.terms[0];
        a.push(widen(backend, term_a)?);
        g.push(widen(backend, term_g)?);
    }
    let a = decompose_all(backend, &views(&a))?;
    let g = decompose_all(backend, &views(&g))?;
    let diagonals = a.into_iter().zip(g);
    let diagonals = diagonals.map(|((values_a, basis_a), (values_g, basis_g))| {
        if damping == 0.0 {
            expect_regular("A", &values_a)?;
            expect_regular("G", &values_g)?;
        }
        let spectrum = Spectrum {
            constant: damping,
            pairs: vec![(values_g, values_a)],
        };
        Ok(DiagonalInBasis::orthonormal(basis_a, basis_g, spectrum))
    });
    diagonals.collect()
}

fn expect_regular(name: &str, values: &[f64]) -> Result<()> {
    let (smallest, largest) = (values[0], values[values.len() - 1]);
    if smallest > f64::EPSILON * values.len() as f64 * largest {
        Ok(())
    } else {
        Err(singular(name, smallest, largest))
    }
}

fn singular(name: &str, smallest: f64, largest: f64) -> Error {
    Error::Numerical(format!(
        "{name} is singular or indefinite (from {smallest:.3e} to {largest:.3e}): add damping"
    ))
}

fn two_terms<B: Backend, T: Real>(
    backend: &B,
    group: &Group<'_, T>,
    cancel: &Cancel,
) -> Result<DiagonalInBasis<B>> {
    let ((a1, g1), (a2, g2)) = (group.terms[0], group.terms[1]);
    let a = diagonalise_together(backend, "A", a1, a2)?;
    cancel.check()?;
    let g = diagonalise_together(backend, "G", g1, g2)?;
    Ok(DiagonalInBasis {
        basis_a: a.basis,
        basis_g: g.basis,
        spectrum: Spectrum {
            constant: 0.0,
            pairs: vec![(g.first, a.first), (g.second, a.second)],
        },
        log_volumes: [a.log_volume, g.log_volume],
    })
}

/// A basis P in which two matrices are diagonal, and their diagonals.
struct Together<M> {
    basis: M,
    first: Vec<f64>,
    second: Vec<f64>,
    log_volume: f64,
}

/// Diagonalises X_1 and X_2 at once.
///
/// The sum `S = X_1 / t_1 + X_2 / t_2` (t the mean eigenvalue) is factored rather than either
/// matrix: each alone may be singular, as the within-batch stratum is in the direction of the
/// bias. With `S = L L^T` and `L^-1 X_1 L^-T = Q diag Q^T` the basis is `P = L^-T Q`.
fn diagonalise_together<B: Backend, T: Real>(
    backend: &B,
    name: &str,
    x1: Matrix<'_, T>,
    x2: Matrix<'_, T>,
) -> Result<Together<B::Matrix<f64>>> {
    let size = x1.rows();
    let (x1, x2) = (widen(backend, x1)?, widen(backend, x2)?);
    let mean = |x: &B::Matrix<f64>| -> Result<f64> {
        let mean = backend.diagonal(x.view())?.iter().sum::<f64>() / size as f64;
        Ok(if mean > 0.0 { mean } else { 1.0 })
    };
    let (t1, t2) = (mean(&x1)?, mean(&x2)?);
    let mut l = backend.zeros::<f64>(size, size)?;
    backend.add_scaled(t1.recip(), x1.view(), l.view_mut())?;
    backend.add_scaled(t2.recip(), x2.view(), l.view_mut())?;
    let log_volume = cholesky(backend, &format!("the sum of the two {name}"), &mut l)?;
    let mut congruent = x1;
    congruence(backend, &l, &mut congruent)?;
    let (first, mut basis) = decompose(backend, congruent.view())?;
    backend.solve_triangular(l.view(), Triangle::LowerTransposed, basis.view_mut())?;
    // In this basis S is the identity, so the second diagonal follows from the first.
    let second = first.iter().map(|value| (t2 * (1.0 - value / t1)).max(0.0));
    Ok(Together {
        basis,
        second: second.collect(),
        first: first.into_iter().map(|value| value.max(0.0)).collect(),
        log_volume,
    })
}

/// Replaces symmetric X by `L^-1 X L^-T`.
fn congruence<B: Backend>(backend: &B, l: &B::Matrix<f64>, x: &mut B::Matrix<f64>) -> Result<()> {
    backend.solve_triangular(l.view(), Triangle::Lower, x.view_mut())?;
    backend.solve_triangular(l.view(), Triangle::Lower, x.view_mut().transpose())
}
