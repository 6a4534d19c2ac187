//! A sum of Kronecker products packed for many products with it.

use faer::MatRef;

use super::KroneckerSum;
use crate::backend::cpu::{Cpu, Packed};
use crate::error::{Error, Result};
use crate::view::{Dtype, Real, TensorView, TensorViewMut};

/// A packed sum, for the thousands of products of a training loop; holds copies of the factors.
///
/// Factors of low numerical rank (the mean stratum has at most one dimension per mini-batch) are
/// kept as thin roots, exact up to rounding, and rows that are zero in all factors are left out.
/// Groups of a single row have their terms added up. Concurrent products wait for one another.
pub struct KroneckerOperator {
    terms: Terms,
}

enum Terms {
    Single(Packed<f32>),
    Double(Packed<f64>),
}

impl KroneckerOperator {
    /// Packs the terms.
    pub fn new(sum: &KroneckerSum<'_>) -> Result<Self> {
        let cpu = Cpu::current();
        let terms = match sum.dtype {
            Dtype::Float32 => Terms::Single(Packed::new(&cpu, &sum.finite_by_group(&cpu)?)),
            _ => Terms::Double(Packed::new(&cpu, &sum.finite_by_group(&cpu)?)),
        };
        Ok(Self { terms })
    }

    /// Writes `sum_k G_k V A_k` for V of shape `[D, K]` and returns its inner product with V.
    pub fn apply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<f64> {
        match &self.terms {
            Terms::Single(packed) => apply(packed, v, out),
            Terms::Double(packed) => apply(packed, v, out),
        }
    }

    /// Floating-point operations of one product.
    pub fn flops(&self) -> usize {
        match &self.terms {
            Terms::Single(packed) => packed.flops(),
            Terms::Double(packed) => packed.flops(),
        }
    }
}

fn apply<T: Real>(
    packed: &Packed<T>,
    v: &TensorView<'_>,
    out: &mut TensorViewMut<'_>,
) -> Result<f64> {
    let (outputs, inputs) = packed.size();
    for (name, shape) in [("v", v.shape()), ("out", out.shape())] {
        if shape != [outputs, inputs] {
            return Err(Error::Shape(format!(
                "{name} must be [{outputs}, {inputs}], got shape {shape:?}"
            )));
        }
    }
    let v: MatRef<'_, T> = v.matrix()?;
    Ok(packed.apply(&Cpu::current(), v, out.matrix()?))
}
