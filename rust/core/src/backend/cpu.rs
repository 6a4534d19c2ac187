//! The reference backend: faer for the blocks, threads of our own around them.

use std::sync::{Arc, Mutex};

use faer::linalg::matmul::matmul;
use faer::linalg::{cholesky::llt, evd, triangular_solve};
use faer::{Accum, Mat, MatMut, MatRef, Par};

use self::operator::Packed;
use self::patches::Patches;
use self::pool::{Shelves, lock};
use self::units::Dense;
use super::{Backend, Spectrum, Storage, Triangle};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gram::{GramTask, Precision, Units};
use crate::kronecker::Group;
use crate::view::{Device, Dtype, Place, Real};

mod gram;
mod operator;
mod patches;
mod pool;
mod product;
mod simd;
mod syrk;
mod units;

pub use self::pool::{num_threads, set_num_threads};

/// Below this many flops a second thread costs more to wake than it saves.
const PARALLEL_FLOPS: f64 = 8e6;

/// Threads and scratch memory of this process.
pub struct Cpu {
    threads: usize,
    pool: Option<rayon::ThreadPool>,
    scratch: Shelves,
}

impl Cpu {
    /// The backend of this process; made on the first call.
    pub fn current() -> Arc<Self> {
        pool::current()
    }

    fn with_threads(threads: usize) -> Self {
        let pool = (threads > 1)
            .then(|| {
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("ekfac-{index}"))
                    .build()
                    .ok()
            })
            .flatten();
        Self {
            threads: if pool.is_some() { threads } else { 1 },
            pool,
            scratch: Shelves::default(),
        }
    }

    /// Works through the tasks in order, each on whichever thread is free; the calling thread is
    /// one of them.
    fn run<I: Send>(&self, tasks: Vec<I>, work: impl Fn(I) + Sync) {
        let workers = self.threads.min(tasks.len());
        match &self.pool {
            Some(pool) if workers > 1 => {
                let queue = Mutex::new(tasks.into_iter());
                let next = || lock(&queue).next();
                let drain = || {
                    while let Some(task) = next() {
                        work(task);
                    }
                };
                pool.in_place_scope(|scope| {
                    for _ in 1..workers {
                        scope.spawn(|_| drain());
                    }
                    drain();
                });
            }
            _ => tasks.into_iter().for_each(work),
        }
    }

    /// Into how many pieces work of this many flops is best cut.
    fn pieces(&self, flops: f64) -> usize {
        if flops < PARALLEL_FLOPS {
            1
        } else {
            self.threads
        }
    }

    /// Runs a routine of faer's that spreads over threads by itself.
    fn within_pool<R: Send>(&self, work: impl FnOnce(Par) -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(|| work(Par::rayon(self.threads))),
            None => work(Par::Seq),
        }
    }
}

impl<T: Real> Storage<T> for Mat<T> {
    fn view(&self) -> MatRef<'_, T> {
        self.as_ref()
    }
    fn view_mut(&mut self) -> MatMut<'_, T> {
        self.as_mut()
    }
}

impl Backend for Cpu {
    type Matrix<T: Real> = Mat<T>;
    type Packed<T: Real> = Packed<T>;
    type Handle = Arc<Self>;

    fn at(_: Place) -> Result<Arc<Self>> {
        Ok(Self::current())
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Result<Mat<T>> {
        Ok(Mat::zeros(rows, columns))
    }

    fn upload<T: Real>(&self, host: MatRef<'_, T>) -> Result<Mat<T>> {
        Ok(host.to_owned())
    }

    fn copy<S: Real, T: Real>(&self, from: MatRef<'_, S>, to: MatMut<'_, T>) -> Result<()> {
        zip_elements(to, from, |to, from| *to = T::from_element(from));
        Ok(())
    }

    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatMut<'_, T>>>,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()> {
        if task.precision != Precision::Ieee {
            return Err(Error::Option(
                "precision: expected \"ieee\" on the CPU, got \"tf32\", which is for GPUs"
                    .to_owned(),
            ));
        }
        macro_rules! accumulate {
            ($element:ty) => {
                match units {
                    Units::Dense(x) => {
                        let source = Dense::<$element>::new(x)?;
                        gram::accumulate(self, &source, out, &task.strata, task.append_one, cancel)
                    }
                    Units::Patches(x, geometry) => {
                        let source = Patches::<$element>::new(x, geometry)?;
                        gram::accumulate(self, &source, out, &task.strata, task.append_one, cancel)
                    }
                }
            };
        }
        match units.tensor().dtype() {
            Dtype::Float32 => accumulate!(f32),
            Dtype::Float64 => accumulate!(f64),
            Dtype::Float16 => accumulate!(half::f16),
            Dtype::BFloat16 => accumulate!(half::bf16),
        }
    }

