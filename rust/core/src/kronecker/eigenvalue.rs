//! The largest eigenvalue of a sum of Kronecker products.

use faer::{Mat, MatRef};

use super::Pair;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Storage};
use crate::cancel::Cancel;
use crate::error::Result;
use crate::view::Real;

/// Lanczos vectors kept before a restart from the best one found.
const BASIS: usize = 32;
/// Restarts before the estimate is taken as it is.
const RESTARTS: usize = 12;
/// The residual, relative to the estimate, at which it is accepted.
const TOLERANCE: f64 = 3e-5;

/// Sizes of the whole matrix up to which it is decomposed as it is.
const SMALL: usize = 64;

/// The algebraically largest eigenvalue.
pub(super) fn top<B: Backend, T: Real>(
    backend: &B,
    terms: &[Pair<'_, T>],
    cancel: &Cancel,
) -> Result<f64> {
    cancel.check()?;
    let size = |(a, g): &Pair<'_, T>| a.nrows() * g.nrows();
    match terms {
        [(a, g)] => {
            let (of_a, of_g) = (extremes(backend, *a)?, extremes(backend, *g)?);
            let products = of_a.iter().flat_map(|x| of_g.map(|y| x * y));
            Ok(products.fold(f64::NEG_INFINITY, f64::max))
        }
        [first, ..] if size(first) <= SMALL => {
            let mut whole = backend.zeros::<T>(size(first), size(first));
            backend.dense_kronecker(terms, whole.view_mut());
            extremes(backend, whole.view()).map(|[_, largest]| largest)
        }
        _ => lanczos(backend, terms, cancel),
    }
}

/// The smallest and the largest eigenvalue.
fn extremes<B: Backend, T: Real>(backend: &B, x: MatRef<'_, T>) -> Result<[f64; 2]> {
    let mut vectors = backend.zeros::<T>(x.nrows(), x.nrows());
    let values = backend.eigh(x, vectors.view_mut())?;
    Ok([values[0], values[x.nrows() - 1]])
}

fn lanczos<B: Backend, T: Real>(
    backend: &B,
    terms: &[Pair<'_, T>],
    cancel: &Cancel,
) -> Result<f64> {
    let rows = terms[0].1.nrows();
    let columns = terms[0].0.nrows();
    let mut start = backend.upload(pseudo_random::<T>(rows, columns).as_ref());
    let mut best = f64::NEG_INFINITY;
    for _ in 0..RESTARTS {
        let sweep = sweep(backend, terms, start, cancel)?;
        best = best.max(sweep.value);
        if sweep.residual <= TOLERANCE * best.abs() {
            break;
        }
        start = sweep.vector;
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
    terms: &[Pair<'_, T>],
    start: B::Matrix<T>,
    cancel: &Cancel,
) -> Result<Sweep<B::Matrix<T>>> {
    let (rows, columns) = (start.view().nrows(), start.view().ncols());
    let limit = BASIS.min(rows * columns);
    let mut basis: Vec<B::Matrix<T>> = Vec::with_capacity(limit);
    let (mut diagonal, mut offdiagonal) = (Vec::new(), Vec::new());
    let mut next = start;
    normalize(backend, &mut next);
    loop {
        cancel.check()?;
        basis.push(next);
        let current = &basis[basis.len() - 1];
        let mut image = backend.zeros::<T>(rows, columns);
        backend.kronecker_product(
            terms,
            &[current.view()],
            vec![image.view_mut()],
            0.0,
            cancel,
        )?;
        diagonal.push(backend.dot(current.view(), image.view()));
        // Orthogonalising against the whole basis, twice, keeps rounding from bringing the same
        // eigenvalue up again and again.
        for _ in 0..2 {
            for vector in &basis {
                let overlap = backend.dot(vector.view(), image.view());
                backend.add_scaled(-overlap, vector.view(), image.view_mut());
            }
        }
        let norm = normalize(backend, &mut image);
        let ritz = top_ritz(&diagonal, &offdiagonal)?;
        let residual = norm * ritz.vector[basis.len() - 1].abs();
        let scale = diagonal.iter().fold(0.0f64, |scale, x| scale.max(x.abs()));
        let exhausted = norm <= T::EPSILON * scale || basis.len() == limit;
        if exhausted || residual <= TOLERANCE * ritz.value.abs() {
            let mut vector = backend.zeros::<T>(rows, columns);
            for (weight, member) in ritz.vector.iter().zip(&basis) {
                backend.add_scaled(*weight, member.view(), vector.view_mut());
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
    let tridiagonal = Mat::<f64>::from_fn(size, size, |i, j| match i.abs_diff(j) {
        0 => diagonal[i],
        1 => offdiagonal[i.min(j)],
        _ => 0.0,
    });
    let mut vectors = Mat::<f64>::zeros(size, size);
    let values = Cpu::current().eigh(tridiagonal.as_ref(), vectors.as_mut())?;
    Ok(Ritz {
        value: values[size - 1],
        vector: (0..size).map(|i| vectors[(i, size - 1)]).collect(),
    })
}

/// Scales to unit length and returns the length before; zero stays zero.
fn normalize<B: Backend, T: Real>(backend: &B, x: &mut B::Matrix<T>) -> f64 {
    let norm = backend.dot(x.view(), x.view()).sqrt();
    if norm > 0.0 {
        let (rows, columns) = (x.view().nrows(), x.view().ncols());
        let mut scaled = backend.zeros::<T>(rows, columns);
        backend.add_scaled(norm.recip(), x.view(), scaled.view_mut());
        *x = scaled;
    }
    norm
}

/// The same noise on every call (SplitMix64): it has a part along every eigenvector except by
/// unimaginable accident, and results repeat exactly.
fn pseudo_random<T: Real>(rows: usize, columns: usize) -> Mat<T> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    Mat::from_fn(rows, columns, |_, _| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        T::from_f64((bits >> 11) as f64 / (1u64 << 53) as f64 - 0.5)
    })
}
