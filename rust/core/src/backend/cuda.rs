//! The CUDA backend: cuBLAS and cuSOLVER for matrices, kernels of our own around them.
//!
//! Everything is queued on the stream that torch uses for the tensors at hand, in memory that
//! torch allocates (see [`memory`]). The host waits where numbers come back or go there, for
//! decompositions, and for what is made to be kept; nowhere in the product of a packed sum.

use std::fmt::Debug;
use std::ops::Deref;
use std::sync::MutexGuard;

use cudarc::driver::{result, sys};
use faer::{MatMut, MatRef};

use self::gpu::{Entered, Gpu, Handles};
use self::kernels::Argument::{self, Count, Number, Pointer, Words};
use self::memory::{Buffer, DeviceMatrix};
use self::packed::{Packed, blocks};
use super::{Backend, Spectrum, Storage, Triangle};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gram::{GramTask, Precision, Units};
use crate::kronecker::Group;
use crate::view::{Device, Dtype, Place, Real};

mod blas;
mod gpu;
mod gram;
mod kernels;
mod libraries;
mod memory;
mod packed;
mod solver;

pub use self::kernels::{compile, names as kernel_names};
pub use self::libraries::{Findings, Found, Library, look};
pub use self::memory::{Allocator, set_allocator};

/// Threads of a block, spread over the columns of what a kernel works on.
const THREADS: usize = 128;
/// Blocks for each multiprocessor: enough to keep it busy while some wait for memory.
const BLOCKS_PER_MULTIPROCESSOR: usize = 16;
/// The most blocks along the second and third dimension of a launch.
const MOST_BLOCKS: usize = 65_535;

/// A device and the stream that work is queued on.
pub struct Cuda {
    gpu: &'static Gpu,
    stream: usize,
    /// Of single-precision products.
    precision: Precision,
    /// Whether a CUDA graph is being captured on the stream.
    capturing: bool,
}

/// The backend, with its device's context current on this thread for as long as it is held.
pub struct Current {
    cuda: Cuda,
    _entered: Entered,
}

impl Deref for Current {
    type Target = Cuda;

    fn deref(&self) -> &Cuda {
        &self.cuda
    }
}

/// The error of a call that failed with this code.
fn failed(call: &str, code: impl Debug) -> Error {
    let code = format!("{code:?}");
    if code == "CUDA_ERROR_OUT_OF_MEMORY" || code.ends_with("_ALLOC_FAILED") {
        Error::OutOfMemory(format!("{call} ran out of device memory ({code})"))
    } else {
        Error::Cuda(format!("{call} failed: {code}"))
    }
}

fn stream_handle(stream: usize) -> sys::CUstream {
    std::ptr::with_exposed_provenance_mut(stream)
}

/// The address of a matrix, to be read or written by a kernel.
fn address<T>(x: MatRef<'_, T>) -> Argument {
    Pointer(x.as_ptr().expose_provenance() as u64)
}

fn count(value: usize) -> Argument {
    Count(value as u64)
}

/// Row and column stride of a matrix.
fn strides<T>(x: MatRef<'_, T>) -> [Argument; 2] {
    [x.row_stride(), x.col_stride()].map(|stride| count(stride.unsigned_abs()))
}

/// Whether neighbours along a row are nearer to each other than those along a column, so that
/// threads should be spread along rows.
fn runs_along_rows<T>(x: MatRef<'_, T>) -> bool {
    x.col_stride() <= x.row_stride() || x.nrows() <= 1
}

