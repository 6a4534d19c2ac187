//! Borrowed tensors of other owners: pointer, shape, strides, dtype, device, stream.
//!
//! # Safety contract
//!
//! Every view starts at [`TensorView::from_raw_parts`] or [`TensorViewMut::from_raw_parts`], and
//! whoever calls them promises, for as long as the view lives:
//!
//! - the memory that shape and strides (in elements) reach from `pointer` belongs to one
//!   allocation on `device` and holds initialised elements of `dtype`;
//! - nobody writes to the memory of a [`TensorView`], and nobody but the view touches the memory
//!   of a [`TensorViewMut`];
//! - for a GPU, `stream` is a live stream of that device, and earlier work on the memory was
//!   submitted to it. Work that a call queues there goes on after the call: whoever writes to the
//!   memory later, or gives it back, does so in the order of that stream.
//!
//! What can be checked here is checked here: alignment, null pointers, sizes that overflow, and
//! outputs in which two indices would share one element. Apart from the CUDA backend, this is the
//! only module with `unsafe` code.

use std::fmt;
use std::marker::PhantomData;

use faer::{MatMut, MatRef};
use half::{bf16, f16};
use ndarray::{ArrayView, ArrayViewD, ArrayViewMut, Dimension, IxDyn, ShapeBuilder};

use crate::error::{Error, Result};

/// Element types a tensor may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit IEEE floating point.
    Float32,
    /// 64-bit IEEE floating point.
    Float64,
    /// 16-bit IEEE floating point.
    Float16,
    /// Truncated 32-bit floating point.
    BFloat16,
}

impl Dtype {
    /// The dtype torch calls by this name, without the `torch.` prefix.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "float32" => Ok(Self::Float32),
            "float64" => Ok(Self::Float64),
            "float16" => Ok(Self::Float16),
            "bfloat16" => Ok(Self::BFloat16),
            other => Err(Error::Dtype(format!(
                "unsupported dtype: expected float32, float64, float16 or bfloat16, got {other}"
            ))),
        }
    }

    /// Bytes per element, which is the required alignment, too.
    pub fn size(self) -> usize {
        match self {
            Self::Float16 | Self::BFloat16 => 2,
            Self::Float32 => 4,
            Self::Float64 => 8,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
        })
    }
}

/// Where the memory of a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// Memory of the CUDA device with this ordinal.
    Cuda(usize),
}

impl Device {
    /// Parses `cpu` or `cuda:<index>`.
    pub fn from_name(name: &str) -> Result<Self> {
        if name == "cpu" {
            return Ok(Self::Cpu);
        }
        name.strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| {
                Error::Device(format!(
                    "unsupported device: expected cpu or cuda:<index>, got {name}"
                ))
            })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// A device, and the stream that orders work there (0 on the CPU).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// The handle of a CUDA stream.
    pub stream: usize,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type that can be read.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The matching dtype.
    const DTYPE: Dtype;
    /// The value in double precision, exactly.
    fn to_f64(self) -> f64;
    /// The value in single precision, rounded for `f64`.
    fn to_f32(self) -> f32;
}

/// An element type that is computed in: `f32` or `f64`.
pub trait Real: Element + faer::traits::RealField + Copy + Default + fmt::Debug {
    /// The spacing of numbers just above one.
    const EPSILON: f64;
    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
    /// Reads any element into this type.
    fn from_element<S: Element>(value: S) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:ident) => {
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                f32::from(self)
            }
        }
    };
}

element!(f32, Float32);
element!(f16, Float16);
element!(bf16, BFloat16);

impl Element for f64 {
    const DTYPE: Dtype = Dtype::Float64;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
}

impl Real for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn from_element<S: Element>(value: S) -> Self {
        value.to_f32()
    }
}

impl Real for f64 {
    const EPSILON: f64 = f64::EPSILON;
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn from_element<S: Element>(value: S) -> Self {
        value.to_f64()
    }
}

/// Everything about a tensor but its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// Distance between neighbours of each dimension, in elements.
    pub strides: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
    /// Where the memory is.
    pub device: Device,
    /// The CUDA stream that orders work on the memory; 0 on the CPU.
    pub stream: usize,
}

impl Layout {
    /// Device and stream.
    pub fn place(&self) -> Place {
        Place {
            device: self.device,
            stream: self.stream,
        }
    }

