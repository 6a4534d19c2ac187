//! Conjugate gradients, for sums that have no closed-form inverse.

use super::basis::{DiagonalInBasis, Map, check_damping};
use super::decomposition::{decompose, widen};
use super::sum::{KroneckerSum, check_like_v, check_stack};
use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::cancel::Cancel;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::Storage;
use crate::spectrum::Spectrum;
use crate::terms::Term;
use crate::view::{TensorView, TensorViewMut};

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stopping {
    /// The residual to reach, relative to the right-hand side.
    pub tolerance: f64,
    /// After how many iterations to give up.
    pub max_iterations: usize,
}

/// How a solve went; for a stack and for groups, the worst of its members.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Convergence {
    /// Iterations needed.
    pub iterations: usize,
    /// The residual reached, relative to the right-hand side.
    pub residual: f64,
}

impl KroneckerSum<'_> {
    /// Solves `(sum_k G_k (x) A_k + damping I) X = V` for each V of `[D, K]` or `[S, D, K]`.
    ///
    /// Iterates in double precision from zero. The preconditioner is the diagonal of the damped
    /// sum in the eigenbasis of the summed factors, which for one term is the operator itself.
    ///
    /// # Errors
    ///
    /// [`Error::Numerical`] if a residual stays above the tolerance or the sum is not positive
    /// definite.
    pub fn conjugate_gradients(
        &self,
        damping: f64,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        stopping: Stopping,
        cancel: &Cancel,
    ) -> Result<Convergence> {
        check_damping(damping)?;
        if !(stopping.tolerance > 0.0 && stopping.tolerance < 1.0) {
            return Err(Error::Option(format!(
                "tolerance must be between 0 and 1, got {}",
                stopping.tolerance
            )));
        }
        check_stack("v", v.shape(), self.outputs(), self.inputs())?;
        check_like_v(v.shape(), out.shape())?;
        self.check_dtypes(&[("v", v.dtype()), ("out", out.dtype())])?;
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let (v, mut out) = (backend.matrices::<T>(v)?, backend.matrices_mut::<T>(out)?);
            backend.check_finite(&v, &|_| "v".to_owned())?;
            let mut worst = Convergence::default();
            for group in self.finite_by_group::<_, T>(backend)? {
                let solver = Solver::new(backend, &group.terms, damping, cancel)?;
                for (&v, out) in v.iter().zip(&mut out) {
                    let right = widen(backend, group.of(v))?;
                    let (x, convergence) = solver.solve(right, stopping, cancel)?;
                    backend.copy(x.view(), group.of_mut(out.as_mut()))?;
                    worst.iterations = worst.iterations.max(convergence.iterations);
                    worst.residual = worst.residual.max(convergence.residual);
                }
            }
            Ok(worst)
        }))
    }
}

/// A term (A, G) in double precision.
type OwnedTerm<B> = (<B as Backend>::Matrix<f64>, <B as Backend>::Matrix<f64>);

/// The damped sum in double precision, with its preconditioner.
struct Solver<'b, B: Backend> {
    backend: &'b B,
    terms: Vec<OwnedTerm<B>>,
    damping: f64,
    preconditioner: DiagonalInBasis<B>,
}

