//! Borrowed tensors of other owners: pointer, shape, strides, dtype, device, stream.
//!
//! # Safety contract
//!
//! Every view starts at [`TensorView::from_raw_parts`] or [`TensorViewMut::from_raw_parts`], and
//! whoever calls them promises, for as long as the view lives (and a backend promises the same of
//! what it lends of its own memory, at [`Memory::new`] and [`MemoryMut::new`]):
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
//! outputs in which two indices would share one element. Apart from the backends, this is the only
//! module with `unsafe` code.

use std::marker::PhantomData;

use ndarray::{ArrayView, ArrayViewD, ArrayViewMut, ArrayViewMutD, Dimension, IxDyn, ShapeBuilder};

use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::place::{Device, Place};

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

    /// Number and size of non-empty square matrices: one (`[n, n]`), or a stack (`[groups, n, n]`).
    pub(crate) fn expect_squares(&self, name: &str) -> Result<(usize, usize)> {
        match self.shape[..] {
            [rows, columns] if rows == columns && rows > 0 => Ok((1, rows)),
            [groups, rows, columns] if rows == columns && groups * rows > 0 => Ok((groups, rows)),
            _ => Err(Error::Shape(format!(
                "{name} must be a square matrix or a stack of them, got shape {:?}",
                self.shape
            ))),
        }
    }

    /// Fails unless the elements are of this dtype.
    pub(crate) fn expect_dtype(&self, expected: Dtype) -> Result<()> {
        if self.dtype == expected {
            Ok(())
        } else {
            Err(Error::Dtype(format!(
                "expected dtype {expected}, got {}",
                self.dtype
            )))
        }
    }
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
        self.layout.device.expect(Device::Cpu)?;
        self.layout.expect_dtype(T::DTYPE)?;
        let shape = IxDyn(&self.layout.shape).strides(IxDyn(&self.layout.strides));
        // SAFETY: device and dtype were checked just above, alignment and size at construction;
        // the rest is the module's contract.
        Ok(unsafe { ArrayView::from_shape_ptr(shape, host_pointer::<T>(self.pointer)) })
    }

    /// The address of the first element; it says nothing where there is none.
    pub(crate) fn address(&self) -> usize {
        self.pointer.expose_provenance()
    }
}

/// Where an array begins: an empty one anywhere.
fn host_pointer<T>(pointer: *const u8) -> *const T {
    if pointer.is_null() {
        std::ptr::NonNull::dangling().as_ptr()
    } else {
        pointer.cast()
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

    /// The address of the first element; it says nothing where there is none.
    pub(crate) fn address(&self) -> usize {
        self.pointer.expose_provenance()
    }

    /// The tensor as an array in host memory.
    pub fn array_mut<T: Element>(&mut self) -> Result<ArrayViewMutD<'_, T>> {
        self.layout.device.expect(Device::Cpu)?;
        self.layout.expect_dtype(T::DTYPE)?;
        let shape = IxDyn(&self.layout.shape).strides(IxDyn(&self.layout.strides));
        let pointer = host_pointer::<T>(self.pointer).cast_mut();
        // SAFETY: device and dtype were checked just above, alignment, size and that no two indices
        // share an element at construction; the array borrows the view, the only way to the memory.
        Ok(unsafe { ArrayViewMut::from_shape_ptr(shape, pointer) })
    }

    /// Matrices as they are; each of the rows of a tensor of rows as a matrix of its own.
    pub(crate) fn as_matrices(&mut self, rows: bool) -> TensorViewMut<'_> {
        let mut layout = self.layout.clone();
        if rows {
            let last = layout.shape.len().saturating_sub(1);
            layout.shape.insert(last, 1);
            layout.strides.insert(last, 0);
        }
        TensorViewMut {
            pointer: self.pointer,
            layout,
            memory: PhantomData,
        }
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

/// Elements that a backend allocated and lends, for as long as it says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory<'a, T> {
    address: usize,
    elements: usize,
    place: Place,
    memory: PhantomData<&'a T>,
}

impl<T> Memory<'_, T> {
    /// Lends memory to be read.
    ///
    /// # Safety
    ///
    /// The backend keeps the contract in this module's documentation, for this many elements from
    /// `address` on, for the lifetime `'a`.
    pub(crate) unsafe fn new(address: usize, elements: usize, place: Place) -> Self {
        Self {
            address,
            elements,
            place,
            memory: PhantomData,
        }
    }

    /// Where it begins.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// How many elements there are.
    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    /// Device and stream.
    pub(crate) fn place(&self) -> Place {
        self.place
    }
}

/// As [`Memory`], to be written to.
#[derive(Debug)]
pub(crate) struct MemoryMut<'a, T> {
    lent: Memory<'a, T>,
    memory: PhantomData<&'a mut T>,
}

impl<'a, T> MemoryMut<'a, T> {
    /// Lends memory to be written to.
    ///
    /// # Safety
    ///
    /// As for [`Memory::new`], and nothing else touches the memory.
    pub(crate) unsafe fn new(address: usize, elements: usize, place: Place) -> Self {
        Self {
            // SAFETY: the caller's promise.
            lent: unsafe { Memory::new(address, elements, place) },
            memory: PhantomData,
        }
    }

    /// What is lent.
    pub(crate) fn lent(&self) -> &Memory<'a, T> {
        &self.lent
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
