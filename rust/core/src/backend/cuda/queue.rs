//! A device and the stream that work is queued on: memory, transfers, launches.

use std::ops::Deref;
use std::sync::MutexGuard;

use cudarc::driver::{result, sys};

use super::calls::{failed, stream_handle};
use super::gpu::{Entered, Gpu, Handles};
use super::kernels::Argument::{self, Count};
use super::memory::{Buffer, DeviceMatrix};
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Matrix};
use crate::place::{Device, Place};
use crate::units::Precision;

/// Threads of a block, spread over the columns of what a kernel works on.
pub(super) const THREADS: usize = 128;
/// Blocks for each multiprocessor: enough to keep it busy while some wait for memory.
pub(super) const BLOCKS_PER_MULTIPROCESSOR: usize = 16;
/// The most blocks along the second and third dimension of a launch.
const MOST_BLOCKS: usize = 65_535;

/// A device and the stream that work is queued on.
pub struct Cuda {
    pub(super) gpu: &'static Gpu,
    pub(super) stream: usize,
    /// Whether a CUDA graph is being captured on the stream.
    pub(super) capturing: bool,
    /// Of dense products in single precision.
    pub(super) precision: Precision,
}

/// The backend, with its device's context current on this thread for as long as it is held.
pub struct Current {
    cuda: Cuda,
    _entered: Entered,
}

impl Current {
    /// The backend for tensors at this place, whether or not a graph is being captured.
    pub(super) fn enter(place: Place) -> Result<Self> {
        let mut cuda = Cuda::of(place)?;
        let _entered = cuda.gpu.enter()?;
        cuda.capturing = cuda.is_capturing()?;
        Ok(Self { cuda, _entered })
    }
}

impl Deref for Current {
    type Target = Cuda;

    fn deref(&self) -> &Cuda {
        &self.cuda
    }
}

/// A number, to be given to a kernel.
pub(super) fn count(value: usize) -> Argument {
    Count(value as u64)
}

/// Row and column stride of a matrix, to be given to a kernel.
pub(super) fn strides<T>(x: Matrix<'_, T>) -> [Argument; 2] {
    [x.row_stride(), x.column_stride()].map(|stride| count(stride.unsigned_abs()))
}

/// Whether neighbours along a row are nearer to each other than those along a column, so that
/// threads should be spread along rows.
pub(super) fn runs_along_rows<T>(x: Matrix<'_, T>) -> bool {
    x.column_stride() <= x.row_stride() || x.rows() <= 1
}

/// The distance from each matrix of a stack to the next one, where it is always the same; then all
/// are on the device of the first one.
pub(super) fn step_of<T>(stack: &[Matrix<'_, T>]) -> Option<usize> {
    let first = stack.first()?;
    let step = match stack.get(1) {
        Some(second) => second.address().checked_sub(first.address())?,
        None => 0,
    };
    let like_first = |x: &Matrix<'_, T>| {
        x.place().device == first.place().device
            && (x.row_stride(), x.column_stride()) == (first.row_stride(), first.column_stride())
    };
    let mut each = stack.iter().enumerate();
    let regular =
        each.all(|(index, x)| x.address() == first.address() + index * step && like_first(x));
    (regular && step.is_multiple_of(size_of::<T>())).then(|| step / size_of::<T>())
}

impl Cuda {
    /// The device and stream of this place.
    fn of(place: Place) -> Result<Self> {
        let Device::Cuda(ordinal) = place.device else {
            return Err(Error::Device(format!(
                "expected a CUDA device, got {}",
                place.device
            )));
        };
        Ok(Self {
            gpu: Gpu::of(ordinal)?,
            stream: place.stream,
            capturing: false,
            precision: Precision::Ieee,
        })
    }

    /// The same, with dense products in this precision.
    pub(super) fn with_precision(&self, precision: Precision) -> Self {
        Self { precision, ..*self }
    }

    /// The stream, as the driver takes it.
    pub(super) fn stream(&self) -> sys::CUstream {
        stream_handle(self.stream)
    }

    /// Whether a CUDA graph is being captured on the stream.
    fn is_capturing(&self) -> Result<bool> {
        // SAFETY: the stream is the caller's current one.
        let status = unsafe { result::stream::is_capturing(self.stream()) }
            .map_err(|error| failed("cuStreamIsCapturing", error.0))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Where this backend computes.
    pub(super) fn place(&self) -> Place {
        Place {
            device: Device::Cuda(self.gpu.ordinal),
            stream: self.stream,
        }
    }

    /// The address of a matrix, if it is on this device.
    pub(super) fn address<T>(&self, x: Matrix<'_, T>) -> Result<u64> {
        x.place().device.expect(self.place().device)?;
        Ok(x.address() as u64)
    }

    /// Waits for all work queued on the stream.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: the stream is the caller's current one.
        unsafe { result::stream::synchronize(self.stream()) }
            .map_err(|error| failed("cuStreamSynchronize", error.0))
    }

