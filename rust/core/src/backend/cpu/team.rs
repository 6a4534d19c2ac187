//! Threads of our own, and scratch memory that is kept between calls.
//!
//! Rayon's global pool dies in a forked child (a DataLoader worker), so each process makes its own
//! team on first use; nothing happens at import.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use faer::Par;

use crate::element::Real;
use crate::error::{Error, Result};

/// Below this many flops a second thread costs more to wake than it saves.
const PARALLEL_FLOPS: f64 = 8e6;

/// The threads of a process and their scratch memory.
pub(super) struct Team {
    threads: usize,
    pool: Option<rayon::ThreadPool>,
    scratch: Shelves,
}

impl Team {
    /// The team of this process; made on the first call.
    pub(super) fn current() -> Arc<Self> {
        let mut team = lock(&Process::current().team);
        let made = || Arc::new(Self::with_threads(num_threads()));
        Arc::clone(team.get_or_insert_with(made))
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

    /// How many threads there are, the caller's among them.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Scratch memory for elements of this type.
    pub(super) fn scratch<T: Real>(&self) -> &Shelf<T> {
        self.scratch.of()
    }

    /// Works through the tasks in order, each on whichever thread is free; the calling thread is
    /// one of them.
    pub(super) fn run<I: Send>(&self, tasks: Vec<I>, work: impl Fn(I) + Sync) {
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
    pub(super) fn pieces(&self, flops: f64) -> usize {
        if flops < PARALLEL_FLOPS {
            1
        } else {
            self.threads
        }
    }

    /// Runs a routine of faer's that spreads over threads by itself.
    pub(super) fn within_pool<R: Send>(&self, work: impl FnOnce(Par) -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(|| work(Par::rayon(self.threads))),
            None => work(Par::Seq),
        }
    }
}

/// A process that computes, and the one forked from it that this is, if it is one. A child has
/// nothing of its parent's team: of its threads only the one that forked lives on, and another may
/// have held any of its locks.
#[derive(Default)]
struct Process {
    id: OnceLock<u32>,
    team: Mutex<Option<Arc<Team>>>,
    child: OnceLock<Box<Process>>,
}

impl Process {
    /// This process.
    fn current() -> &'static Self {
        static FIRST: Process = Process {
            id: OnceLock::new(),
            team: Mutex::new(None),
            child: OnceLock::new(),
        };
        let mut process = &FIRST;
        while let Some(child) = process.child.get() {
            process = child;
        }
        let id = std::process::id();
        if *process.id.get_or_init(|| id) == id {
            return process;
        }
        let child = || {
            Box::new(Self {
                id: OnceLock::from(id),
                ..Self::default()
            })
        };
        process.child.get_or_init(child)
    }
}

/// The number of threads asked for, which children inherit; 0 where nobody asked.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Sets the number of threads from the next call on.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(Error::Option(
            "threads must be at least 1, got 0".to_owned(),
        ));
    }
    let mut team = lock(&Process::current().team);
    THREADS.store(threads, Ordering::Relaxed);
    *team = None;
    Ok(())
}

/// The number of threads used, all cores available to the process unless set otherwise.
pub fn num_threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => default_threads(),
        threads => threads,
    }
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
pub(super) struct Shelf<T>(Mutex<Vec<Vec<T>>>);

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
pub(super) struct Shelves {
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