    /// Number of elements from the first to just behind the last one that can be reached; 0 for
    /// an empty tensor.
    fn span(&self) -> Result<usize> {
        if self.shape.contains(&0) {
            return Ok(0);
        }
        let last = self
            .shape
            .iter()
            .zip(&self.strides)
            .try_fold(0usize, |sum, (&extent, &stride)| {
                sum.checked_add((extent - 1).checked_mul(stride)?)
            });
        last.and_then(|last| last.checked_add(1))
            .filter(|&span| span <= isize::MAX as usize / self.dtype.size())
            .ok_or_else(|| {
                Error::Shape(format!(
                    "shape {:?} with strides {:?} does not fit into memory",
                    self.shape, self.strides
                ))
            })
    }

    fn check(&self, address: usize) -> Result<()> {
        if self.shape.len() != self.strides.len() {
            return Err(Error::Shape(format!(
                "shape {:?} and strides {:?} have different lengths",
                self.shape, self.strides
            )));
        }
        let span = self.span()?;
        if span > 0 && address == 0 {
            return Err(Error::Shape(format!(
                "a tensor of shape {:?} has no memory (null data pointer)",
                self.shape
            )));
        }
        if !address.is_multiple_of(self.dtype.size()) {
            return Err(Error::Shape(format!(
                "the data pointer is not aligned to its dtype {}",
                self.dtype
            )));
        }
        Ok(())
    }

    /// Refuses layouts in which two indices could share an element. Sorted by stride, each
    /// dimension must step over everything the smaller ones reach; torch's own dense and sliced
    /// layouts all do.
    fn check_distinct(&self) -> Result<()> {
        if self.shape.contains(&0) {
            return Ok(());
        }
        let mut dimensions: Vec<(usize, usize)> = self
            .strides
            .iter()
            .zip(&self.shape)
            .filter(|&(_, &extent)| extent > 1)
            .map(|(&stride, &extent)| (stride, extent))
            .collect();
        dimensions.sort_unstable();
        let mut reach = 0;
        for (stride, extent) in dimensions {
            if stride <= reach {
                return Err(Error::Shape(format!(
                    "an output must not share memory between its elements (expanded tensors do): \
                     got shape {:?} with strides {:?}",
                    self.shape, self.strides
                )));
            }
            reach += stride * (extent - 1);
        }
        Ok(())
    }

    fn expect_dtype(&self, expected: Dtype) -> Result<()> {
        if self.dtype == expected {
            Ok(())
        } else {
            Err(Error::Dtype(format!(
                "expected dtype {expected}, got {}",
                self.dtype
            )))
        }
    }

    /// Fails unless the tensor is on this device.
    pub(crate) fn expect_device(&self, expected: Device) -> Result<()> {
        if self.device == expected {
            Ok(())
        } else {
            Err(Error::Device(format!(
                "all tensors must be on one device: expected {expected}, got one on {}",
                self.device
            )))
        }
    }

    /// The trailing two dimensions as a matrix, and where each matrix of the stack begins.
    fn as_matrices(&self) -> Result<(MatrixLayout, Vec<usize>)> {
        let ([counts @ .., rows, columns], [steps @ .., down, right]) =
            (&self.shape[..], &self.strides[..])
        else {
            return Err(Error::Shape(format!(
                "expected a matrix or a stack of matrices, got shape {:?}",
                self.shape
            )));
        };
        let mut starts = vec![0];
        for (&count, &step) in counts.iter().zip(steps) {
            let place = |&start: &usize| (0..count).map(move |index| start + index * step);
            starts = starts.iter().flat_map(place).collect();
        }
        let matrix = MatrixLayout {
            rows: *rows,
            columns: *columns,
            row_stride: *down as isize,
            column_stride: *right as isize,
        };
        Ok((matrix, starts))
    }
}

/// Extents and strides, in elements, of each matrix of a stack.
struct MatrixLayout {
    rows: usize,
    columns: usize,
    row_stride: isize,
    column_stride: isize,
}

/// A borrowed tensor that is only read. Expanded (zero-stride) and sliced tensors are welcome.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    pointer: *const u8,
    layout: Layout,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: by the contract above nobody writes to the memory, so threads may share the view.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}

