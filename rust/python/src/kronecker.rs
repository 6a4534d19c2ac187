//! Bindings of `ekfac_core::kronecker`.

use ekfac_core::Result;
use ekfac_core::kronecker::{self, KroneckerSum, Product, Stopping, TensorFactor};
use ekfac_core::terms::Factor;
use ekfac_core::units::Precision;
use pyo3::prelude::*;

use crate::call::run;
use crate::tensor::{RawTensor, RawTerm, check_disjoint, factors};

/// The checked sum of these terms.
fn sum(terms: &[RawTerm]) -> Result<KroneckerSum<'_>> {
    let views = terms.iter().map(|(a, g)| Ok((a.view()?, g.view()?)));
    KroneckerSum::new(views.collect::<Result<_>>()?)
}

/// `out = sum_k G_k V A_k + damping * V`.
#[pyfunction]
pub fn kronecker_product(
    py: Python<'_>,
    terms: Vec<RawTerm>,
    v: RawTensor,
    mut out: RawTensor,
    damping: f64,
) -> PyResult<()> {
    run(py, |cancel| {
        check_disjoint(&[&out], factors(&terms).chain([&v]))?;
        sum(&terms)?.product(&v.view()?, &mut out.view_mut()?, damping, cancel)
    })
}

/// `sum_k <V, G_k V A_k>`.
#[pyfunction]
pub fn kronecker_quadratic(py: Python<'_>, terms: Vec<RawTerm>, v: RawTensor) -> PyResult<f64> {
    run(py, |cancel| sum(&terms)?.quadratic(&v.view()?, cancel))
}

/// The Frobenius inner product of two sums.
#[pyfunction]
pub fn kronecker_inner(py: Python<'_>, terms: Vec<RawTerm>, others: Vec<RawTerm>) -> PyResult<f64> {
    run(py, |_| sum(&terms)?.inner(&sum(&others)?))
}

/// The diagonal as a `[D, K]` matrix.
#[pyfunction]
pub fn kronecker_diagonal(py: Python<'_>, terms: Vec<RawTerm>, mut out: RawTensor) -> PyResult<()> {
    run(py, |_| {
        check_disjoint(&[&out], factors(&terms))?;
        sum(&terms)?.diagonal(&mut out.view_mut()?)
    })
}

/// The whole matrix, `[D K, D K]`; zero between rows of different groups.
#[pyfunction]
pub fn kronecker_dense(py: Python<'_>, terms: Vec<RawTerm>, mut out: RawTensor) -> PyResult<()> {
    run(py, |_| {
        check_disjoint(&[&out], factors(&terms))?;
        sum(&terms)?.dense(&mut out.view_mut()?)
    })
}

/// The trace.
#[pyfunction]
pub fn kronecker_trace(py: Python<'_>, terms: Vec<RawTerm>) -> PyResult<f64> {
    run(py, |_| sum(&terms)?.trace())
}

/// The largest eigenvalue of the damped sum.
#[pyfunction]
pub fn kronecker_top_eigenvalue(
    py: Python<'_>,
    terms: Vec<RawTerm>,
    damping: f64,
) -> PyResult<f64> {
    run(py, |cancel| sum(&terms)?.top_eigenvalue(damping, cancel))
}

/// Writes the nearest sum of fewer terms and returns the relative Frobenius error.
#[pyfunction]
pub fn kronecker_compress(
    py: Python<'_>,
    terms: Vec<RawTerm>,
    mut out: Vec<RawTerm>,
) -> PyResult<f64> {
    run(py, |_| {
        check_disjoint(&factors(&out).collect::<Vec<_>>(), factors(&terms))?;
        let out = out.iter_mut();
        let mut views = out
            .map(|(a, g)| Ok((a.view_mut()?, g.view_mut()?)))
            .collect::<Result<Vec<_>>>()?;
        sum(&terms)?.compress(&mut views)
    })
}

/// Solves with the damped sum; returns (iterations, relative residual).
#[pyfunction]
pub fn conjugate_gradients(
    py: Python<'_>,
    terms: Vec<RawTerm>,
    damping: f64,
    v: RawTensor,
    mut out: RawTensor,
    tolerance: f64,
    max_iterations: usize,
) -> PyResult<(usize, f64)> {
    let stopping = Stopping {
        tolerance,
        max_iterations,
    };
    run(py, |cancel| {
        check_disjoint(&[&out], factors(&terms).chain([&v]))?;
        let (v, mut out) = (v.view()?, out.view_mut()?);
        let convergence =
            sum(&terms)?.conjugate_gradients(damping, &v, &mut out, stopping, cancel)?;
        Ok((convergence.iterations, convergence.residual))
    })
}

/// The exact inverse of one damped term, or of a sum of two terms.
#[pyclass(frozen, module = "ekfac_rs._core")]
pub struct KroneckerInverse(kronecker::KroneckerInverse);

#[pymethods]
impl KroneckerInverse {
    #[new]
    fn new(py: Python<'_>, terms: Vec<RawTerm>, damping: f64) -> PyResult<Self> {
        run(py, |cancel| {
            kronecker::KroneckerInverse::new(&sum(&terms)?, damping, cancel)
        })
        .map(Self)
    }

