//! A sum of Kronecker products packed for many products with it.

use super::KroneckerSum;
use crate::backend::{Backend, on_device};
use crate::error::{Error, Result};
use crate::view::{Place, Real, TensorView, TensorViewMut, with_real};

/// A packed sum, for the thousands of products of a training loop; holds copies of the factors.
///
/// On the CPU, factors of low numerical rank (the mean stratum has at most one dimension per
/// mini-batch) are kept as thin roots, exact up to rounding, and rows that are zero in all factors
/// are left out. Groups of a single row have their terms added up. Concurrent products wait for
/// one another.
pub struct KroneckerOperator {
    /// (D, K).
    size: [usize; 2],
    flops: usize,
    packed: Box<dyn Apply>,
}

impl KroneckerOperator {
    /// Packs the terms.
    pub fn new(sum: &KroneckerSum<'_>) -> Result<Self> {
        on_device!(sum.place, backend => with_real!(sum.dtype, T => {
            Self::pack::<_, T>(backend, sum)
        }))
    }

    fn pack<B: Backend + 'static, T: Real>(backend: &B, sum: &KroneckerSum<'_>) -> Result<Self> {
        let packed = backend.pack::<T>(&sum.finite_by_group(backend)?)?;
        backend.settle()?;
        Ok(Self {
            size: [sum.outputs, sum.inputs],
            flops: B::packed_flops(&packed),
            packed: Box::new(Packed::<B, T> {
                packed,
                home: sum.place,
            }),
        })
    }

    /// Writes `sum_k G_k V A_k` for V of shape `[D, K]`. Returns its inner product with V, or
    /// nothing on a GPU, where it would have to be waited for.
    pub fn apply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<Option<f64>> {
        for (name, shape) in [("v", v.shape()), ("out", out.shape())] {
            if shape != self.size {
                return Err(Error::Shape(format!(
                    "{name} must be {:?}, got shape {shape:?}",
                    self.size
                )));
            }
        }
        self.packed.apply(v, out)
    }

    /// Floating-point operations of one product.
    pub fn flops(&self) -> usize {
        self.flops
    }
}

/// A packed sum of any backend and type.
trait Apply: Send + Sync {
    fn apply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<Option<f64>>;
}

struct Packed<B: Backend, T: Real> {
    packed: B::Packed<T>,
    home: Place,
}

impl<B: Backend, T: Real> Apply for Packed<B, T> {
    fn apply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<Option<f64>> {
        v.layout().expect_device(self.home.device)?;
        let backend = B::at_for_packed(v.place())?;
        let (v, out) = (backend.matrix::<T>(v)?, backend.matrix_mut(out)?);
        let inner = backend.apply_packed(&self.packed, v, out);
        // Also what a failed call queued may still be at work.
        backend.hold_for(self.home)?;
        inner
    }
}