impl<'a> TensorView<'a> {
    /// Borrows memory described by address and layout.
    ///
    /// # Safety
    ///
    /// The caller keeps the contract in this module's documentation for the lifetime `'a`.
    pub unsafe fn from_raw_parts(address: usize, layout: Layout) -> Result<Self> {
        layout.check(address)?;
        let pointer = std::ptr::with_exposed_provenance(address);
        Ok(Self {
            pointer,
            layout,
            memory: PhantomData,
        })
    }

    /// Borrows an array in host memory.
    pub fn new<T: Element, D: Dimension>(array: ArrayView<'a, T, D>) -> Result<Self> {
        let layout = host_layout(T::DTYPE, array.shape(), array.strides())?;
        Ok(Self {
            pointer: array.as_ptr().cast(),
            layout,
            memory: PhantomData,
        })
    }

    /// Shape, strides, dtype, device and stream.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Device and stream.
    pub fn place(&self) -> Place {
        self.layout.place()
    }

    /// `[N, K]` seen as `[N, 1, K]`; other tensors as they are.
    pub fn as_examples(&self) -> Self {
        let mut view = self.clone();
        if let (&[examples, features], &[down, right]) =
            (&self.layout.shape[..], &self.layout.strides[..])
        {
            view.layout.shape = vec![examples, 1, features];
            view.layout.strides = vec![down, 0, right];
        }
        view
    }

    /// `[N, T, K]` seen as `[N T, K]`, where the strides allow it.
    pub fn flatten_units(&self) -> Option<Self> {
        let (&[examples, locations, features], &[over, down, right]) =
            (&self.layout.shape[..], &self.layout.strides[..])
        else {
            return None;
        };
        let step = match (examples, locations) {
            (_, 1) => over,
            (1, _) => down,
            _ if over == locations * down => down,
            _ => return None,
        };
        let mut view = self.clone();
        view.layout.shape = vec![examples * locations, features];
        view.layout.strides = vec![step, right];
        Some(view)
    }

    /// `[N, C, *spatial]` seen as `[N, T, C]`, one location for each element of `spatial`, where
    /// the strides allow it.
    pub(crate) fn flatten_locations(&self) -> Option<Self> {
        let ([examples, channels, extents @ ..], [over, across, steps @ ..]) =
            (&self.layout.shape[..], &self.layout.strides[..])
        else {
            return None;
        };
        let mut dimensions = extents.iter().zip(steps).rev();
        let (mut locations, mut step) = (1, 0);
        for (&extent, &stride) in dimensions.by_ref().filter(|&(&extent, _)| extent != 1) {
            if locations == 1 {
                step = stride;
            } else if stride != locations * step {
                return None;
            }
            locations *= extent;
        }
        let mut view = self.clone();
        view.layout.shape = vec![*examples, locations, *channels];
        view.layout.strides = vec![*over, step, *across];
        Some(view)
    }

    /// The tensor as an array in host memory.
    pub fn array<T: Element>(&self) -> Result<ArrayViewD<'a, T>> {
        self.layout.expect_device(Device::Cpu)?;
        self.layout.expect_dtype(T::DTYPE)?;
        let shape = IxDyn(&self.layout.shape).strides(IxDyn(&self.layout.strides));
        // SAFETY: device and dtype were checked just above, alignment and size at construction;
        // the rest is the module's contract.
        Ok(unsafe { ArrayView::from_shape_ptr(shape, self.host_pointer::<T>()) })
    }

    /// The matrices in the trailing two dimensions, in row-major order of the leading ones.
    ///
    /// They are for [`Backend::matrices`](crate::backend::Backend::matrices), which checks the
    /// device: the memory of a tensor on a GPU is out of reach here.
    pub(crate) fn matrices<T: Real>(&self) -> Result<Vec<MatRef<'a, T>>> {
        self.layout.expect_dtype(T::DTYPE)?;
        let (matrix, starts) = self.layout.as_matrices()?;
        let origin = self.host_pointer::<T>();
        let at = |start| {
            // SAFETY: as in `array`, but for the device: nothing is read through the matrices
            // except by the backend of the tensor's own device. The start of each matrix lies
            // inside the tensor.
            unsafe {
                MatRef::from_raw_parts(
                    origin.wrapping_add(start),
                    matrix.rows,
                    matrix.columns,
                    matrix.row_stride,
                    matrix.column_stride,
                )
            }
        };
        Ok(starts.into_iter().map(at).collect())
    }

    /// The address of the first element.
    pub(crate) fn address(&self) -> usize {
        self.pointer.expose_provenance()
    }

    fn host_pointer<T>(&self) -> *const T {
        if self.pointer.is_null() {
            std::ptr::NonNull::dangling().as_ptr()
        } else {
            self.pointer.cast()
        }
    }
}

