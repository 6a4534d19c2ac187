//! Sums of Kronecker products `H = sum_k G_k (x) A_k`, acting on matrices as
//! `V -> sum_k G_k V A_k`.
//!
//! V is `[D, K]` and `vec` is row-major; each A is `[K, K]`, each G is `[D, D]`, all symmetric and
//! stored in full.

use faer::MatRef;

use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Spectrum, Storage};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::linalg::expect_square;
use crate::view::{Dtype, Real, TensorView, TensorViewMut, with_real};

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
pub(crate) type Pair<'a, T> = (MatRef<'a, T>, MatRef<'a, T>);

/// A borrowed, checked sum of Kronecker products.
#[derive(Debug, Clone)]
pub struct KroneckerSum<'a> {
    terms: Vec<(TensorView<'a>, TensorView<'a>)>,
    inputs: usize,
    outputs: usize,
    dtype: Dtype,
}

impl<'a> KroneckerSum<'a> {
    /// Checks that all terms (A, G) agree in shape, dtype and device.
    pub fn new(terms: Vec<(TensorView<'a>, TensorView<'a>)>) -> Result<Self> {
        let Some((first_a, first_g)) = terms.first() else {
            return Err(Error::Option(
                "a sum of Kronecker products needs at least one term".to_owned(),
            ));
        };
        let inputs = expect_square("A of term 0", first_a.shape())?;
        let outputs = expect_square("G of term 0", first_g.shape())?;
        let dtype = first_a.dtype();
        for (index, (a, g)) in terms.iter().enumerate() {
            for (name, factor, size) in [("A", a, inputs), ("G", g, outputs)] {
                if factor.shape() != [size, size] {
                    return Err(Error::Shape(format!(
                        "{name} of term {index} must be [{size}, {size}], got shape {:?}",
                        factor.shape()
                    )));
                }
                if factor.dtype() != dtype {
                    return Err(Error::Dtype(format!(
                        "{name} of term {index} must be {dtype} like the first factor, got {}",
                        factor.dtype()
                    )));
                }
                factor.expect_cpu()?;
            }
        }
        Ok(Self {
            terms,
            inputs,
            outputs,
            dtype,
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

    /// K, the size of every A.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// D, the size of every G.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Floating-point operations of one product with a single V.
    pub fn flops(&self) -> f64 {
        let (inputs, outputs) = (self.inputs as f64, self.outputs as f64);
        2.0 * inputs * outputs * (inputs + outputs) * self.len() as f64
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
        with_real!(self.dtype, T => {
            let (terms, v, out) = (self.pairs::<T>()?, v.matrices::<T>()?, out.matrices::<T>()?);
            Cpu::current().kronecker_product(&terms, &v, out, damping, cancel)
        })
    }

    /// `sum_k <V, G_k V A_k>`, summed over the stack if V is `[S, D, K]`.
    pub fn quadratic(&self, v: &TensorView<'_>, cancel: &Cancel) -> Result<f64> {
        check_stack("v", v.shape(), self.outputs, self.inputs)?;
        self.check_dtypes(&[("v", v.dtype())])?;
        with_real!(self.dtype, T => {
            quadratic(&*Cpu::current(), &self.pairs::<T>()?, &v.matrices::<T>()?, cancel)
        })
    }

    /// The Frobenius inner product with another sum of the same sizes.
    pub fn inner(&self, other: &KroneckerSum<'_>) -> Result<f64> {
        if (self.inputs, self.outputs) != (other.inputs, other.outputs) {
            return Err(Error::Shape(format!(
                "both sums must have the same sizes, got K = {} and {}, D = {} and {}",
                self.inputs, other.inputs, self.outputs, other.outputs
            )));
        }
        self.check_dtypes(&[("the other sum", other.dtype)])?;
        with_real!(self.dtype, T => {
            Ok(inner(&*Cpu::current(), &self.pairs::<T>()?, &other.pairs::<T>()?))
        })
    }

    /// The trace, `sum_k tr(A_k) tr(G_k)`.
    pub fn trace(&self) -> Result<f64> {
        with_real!(self.dtype, T => {
            let cpu = Cpu::current();
            let trace = |x: MatRef<'_, T>| cpu.diagonal(x).iter().sum::<f64>();
            Ok(self.pairs::<T>()?.iter().map(|&(a, g)| trace(a) * trace(g)).sum())
        })
    }

    /// Writes the diagonal as a `[D, K]` matrix.
    pub fn diagonal(&self, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.check_shape("out", out.shape(), [self.outputs, self.inputs])?;
        self.check_dtypes(&[("out", out.dtype())])?;
        with_real!(self.dtype, T => {
            let cpu = Cpu::current();
            let pairs = self.pairs::<T>()?;
            let pairs = pairs.iter().map(|&(a, g)| (cpu.diagonal(g), cpu.diagonal(a)));
            let diagonal = Spectrum { constant: 0.0, pairs: pairs.collect() };
            cpu.write_spectrum(&diagonal, out.matrix::<T>()?);
            Ok(())
        })
    }

    /// Writes the whole `[D K, D K]` matrix; row and column indices are `d * K + k`.
    pub fn dense(&self, out: &mut TensorViewMut<'_>) -> Result<()> {
        let size = self.outputs * self.inputs;
        self.check_shape("out", out.shape(), [size, size])?;
        self.check_dtypes(&[("out", out.dtype())])?;
        with_real!(self.dtype, T => {
            Cpu::current().dense_kronecker(&self.pairs::<T>()?, out.matrix::<T>()?);
            Ok(())
        })
    }

    /// The largest eigenvalue of the sum plus `damping`: exact for one term, otherwise by Lanczos
    /// iterations, from below, to a relative accuracy of about 1e-4 or better.
    pub fn top_eigenvalue(&self, damping: f64, cancel: &Cancel) -> Result<f64> {
        with_real!(self.dtype, T => {
            let cpu = Cpu::current();
            let pairs = self.finite_pairs::<T>(&cpu)?;
            Ok(eigenvalue::top(&*cpu, &pairs, cancel)? + damping)
        })
    }

    pub(crate) fn pairs<T: Real>(&self) -> Result<Vec<Pair<'a, T>>> {
        let pair = |(a, g): &(TensorView<'a>, TensorView<'a>)| Ok((a.matrix()?, g.matrix()?));
        self.terms.iter().map(pair).collect()
    }

    /// The terms, after making sure that decompositions will not meet NaN or infinity.
    fn finite_pairs<T: Real>(&self, cpu: &Cpu) -> Result<Vec<Pair<'a, T>>> {
        let pairs = self.pairs::<T>()?;
        for (index, &(a, g)) in pairs.iter().enumerate() {
            cpu.check_finite(a, &format!("A of term {index}"))?;
            cpu.check_finite(g, &format!("G of term {index}"))?;
        }
        Ok(pairs)
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
    v: &[MatRef<'_, T>],
    cancel: &Cancel,
) -> Result<f64> {
    let mut total = 0.0;
    for &v in v {
        let mut product = backend.zeros::<T>(v.nrows(), v.ncols());
        backend.kronecker_product(terms, &[v], vec![product.view_mut()], 0.0, cancel)?;
        total += backend.dot(v, product.view());
    }
    Ok(total)
}

fn inner<B: Backend, T: Real>(backend: &B, terms: &[Pair<'_, T>], others: &[Pair<'_, T>]) -> f64 {
    let product = |&(a, g): &Pair<'_, T>, &(other_a, other_g): &Pair<'_, T>| {
        backend.dot(a, other_a) * backend.dot(g, other_g)
    };
    terms
        .iter()
        .flat_map(|term| others.iter().map(move |other| product(term, other)))
        .sum()
}

/// A copy in double precision.
fn widen<B: Backend, T: Real>(backend: &B, x: MatRef<'_, T>) -> B::Matrix<f64> {
    let mut wide = backend.zeros::<f64>(x.nrows(), x.ncols());
    backend.copy(x, wide.view_mut());
    wide
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
