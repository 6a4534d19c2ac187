//! A sum of Kronecker products packed for many products with it.

use std::any::Any;
use std::collections::BTreeMap;

use super::kept::visit;
use super::sum::KroneckerSum;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::dispatch::on_device;
use crate::element::{Real, with_real};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::place::{Device, Place};
use crate::terms::{Combination, Factor, Multiplied};
use crate::units::Precision;
use crate::view::{TensorView, TensorViewMut};

/// A factor of a term, as a tensor or by its root.
pub type TensorFactor<'a> = Factor<TensorView<'a>>;

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
    place: Place,
    packed: Box<dyn Multiply>,
}

/// One product of several.
pub struct Product<'a> {
    /// The operator.
    pub operator: &'a KroneckerOperator,
    /// V, `[D, K]`.
    pub v: TensorView<'a>,
    /// Where the result goes, `[D, K]`.
    pub out: TensorViewMut<'a>,
    /// How much of V is added to it.
    pub damping: f64,
    /// Where the inner products with V of the product itself, and of V, go: `[1, 2]`.
    pub inner: TensorViewMut<'a>,
}

impl KroneckerOperator {
    /// Packs the terms, for products in this precision, ieee or tf32.
    pub fn new(sum: &KroneckerSum<'_>, precision: Precision) -> Result<Self> {
        expect_precision(precision)?;
        on_device!(sum.place(), backend => with_real!(sum.dtype(), T => {
            let packed = backend.pack::<T>(&sum.finite_by_group(backend)?, precision)?;
            let size = [sum.outputs(), sum.inputs()];
            Self::keep::<_, T>(backend, packed, size, sum.place())
        }))
    }

    /// Packs terms (A, G) of one group, for V of shape `[D, K]`. Of factors that are known by their
    /// roots products go through as few columns as can be.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] where a factor with something beside its root, or the identity, meets
    /// another that is no mere root, and without terms.
    pub fn of_factors(
        size: [usize; 2],
        terms: &[(TensorFactor<'_>, TensorFactor<'_>)],
        precision: Precision,
    ) -> Result<Self> {
        expect_precision(precision)?;
        let like = check_factors(size, terms)?;
        on_device!(like.place(), backend => with_real!(like.dtype(), T => {
            let mut borrowed = Vec::with_capacity(terms.len());
            for (a, g) in terms {
                borrowed.push((matrix_of::<_, T>(backend, a)?, matrix_of::<_, T>(backend, g)?));
            }
            let packed = backend.pack_factors::<T>(size, &borrowed, precision)?;
            Self::keep::<_, T>(backend, packed, size, like.place())
        }))
    }

    fn keep<B: Backend + 'static, T: Real>(
        backend: &B,
        packed: B::Packed<T>,
        size: [usize; 2],
        place: Place,
    ) -> Result<Self> {
        backend.settle()?;
        Ok(Self {
            size,
            flops: B::packed_flops(&packed),
            place,
            packed: Box::new(Packed::<B, T> {
                packed,
                home: place,
            }),
        })
    }

    /// Writes `sum_k G_k V A_k` for V of shape `[D, K]`.
    pub fn apply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.check(v, out)?;
        self.packed.multiply(v, out)
    }

    /// Writes `scale * sum_k G_k V A_k + damping * V` for each of these. On the CPU the threads
    /// share the products; on a GPU nobody waits for them.
    pub fn apply_all(products: Vec<Product<'_>>, scale: f64) -> Result<()> {
        for product in &products {
            product.operator.check(&product.v, &product.out)?;
            if product.inner.shape() != [1, 2] {
                return Err(Error::Shape(format!(
                    "inner must have two numbers for each product, got shape {:?}",
                    product.inner.shape()
                )));
            }
        }
        let mut alike: BTreeMap<_, Vec<Product<'_>>> = BTreeMap::new();
        for product in products {
            let (place, dtype) = (product.v.place(), product.v.dtype());
            let kind = (place.device, dtype.size());
            alike.entry(kind).or_default().push(product);
        }
        for mut products in alike.into_values() {
            let (place, dtype) = (products[0].v.place(), products[0].v.dtype());
            with_real!(dtype, T => match place.device {
                Device::Cpu => apply_alike::<Cpu, T>(place, &mut products, scale),
                Device::Cuda(_) => apply_alike::<Cuda, T>(place, &mut products, scale),
            })?;
        }
        Ok(())
    }

    /// The packed sum, if it is one of this backend and type.
    fn packed_as<B: Backend + 'static, T: Real>(&self) -> Result<&Packed<B, T>> {
        self.packed.as_any().downcast_ref().ok_or_else(|| {
            Error::Dtype(format!(
                "expected V of the dtype of the terms, got {}",
                T::DTYPE
            ))
        })
    }

    fn check(&self, v: &TensorView<'_>, out: &TensorViewMut<'_>) -> Result<()> {
        for (name, shape) in [("v", v.shape()), ("out", out.shape())] {
            if shape != self.size {
                return Err(Error::Shape(format!(
                    "{name} must be {:?}, got shape {shape:?}",
                    self.size
                )));
            }
        }
        Ok(())
    }

    /// Floating-point operations of one product.
    pub fn flops(&self) -> usize {
        self.flops
    }
}

