//! Device memory, which torch allocates.
//!
//! Torch's allocator keeps a pool for each stream: what is released may be handed out again at
//! once to work that comes later on the same stream. So memory is asked for on the stream that will
//! use it, and may be released as soon as that work is queued.

use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock};

use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut, Storage};
use crate::place::{Device, Place};
use crate::view::{Memory, MemoryMut};

/// Where device memory comes from.
pub trait Allocator: Send + Sync {
    /// The address of this many bytes, for use on this stream of this device.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if there are not so many.
    fn allocate(&self, bytes: usize, device: usize, stream: usize) -> Result<usize>;

    /// Takes memory back.
    fn release(&self, address: usize);
}

static ALLOCATOR: RwLock<Option<Arc<dyn Allocator>>> = RwLock::new(None);

/// Sets where device memory comes from, from now on.
pub fn set_allocator(allocator: Arc<dyn Allocator>) {
    *ALLOCATOR.write().unwrap_or_else(PoisonError::into_inner) = Some(allocator);
}

/// A piece of device memory.
pub(super) struct Buffer {
    address: u64,
    allocator: Arc<dyn Allocator>,
}

impl Buffer {
    /// Memory with arbitrary contents.
    pub(super) fn new(bytes: usize, place: Place) -> Result<Self> {
        let Device::Cuda(device) = place.device else {
            return Err(Error::Internal(format!(
                "{} has no device memory",
                place.device
            )));
        };
        // The lock is given back before the allocator runs: that waits for the interpreter, which
        // may be waiting for the lock.
        let allocator = ALLOCATOR
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let allocator = allocator.ok_or_else(|| {
            Error::Cuda("no allocator of device memory was set: set_cuda_allocator".to_owned())
        })?;
        // An empty matrix gets an address, too: libraries refuse null.
        let address = allocator.allocate(bytes.max(1), device, place.stream)? as u64;
        Ok(Self { address, allocator })
    }

    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.allocator.release(self.address as usize);
    }
}

/// A matrix in device memory, row by row.
pub struct DeviceMatrix<T> {
    buffer: Buffer,
    rows: usize,
    columns: usize,
    place: Place,
    element: PhantomData<T>,
}

impl<T: Real> DeviceMatrix<T> {
    /// A matrix with arbitrary contents.
    pub(super) fn new(rows: usize, columns: usize, place: Place) -> Result<Self> {
        let bytes = rows
            .checked_mul(columns)
            .and_then(|elements| elements.checked_mul(T::DTYPE.size()))
            .ok_or_else(|| {
                Error::OutOfMemory(format!("a matrix of {rows} x {columns} fits nowhere"))
            })?;
        Ok(Self {
            buffer: Buffer::new(bytes, place)?,
            rows,
            columns,
            place,
            element: PhantomData,
        })
    }

    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// The memory.
    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// As a matrix of as many elements.
    pub(super) fn reshaped(&self, rows: usize, columns: usize) -> Matrix<'_, T> {
        Matrix::by_rows(self.lent(), [rows, columns])
    }

    /// As a matrix of as many elements, to be written to.
    pub(super) fn reshaped_mut(&mut self, rows: usize, columns: usize) -> MatrixMut<'_, T> {
        MatrixMut::by_rows(self.lent_mut(), [rows, columns])
    }

    fn lent(&self) -> Memory<'_, T> {
        let elements = self.rows * self.columns;
        // SAFETY: the buffer holds this many elements, is aligned (torch aligns to 512 bytes) and
        // outlives what is lent.
        unsafe { Memory::new(self.address() as usize, elements, self.place) }
    }

    fn lent_mut(&mut self) -> MemoryMut<'_, T> {
        let elements = self.rows * self.columns;
        // SAFETY: as in `lent`, and `&mut self` is exclusive.
        unsafe { MemoryMut::new(self.address() as usize, elements, self.place) }
    }
}

impl<T: Real> Storage<T> for DeviceMatrix<T> {
    fn view(&self) -> Matrix<'_, T> {
        self.reshaped(self.rows, self.columns)
    }

    fn view_mut(&mut self) -> MatrixMut<'_, T> {
        self.reshaped_mut(self.rows, self.columns)
    }
}