/// The distance from each matrix of a stack to the next one, where it is always the same.
fn step_of<T>(stack: &[MatRef<'_, T>]) -> Option<usize> {
    let place = |x: &MatRef<'_, T>| x.as_ptr().expose_provenance();
    let first = stack.first()?;
    let step = match stack.get(1) {
        Some(second) => place(second).checked_sub(place(first))?,
        None => 0,
    };
    let regular = stack.iter().enumerate().all(|(index, x)| {
        place(x) == place(first) + index * step
            && (x.row_stride(), x.col_stride()) == (first.row_stride(), first.col_stride())
    });
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
            precision: Precision::Ieee,
            capturing: false,
        })
    }

    /// The same device and stream with another precision.
    fn with_precision(&self, precision: Precision) -> Self {
        Self { precision, ..*self }
    }

    fn stream(&self) -> sys::CUstream {
        stream_handle(self.stream)
    }

    /// Whether a CUDA graph is being captured on the stream.
    fn is_capturing(&self) -> Result<bool> {
        // SAFETY: the stream is the caller's current one.
        let status = unsafe { result::stream::is_capturing(self.stream()) }
            .map_err(|error| failed("cuStreamIsCapturing", error.0))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Waits for all work queued on the stream.
    fn wait(&self) -> Result<()> {
        // SAFETY: the stream is the caller's current one.
        unsafe { result::stream::synchronize(self.stream()) }
            .map_err(|error| failed("cuStreamSynchronize", error.0))
    }

    fn handles(&self) -> Result<MutexGuard<'_, Handles>> {
        self.gpu
            .handles(self.stream, self.precision, self.capturing)
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer> {
        Buffer::new(bytes, self.gpu.ordinal, self.stream)
    }

    /// A matrix with arbitrary contents.
    fn matrix_of<T: Real>(&self, rows: usize, columns: usize) -> Result<DeviceMatrix<T>> {
        DeviceMatrix::new(rows, columns, self.gpu.ordinal, self.stream)
    }

    /// A copy, row by row.
    fn copied<T: Real>(&self, x: MatRef<'_, T>) -> Result<DeviceMatrix<T>> {
        let mut copy = self.matrix_of::<T>(x.nrows(), x.ncols())?;
        self.copy(x, copy.view_mut())?;
        Ok(copy)
    }

    /// The first elements of a buffer, once the stream's work is done.
    fn download<E: Copy + Default>(&self, buffer: &Buffer, elements: usize) -> Result<Vec<E>> {
        let mut host = vec![E::default(); elements];
        // SAFETY: the buffer holds as many elements (each caller made it so), and the stream is
        // waited for before the vector is looked at.
        unsafe { result::memcpy_dtoh_async(&mut host, buffer.address(), self.stream()) }
            .map_err(|error| failed("cuMemcpyDtoHAsync", error.0))?;
        self.wait()?;
        Ok(host)
    }

    /// All elements, row by row, in double precision.
    fn to_host<T: Real>(&self, x: MatRef<'_, T>) -> Result<Vec<f64>> {
        let (rows, columns) = (x.nrows(), x.ncols());
        let buffer = self.buffer(8 * rows * columns)?;
        let pointer = std::ptr::with_exposed_provenance_mut(buffer.address() as usize);
        // SAFETY: the buffer holds this many numbers of eight bytes and outlives the view.
        let wide = unsafe {
            MatMut::<f64>::from_raw_parts_mut(pointer, rows, columns, columns as isize, 1)
        };
        self.copy(x, wide)?;
        self.download(&buffer, rows * columns)
    }

    /// Blocks along each dimension for a table of this size, gone through `items` times.
    fn grid(&self, items: usize, rows: usize, columns: usize) -> [usize; 3] {
        let (across, deep) = (columns.div_ceil(THREADS), items.min(MOST_BLOCKS));
        let wanted = BLOCKS_PER_MULTIPROCESSOR * self.gpu.multiprocessors;
        let down = wanted.div_ceil(across * deep);
        [across, down.clamp(1, rows.min(MOST_BLOCKS)), deep]
    }

    /// Queues a kernel over a table of `rows` and `columns`, `items` times.
    ///
    /// # Safety
    ///
    /// As for [`kernels::Kernels::launch`].
    unsafe fn launch(
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

    /// Copies a stack of matrices of one size, rounding or widening.
    fn copy_stack<S: Real, T: Real>(
        &self,
        from: &[MatRef<'_, S>],
        to: Vec<MatMut<'_, T>>,
    ) -> Result<()> {
        let targets: Vec<_> = to.iter().map(|to| to.as_ref()).collect();
        let (Some(&first), Some(&target)) = (from.first(), targets.first()) else {
            return Ok(());
        };
        let (Some(from_step), Some(to_step)) = (step_of(from), step_of(&targets)) else {
            let mut pairs = from.iter().zip(to);
            return pairs.try_for_each(|(&from, to)| self.copy(from, to));
        };
        let (first, target) = if runs_along_rows(target) {
            (first, target)
        } else {
            (first.transpose(), target.transpose())
        };
        let (rows, columns) = (target.nrows(), target.ncols());
        let mut arguments = vec![address(first), count(from_step)];
        arguments.extend(strides(first));
        arguments.extend([from.len(), rows, columns].map(count));
        arguments.extend([address(target), count(to_step)]);
        arguments.extend(strides(target));
        let types = [S::DTYPE, T::DTYPE];
        // SAFETY: the views are of matrices of this size on this device; those written to are
        // exclusive.
        unsafe { self.launch(types, "convert", from.len(), rows, columns, arguments) }
    }

    /// Zeroes what is above the diagonal.
    fn zero_upper<T: Real>(&self, x: MatMut<'_, T>) -> Result<()> {
        let size = x.nrows();
        let mut arguments = vec![address(x.as_ref()), count(size)];
        arguments.extend(strides(x.as_ref()));
        // SAFETY: the view is exclusive and of a square matrix on this device.
        unsafe { self.launch([T::DTYPE; 2], "zero_upper", 1, size, size, arguments) }
    }

    /// The values of a spectrum on the device: left, right, number of pairs, constant.
    fn upload_spectrum(
        &self,
        spectrum: &Spectrum,
    ) -> Result<([DeviceMatrix<f64>; 2], [Argument; 4])> {
        let side = |values: Vec<&Vec<f64>>| {
            let rows = values.len();
            let columns = values.first().map_or(0, |values| values.len());
            let host = faer::Mat::from_fn(rows, columns, |k, i| values[k][i]);
            self.upload(host.as_ref())
        };
        let left = side(spectrum.pairs.iter().map(|(left, _)| left).collect())?;
        let right = side(spectrum.pairs.iter().map(|(_, right)| right).collect())?;
        let arguments = [
            Pointer(left.address()),
            Pointer(right.address()),
            count(spectrum.pairs.len()),
            Number(spectrum.constant),
        ];
        Ok(([left, right], arguments))
    }

    /// The row-major number of the first NaN or infinity among elements with these extents and
    /// strides, if there is one.
    fn first_non_finite(
        &self,
        dtype: Dtype,
        place: u64,
        extents: &[usize],
        steps: &[usize],
    ) -> Result<Option<usize>> {
        let missing = 5 - extents.len();
        let mut words = vec![1; missing];
        words.extend(extents.iter().map(|&extent| extent as u64));
        words.resize(5 + missing, 0);
        words.extend(steps.iter().map(|&step| step as u64));
        let columns = extents.last().copied().unwrap_or(1);
        let rows = extents.iter().product::<usize>() / columns.max(1);
        let first = self.buffer(8)?;
        // All bits set: larger than any number.
        // SAFETY: the buffer has this many bytes.
        unsafe { result::memset_d8_async(first.address(), 0xff, 8, self.stream()) }
            .map_err(|error| failed("cuMemsetD8Async", error.0))?;
        let arguments = vec![
            Pointer(place),
            Words(words),
            count(rows),
            count(columns),
            Pointer(first.address()),
        ];
        // Kernels that read half precision compute in single.
        let real = if dtype == Dtype::Float64 {
            dtype
        } else {
            Dtype::Float32
        };
        // SAFETY: extents and strides are those of a tensor on this device.
        unsafe {
            self.launch(
                [dtype, real],
                "first_non_finite",
                1,
                rows,
                columns,
                arguments,
            )?
        };
        let first = self.download::<u64>(&first, 1)?[0];
        Ok((first != u64::MAX).then_some(first as usize))
    }

    /// Inner products of columns over runs of rows, one run on top of the other, and how many
    /// numbers these are.
    fn partial_dots<T: Real>(
        &self,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
    ) -> Result<(DeviceMatrix<f64>, usize)> {
        let (rows, columns) = (a.nrows(), a.ncols());
        // Every block of the launch writes a row.
        let [_, down, _] = self.grid(1, rows, columns);
        let partial = self.matrix_of::<f64>(down, columns)?;
        let mut arguments = vec![address(a)];
        arguments.extend(strides(a));
        arguments.push(address(b));
        arguments.extend(strides(b));
        arguments.extend([rows, columns].map(count));
        arguments.push(Pointer(partial.address()));
        // SAFETY: the views are of matrices of this size on this device, and there is a row of
        // sums for every block that `launch` starts.
        unsafe { self.launch([T::DTYPE; 2], "dot", 1, rows, columns, arguments)? };
        Ok((partial, down * columns))
    }

    /// Sums of the numbers whose places differ by multiples of `width`, in a fixed order.
    fn fold(
        &self,
        mut numbers: DeviceMatrix<f64>,
        mut length: usize,
        width: usize,
    ) -> Result<Vec<f64>> {
        /// Numbers that one thread adds up.
        const EACH: usize = 32;
        while length > width {
            let columns = (length / width).div_ceil(EACH) * width;
            let sums = self.matrix_of::<f64>(1, columns)?;
            let mut arguments = vec![Pointer(numbers.address())];
            arguments.extend([length, columns].map(count));
            arguments.push(Pointer(sums.address()));
            // SAFETY: each matrix holds as many numbers as is said.
            unsafe { self.launch([Dtype::Float64; 2], "fold", 1, 1, columns, arguments)? };
            (numbers, length) = (sums, columns);
        }
        self.download::<f64>(numbers.buffer(), width)
    }
}

impl Backend for Cuda {
    type Matrix<T: Real> = DeviceMatrix<T>;
    type Packed<T: Real> = Packed<T>;
    type Handle = Current;

    fn at(place: Place) -> Result<Current> {
        let current = Self::at_for_packed(place)?;
        if current.capturing {
            return Err(Error::Cuda(
                "a CUDA graph is being captured: only the product of a penalty can be part of \
                 one; call everything else before or after"
                    .to_owned(),
            ));
        }
        Ok(current)
    }

    fn at_for_packed(place: Place) -> Result<Current> {
        let mut cuda = Self::of(place)?;
        let _entered = cuda.gpu.enter()?;
        cuda.capturing = cuda.is_capturing()?;
        Ok(Current { cuda, _entered })
    }

    fn device(&self) -> Device {
        Device::Cuda(self.gpu.ordinal)
    }

    fn hold_for(&self, home: Place) -> Result<()> {
        // A graph is replayed long after; whoever keeps it keeps what it uses.
        if home.stream == self.stream || self.capturing {
            return Ok(());
        }
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(|e| failed("cuEventCreate", e.0))?;
        // SAFETY: the event lives until it is destroyed, which waits for nothing; both streams are
        // torch's, which keeps them. A stream that is gone has no more work to order.
        unsafe {
            let recorded = result::event::record(event, self.stream());
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            let waited = result::stream::wait_event(stream_handle(home.stream), event, flags);
            let destroyed = result::event::destroy(event);
            recorded.map_err(|e| failed("cuEventRecord", e.0))?;
            waited.map_err(|e| failed("cuStreamWaitEvent", e.0))?;
            destroyed.map_err(|e| failed("cuEventDestroy", e.0))
        }
    }

    fn settle(&self) -> Result<()> {
        self.wait()
    }

    fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Result<DeviceMatrix<T>> {
        let matrix = self.matrix_of::<T>(rows, columns)?;
        let bytes = rows * columns * T::DTYPE.size();
        if bytes > 0 {
            // SAFETY: the matrix has this many bytes.
            unsafe { result::memset_d8_async(matrix.address(), 0, bytes, self.stream()) }
                .map_err(|error| failed("cuMemsetD8Async", error.0))?;
        }
        Ok(matrix)
    }

    fn upload<T: Real>(&self, host: MatRef<'_, T>) -> Result<DeviceMatrix<T>> {
        let (rows, columns) = (host.nrows(), host.ncols());
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

    fn copy<S: Real, T: Real>(&self, from: MatRef<'_, S>, to: MatMut<'_, T>) -> Result<()> {
        self.copy_stack(&[from], vec![to])
    }

    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatMut<'_, T>>>,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()> {
        gram::accumulate(
            &self.with_precision(task.precision),
            units,
            out,
            task,
            cancel,
        )
    }

    fn symmetrize<T: Real>(&self, x: Vec<MatMut<'_, T>>) -> Result<()> {
        let stack: Vec<_> = x.iter().map(|x| x.as_ref()).collect();
        let Some(&first) = stack.first() else {
            return Ok(());
        };
        let Some(step) = step_of(&stack) else {
            return x.into_iter().try_for_each(|x| self.symmetrize(vec![x]));
        };
        let size = first.nrows();
        let mut arguments = vec![address(first)];
        arguments.extend([stack.len(), step, size].map(count));
        arguments.extend(strides(first));
        let types = [T::DTYPE; 2];
        // SAFETY: the views are exclusive and of square matrices of this size on this device.
        unsafe { self.launch(types, "symmetrize", stack.len(), size, size, arguments) }
    }

    fn eigh<T: Real>(
        &self,
        x: &[MatRef<'_, T>],
        vectors: Vec<MatMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>> {
        self.decompose(x, vectors)
    }

    fn cholesky<T: Real>(&self, x: MatMut<'_, T>) -> Result<Option<usize>> {
        self.factor(x)
    }

    fn solve_triangular<T: Real>(
        &self,
        l: MatRef<'_, T>,
        triangle: Triangle,
        x: MatMut<'_, T>,
    ) -> Result<()> {
        self.solve_lower(l, triangle, x)
    }

    fn gemm<T: Real>(
        &self,
        out: MatMut<'_, T>,
        keep: bool,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
        alpha: f64,
    ) -> Result<()> {
        self.multiply(out, keep, a, b, alpha)
    }

    fn kronecker_product<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        v: &[MatRef<'_, T>],
        out: Vec<MatMut<'_, T>>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        let Some(first) = v.first() else {
            return Ok(());
        };
        let mut half = self.matrix_of::<T>(first.nrows(), first.ncols())?;
        for (&v, mut out) in v.iter().zip(out) {
            cancel.check()?;
            for (index, &(a, g)) in terms.iter().enumerate() {
                self.multiply(half.view_mut(), false, v, a, 1.0)?;
                self.multiply(out.as_mut(), index > 0, g, half.view(), 1.0)?;
            }
            if damping != 0.0 {
                self.add_scaled(damping, v, out)?;
            }
        }
        Ok(())
    }

    fn pack<T: Real>(&self, groups: &[Group<'_, T>]) -> Result<Packed<T>> {
        Packed::new(self, groups)
    }

    fn apply_packed<T: Real>(
        &self,
        packed: &Packed<T>,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
    ) -> Result<Option<f64>> {
        packed.apply(self, v, out)?;
        Ok(None)
    }

    fn packed_flops<T: Real>(packed: &Packed<T>) -> usize {
        packed.flops()
    }

    fn dot<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Result<f64> {
        let (a, b) = if runs_along_rows(a) {
            (a, b)
        } else {
            (a.transpose(), b.transpose())
        };
        if a.nrows() == 0 || a.ncols() == 0 {
            return Ok(0.0);
        }
        let (partial, length) = self.partial_dots(a, b)?;
        Ok(self.fold(partial, length, 1)?[0])
    }

    fn column_dots<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Result<Vec<f64>> {
        if a.nrows() == 0 || a.ncols() == 0 {
            return Ok(vec![0.0; a.ncols()]);
        }
        let (partial, length) = self.partial_dots(a, b)?;
        self.fold(partial, length, a.ncols())
    }

    fn add_scaled<T: Real>(&self, alpha: f64, x: MatRef<'_, T>, y: MatMut<'_, T>) -> Result<()> {
        let y = y.as_ref();
        let (x, y) = if runs_along_rows(y) {
            (x, y)
        } else {
            (x.transpose(), y.transpose())
        };
        let (rows, columns) = (y.nrows(), y.ncols());
        let mut arguments = vec![Number(alpha), address(x)];
        arguments.extend(strides(x));
        arguments.extend([rows, columns].map(count));
        arguments.push(address(y));
        arguments.extend(strides(y));
        // SAFETY: the views are of matrices of one size on this device; `y` was exclusive.
        unsafe { self.launch([T::DTYPE; 2], "add_scaled", 1, rows, columns, arguments) }
    }

    fn scale_by_spectrum<T: Real>(
        &self,
        x: MatMut<'_, T>,
        spectrum: &Spectrum,
        power: f64,
    ) -> Result<()> {
        let (_values, [left, right, pairs, constant]) = self.upload_spectrum(spectrum)?;
        let (rows, columns) = (x.nrows(), x.ncols());
        let mut arguments = vec![left, right, pairs, constant, Number(power)];
        arguments.extend([rows, columns].map(count));
        arguments.push(address(x.as_ref()));
        arguments.extend(strides(x.as_ref()));
        // SAFETY: the view is exclusive; the spectrum has an entry for each of its elements.
        unsafe {
            self.launch(
                [T::DTYPE; 2],
                "scale_by_spectrum",
                1,
                rows,
                columns,
                arguments,
            )
        }
    }

    fn diagonals<T: Real>(&self, x: &[MatRef<'_, T>]) -> Result<Vec<Vec<f64>>> {
        let size = x.first().map_or(0, |x| x.nrows());
        let rows = x.iter().map(|x| {
            let step = x.row_stride() + x.col_stride();
            // SAFETY: the diagonal's elements are among those of the matrix.
            unsafe { MatRef::from_raw_parts(x.as_ptr(), 1, size, 0, step) }
        });
        let mut wide = self.matrix_of::<f64>(x.len(), size)?;
        self.copy_stack(&rows.collect::<Vec<_>>(), blocks(wide.view_mut(), 1, 1))?;
        let values = self.download::<f64>(wide.buffer(), x.len() * size)?;
        Ok(values.chunks(size.max(1)).map(<[f64]>::to_vec).collect())
    }

    fn dense_kronecker<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        mut out: MatMut<'_, T>,
    ) -> Result<()> {
        let size = out.nrows();
        self.write_spectrum(&Spectrum::default(), out.as_mut())?;
        for &(a, g) in terms {
            let mut arguments = vec![address(a)];
            arguments.extend(strides(a));
            arguments.extend([count(a.nrows()), address(g)]);
            arguments.extend(strides(g));
            arguments.extend([count(size), address(out.as_ref())]);
            arguments.extend(strides(out.as_ref()));
            // SAFETY: the views are of matrices on this device; `out` is exclusive and has as many
            // rows as A and G together.
            unsafe { self.launch([T::DTYPE; 2], "add_kronecker", 1, size, size, arguments)? };
        }
        Ok(())
    }

    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, out: MatMut<'_, T>) -> Result<()> {
        let (_values, [left, right, pairs, constant]) = self.upload_spectrum(spectrum)?;
        let (rows, columns) = (out.nrows(), out.ncols());
        let mut arguments = vec![left, right, pairs, constant];
        arguments.extend([rows, columns].map(count));
        arguments.push(address(out.as_ref()));
        arguments.extend(strides(out.as_ref()));
        // SAFETY: as in `scale_by_spectrum`.
        unsafe { self.launch([T::DTYPE; 2], "write_spectrum", 1, rows, columns, arguments) }
    }

    fn check_finite<T: Real>(
        &self,
        x: &[MatRef<'_, T>],
        name: &dyn Fn(usize) -> String,
    ) -> Result<()> {
        let Some(&first) = x.first() else {
            return Ok(());
        };
        let Some(step) = step_of(x) else {
            let mut each = x.iter().enumerate();
            return each.try_for_each(|(index, &x)| self.check_finite(&[x], &|_| name(index)));
        };
        let (rows, columns) = (first.nrows(), first.ncols());
        let extents = [x.len(), rows, columns];
        let [down, across] = [first.row_stride(), first.col_stride()].map(isize::unsigned_abs);
        let place = first.as_ptr().expose_provenance() as u64;
        match self.first_non_finite(T::DTYPE, place, &extents, &[step, down, across])? {
            None => Ok(()),
            Some(number) => {
                let (item, rest) = (number / (rows * columns), number % (rows * columns));
                let (i, j) = (rest / columns, rest % columns);
                let value = self.to_host(x[item].submatrix(i, j, 1, 1))?[0];
                Err(super::cpu::non_finite(&name(item), value, i, j))
            }
        }
    }
}
