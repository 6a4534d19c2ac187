//! Element by element: copies, sums and inner products, spectra.

use cudarc::driver::result;

use super::calls::failed;
use super::kernels::Argument::{self, Number, Pointer, Words};
use super::memory::DeviceMatrix;
use super::queue::{Cuda, count, runs_along_rows, step_of, strides};
use crate::element::{Dtype, Real};
use crate::error::Result;
use crate::matrix::{HostMatrix, Matrix, MatrixMut, Storage};
use crate::spectrum::Spectrum;
use crate::terms::Multiplied;

/// Layers of one launch: as many as its arguments have room for (4 kB), and the words of each. As in
/// kernels.cu.
const LAYERS: usize = 32;
const WORDS: usize = 13;

/// Elements that a thread goes through, where the layer has no more threads than this.
const EACH: usize = 16;
const MOST_THREADS: usize = 1 << 15;

/// Threads that add up the partial sums of a layer. As in kernels.cu.
const ADDING: usize = 128;

impl Cuda {
    /// A copy, row by row.
    pub(super) fn copied<T: Real>(&self, x: Matrix<'_, T>) -> Result<DeviceMatrix<T>> {
        let mut copy = self.matrix_of::<T>(x.rows(), x.columns())?;
        self.convert(x, copy.view_mut())?;
        Ok(copy)
    }

    /// All elements, row by row, in double precision.
    pub(super) fn to_host<T: Real>(&self, x: Matrix<'_, T>) -> Result<Vec<f64>> {
        let (rows, columns) = (x.rows(), x.columns());
        let mut wide = self.matrix_of::<f64>(rows, columns)?;
        self.convert(x, wide.view_mut())?;
        self.download(wide.buffer(), rows * columns)
    }

    /// Copies a matrix, rounding or widening.
    pub(super) fn convert<S: Real, T: Real>(
        &self,
        from: Matrix<'_, S>,
        to: MatrixMut<'_, T>,
    ) -> Result<()> {
        self.copy_stack(&[from], vec![to])
    }

