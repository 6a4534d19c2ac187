//! A sum of Kronecker products packed for many products with it.

use super::kept::{Keep, Kept};
use super::sum::KroneckerSum;
use crate::backend::Backend;
use crate::backend::dispatch::on_device;
use crate::cancel::Cancel;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::place::Place;
use crate::view::{TensorView, TensorViewMut};

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
    packed: Kept<(), Option<f64>>,
}

impl KroneckerOperator {
    /// Packs the terms.
    pub fn new(sum: &KroneckerSum<'_>) -> Result<Self> {
        on_device!(sum.place(), backend => with_real!(sum.dtype(), T => {
            Self::pack::<_, T>(backend, sum)
        }))
    }

    fn pack<B: Backend + 'static, T: Real>(backend: &B, sum: &KroneckerSum<'_>) -> Result<Self> {
        let packed = backend.pack::<T>(&sum.finite_by_group(backend)?)?;
        Ok(Self {
            size: [sum.outputs(), sum.inputs()],
            flops: B::packed_flops(&packed),
            packed: Kept::new(Packed::<B, T>(packed), backend, sum.place())?,
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
        self.packed.apply(v, out, (), &Cancel::new())
    }

    /// Floating-point operations of one product.
    pub fn flops(&self) -> usize {
        self.flops
    }
}

/// A sum as its backend packs it.
struct Packed<B: Backend, T: Real>(B::Packed<T>);

impl<B: Backend + 'static, T: Real> Keep for Packed<B, T> {
    type On = B;
    type Task = ();
    type Answer = Option<f64>;

    fn enter(place: Place) -> Result<B::Handle> {
        B::at_for_packed(place)
    }

    fn apply(
        &self,
        backend: &B,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        (): (),
        _: &Cancel,
    ) -> Result<Option<f64>> {
        let (v, out) = (backend.matrix::<T>(v)?, backend.matrix_mut(out)?);
        backend.apply_packed(&self.0, v, out)
    }
}
