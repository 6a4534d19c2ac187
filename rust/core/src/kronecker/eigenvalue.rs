//! The largest eigenvalue of a sum of Kronecker products.

use super::decomposition::{decompose, decompose_all, views};
use super::sum::KroneckerSum;
use crate::backend::Backend;
use crate::backend::dispatch::{host, on_device};
use crate::cancel::Cancel;
use crate::element::{Real, with_real};
use crate::error::Result;
use crate::matrix::{HostMatrix, Matrix, Storage};
use crate::terms::{Group, Term};

/// Lanczos vectors kept before a restart from the best one found.
const BASIS: usize = 32;
/// Restarts before the estimate is taken as it is.
const RESTARTS: usize = 12;
/// Length of the noise in a start that is otherwise of length one.
const NOISE: f64 = 0.1;
/// The residual, relative to the estimate, at which it is accepted.
const TOLERANCE: f64 = 3e-5;

/// Sizes of the whole matrix up to which it is decomposed as it is.
const SMALL: usize = 64;

/// Sizes of a factor from which its largest and smallest eigenvalue are found one by one.
const LARGE: usize = 512;

impl KroneckerSum<'_> {
    /// The largest eigenvalue of the sum plus `damping`, the largest of all groups: exact for one
    /// term and for small groups, otherwise by Lanczos iterations, from below, to a relative
    /// accuracy of about 1e-4 or better.
    pub fn top_eigenvalue(&self, damping: f64, cancel: &Cancel) -> Result<f64> {
        on_device!(self.place(), backend => with_real!(self.dtype(), T => {
            let groups = self.finite_by_group::<_, T>(backend)?;
            Ok(top(backend, &groups, cancel)? + damping)
        }))
    }
}

/// The algebraically largest eigenvalue of all groups.
fn top<B: Backend, T: Real>(backend: &B, groups: &[Group<'_, T>], cancel: &Cancel) -> Result<f64> {
    cancel.check()?;
    let (a, g) = groups[0].terms[0];
    let tops = if groups[0].terms.len() == 1 {
        let (a, g): (Vec<_>, Vec<_>) = groups.iter().map(|group| group.terms[0]).unzip();
        let pairs = extremes(backend, &a, cancel)?
            .into_iter()
            .zip(extremes(backend, &g, cancel)?);
        let products = pairs.flat_map(|(a, g)| a.map(|x| g.map(|y| x * y)));
        products.flatten().collect()
    } else if a.rows() * g.rows() <= SMALL {
        dense_tops(backend, groups, cancel)?
    } else {
        let top = |group: &Group<'_, T>| {
            let start = separable_start(backend, &group.terms, cancel)?;
            lanczos(backend, &group.terms, 0.0, start, cancel).map(|top| top.value)
        };
        groups.iter().map(top).collect::<Result<Vec<_>>>()?
    };
    Ok(tops.into_iter().fold(f64::NEG_INFINITY, f64::max))
}

