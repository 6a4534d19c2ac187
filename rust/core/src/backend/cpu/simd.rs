//! Loops compiled for the vector instructions found at run time.

use faer::traits::pulp;

use crate::element::{Element, Real};

/// A loop to be compiled for several instruction sets: its `call` must be `#[inline(always)]`, and
/// so must what it calls (a closure would not be inlined reliably).
pub(super) use pulp::NullaryFnOnce as Loop;

/// Runs a loop with the widest vectors of this machine.
pub(super) fn run<L: Loop>(work: L) -> L::Output {
    pulp::Arch::new().dispatch(work)
}

/// Independent partial sums, so that additions do not wait for one another.
const LANES: usize = 16;

/// The sum in double precision.
pub(super) struct Sum<'a, S>(pub &'a [S]);

impl<S: Element> Loop for Sum<'_, S> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        sum(self.0)
    }
}

/// The inner product of two slices in double precision.
pub(super) struct Dot<'a, T>(pub &'a [T], pub &'a [T]);

impl<T: Real> Loop for Dot<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        dot(self.0, self.1)
    }
}

/// The sum in double precision; as the others here, for loops that are compiled themselves.
#[inline(always)]
pub(super) fn sum<S: Element>(values: &[S]) -> f64 {
    let (blocks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum += value.to_f64();
        }
    }
    let rest: f64 = rest.iter().map(|value| value.to_f64()).sum();
    sums.iter().sum::<f64>() + rest
}

/// The inner product in double precision.
#[inline(always)]
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> f64 {
    let (blocks_a, rest_a) = a.as_chunks::<LANES>();
    let (blocks_b, rest_b) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (left, right) in blocks_a.iter().zip(blocks_b) {
        for ((sum, x), y) in sums.iter_mut().zip(left).zip(right) {
            *sum += x.to_f64() * y.to_f64();
        }
    }
    let rest = rest_a.iter().zip(rest_b);
    let rest: f64 = rest.map(|(x, y)| x.to_f64() * y.to_f64()).sum();
    sums.iter().sum::<f64>() + rest
}

/// The sum of squared distances from a number, in double precision.
#[inline(always)]
pub(super) fn squares_about<T: Real>(values: &[T], centre: f64) -> f64 {
    let (blocks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            let distance = value.to_f64() - centre;
            *sum += distance * distance;
        }
    }
    let rest = rest.iter().map(|value| value.to_f64() - centre);
    let rest: f64 = rest.map(|distance| distance * distance).sum();
    sums.iter().sum::<f64>() + rest
}

/// `x -= factor * y`.
pub(super) struct SubtractScaled<'a, 'b>(pub &'a mut [f64], pub f64, pub &'b [f64]);

impl Loop for SubtractScaled<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (x, y) in self.0.iter_mut().zip(self.2) {
            *x -= self.1 * y;
        }
    }
}

/// The widest vector instructions this machine offers, among those faer selects at run time.
pub fn instruction_set() -> &'static str {
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