fn expect_precision(precision: Precision) -> Result<()> {
    match precision {
        Precision::Ieee | Precision::Tf32 => Ok(()),
        Precision::Bf16 => Err(Error::Option(
            "precision: expected ieee or tf32 for products with curvatures, got bf16".to_owned(),
        )),
    }
}

/// The tensor of a factor, unless it is the identity.
fn tensor_of<'f, 'a>(factor: &'f TensorFactor<'a>) -> Option<&'f TensorView<'a>> {
    match factor {
        Factor::Whole(x) | Factor::Rooted { root: x, .. } => Some(x),
        Factor::Identity => None,
    }
}

/// A factor as a matrix, or the root of one, of finite numbers.
fn matrix_of<'a, B: Backend, T: Real>(
    backend: &B,
    factor: &TensorFactor<'a>,
) -> Result<Factor<Matrix<'a, T>>> {
    let finite = |x| {
        let matrix = backend.matrix::<T>(x)?;
        backend.check_finite(&[matrix], &|_| "a factor".to_owned())?;
        Ok(matrix)
    };
    Ok(match factor {
        Factor::Whole(x) => Factor::Whole(finite(x)?),
        Factor::Rooted { root, shift } => Factor::Rooted {
            root: finite(root)?,
            shift: *shift,
        },
        Factor::Identity => Factor::Identity,
    })
}

/// Fails unless the factors fit V of this size and one another; returns one of their tensors.
fn check_factors<'f, 'a>(
    [rows, columns]: [usize; 2],
    terms: &'f [(TensorFactor<'a>, TensorFactor<'a>)],
) -> Result<&'f TensorView<'a>> {
    let sides = terms
        .iter()
        .flat_map(|(a, g)| [(a, columns, "A"), (g, rows, "G")]);
    let mut like: Option<&TensorView<'_>> = None;
    for (factor, size, name) in sides {
        let Some(x) = tensor_of(factor) else { continue };
        let fits = match (factor, x.shape()) {
            (Factor::Whole(_), shape) => shape == [size, size],
            (_, &[height, width]) => height == size && width > 0,
            _ => false,
        };
        if !fits {
            return Err(Error::Shape(format!(
                "{name} must be [{size}, {size}], or a root of {size} rows, got shape {:?}",
                x.shape()
            )));
        }
        let first = *like.get_or_insert(x);
        if x.dtype() != first.dtype() {
            return Err(Error::Dtype(format!(
                "{name} must be {} like the first factor, got {}",
                first.dtype(),
                x.dtype()
            )));
        }
        x.place().device.expect(first.place().device)?;
    }
    let is_thin = |x: &TensorFactor<'_>| matches!(x, Factor::Rooted { shift: 0.0, .. });
    let is_whole = |x: &TensorFactor<'_>| matches!(x, Factor::Whole(_));
    let has_way = |(a, g): &(TensorFactor<'_>, TensorFactor<'_>)| {
        is_thin(a) || is_thin(g) || (is_whole(a) && is_whole(g))
    };
    match like {
        Some(like) if terms.iter().all(has_way) => Ok(like),
        _ => Err(Error::Option(
            "a term needs two whole factors, or one by its root alone, and a sum needs a term"
                .to_owned(),
        )),
    }
}

/// Products with V on one device and of one type.
fn apply_alike<B: Backend + 'static, T: Real>(
    place: Place,
    products: &mut [Product<'_>],
    scale: f64,
) -> Result<()> {
    let mut homes = Vec::with_capacity(products.len());
    for product in &*products {
        place.device.expect(product.operator.place.device)?;
        homes.push(product.operator.packed_as::<B, T>()?.home);
    }
    let backend = B::at_for_packed(place)?;
    let mut tasks = Vec::with_capacity(products.len());
    for product in products {
        let damping = product.damping;
        let task = Multiplied {
            v: backend.matrix(&product.v)?,
            out: backend.matrix_mut(&mut product.out)?,
            wanted: Combination { scale, damping },
            inner: backend.matrix_mut(&mut product.inner)?,
        };
        tasks.push((&product.operator.packed_as::<B, T>()?.packed, task));
    }
    let answer = backend.apply_all_packed(tasks);
    // Also what a failed call queued may still be at work.
    for home in homes {
        backend.hold_for(home)?;
    }
    answer
}

/// A packed sum of any backend and type.
trait Multiply: Send + Sync {
    fn multiply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<()>;

    /// The sum as what it is.
    fn as_any(&self) -> &dyn Any;
}

/// A sum as its backend packs it, and where its memory is.
struct Packed<B: Backend, T: Real> {
    packed: B::Packed<T>,
    home: Place,
}

impl<B: Backend + 'static, T: Real> Multiply for Packed<B, T> {
    fn multiply(&self, v: &TensorView<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        visit(v.place(), self.home, B::at_for_packed, |backend: &B| {
            let (v, out) = (backend.matrix::<T>(v)?, backend.matrix_mut(out)?);
            backend.apply_packed(&self.packed, v, out)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