/// The largest eigenvalue of each group's whole matrix.
fn dense_tops<B: Backend, T: Real>(
    backend: &B,
    groups: &[Group<'_, T>],
    cancel: &Cancel,
) -> Result<Vec<f64>> {
    let dense = groups.iter().map(|group| {
        let (a, g) = group.terms[0];
        let size = a.rows() * g.rows();
        let mut whole = backend.zeros::<T>(size, size)?;
        backend.dense_kronecker(&group.terms, whole.view_mut())?;
        Ok(whole)
    });
    let dense = dense.collect::<Result<Vec<_>>>()?;
    let both = extremes(backend, &views(&dense), cancel)?;
    Ok(both.into_iter().map(|[_, largest]| largest).collect())
}

/// The smallest and the largest eigenvalue of each of these matrices of one size.
fn extremes<B: Backend, T: Real>(
    backend: &B,
    x: &[Matrix<'_, T>],
    cancel: &Cancel,
) -> Result<Vec<[f64; 2]>> {
    let size = x[0].rows();
    if size < LARGE {
        let spectra = decompose_all(backend, x)?.into_iter();
        return Ok(spectra
            .map(|(values, _)| [values[0], values[size - 1]])
            .collect());
    }
    let minus = backend.upload(&constant(-1.0))?;
    let both = x.iter().map(|&x| {
        let largest = top_of_factor(backend, x, cancel)?.value;
        // The smallest one is the distance of `largest - x` from the largest one.
        let terms = [(x, minus.view())];
        let start = noise(backend, 1, size)?;
        let range = lanczos(backend, &terms, largest, start, cancel)?.value;
        Ok([largest - range, largest])
    });
    both.collect()
}

/// The largest eigenvalue of one factor, its vector as a row.
fn top_of_factor<B: Backend, T: Real>(
    backend: &B,
    x: Matrix<'_, T>,
    cancel: &Cancel,
) -> Result<Sweep<B::Matrix<T>>> {
    let one = backend.upload(&constant(1.0))?;
    let start = noise(backend, 1, x.rows())?;
    lanczos(backend, &[(x, one.view())], 0.0, start, cancel)
}

/// The top eigenvector of the largest term, as that of the sum is often close to it, and a little
/// noise, for when it is not. Products with factors alone cost next to nothing.
fn separable_start<B: Backend, T: Real>(
    backend: &B,
    terms: &[Term<'_, T>],
    cancel: &Cancel,
) -> Result<B::Matrix<T>> {
    let mut largest = f64::NEG_INFINITY;
    let mut start = backend.zeros::<T>(0, 0)?;
    for &(a, g) in terms {
        let of_a = top_of_factor(backend, a, cancel)?;
        let of_g = top_of_factor(backend, g, cancel)?;
        let value = of_a.value * of_g.value;
        if value > largest {
            largest = value;
            start = backend.zeros(g.rows(), a.rows())?;
            let column = of_g.vector.view().transpose();
            backend.gemm(start.view_mut(), false, column, of_a.vector.view(), 1.0)?;
        }
    }
    let (rows, columns) = (start.view().rows(), start.view().columns());
    let mut noise = noise::<B, T>(backend, rows, columns)?;
    normalize(backend, &mut noise)?;
    backend.add_scaled(NOISE, noise.view(), start.view_mut())?;
    Ok(start)
}

/// The largest eigenvalue of the sum plus `damping`.
fn lanczos<B: Backend, T: Real>(
    backend: &B,
    terms: &[Term<'_, T>],
    damping: f64,
    start: B::Matrix<T>,
    cancel: &Cancel,
) -> Result<Sweep<B::Matrix<T>>> {
    let mut best = sweep(backend, terms, damping, start, cancel)?;
    for _ in 1..RESTARTS {
        if best.residual <= TOLERANCE * best.value.abs() {
            break;
        }
        let next = sweep(backend, terms, damping, best.vector, cancel)?;
        best = Sweep {
            value: next.value.max(best.value),
            ..next
        };
    }
    Ok(best)
}

/// What one Lanczos basis says about the top of the spectrum.
struct Sweep<M> {
    value: f64,
    vector: M,
    residual: f64,
}

fn sweep<B: Backend, T: Real>(
    backend: &B,
    terms: &[Term<'_, T>],
    damping: f64,
    start: B::Matrix<T>,
    cancel: &Cancel,
) -> Result<Sweep<B::Matrix<T>>> {
    let (rows, columns) = (start.view().rows(), start.view().columns());
    let limit = BASIS.min(rows * columns);
    let mut basis: Vec<B::Matrix<T>> = Vec::with_capacity(limit);
    let (mut diagonal, mut offdiagonal) = (Vec::new(), Vec::new());
    let mut next = start;
    normalize(backend, &mut next)?;
    loop {
        cancel.check()?;
        basis.push(next);
        let current = &basis[basis.len() - 1];
        let mut image = backend.zeros::<T>(rows, columns)?;
        backend.kronecker_product(
            terms,
            &[current.view()],
            vec![image.view_mut()],
            damping,
            cancel,
        )?;
        diagonal.push(backend.dot(current.view(), image.view())?);
        // Orthogonalising against the whole basis, twice, keeps rounding from bringing the same
        // eigenvalue up again and again.
        for _ in 0..2 {
            for vector in &basis {
                let overlap = backend.dot(vector.view(), image.view())?;
                backend.add_scaled(-overlap, vector.view(), image.view_mut())?;
            }
        }
        let norm = normalize(backend, &mut image)?;
        let ritz = top_ritz(&diagonal, &offdiagonal)?;
        let residual = norm * ritz.vector[basis.len() - 1].abs();
        let scale = diagonal.iter().fold(0.0f64, |scale, x| scale.max(x.abs()));
        let exhausted = norm <= T::EPSILON * scale || basis.len() == limit;
        if exhausted || residual <= TOLERANCE * ritz.value.abs() {
            let mut vector = backend.zeros::<T>(rows, columns)?;
            for (weight, member) in ritz.vector.iter().zip(&basis) {
                backend.add_scaled(*weight, member.view(), vector.view_mut())?;
            }
            return Ok(Sweep {
                value: ritz.value,
                vector,
                residual,
            });
        }
        offdiagonal.push(norm);
        next = image;
    }
}

struct Ritz {
    value: f64,
    vector: Vec<f64>,
}

/// The largest eigenpair of the small tridiagonal matrix, on the host.
fn top_ritz(diagonal: &[f64], offdiagonal: &[f64]) -> Result<Ritz> {
    let size = diagonal.len();
    let tridiagonal = HostMatrix::from_fn(size, size, |i, j| match i.abs_diff(j) {
        0 => diagonal[i],
        1 => offdiagonal[i.min(j)],
        _ => 0.0,
    });
    let (values, vectors) = decompose(&*host(), tridiagonal.view())?;
    Ok(Ritz {
        value: values[size - 1],
        vector: (0..size).map(|i| vectors[(i, size - 1)]).collect(),
    })
}

/// Scales to unit length and returns the length before; zero stays zero.
fn normalize<B: Backend, T: Real>(backend: &B, x: &mut B::Matrix<T>) -> Result<f64> {
    let norm = backend.dot(x.view(), x.view())?.sqrt();
    if norm > 0.0 {
        let (rows, columns) = (x.view().rows(), x.view().columns());
        let mut scaled = backend.zeros::<T>(rows, columns)?;
        backend.add_scaled(norm.recip(), x.view(), scaled.view_mut())?;
        *x = scaled;
    }
    Ok(norm)
}

fn constant<T: Real>(value: f64) -> HostMatrix<T> {
    HostMatrix::from_fn(1, 1, |_, _| T::from_f64(value))
}

fn noise<B: Backend, T: Real>(backend: &B, rows: usize, columns: usize) -> Result<B::Matrix<T>> {
    backend.upload(&pseudo_random::<T>(rows, columns))
}

/// The same noise on every call (SplitMix64): it has a part along every eigenvector except by
/// unimaginable accident, and results repeat exactly.
fn pseudo_random<T: Real>(rows: usize, columns: usize) -> HostMatrix<T> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    HostMatrix::from_fn(rows, columns, |_, _| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        T::from_f64((bits >> 11) as f64 / (1u64 << 53) as f64 - 0.5)
    })
}
