//! The reference backend: faer for the blocks, and threads around them.

use std::ops::Deref;
use std::sync::Arc;

use faer::{Accum, MatRef};

use self::packed::Packed;
use self::team::Team;
use super::{Backend, Triangle};
use crate::cancel::Cancel;
use crate::element::Real;
use crate::error::{Error, Result};
use crate::matrix::{HostMatrix, Matrix, MatrixMut, non_finite};
use crate::merging::{Deviation, MapGradient, Moments, MomentsGradient};
use crate::place::{Device, Place};
use crate::spectrum::Spectrum;
use crate::terms::{Combination, FactoredTerm, Group, Multiplied, Term};
use crate::units::{GramTask, Precision, Units};

mod blas;
mod elements;
mod gram;
mod host;
mod merging;
mod offsets;
mod openmp;
mod packed;
mod patches;
mod product;
mod simd;
mod solver;
mod source;
mod syrk;
mod team;

pub use self::simd::instruction_set;
pub use self::team::{note_process, num_threads, set_num_threads, whose_threads};

/// The host, with the threads of this process.
pub struct Cpu {
    team: Arc<Team>,
}

impl Cpu {
    /// The backend of this process.
    pub fn current() -> Current {
        let team = Team::current();
        Current(Self { team })
    }

    /// Writes the moments of BatchNorms' inputs.
    pub(crate) fn moments<T: Real>(&self, tasks: Vec<Moments<'_, T>>) -> Result<()> {
        merging::moments(&self.team, tasks)
    }

    /// Does independent work of so many flops each: what is more than a thread's share by all
    /// threads together, the rest by one thread each.
    pub(crate) fn share<I: Send>(&self, mut work: Vec<(usize, I)>, each: impl Fn(I) + Sync) {
        let total: usize = work.iter().map(|(flops, _)| flops).sum();
        let threads = self.team.pieces(total as f64);
        // The longest first: what is left at the end is short.
        work.sort_by_key(|(flops, _)| std::cmp::Reverse(*flops));
        let large = work.partition_point(|(flops, _)| flops * threads > total);
        let small = work.split_off(large);
        work.into_iter().for_each(|(_, item)| each(item));
        if threads > 1 {
            self.team.run(small, |(_, item)| each(item));
        } else {
            small.into_iter().for_each(|(_, item)| each(item));
        }
    }
}

/// The backend, for as long as it is held.
pub struct Current(Cpu);

impl Deref for Current {
    type Target = Cpu;

    fn deref(&self) -> &Cpu {
        &self.0
    }
}

impl Backend for Cpu {
    type Matrix<T: Real> = HostMatrix<T>;
    type Packed<T: Real> = Packed<T>;
    type Handle = Current;

