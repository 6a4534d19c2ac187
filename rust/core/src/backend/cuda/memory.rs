//! Device memory, which torch allocates.
//!
//! Torch's allocator keeps a pool for each stream: what is released may be handed out again at
//! once to work that comes later on the same stream. So memory is asked for on the stream that will
//! use it, and may be released as soon as that work is queued.

use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock};

use faer::{MatMut, MatRef};

use crate::backend::Storage;
use crate::error::{Error, Result};
use crate::view::Real;

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
    pub(super) fn new(bytes: usize, device: usize, stream: usize) -> Result<Self> {
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
        let address = allocator.allocate(bytes.max(1), device, stream)? as u64;
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
    element: PhantomData<T>,
}

impl<T: Real> DeviceMatrix<T> {
    /// A matrix with arbitrary contents.
    pub(super) fn new(rows: usize, columns: usize, device: usize, stream: usize) -> Result<Self> {
        let bytes = rows
            .checked_mul(columns)
            .and_then(|elements| elements.checked_mul(T::DTYPE.size()))
            .ok_or_else(|| {
                Error::OutOfMemory(format!("a matrix of {rows} x {columns} fits nowhere"))
            })?;
        Ok(Self {
            buffer: Buffer::new(bytes, device, stream)?,
            rows,
            columns,
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
    pub(super) fn reshaped(&self, rows: usize, columns: usize) -> Result<MatRef<'_, T>> {
        self.expect_elements(rows, columns)?;
        Ok(self.by_rows(rows, columns))
    }

    /// As a matrix of as many elements, to be written to.
    pub(super) fn reshaped_mut(&mut self, rows: usize, columns: usize) -> Result<MatMut<'_, T>> {
        self.expect_elements(rows, columns)?;
        Ok(self.by_rows_mut(rows, columns))
    }

    /// Row by row; there are as many elements.
    fn by_rows(&self, rows: usize, columns: usize) -> MatRef<'_, T> {
        let pointer = std::ptr::with_exposed_provenance(self.address() as usize);
        // SAFETY: both callers know that the buffer, which outlives the view, holds this many
        // elements; its address is aligned (torch aligns to 512 bytes). Nothing but this backend
        // follows the pointer, which is the device's.
        unsafe { MatRef::from_raw_parts(pointer, rows, columns, columns as isize, 1) }
    }

    fn by_rows_mut(&mut self, rows: usize, columns: usize) -> MatMut<'_, T> {
        let pointer = std::ptr::with_exposed_provenance_mut(self.address() as usize);
        // SAFETY: as in `by_rows`, and `&mut self` is exclusive.
        unsafe { MatMut::from_raw_parts_mut(pointer, rows, columns, columns as isize, 1) }
    }

    fn expect_elements(&self, rows: usize, columns: usize) -> Result<()> {
        if rows * columns == self.rows * self.columns {
            Ok(())
        } else {
            Err(Error::Shape(format!(
                "a matrix of {} x {} has no view of {rows} x {columns}",
                self.rows, self.columns
            )))
        }
    }
}

impl<T: Real> Storage<T> for DeviceMatrix<T> {
    fn view(&self) -> MatRef<'_, T> {
        self.by_rows(self.rows, self.columns)
    }

    fn view_mut(&mut self) -> MatMut<'_, T> {
        self.by_rows_mut(self.rows, self.columns)
    }
}
