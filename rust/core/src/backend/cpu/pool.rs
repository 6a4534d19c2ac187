//! Threads of our own, and scratch memory that is kept between calls.
//!
//! Rayon's global pool dies in a forked child (a DataLoader worker), so each process makes its own
//! on first use; nothing happens at import.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Cpu;
use crate::error::{Error, Result};
use crate::view::Real;

struct State {
    process: u32,
    threads: Option<usize>,
    cpu: Option<Arc<Cpu>>,
}

static STATE: Mutex<State> = Mutex::new(State {
    process: 0,
    threads: None,
    cpu: None,
});

/// The backend of this process.
pub(super) fn current() -> Arc<Cpu> {
    let mut state = lock(&STATE);
    let process = std::process::id();
    if state.process != process {
        // The threads of a pool made before a fork exist only in the parent: dropping the pool
        // here would talk to nobody.
        std::mem::forget(state.cpu.take());
        state.process = process;
    }
    let threads = state.threads.unwrap_or_else(default_threads);
    Arc::clone(
        state
            .cpu
            .get_or_insert_with(|| Arc::new(Cpu::with_threads(threads))),
    )
}

/// Sets the number of threads from the next call on.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(Error::Option(
            "threads must be at least 1, got 0".to_owned(),
        ));
    }
    let mut state = lock(&STATE);
    if state.process != std::process::id() {
        std::mem::forget(state.cpu.take());
    }
    state.threads = Some(threads);
    state.cpu = None;
    Ok(())
}

/// The number of threads used, all cores available to the process unless set otherwise.
pub fn num_threads() -> usize {
    lock(&STATE).threads.unwrap_or_else(default_threads)
}

/// Asked once: the answer comes from files of the control group, which take longer to read than a
/// small product to compute.
fn default_threads() -> usize {
    static AVAILABLE: OnceLock<usize> = OnceLock::new();
    *AVAILABLE.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// A panic while the lock was held cannot leave the data half-changed anywhere it is used here.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Scratch vectors waiting for their next use.
#[derive(Default)]
pub struct Shelf<T>(Mutex<Vec<Vec<T>>>);

/// How much scratch memory is kept per element type; more is given back to the allocator.
const KEPT_ELEMENTS: usize = 1 << 25;

impl<T: Real> Shelf<T> {
    /// Lends a scratch slice with arbitrary (but initialised) contents.
    pub(super) fn with<R>(&self, length: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
        let mut buffer = self.take(length);
        if buffer.len() < length {
            buffer = vec![T::default(); length];
        }
        let result = work(&mut buffer[..length]);
        let mut shelf = lock(&self.0);
        if shelf.iter().map(Vec::len).sum::<usize>() + buffer.len() <= KEPT_ELEMENTS {
            shelf.push(buffer);
        }
        result
    }

    /// The smallest buffer that is large enough, or else the largest, whose place the grown one
    /// will take.
    fn take(&self, length: usize) -> Vec<T> {
        let mut shelf = lock(&self.0);
        let fitting = (0..shelf.len())
            .filter(|&index| shelf[index].len() >= length)
            .min_by_key(|&index| shelf[index].len());
        let chosen = fitting.or_else(|| (0..shelf.len()).max_by_key(|&index| shelf[index].len()));
        chosen.map_or_else(Vec::new, |index| shelf.swap_remove(index))
    }
}

/// One shelf for each type that is computed in.
#[derive(Default)]
pub struct Shelves {
    single: Shelf<f32>,
    double: Shelf<f64>,
}

impl Shelves {
    /// The shelf of this type.
    pub(super) fn of<T: Real>(&self) -> &Shelf<T> {
        let shelves: [&dyn std::any::Any; 2] = [&self.single, &self.double];
        match shelves.iter().find_map(|shelf| shelf.downcast_ref()) {
            Some(shelf) => shelf,
            None => unreachable!("Real is sealed: f32 and f64 are all there is"),
        }
    }
}