    fn at(_: Place) -> Result<Current> {
        Ok(Self::current())
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn zeros<T: Real>(&self, rows: usize, columns: usize) -> Result<HostMatrix<T>> {
        Ok(HostMatrix::zeros(rows, columns))
    }

    fn upload<T: Real>(&self, host: &HostMatrix<T>) -> Result<HostMatrix<T>> {
        Ok(host.clone())
    }

    fn copy<S: Real, T: Real>(&self, from: Matrix<'_, S>, to: MatrixMut<'_, T>) -> Result<()> {
        elements::copy(host::read(from)?, host::write(to)?);
        Ok(())
    }

    fn accumulate_gram<T: Real>(
        &self,
        units: &Units<'_>,
        out: Vec<Vec<MatrixMut<'_, T>>>,
        task: &GramTask,
        cancel: &Cancel,
    ) -> Result<()> {
        expect_exact(task.precision)?;
        if task.note.is_some() {
            return Err(Error::Option(
                "a note is for GPUs: on the CPU, what is not finite is an error at once".to_owned(),
            ));
        }
        let out = out.into_iter().map(host::write_all);
        let out = out.collect::<Result<_>>()?;
        let squares = gram::Squares {
            team: &self.team,
            units,
            strata: &task.strata,
            append_one: task.append_one,
            out,
            cancel,
        };
        T::read(units.tensor().dtype(), squares)
    }

    fn symmetrize<T: Real>(&self, x: Vec<MatrixMut<'_, T>>, divisor: f64) -> Result<()> {
        elements::symmetrize(&self.team, host::write_all(x)?, T::from_f64(divisor));
        Ok(())
    }

    fn eigh<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        vectors: Vec<MatrixMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>> {
        let pairs = host::read_all(x)?
            .into_iter()
            .zip(host::write_all(vectors)?);
        let decompose = |(x, vectors)| solver::eigh(&self.team, x, vectors);
        pairs.map(decompose).collect()
    }

    fn cholesky<T: Real>(&self, x: MatrixMut<'_, T>) -> Result<Option<usize>> {
        Ok(solver::cholesky(&self.team, host::write(x)?))
    }

    fn solve_triangular<T: Real>(
        &self,
        l: Matrix<'_, T>,
        triangle: Triangle,
        x: MatrixMut<'_, T>,
    ) -> Result<()> {
        blas::solve_triangular(&self.team, host::read(l)?, triangle, host::write(x)?);
        Ok(())
    }

    fn gemm<T: Real>(
        &self,
        out: MatrixMut<'_, T>,
        keep: bool,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        alpha: f64,
    ) -> Result<()> {
        let accumulate = if keep { Accum::Add } else { Accum::Replace };
        let (out, a, b) = (host::write(out)?, host::read(a)?, host::read(b)?);
        blas::gemm(&self.team, out, accumulate, a, b, T::from_f64(alpha));
        Ok(())
    }

    fn kronecker_product<T: Real>(
        &self,
        terms: &[Term<'_, T>],
        v: &[Matrix<'_, T>],
        out: Vec<MatrixMut<'_, T>>,
        damping: f64,
        cancel: &Cancel,
    ) -> Result<()> {
        let (terms, v) = (host::read_terms(terms)?, host::read_all(v)?);
        let out = host::write_all(out)?;
        product::kronecker_product(&self.team, &terms, &v, out, damping, cancel)
    }

    fn pack<T: Real>(&self, groups: &[Group<'_, T>], precision: Precision) -> Result<Packed<T>> {
        expect_exact(precision)?;
        Packed::new(&self.team, groups)
    }

    fn pack_factors<T: Real>(
        &self,
        size: [usize; 2],
        terms: &[FactoredTerm<'_, T>],
        precision: Precision,
    ) -> Result<Packed<T>> {
        expect_exact(precision)?;
        Packed::of_factors(size, terms)
    }

    fn apply_packed<T: Real>(
        &self,
        packed: &Packed<T>,
        v: Matrix<'_, T>,
        out: MatrixMut<'_, T>,
    ) -> Result<()> {
        let (v, out) = (host::read(v)?, host::write(out)?);
        packed.apply(&self.team, v, out, Combination::PRODUCT);
        Ok(())
    }

    fn apply_all_packed<T: Real>(
        &self,
        products: Vec<(&Packed<T>, Multiplied<'_, T>)>,
    ) -> Result<()> {
        let mut work = Vec::with_capacity(products.len());
        for (packed, product) in products {
            let (v, out) = (host::read(product.v)?, host::write(product.out)?);
            let inner = host::write(product.inner)?;
            let task = (packed, v, out, product.wanted, inner);
            work.push((packed.flops(), task));
        }
        self.share(work, |(packed, v, out, wanted, mut inner)| {
            let products = packed.apply(&self.team, v, out, wanted);
            (inner[(0, 0)], inner[(0, 1)]) = (products.curved, products.flat);
        });
        Ok(())
    }

    fn moments_backward<T: Real>(&self, gradient: MomentsGradient<'_, T>) -> Result<()> {
        merging::moments_backward(&self.team, gradient)
    }

    fn merge<T: Real>(&self, layers: Vec<Deviation<'_, T>>) -> Result<()> {
        merging::merge(&self.team, layers)
    }

    fn merge_backward<T: Real>(&self, layers: Vec<MapGradient<'_, T>>) -> Result<()> {
        merging::merge_backward(&self.team, layers)
    }

    fn packed_flops<T: Real>(packed: &Packed<T>) -> usize {
        packed.flops()
    }

    fn dot<T: Real>(&self, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<f64> {
        Ok(elements::dot(host::read(a)?, host::read(b)?))
    }

    fn column_dots<T: Real>(&self, a: Matrix<'_, T>, b: Matrix<'_, T>) -> Result<Vec<f64>> {
        let (a, b) = (host::read(a)?, host::read(b)?);
        let column = |j| elements::dot(a.subcols(j, 1), b.subcols(j, 1));
        Ok((0..a.ncols()).map(column).collect())
    }

    fn add_scaled<T: Real>(&self, alpha: f64, x: Matrix<'_, T>, y: MatrixMut<'_, T>) -> Result<()> {
        elements::add_scaled(alpha, host::read(x)?, host::write(y)?);
        Ok(())
    }

    fn scale_by_spectrum<T: Real>(
        &self,
        x: MatrixMut<'_, T>,
        spectrum: &Spectrum,
        power: f64,
    ) -> Result<()> {
        elements::scale_by_spectrum(host::write(x)?, spectrum, power);
        Ok(())
    }

    fn diagonals<T: Real>(&self, x: &[Matrix<'_, T>]) -> Result<Vec<Vec<f64>>> {
        let diagonal = |x: MatRef<'_, T>| (0..x.nrows()).map(|i| x[(i, i)].to_f64()).collect();
        Ok(host::read_all(x)?.into_iter().map(diagonal).collect())
    }

    fn dense_kronecker<T: Real>(&self, terms: &[Term<'_, T>], out: MatrixMut<'_, T>) -> Result<()> {
        product::dense_kronecker(&host::read_terms(terms)?, host::write(out)?);
        Ok(())
    }

    fn write_spectrum<T: Real>(&self, spectrum: &Spectrum, out: MatrixMut<'_, T>) -> Result<()> {
        elements::write_spectrum(spectrum, host::write(out)?);
        Ok(())
    }

    fn check_finite<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        name: &dyn Fn(usize) -> String,
    ) -> Result<()> {
        for (index, x) in host::read_all(x)?.into_iter().enumerate() {
            if let Some((value, i, j)) = elements::first_non_finite(x) {
                return Err(non_finite(&name(index), value, i, j));
            }
        }
        Ok(())
    }
}

/// Fails for what is for GPUs.
fn expect_exact(precision: Precision) -> Result<()> {
    match precision {
        Precision::Ieee => Ok(()),
        other => Err(Error::Option(format!(
            "precision: expected \"ieee\" on the CPU, got {:?}, which is for GPUs",
            other.name()
        ))),
    }
}
