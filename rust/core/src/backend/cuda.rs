//! The CUDA backend: cuBLAS and cuSOLVER for matrices, kernels of our own around them.
//!
//! Everything is queued on the stream that torch uses for the tensors at hand, in memory that
//! torch allocates (see [`memory`]). The host waits where numbers come back or go there, for
//! decompositions, and for what is made to be kept; nowhere in the product of a packed sum.

use cudarc::driver::{result, sys};

use self::calls::{failed, stream_handle};
use self::elements::blocks;
use self::kernels::Argument::{Number, Pointer};
use self::memory::DeviceMatrix;
use self::packed::Packed;
use self::queue::{count, runs_along_rows, step_of, strides};
use super::{Backend, Triangle};
use crate::cancel::Cancel;
use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Matrix, MatrixMut, Storage, non_finite};
use crate::merging::{Deviation, MapGradient, MomentsGradient};
use crate::place::{Device, Place};
use crate::spectrum::Spectrum;
use crate::terms::{FactoredTerm, Group, Multiplied, Term};
use crate::units::{GramTask, Precision, Units};

mod blas;
mod calls;
mod elements;
mod findings;
mod gpu;
mod gram;
mod kernels;
mod libraries;
mod memory;
mod merging;
mod offsets;
mod packed;
mod queue;
mod solver;
mod source;