    /// Writes the inverse applied to `v`.
    fn solve(&self, py: Python<'_>, v: RawTensor, mut out: RawTensor) -> PyResult<()> {
        run(py, |cancel| {
            check_disjoint(&[&out], [&v])?;
            self.0.solve(&v.view()?, &mut out.view_mut()?, cancel)
        })
    }

    /// The natural logarithm of the determinant.
    fn logdet(&self, py: Python<'_>) -> PyResult<f64> {
        run(py, |_| Ok(self.0.logdet()))
    }

    /// Maps standard normal noise to samples whose covariance is the inverse.
    fn sample(&self, py: Python<'_>, noise: RawTensor, mut out: RawTensor) -> PyResult<()> {
        run(py, |cancel| {
            check_disjoint(&[&out], [&noise])?;
            self.0.sample(&noise.view()?, &mut out.view_mut()?, cancel)
        })
    }
}

/// A square root of a sum of terms.
#[pyclass(frozen, module = "ekfac_rs._core")]
pub struct KroneckerRoot(kronecker::KroneckerRoot);

#[pymethods]
impl KroneckerRoot {
    #[new]
    fn new(py: Python<'_>, terms: Vec<RawTerm>) -> PyResult<Self> {
        run(py, |cancel| {
            kronecker::KroneckerRoot::new(&sum(&terms)?, cancel)
        })
        .map(Self)
    }

    /// Maps noise `[n, terms, D, K]` to samples `[n, D, K]`.
    fn apply(&self, py: Python<'_>, noise: RawTensor, mut out: RawTensor) -> PyResult<()> {
        run(py, |cancel| {
            check_disjoint(&[&out], [&noise])?;
            self.0.apply(&noise.view()?, &mut out.view_mut()?, cancel)
        })
    }
}

/// A sum of terms packed for many products.
#[pyclass(frozen, module = "ekfac_rs._core")]
pub struct KroneckerOperator(kronecker::KroneckerOperator);

#[pymethods]
impl KroneckerOperator {
    #[new]
    #[pyo3(signature = (terms, precision = "ieee"))]
    fn new(py: Python<'_>, terms: Vec<RawTerm>, precision: &str) -> PyResult<Self> {
        run(py, |_| {
            kronecker::KroneckerOperator::new(&sum(&terms)?, Precision::from_name(precision)?)
        })
        .map(Self)
    }

    /// Packs terms of one group, for V of this shape, whose factors may be known by their roots.
    #[staticmethod]
    #[pyo3(signature = (shape, terms, precision = "ieee"))]
    fn from_factors(
        py: Python<'_>,
        shape: [usize; 2],
        terms: Vec<(RawFactor, RawFactor)>,
        precision: &str,
    ) -> PyResult<Self> {
        run(py, |_| {
            let views = terms.iter().map(|(a, g)| Ok((factor(a)?, factor(g)?)));
            let views = views.collect::<Result<Vec<_>>>()?;
            let precision = Precision::from_name(precision)?;
            kronecker::KroneckerOperator::of_factors(shape, &views, precision)
        })
        .map(Self)
    }

    /// Writes the product.
    fn apply(&self, py: Python<'_>, v: RawTensor, mut out: RawTensor) -> PyResult<()> {
        run(py, |_| {
            check_disjoint(&[&out], [&v])?;
            self.0.apply(&v.view()?, &mut out.view_mut()?)
        })
    }

    /// Floating-point operations of one product.
    #[getter]
    fn flops(&self) -> usize {
        self.0.flops()
    }
}

/// A factor: a tensor, and what is on the diagonal beside if the tensor is its root; nothing for
/// the identity.
type RawFactor = Option<(RawTensor, Option<f64>)>;

fn factor(raw: &RawFactor) -> Result<TensorFactor<'_>> {
    Ok(match raw {
        None => Factor::Identity,
        Some((x, None)) => Factor::Whole(x.view()?),
        Some((root, Some(shift))) => Factor::Rooted {
            root: root.view()?,
            shift: *shift,
        },
    })
}

/// An operator, V, where the result goes, how much of V is added to it, and where two inner
/// products go.
type RawProduct<'py> = (
    Bound<'py, KroneckerOperator>,
    RawTensor,
    RawTensor,
    f64,
    RawTensor,
);

/// Writes `scale * H V + damping * V` for each of these, and the inner products `<V, H V>` and
/// `<V, V>`.
#[pyfunction]
pub fn apply_operators(py: Python<'_>, products: Vec<RawProduct<'_>>, scale: f64) -> PyResult<()> {
    let unbound = |(operator, v, out, damping, inner): RawProduct<'_>| {
        (operator.unbind(), v, out, damping, inner)
    };
    let mut products: Vec<_> = products.into_iter().map(unbound).collect();
    run(py, |_| {
        let outputs = products
            .iter()
            .flat_map(|(_, _, out, _, inner)| [out, inner]);
        let inputs = products.iter().map(|(_, v, ..)| v);
        check_disjoint(&outputs.collect::<Vec<_>>(), inputs)?;
        let views = products
            .iter_mut()
            .map(|(operator, v, out, damping, inner)| {
                Ok(Product {
                    operator: &operator.get().0,
                    v: v.view()?,
                    out: out.view_mut()?,
                    damping: *damping,
                    inner: inner.view_mut()?,
                })
            });
        kronecker::KroneckerOperator::apply_all(views.collect::<Result<_>>()?, scale)
    })
}
