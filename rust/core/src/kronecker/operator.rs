//! A sum of Kronecker products packed for many products with it.

use faer::{Mat, MatRef};

use super::{KroneckerSum, Pair};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::cancel::Cancel;
use crate::error::Result;
use crate::view::{Dtype, Real, TensorView, TensorViewMut};

/// A packed sum; holds copies of the factors.
pub struct KroneckerOperator {
    inputs: usize,
    outputs: usize,
    packed: Packed,
}

enum Packed {
    Single(Terms<f32>),
    Double(Terms<f64>),
}

struct Terms<T> {
    factors: Vec<(Mat<T>, Mat<T>)>,
}

impl KroneckerOperator {
    /// Packs the terms.
    pub fn new(sum: &KroneckerSum<'_>) -> Result<Self> {
        let packed = match sum.dtype {
            Dtype::Float32 => Packed::Single(Terms::new(&sum.pairs()?)),
            _ => Packed::Double(Terms::new(&sum.pairs()?)),
        };
        Ok(Self {
            inputs: sum.inputs,
            outputs: sum.outputs,
            packed,
        })
    }

    /// Writes `sum_k G_k V A_k` and returns its inner product with V.
    pub fn apply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<f64> {
        match &self.packed {
            Packed::Single(terms) => terms.apply(v.matrix()?, out),
            Packed::Double(terms) => terms.apply(v.matrix()?, out),
        }
    }

    /// Floating-point operations of one product.
    pub fn flops(&self) -> usize {
        let count = match &self.packed {
            Packed::Single(t) => t.factors.len(),
            Packed::Double(t) => t.factors.len(),
        };
        2 * self.inputs * self.outputs * (self.inputs + self.outputs) * count
    }
}

impl<T: Real> Terms<T> {
    fn new(pairs: &[Pair<'_, T>]) -> Self {
        Self {
            factors: pairs
                .iter()
                .map(|(a, g)| (a.to_owned(), g.to_owned()))
                .collect(),
        }
    }
    fn apply(&self, v: MatRef<'_, T>, out: &mut TensorViewMut<'_>) -> Result<f64> {
        let cpu = Cpu::current();
        let pairs: Vec<_> = self
            .factors
            .iter()
            .map(|(a, g)| (a.as_ref(), g.as_ref()))
            .collect();
        cpu.kronecker_product(&pairs, &[v], vec![out.matrix::<T>()?], 0.0, &Cancel::new())?;
        Ok(cpu.dot(v, out.matrix::<T>()?.as_ref()))
    }
}