    fn symmetrize<T: Real>(&self, x: Vec<MatMut<'_, T>>) -> Result<()> {
        x.into_iter().for_each(symmetrize);
        Ok(())
    }

    fn eigh<T: Real>(
        &self,
        x: &[MatRef<'_, T>],
        vectors: Vec<MatMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>> {
        let pairs = x.iter().zip(vectors);
        pairs.map(|(&x, vectors)| eigh(self, x, vectors)).collect()
    }

    fn cholesky<T: Real>(&self, mut x: MatMut<'_, T>) -> Result<Option<usize>> {
        let size = x.nrows();
        let outcome = self.within_pool(|par| {
            let request =
                llt::factor::cholesky_in_place_scratch::<T>(size, par, Default::default());
            let mut memory = faer::dyn_stack::MemBuffer::new(request);
            llt::factor::cholesky_in_place(
                x.as_mut(),
                llt::factor::LltRegularization::default(),
                par,
                faer::dyn_stack::MemStack::new(&mut memory),
                Default::default(),
            )
        });
        for j in 1..size {
            for i in 0..j {
                x[(i, j)] = T::default();
            }
        }
        match outcome {
            Ok(_) => Ok(None),
            Err(llt::factor::LltError::NonPositivePivot { index }) => Ok(Some(index)),
        }
    }

    fn solve_triangular<T: Real>(
        &self,
        l: MatRef<'_, T>,
        triangle: Triangle,
        x: MatMut<'_, T>,
    ) -> Result<()> {
        self.within_pool(|par| match triangle {
            Triangle::Lower => triangular_solve::solve_lower_triangular_in_place(l, x, par),
            Triangle::LowerTransposed => {
                triangular_solve::solve_upper_triangular_in_place(l.transpose(), x, par);
            }
        });
        Ok(())
    }

    fn gemm<T: Real>(
        &self,
        out: MatMut<'_, T>,
        keep: bool,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
        alpha: f64,
    ) -> Result<()> {
        let accumulate = if keep { Accum::Add } else { Accum::Replace };
        gemm(self, out, accumulate, a, b, T::from_f64(alpha));
        Ok(())
    }

    fn kronecker_product<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        v: &[MatRef<'_, T>],
        out: Vec<MatMut<'_, T>>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        product::kronecker_product(self, terms, v, out, damping, cancel)
    }

    fn pack<T: Real>(&self, groups: &[Group<'_, T>]) -> Result<Packed<T>> {
        Ok(Packed::new(self, groups))
    }

    fn apply_packed<T: Real>(
        &self,
        packed: &Packed<T>,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
    ) -> Result<Option<f64>> {
        Ok(Some(packed.apply(self, v, out)))
    }

    fn packed_flops<T: Real>(packed: &Packed<T>) -> usize {
        packed.flops()
    }

    fn dot<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Result<f64> {
        Ok(dot(a, b))
    }

    fn column_dots<T: Real>(&self, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Result<Vec<f64>> {
        let column = |j| dot(a.subcols(j, 1), b.subcols(j, 1));
        Ok((0..a.ncols()).map(column).collect())
    }

    fn add_scaled<T: Real>(&self, alpha: f64, x: MatRef<'_, T>, y: MatMut<'_, T>) -> Result<()> {
        let alpha = T::from_f64(alpha);
        zip_elements(y, x, |y, x| *y += alpha * x);
        Ok(())
    }

    fn scale_by_spectrum<T: Real>(
        &self,
        mut x: MatMut<'_, T>,
        spectrum: &Spectrum,
        power: f64,
    ) -> Result<()> {
        for j in 0..x.ncols() {
            for i in 0..x.nrows() {
                let entry = spectrum.at(i, j);
                let factor = if power == -1.0 {
                    entry.recip()
                } else {
                    entry.powf(power)
                };
                x[(i, j)] *= T::from_f64(factor);
            }
        }
        Ok(())
    }

    fn diagonals<T: Real>(&self, x: &[MatRef<'_, T>]) -> Result<Vec<Vec<f64>>> {
        let diagonal = |x: &MatRef<'_, T>| (0..x.nrows()).map(|i| x[(i, i)].to_f64()).collect();
        Ok(x.iter().map(diagonal).collect())
    }

    fn dense_kronecker<T: Real>(
        &self,
        terms: &[(MatRef<'_, T>, MatRef<'_, T>)],
        mut out: MatMut<'_, T>,
    ) -> Result<()> {
        let Some((first_a, _)) = terms.first() else {
            return Ok(());
        };
        let size = first_a.nrows();
        for row in 0..out.nrows() {
            for column in 0..out.ncols() {
                let (d, e, k, l) = (row / size, column / size, row % size, column % size);
                let entry: f64 = terms
                    .iter()
                    .map(|(a, g)| g[(d, e)].to_f64() * a[(k, l)].to_f64())
                    .sum();
                out[(row, column)] = T::from_f64(entry);
            }
        }
        Ok(())
    }

    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, mut out: MatMut<'_, T>) -> Result<()> {
        for i in 0..out.nrows() {
            for j in 0..out.ncols() {
                out[(i, j)] = T::from_f64(spectrum.at(i, j));
            }
        }
        Ok(())
    }

    fn check_finite<T: Real>(
        &self,
        x: &[MatRef<'_, T>],
        name: &dyn Fn(usize) -> String,
    ) -> Result<()> {
        for (index, x) in x.iter().enumerate() {
            for i in 0..x.nrows() {
                for j in 0..x.ncols() {
                    let value = x[(i, j)].to_f64();
                    if !value.is_finite() {
                        return Err(non_finite(&name(index), value, i, j));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The error for a matrix that contains NaN or infinity.
pub(super) fn non_finite(name: &str, value: f64, i: usize, j: usize) -> Error {
    Error::NonFinite(format!("{name} contains {value} at [{i}, {j}]"))
}

fn symmetrize<T: Real>(x: MatMut<'_, T>) {
    const BLOCK: usize = 64;
    let size = x.nrows();
    let mut rest = x;
    // Peel off one block of columns (lower part) and the matching block of rows (upper part).
    let mut start = 0;
    while start < size {
        let width = BLOCK.min(size - start);
        let (mut corner, mut upper, lower, below) = rest.split_at_mut(width, width);
        for i in 0..width {
            for j in 0..i {
                corner[(j, i)] = corner[(i, j)];
            }
        }
        let remaining = size - start - width;
        for block in (0..remaining).step_by(BLOCK) {
            for i in block..(block + BLOCK).min(remaining) {
                for j in 0..width {
                    upper[(j, i)] = lower[(i, j)];
                }
            }
        }
        rest = below;
        start += width;
    }
}

fn eigh<T: Real>(cpu: &Cpu, x: MatRef<'_, T>, vectors: MatMut<'_, T>) -> Result<Vec<f64>> {
    let size = x.nrows();
    let mut values = faer::Mat::<T>::zeros(size, 1);
    let mut columns = Mat::<T>::zeros(size, size);
    let flops = 10.0 * (size as f64).powi(3);
    let mut decompose = |par: Par| {
        let request = evd::self_adjoint_evd_scratch::<T>(
            size,
            evd::ComputeEigenvectors::Yes,
            par,
            Default::default(),
        );
        let mut memory = faer::dyn_stack::MemBuffer::new(request);
        evd::self_adjoint_evd(
            x,
            values.as_mut().col_mut(0).as_diagonal_mut(),
            Some(columns.as_mut()),
            par,
            faer::dyn_stack::MemStack::new(&mut memory),
            Default::default(),
        )
    };
    let outcome = if cpu.pieces(flops) > 1 {
        cpu.within_pool(decompose)
    } else {
        decompose(Par::Seq)
    };
    outcome.map_err(|_| {
        Error::Numerical(format!(
            "the eigendecomposition of a {size} x {size} matrix did not converge"
        ))
    })?;
    cpu.copy(columns.as_ref(), vectors)?;
    Ok(values
        .as_ref()
        .col(0)
        .iter()
        .map(|value| value.to_f64())
        .collect())
}

/// `out (+)= alpha a b`, cut along the longer side of `out`.
fn gemm<T: Real>(
    cpu: &Cpu,
    out: MatMut<'_, T>,
    accumulate: Accum,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    alpha: T,
) {
    let flops = 2.0 * (out.nrows() * out.ncols()) as f64 * a.ncols() as f64;
    if out.nrows() >= out.ncols() {
        let blocks = split_rows(out, cpu.pieces(flops));
        cpu.run(blocks, |(start, block)| {
            let rows = a.subrows(start, block.nrows());
            matmul(block, accumulate, rows, b, alpha, Par::Seq);
        });
    } else {
        let blocks = split_columns(out, cpu.pieces(flops));
        cpu.run(blocks, |(start, block)| {
            let columns = b.subcols(start, block.ncols());
            matmul(block, accumulate, a, columns, alpha, Par::Seq);
        });
    }
}

/// Consecutive blocks of rows of about equal height, with the index of their first row.
fn split_rows<T>(matrix: MatMut<'_, T>, pieces: usize) -> Vec<(usize, MatMut<'_, T>)> {
    let rows = matrix.nrows();
    let pieces = pieces.clamp(1, rows.max(1));
    let mut blocks = Vec::with_capacity(pieces);
    let (mut rest, mut start) = (matrix, 0);
    for piece in 1..=pieces {
        let end = rows * piece / pieces;
        let (block, below) = rest.split_at_row_mut(end - start);
        blocks.push((start, block));
        (rest, start) = (below, end);
    }
    blocks
}

/// Consecutive blocks of columns of about equal width, with the index of their first column.
fn split_columns<T>(matrix: MatMut<'_, T>, pieces: usize) -> Vec<(usize, MatMut<'_, T>)> {
    split_rows(matrix.transpose_mut(), pieces)
        .into_iter()
        .map(|(start, block)| (start, block.transpose_mut()))
        .collect()
}

fn dot<T: Real>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> f64 {
    let (a, b) = row_major_if_possible(a, b);
    (0..a.nrows())
        .map(|i| {
            let (left, right) = (a.row(i), b.row(i));
            match (
                left.try_as_row_major().map(|row| row.as_slice()),
                right.try_as_row_major().map(|row| row.as_slice()),
            ) {
                (Some(left), Some(right)) => simd::run(simd::Dot(left, right)),
                _ => (0..a.ncols())
                    .map(|j| left[j].to_f64() * right[j].to_f64())
                    .sum(),
            }
        })
        .sum()
}

/// Transposes both views if that makes the rows of the first one contiguous.
fn row_major_if_possible<'a, S, T>(
    a: MatRef<'a, S>,
    b: MatRef<'a, T>,
) -> (MatRef<'a, S>, MatRef<'a, T>) {
    if a.row_stride() == 1 && a.col_stride() != 1 {
        (a.transpose(), b.transpose())
    } else {
        (a, b)
    }
}

/// Applies `f` to every pair of elements, along rows of `to` where they are contiguous.
fn zip_elements<S: Real, T: Real>(to: MatMut<'_, T>, from: MatRef<'_, S>, f: impl Fn(&mut T, S)) {
    let (mut to, from) = if to.row_stride() == 1 && to.col_stride() != 1 {
        (to.transpose_mut(), from.transpose())
    } else {
        (to, from)
    };
    for i in 0..to.nrows() {
        let (mut target, source) = (to.as_mut().row_mut(i), from.row(i));
        let contiguous = source.try_as_row_major().map(|row| row.as_slice());
        let target_slice = target
            .as_mut()
            .try_as_row_major_mut()
            .map(|row| row.as_slice_mut());
        if let (Some(target), Some(source)) = (target_slice, contiguous) {
            for (target, &source) in target.iter_mut().zip(source) {
                f(target, source);
            }
            continue;
        }
        for j in 0..source.ncols() {
            f(&mut target[j], source[j]);
        }
    }
}

/// The widest vector instructions this machine offers, among those faer selects at run time.
pub fn simd() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            return "avx2";
        }
    }
    "baseline"
}