impl<'b, B: Backend> Solver<'b, B> {
    fn new<T: Real>(
        backend: &'b B,
        pairs: &[Term<'_, T>],
        damping: f64,
        cancel: &Cancel,
    ) -> Result<Self> {
        let terms = pairs
            .iter()
            .map(|&(a, g)| Ok((widen(backend, a)?, widen(backend, g)?)))
            .collect::<Result<Vec<_>>>()?;
        cancel.check()?;
        let preconditioner = diagonal_of_sum(backend, &terms, damping)?;
        Ok(Self {
            backend,
            terms,
            damping,
            preconditioner,
        })
    }

    fn multiply(&self, v: &B::Matrix<f64>, cancel: &Cancel) -> Result<B::Matrix<f64>> {
        let terms: Vec<_> = self
            .terms
            .iter()
            .map(|(a, g)| (a.view(), g.view()))
            .collect();
        let mut out = self.backend.zeros(v.view().rows(), v.view().columns())?;
        let target = vec![out.view_mut()];
        self.backend
            .kronecker_product(&terms, &[v.view()], target, self.damping, cancel)?;
        Ok(out)
    }

    fn solve(
        &self,
        v: B::Matrix<f64>,
        stopping: Stopping,
        cancel: &Cancel,
    ) -> Result<(B::Matrix<f64>, Convergence)> {
        let backend = self.backend;
        let dot = |a: &B::Matrix<f64>, b: &B::Matrix<f64>| backend.dot(a.view(), b.view());
        let mut x = backend.zeros::<f64>(v.view().rows(), v.view().columns())?;
        let norm = dot(&v, &v)?.sqrt();
        if norm == 0.0 {
            return Ok((x, Convergence::default()));
        }
        let mut residual = v;
        let mut direction = self
            .preconditioner
            .apply(backend, &residual, Map::Inverse)?;
        let mut energy = dot(&residual, &direction)?;
        let mut reached = 1.0;
        for iteration in 1..=stopping.max_iterations {
            cancel.check()?;
            let image = self.multiply(&direction, cancel)?;
            let curvature = dot(&direction, &image)?;
            if curvature.is_nan() || curvature <= 0.0 {
                return Err(Error::Numerical(format!(
                    "the damped sum is not positive definite (curvature {curvature:.3e} along a \
                     search direction): add damping"
                )));
            }
            let step = energy / curvature;
            backend.add_scaled(step, direction.view(), x.view_mut())?;
            backend.add_scaled(-step, image.view(), residual.view_mut())?;
            reached = dot(&residual, &residual)?.sqrt() / norm;
            if reached <= stopping.tolerance {
                let convergence = Convergence {
                    iterations: iteration,
                    residual: reached,
                };
                return Ok((x, convergence));
            }
            let mut next = self
                .preconditioner
                .apply(backend, &residual, Map::Inverse)?;
            let next_energy = dot(&residual, &next)?;
            backend.add_scaled(next_energy / energy, direction.view(), next.view_mut())?;
            (direction, energy) = (next, next_energy);
        }
        Err(Error::Numerical(format!(
            "conjugate gradients reached a relative residual of {reached:.3e} in {} iterations, \
             not {:.3e}: raise max_iterations, the tolerance or the damping",
            stopping.max_iterations, stopping.tolerance
        )))
    }
}

/// The diagonal of the damped sum in the eigenbasis of the summed, equally weighted factors.
///
/// In an orthonormal basis the diagonal of a positive definite operator is positive, so this is
/// always a valid preconditioner; it is exact where the factors commute.
fn diagonal_of_sum<B: Backend>(
    backend: &B,
    terms: &[OwnedTerm<B>],
    damping: f64,
) -> Result<DiagonalInBasis<B>> {
    let factors_a: Vec<_> = terms.iter().map(|(a, _)| a).collect();
    let factors_g: Vec<_> = terms.iter().map(|(_, g)| g).collect();
    let a = common_basis(backend, &factors_a)?;
    let g = common_basis(backend, &factors_g)?;
    let spectrum = Spectrum {
        constant: damping,
        pairs: g.diagonals.into_iter().zip(a.diagonals).collect(),
    };
    let diagonal = DiagonalInBasis::orthonormal(a.vectors, g.vectors, spectrum);
    diagonal.expect_positive()?;
    Ok(diagonal)
}

/// Orthonormal vectors, as columns, and the diagonal of each factor in their basis.
struct CommonBasis<M> {
    vectors: M,
    diagonals: Vec<Vec<f64>>,
}

/// The eigenvectors of the sum of the factors, each divided by its trace.
fn common_basis<B: Backend>(
    backend: &B,
    factors: &[&B::Matrix<f64>],
) -> Result<CommonBasis<B::Matrix<f64>>> {
    let size = factors[0].view().rows();
    let mut sum = backend.zeros::<f64>(size, size)?;
    for factor in factors {
        let trace: f64 = backend.diagonal(factor.view())?.iter().sum();
        if trace > 0.0 {
            backend.add_scaled(trace.recip(), factor.view(), sum.view_mut())?;
        }
    }
    let (_, vectors) = decompose(backend, sum.view())?;
    let mut image = backend.zeros::<f64>(size, size)?;
    let basis = vectors.view();
    let diagonals = factors.iter().map(|factor| {
        backend.gemm(image.view_mut(), false, factor.view(), basis, 1.0)?;
        backend.column_dots(image.view(), basis)
    });
    let diagonals = diagonals.collect::<Result<_>>()?;
    Ok(CommonBasis { vectors, diagonals })
}