    /// Copies a stack of matrices of one size, rounding or widening.
    pub(super) fn copy_stack<S: Real, T: Real>(
        &self,
        from: &[Matrix<'_, S>],
        to: Vec<MatrixMut<'_, T>>,
    ) -> Result<()> {
        let targets: Vec<_> = to.iter().map(|to| to.as_ref()).collect();
        let (Some(&first), Some(&target)) = (from.first(), targets.first()) else {
            return Ok(());
        };
        let (Some(from_step), Some(to_step)) = (step_of(from), step_of(&targets)) else {
            let mut pairs = from.iter().zip(to);
            return pairs.try_for_each(|(&from, to)| self.convert(from, to));
        };
        let (first, target) = if runs_along_rows(target) {
            (first, target)
        } else {
            (first.transpose(), target.transpose())
        };
        let (rows, columns) = (target.rows(), target.columns());
        let mut arguments = vec![Pointer(self.address(first)?), count(from_step)];
        arguments.extend(strides(first));
        arguments.extend([from.len(), rows, columns].map(count));
        arguments.extend([Pointer(self.address(target)?), count(to_step)]);
        arguments.extend(strides(target));
        let types = [S::DTYPE, T::DTYPE];
        // SAFETY: the views are of matrices of this size on this device; those written to are
        // exclusive.
        unsafe { self.launch(types, "convert", from.len(), rows, columns, arguments) }
    }

    /// Zeroes what is above the diagonal.
    pub(super) fn zero_upper<T: Real>(&self, x: MatrixMut<'_, T>) -> Result<()> {
        let size = x.rows();
        let mut arguments = vec![Pointer(self.address(x.as_ref())?), count(size)];
        arguments.extend(strides(x.as_ref()));
        // SAFETY: the view is exclusive and of a square matrix on this device.
        unsafe { self.launch([T::DTYPE; 2], "zero_upper", 1, size, size, arguments) }
    }

    /// The values of a spectrum on the device: left, right, number of pairs, constant.
    pub(super) fn upload_spectrum(
        &self,
        spectrum: &Spectrum,
    ) -> Result<([DeviceMatrix<f64>; 2], [Argument; 4])> {
        let side = |values: Vec<&Vec<f64>>| {
            let rows = values.len();
            let columns = values.first().map_or(0, |values| values.len());
            let host = HostMatrix::from_fn(rows, columns, |k, i| values[k][i]);
            self.uploaded(&host)
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
    pub(super) fn first_non_finite(
        &self,
        dtype: Dtype,
        address: u64,
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
            Pointer(address),
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
    pub(super) fn partial_dots<T: Real>(
        &self,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
    ) -> Result<(DeviceMatrix<f64>, usize)> {
        let (rows, columns) = (a.rows(), a.columns());
        // Every block of the launch writes a row.
        let [_, down, _] = self.grid(1, rows, columns);
        let partial = self.matrix_of::<f64>(down, columns)?;
        let mut arguments = vec![Pointer(self.address(a)?)];
        arguments.extend(strides(a));
        arguments.push(Pointer(self.address(b)?));
        arguments.extend(strides(b));
        arguments.extend([rows, columns].map(count));
        arguments.push(Pointer(partial.address()));
        // SAFETY: the views are of matrices of this size on this device, and there is a row of
        // sums for every block that `launch` starts.
        unsafe { self.launch([T::DTYPE; 2], "dot", 1, rows, columns, arguments)? };
        Ok((partial, down * columns))
    }

    /// Makes what is wanted of products, of many layers in three launches.
    pub(super) fn combine<T: Real>(&self, products: &[Multiplied<'_, T>]) -> Result<()> {
        for some in products.chunks(LAYERS) {
            let (mut words, mut threads) = (Vec::with_capacity(LAYERS * WORDS), 0);
            for product in some {
                let (v, out) = (product.v, product.out.as_ref());
                let (v, out) = if runs_along_rows(out) {
                    (v, out)
                } else {
                    (v.transpose(), out.transpose())
                };
                let elements = out.rows() * out.columns();
                let own = elements.div_ceil(EACH).clamp(1, MOST_THREADS);
                words.extend([threads, own, elements, out.columns().max(1)].map(|n| n as u64));
                words.extend([product.wanted.scale, product.wanted.damping].map(f64::to_bits));
                for x in [v, out] {
                    words.push(self.address(x)?);
                    let steps = [x.row_stride(), x.column_stride()];
                    words.extend(steps.map(|step| step.unsigned_abs() as u64));
                }
                words.push(self.address(product.inner.as_ref())?);
                threads += own;
            }
            words.resize(LAYERS * WORDS, 0);
            let partial = self.matrix_of::<f64>(threads, 2)?;
            let sums = self.matrix_of::<f64>(some.len() * ADDING, 2)?;
            let (types, layers) = ([T::DTYPE; 2], count(some.len()));
            let all = || vec![Words(words.clone()), layers.clone()];
            let combined = [count(threads), Pointer(partial.address())];
            let added = [Pointer(partial.address()), Pointer(sums.address())];
            let told = [Pointer(sums.address())];
            let columns = [threads, 2 * ADDING * some.len(), 2 * some.len()];
            let with = |more: &[Argument]| [all(), more.to_vec()].concat();
            // SAFETY: each product's matrices are of one size on this device, what is written was
            // exclusive, and inner products are two numbers; there is a pair of partial sums for
            // every thread, and one of sums for each that adds them up.
            unsafe {
                self.launch(types, "combine", 1, 1, columns[0], with(&combined))?;
                self.launch(types, "add_partial", 1, 1, columns[1], with(&added))?;
                self.launch(types, "write_inner", 1, 1, columns[2], with(&told))?;
            }
        }
        Ok(())
    }

    /// Sums of the numbers whose indices differ by multiples of `width`, in a fixed order.
    pub(super) fn fold(
        &self,
        numbers: DeviceMatrix<f64>,
        length: usize,
        width: usize,
    ) -> Result<Vec<f64>> {
        let (numbers, length) = self.folded(numbers, length, width)?;
        let sums = self.matrix_of::<f64>(1, width)?;
        self.fold_once(numbers.address(), length, width, sums.address())?;
        self.download::<f64>(sums.buffer(), width)
    }

    /// Folds numbers until one thread for each column can add up the rest.
    fn folded(
        &self,
        mut numbers: DeviceMatrix<f64>,
        mut length: usize,
        width: usize,
    ) -> Result<(DeviceMatrix<f64>, usize)> {
        /// Numbers that one thread adds up.
        const EACH: usize = 32;
        while length > EACH * width {
            let columns = (length / width).div_ceil(EACH) * width;
            let sums = self.matrix_of::<f64>(1, columns)?;
            self.fold_once(numbers.address(), length, columns, sums.address())?;
            (numbers, length) = (sums, columns);
        }
        Ok((numbers, length))
    }

    /// Adds up the numbers whose indices differ by multiples of `columns`.
    fn fold_once(&self, numbers: u64, length: usize, columns: usize, sums: u64) -> Result<()> {
        let mut arguments = vec![Pointer(numbers)];
        arguments.extend([length, columns].map(count));
        arguments.push(Pointer(sums));
        // SAFETY: each matrix holds as many numbers as is said.
        unsafe { self.launch([Dtype::Float64; 2], "fold", 1, 1, columns, arguments) }
    }

    /// `y += alpha * x`.
    pub(super) fn add_multiple<T: Real>(
        &self,
        alpha: f64,
        x: Matrix<'_, T>,
        y: MatrixMut<'_, T>,
    ) -> Result<()> {
        let y = y.as_ref();
        let (x, y) = if runs_along_rows(y) {
            (x, y)
        } else {
            (x.transpose(), y.transpose())
        };
        let (rows, columns) = (y.rows(), y.columns());
        let mut arguments = vec![Number(alpha), Pointer(self.address(x)?)];
        arguments.extend(strides(x));
        arguments.extend([rows, columns].map(count));
        arguments.push(Pointer(self.address(y)?));
        arguments.extend(strides(y));
        // SAFETY: the views are of matrices of one size on this device; `y` was exclusive.
        unsafe { self.launch([T::DTYPE; 2], "add_scaled", 1, rows, columns, arguments) }
    }
}

/// Blocks of `height` rows that begin `step` rows apart.
pub(super) fn blocks<T>(
    matrix: MatrixMut<'_, T>,
    height: usize,
    step: usize,
) -> Vec<MatrixMut<'_, T>> {
    let mut blocks = Vec::with_capacity(matrix.rows().div_ceil(step));
    let mut rest = matrix;
    while rest.rows() >= height {
        let between = step.min(rest.rows());
        let (part, below) = rest.split_at_row(between);
        blocks.push(part.subrows(0, height));
        rest = below;
    }
    blocks
}