/// A borrowed tensor that is written to; no two of its indices share an element.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    pointer: *mut u8,
    layout: Layout,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: the view is the only way to its memory, so it may move between threads.
unsafe impl Send for TensorViewMut<'_> {}
// SAFETY: writing needs `&mut`, so sharing a reference allows reading only.
unsafe impl Sync for TensorViewMut<'_> {}

impl<'a> TensorViewMut<'a> {
    /// Borrows memory described by address and layout, to write to it.
    ///
    /// # Safety
    ///
    /// The caller keeps the contract in this module's documentation for the lifetime `'a`.
    pub unsafe fn from_raw_parts(address: usize, layout: Layout) -> Result<Self> {
        layout.check(address)?;
        layout.check_distinct()?;
        let pointer = std::ptr::with_exposed_provenance_mut(address);
        Ok(Self {
            pointer,
            layout,
            memory: PhantomData,
        })
    }

    /// Borrows an array in host memory, to write to it.
    pub fn new<T: Element, D: Dimension>(mut array: ArrayViewMut<'a, T, D>) -> Result<Self> {
        let layout = host_layout(T::DTYPE, array.shape(), array.strides())?;
        layout.check_distinct()?;
        Ok(Self {
            pointer: array.as_mut_ptr().cast(),
            layout,
            memory: PhantomData,
        })
    }

    /// Shape, strides, dtype, device and stream.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Device and stream.
    pub fn place(&self) -> Place {
        self.layout.place()
    }

    /// As [`TensorView::matrices`], to be written to.
    pub(crate) fn matrices<T: Real>(&mut self) -> Result<Vec<MatMut<'_, T>>> {
        self.layout.expect_dtype(T::DTYPE)?;
        let (matrix, starts) = self.layout.as_matrices()?;
        let origin: *mut T = if self.pointer.is_null() {
            std::ptr::NonNull::dangling().as_ptr()
        } else {
            self.pointer.cast()
        };
        let at = |start| {
            // SAFETY: the dtype was checked just above, the rest at construction; on the device
            // see `TensorView::matrices`. `check_distinct` makes the matrices disjoint, and
            // `&mut self` exclusive.
            unsafe {
                MatMut::from_raw_parts_mut(
                    origin.wrapping_add(start),
                    matrix.rows,
                    matrix.columns,
                    matrix.row_stride,
                    matrix.column_stride,
                )
            }
        };
        Ok(starts.into_iter().map(at).collect())
    }

    /// A vector as a matrix of one row; other tensors as they are.
    pub fn as_rows(&mut self) -> TensorViewMut<'_> {
        let mut layout = self.layout.clone();
        if layout.shape.len() == 1 {
            layout.shape.insert(0, 1);
            layout.strides.insert(0, 0);
        }
        TensorViewMut {
            pointer: self.pointer,
            layout,
            memory: PhantomData,
        }
    }
}

fn host_layout(dtype: Dtype, shape: &[usize], strides: &[isize]) -> Result<Layout> {
    let strides = strides
        .iter()
        .zip(shape)
        .map(|(&stride, &extent)| match usize::try_from(stride) {
            Ok(stride) => Ok(stride),
            Err(_) if extent <= 1 => Ok(0),
            Err(_) => Err(Error::Shape(format!(
                "negative strides are not supported: got {strides:?}"
            ))),
        })
        .collect::<Result<_>>()?;
    Ok(Layout {
        shape: shape.to_vec(),
        strides,
        dtype,
        device: Device::Cpu,
        stream: 0,
    })
}

/// Runs a body with `T` standing for the type of a dtype that is computed in; other dtypes are an
/// error.
macro_rules! with_real {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::view::Dtype::Float32 => {
                type $T = f32;
                $body
            }
            $crate::view::Dtype::Float64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::error::Error::Dtype(format!(
                "expected float32 or float64, got {other}"
            ))),
        }
    };
}
pub(crate) use with_real;