    /// The library handles, set to the stream.
    pub(super) fn handles(&self) -> Result<MutexGuard<'_, Handles>> {
        self.gpu.handles(self.stream, self.capturing)
    }

    /// A piece of memory with arbitrary contents.
    pub(super) fn buffer(&self, bytes: usize) -> Result<Buffer> {
        Buffer::new(bytes, self.place())
    }

    /// A matrix with arbitrary contents.
    pub(super) fn matrix_of<T: Real>(
        &self,
        rows: usize,
        columns: usize,
    ) -> Result<DeviceMatrix<T>> {
        DeviceMatrix::new(rows, columns, self.place())
    }

    /// A matrix of zeros.
    pub(super) fn zeroed<T: Real>(&self, rows: usize, columns: usize) -> Result<DeviceMatrix<T>> {
        let matrix = self.matrix_of::<T>(rows, columns)?;
        let bytes = rows * columns * T::DTYPE.size();
        if bytes > 0 {
            // SAFETY: the matrix has this many bytes.
            unsafe { result::memset_d8_async(matrix.address(), 0, bytes, self.stream()) }
                .map_err(|error| failed("cuMemsetD8Async", error.0))?;
        }
        Ok(matrix)
    }

    /// A copy of a matrix in host memory.
    pub(super) fn uploaded<T: Real>(&self, host: &HostMatrix<T>) -> Result<DeviceMatrix<T>> {
        let (rows, columns) = (host.rows(), host.columns());
        let matrix = self.matrix_of::<T>(rows, columns)?;
        let elements = (0..rows).flat_map(|i| (0..columns).map(move |j| host[(i, j)]));
        let elements: Vec<T> = elements.collect();
        if !elements.is_empty() {
            // SAFETY: the matrix has room for the elements, and the stream is waited for before
            // they go.
            unsafe { result::memcpy_htod_async(matrix.address(), &elements, self.stream()) }
                .map_err(|error| failed("cuMemcpyHtoDAsync", error.0))?;
            self.wait()?;
        }
        Ok(matrix)
    }

    /// The first elements of a buffer, once the stream's work is done.
    pub(super) fn download<E: Copy + Default>(
        &self,
        buffer: &Buffer,
        elements: usize,
    ) -> Result<Vec<E>> {
        let mut host = vec![E::default(); elements];
        // SAFETY: the buffer holds as many elements (each caller made it so), and the stream is
        // waited for before the vector is looked at.
        unsafe { result::memcpy_dtoh_async(&mut host, buffer.address(), self.stream()) }
            .map_err(|error| failed("cuMemcpyDtoHAsync", error.0))?;
        self.wait()?;
        Ok(host)
    }

    /// Blocks along each dimension for a table of this size, gone through `items` times.
    pub(super) fn grid(&self, items: usize, rows: usize, columns: usize) -> [usize; 3] {
        let (across, deep) = (columns.div_ceil(THREADS), items.min(MOST_BLOCKS));
        let wanted = BLOCKS_PER_MULTIPROCESSOR * self.gpu.multiprocessors;
        let down = wanted.div_ceil(across * deep);
        [across, down.clamp(1, rows.min(MOST_BLOCKS)), deep]
    }

    /// Queues a kernel over a table of `rows` and `columns`, `items` times.
    ///
    /// # Safety
    ///
    /// As for [`Kernels::launch`](super::kernels::Kernels::launch).
    pub(super) unsafe fn launch(
        &self,
        [element, real]: [Dtype; 2],
        name: &str,
        items: usize,
        rows: usize,
        columns: usize,
        arguments: Vec<Argument>,
    ) -> Result<()> {
        if items == 0 || rows == 0 || columns == 0 {
            return Ok(());
        }
        let [x, y, z] = self.grid(items, rows, columns).map(u32::try_from);
        let (Ok(x), Ok(y), Ok(z)) = (x, y, z) else {
            return Err(Error::Shape(format!(
                "{columns} columns are too many for a GPU"
            )));
        };
        let kernels = self.gpu.kernels(element, real)?;
        // SAFETY: the caller's promise; the context is current while a `Current` is held.
        unsafe { kernels.launch(name, [x, y, z], THREADS as u32, self.stream(), arguments) }
    }
}