pub use self::findings::{Findings, Found, look};
pub use self::kernels::{compile, names as kernel_names};
pub use self::libraries::Library;
pub use self::memory::{Allocator, set_allocator};
pub use self::queue::{Cuda, Current};

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
        Current::enter(place)
    }

    fn device(&self) -> Device {
        self.place().device
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
        self.zeroed(rows, columns)
    }

    fn upload<T: Real>(&self, host: &HostMatrix<T>) -> Result<DeviceMatrix<T>> {
        self.uploaded(host)
    }

    fn copy<S: Real, T: Real>(&self, from: Matrix<'_, S>, to: MatrixMut<'_, T>) -> Result<()> {
        self.convert(from, to)
    }

    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatrixMut<'_, T>>>,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()> {
        gram::accumulate(self, units, out, task, cancel)
    }

    fn symmetrize<T: Real>(&self, x: Vec<MatrixMut<'_, T>>, divisor: f64) -> Result<()> {
        let stack: Vec<_> = x.iter().map(|x| x.as_ref()).collect();
        let Some(&first) = stack.first() else {
            return Ok(());
        };
        let Some(step) = step_of(&stack) else {
            return x
                .into_iter()
                .try_for_each(|x| self.symmetrize(vec![x], divisor));
        };
        let size = first.rows();
        let mut arguments = vec![Pointer(self.address(first)?)];
        arguments.extend([stack.len(), step, size].map(count));
        arguments.extend(strides(first));
        arguments.push(Number(divisor));
        let types = [T::DTYPE; 2];
        // SAFETY: the views are exclusive and of square matrices of this size on this device.
        unsafe { self.launch(types, "symmetrize", stack.len(), size, size, arguments) }
    }

    fn eigh<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        vectors: Vec<MatrixMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>> {
        self.decompose(x, vectors)
    }

    fn cholesky<T: Real>(&self, x: MatrixMut<'_, T>) -> Result<Option<usize>> {
        self.factor(x)
    }

    fn solve_triangular<T: Real>(
        &self,
        l: Matrix<'_, T>,
        triangle: Triangle,
        x: MatrixMut<'_, T>,
    ) -> Result<()> {
        self.solve_lower(l, triangle, x)
    }

    fn gemm<T: Real>(
        &self,
        out: MatrixMut<'_, T>,
        keep: bool,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        alpha: f64,
    ) -> Result<()> {
        self.multiply(out, keep, a, b, alpha)
    }

    fn kronecker_product<T: Real>(
        &self,
        terms: &[Term<'_, T>],
        v: &[Matrix<'_, T>],
        out: Vec<MatrixMut<'_, T>>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        let Some(first) = v.first() else {
            return Ok(());
        };
        let mut half = self.matrix_of::<T>(first.rows(), first.columns())?;
        for (&v, mut out) in v.iter().zip(out) {
            cancel.check()?;
            for (index, &(a, g)) in terms.iter().enumerate() {
                self.multiply(half.view_mut(), false, v, a, 1.0)?;
                self.multiply(out.as_mut(), index > 0, g, half.view(), 1.0)?;
            }
            if damping != 0.0 {
                self.add_multiple(damping, v, out)?;
            }
        }
        Ok(())
    }

    fn pack<T: Real>(&self, groups: &[Group<'_, T>], precision: Precision) -> Result<Packed<T>> {
        Packed::new(self, groups, precision)
    }

    fn pack_factors<T: Real>(
        &self,
        size: [usize; 2],
        terms: &[FactoredTerm<'_, T>],
        precision: Precision,
    ) -> Result<Packed<T>> {
        Packed::of_factors(self, size, terms, precision)
    }

    fn apply_packed<T: Real>(
        &self,
        packed: &Packed<T>,
        v: Matrix<'_, T>,
        out: MatrixMut<'_, T>,
    ) -> Result<()> {
        packed.apply(self, v, out)
    }

    fn apply_all_packed<T: Real>(
        &self,
        mut products: Vec<(&Packed<T>, Multiplied<'_, T>)>,
    ) -> Result<()> {
        for (packed, product) in &mut products {
            packed.apply(self, product.v, product.out.as_mut())?;
        }
        let products: Vec<_> = products.into_iter().map(|(_, product)| product).collect();
        self.combine(&products)
    }

    fn moments_backward<T: Real>(&self, gradient: MomentsGradient<'_, T>) -> Result<()> {
        self.move_moments_back(gradient)
    }

    fn merge<T: Real>(&self, layers: Vec<Deviation<'_, T>>) -> Result<()> {
        self.merge_all(layers)
    }

    fn merge_backward<T: Real>(&self, layers: Vec<MapGradient<'_, T>>) -> Result<()> {
        self.merge_all_backward(layers)
    }

    fn packed_flops<T: Real>(packed: &Packed<T>) -> usize {
        packed.flops()
    }

    fn dot<T: Real>(&self, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<f64> {
        let (a, b) = if runs_along_rows(a) {
            (a, b)
        } else {
            (a.transpose(), b.transpose())
        };
        if a.rows() == 0 || a.columns() == 0 {
            return Ok(0.0);
        }
        let (partial, length) = self.partial_dots(a, b)?;
        Ok(self.fold(partial, length, 1)?[0])
    }

    fn column_dots<T: Real>(&self, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<Vec<f64>> {
        if a.rows() == 0 || a.columns() == 0 {
            return Ok(vec![0.0; a.columns()]);
        }
        let (partial, length) = self.partial_dots(a, b)?;
        self.fold(partial, length, a.columns())
    }

    fn add_scaled<T: Real>(&self, alpha: f64, x: Matrix<'_, T>, y: MatrixMut<'_, T>) -> Result<()> {
        self.add_multiple(alpha, x, y)
    }

    fn scale_by_spectrum<T: Real>(
        &self,
        x: MatrixMut<'_, T>,
        spectrum: &Spectrum,
        power: f64,
    ) -> Result<()> {
        let (_values, [left, right, pairs, constant]) = self.upload_spectrum(spectrum)?;
        let (rows, columns) = (x.rows(), x.columns());
        let mut arguments = vec![left, right, pairs, constant, Number(power)];
        arguments.extend([rows, columns].map(count));
        arguments.push(Pointer(self.address(x.as_ref())?));
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

    fn diagonals<T: Real>(&self, x: &[Matrix<'_, T>]) -> Result<Vec<Vec<f64>>> {
        let size = x.first().map_or(0, |x| x.rows());
        let rows = x.iter().map(|x| x.diagonal());
        let mut wide = self.matrix_of::<f64>(x.len(), size)?;
        self.copy_stack(&rows.collect::<Vec<_>>(), blocks(wide.view_mut(), 1, 1))?;
        let values = self.download::<f64>(wide.buffer(), x.len() * size)?;
        Ok(values.chunks(size.max(1)).map(<[f64]>::to_vec).collect())
    }

    fn dense_kronecker<T: Real>(
        &self,
        terms: &[Term<'_, T>],
        mut out: MatrixMut<'_, T>,
    ) -> Result<()> {
        let size = out.rows();
        self.write_spectrum(&Spectrum::default(), out.as_mut())?;
        for &(a, g) in terms {
            let mut arguments = vec![Pointer(self.address(a)?)];
            arguments.extend(strides(a));
            arguments.extend([count(a.rows()), Pointer(self.address(g)?)]);
            arguments.extend(strides(g));
            arguments.extend([count(size), Pointer(self.address(out.as_ref())?)]);
            arguments.extend(strides(out.as_ref()));
            // SAFETY: the views are of matrices on this device; `out` is exclusive and has as many
            // rows as A and G together.
            unsafe { self.launch([T::DTYPE; 2], "add_kronecker", 1, size, size, arguments)? };
        }
        Ok(())
    }

    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, out: MatrixMut<'_, T>) -> Result<()> {
        let (_values, [left, right, pairs, constant]) = self.upload_spectrum(spectrum)?;
        let (rows, columns) = (out.rows(), out.columns());
        let mut arguments = vec![left, right, pairs, constant];
        arguments.extend([rows, columns].map(count));
        arguments.push(Pointer(self.address(out.as_ref())?));
        arguments.extend(strides(out.as_ref()));
        // SAFETY: as in `scale_by_spectrum`.
        unsafe { self.launch([T::DTYPE; 2], "write_spectrum", 1, rows, columns, arguments) }
    }

    fn check_finite<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        name: &dyn Fn(usize) -> String,
    ) -> Result<()> {
        let Some(&first) = x.first() else {
            return Ok(());
        };
        let Some(step) = step_of(x) else {
            let mut each = x.iter().enumerate();
            return each.try_for_each(|(index, &x)| self.check_finite(&[x], &|_| name(index)));
        };
        let (rows, columns) = (first.rows(), first.columns());
        let extents = [x.len(), rows, columns];
        let [down, across] = [first.row_stride(), first.column_stride()].map(isize::unsigned_abs);
        let address = self.address(first)?;
        match self.first_non_finite(T::DTYPE, address, &extents, &[step, down, across])? {
            None => Ok(()),
            Some(number) => {
                let (item, rest) = (number / (rows * columns), number % (rows * columns));
                let (i, j) = (rest / columns, rest % columns);
                let value = self.to_host(x[item].subrows(i, 1).subcolumns(j, 1))?[0];
                Err(non_finite(&name(item), value, i, j))
            }
        }
    }
}
