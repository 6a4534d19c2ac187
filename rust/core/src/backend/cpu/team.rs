//! The threads that work is shared by, and scratch memory that is kept between calls.
//!
//! They are those of torch's OpenMP team where there is one, and else a pool of our own. Neither
//! outlives a fork (OpenMP's team hangs in a child, and so does rayon's global pool), so each
//! process makes its own pool on first use; nothing is started at import.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use faer::Par;

use super::openmp::{OpenMp, lock};
use crate::element::Real;
use crate::error::{Error, Result};

/// Below this many flops a second thread costs more to wake than it saves.
const PARALLEL_FLOPS: f64 = 8e6;

/// The threads of a process and their scratch memory.
pub(super) struct Team {
    threads: usize,
    openmp: Option<OpenMp>,
    /// None once it could not be made.
    pool: OnceLock<Option<rayon::ThreadPool>>,
    scratch: Shelves,
}

impl Team {
    /// The team of this process, of as many threads as are wanted now.
    pub(super) fn current() -> Arc<Self> {
        let (process, threads) = (Process::current(), num_threads());
        let mut team = lock(&process.team);
        match &*team {
            Some(team) if team.threads == threads => Arc::clone(team),
            _ => Arc::clone(team.insert(Arc::new(Self::new(threads, process.openmp())))),
        }
    }

    fn new(threads: usize, openmp: Option<OpenMp>) -> Self {
        Self {
            threads,
            openmp,
            pool: OnceLock::new(),
            scratch: Shelves::default(),
        }
    }

    /// Threads of our own, made on first use; none where there is one thread or no more to be had.
    fn pool(&self) -> Option<&rayon::ThreadPool> {
        let made = || {
            let builder = rayon::ThreadPoolBuilder::new()
                .num_threads(self.threads)
                .thread_name(|index| format!("ekfac-{index}"));
            (self.threads > 1).then(|| builder.build().ok()).flatten()
        };
        self.pool.get_or_init(made).as_ref()
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
    /// one of them. Tasks of a task are worked through by its thread alone on an OpenMP team.
    pub(super) fn run<I: Send>(&self, tasks: Vec<I>, work: impl Fn(I) + Sync) {
        let workers = self.threads.min(tasks.len());
        if workers < 2 || OpenMp::is_inside() {
            return tasks.into_iter().for_each(work);
        }
        let queue = Mutex::new(tasks.into_iter());
        let next = || lock(&queue).next();
        let drain = || {
            while let Some(task) = next() {
                work(task);
            }
        };
        if let Some(openmp) = self.openmp {
            self.run_in_region(openmp, workers, &drain);
        } else if let Some(pool) = self.pool() {
            pool.in_place_scope(|scope| {
                for _ in 1..workers {
                    scope.spawn(|_| drain());
                }
                drain();
            });
        } else {
            drain();
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
        match self.pool() {
            Some(pool) => pool.install(|| work(Par::rayon(self.threads))),
            None => work(Par::Seq),
        }
    }

    /// Has the calling thread and some others of its OpenMP team do the same work.
    fn run_in_region(&self, openmp: OpenMp, workers: usize, work: &(dyn Fn() + Sync)) {
        let (caller, others) = (thread::current().id(), AtomicUsize::new(1));
        openmp.region(self.region(openmp), &|| {
            // The caller is one of them whatever comes: it looks for signals.
            if thread::current().id() == caller || others.fetch_add(1, Ordering::Relaxed) < workers
            {
                work();
            }
        });
    }

    /// How many threads a region of our own has: all that torch's have. A smaller one would end
    /// the threads that it has no use for.
    fn region(&self, openmp: OpenMp) -> usize {
        self.threads.max(openmp.max_threads())
    }
}

/// A process that computes, and the one forked from it that this is, if it is one. A child has
/// nothing of its parent's team: of its threads only the one that forked lives on, and another may
/// have held any of its locks.
#[derive(Default)]
struct Process {
    id: OnceLock<u32>,
    forked: bool,
    team: Mutex<Option<Arc<Team>>>,
    child: OnceLock<Box<Process>>,
}

impl Process {
    /// This process.
    fn current() -> &'static Self {
        static FIRST: Process = Process {
            id: OnceLock::new(),
            forked: false,
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
                forked: true,
                ..Self::default()
            })
        };
        process.child.get_or_init(child)
    }

    /// The OpenMP run-time, where it can be used: a forked child would wait for threads that only
    /// its parent has.
    fn openmp(&self) -> Option<OpenMp> {
        OpenMp::loaded().filter(|_| !self.forked)
    }
}

/// Notes which process this is, so that those forked from it are told apart even if they are the
/// first to compute. To be called when the library is loaded; nothing is started.
pub fn note_process() {
    Process::current();
}

/// Whose threads share the work: "OpenMP", torch's as a rule, or "own" ones.
pub fn whose_threads() -> &'static str {
    match Process::current().openmp() {
        Some(_) => "OpenMP",
        None => "own",
    }
}

/// The number of threads asked for, which children inherit; 0 where nobody asked.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Sets the number of threads from the next call on.
///
/// # Errors
///
/// [`Error::Option`] unless it is at least 1.
pub fn set_num_threads(threads: i64) -> Result<()> {
    let (1.., Ok(threads)) = (threads, usize::try_from(threads)) else {
        return Err(Error::Option(format!(
            "threads must be at least 1, got {threads}"
        )));
    };
    let mut team = lock(&Process::current().team);
    THREADS.store(threads, Ordering::Relaxed);
    *team = None;
    Ok(())
}

/// The number of threads used: that set last, or else as many as OpenMP would use when called from
/// this thread (`torch.get_num_threads`), or, where there is no OpenMP, all cores available. A
/// thread learns what torch was told on another one at its own first work that torch would share.
pub fn num_threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => OpenMp::loaded().map_or_else(default_threads, OpenMp::max_threads),
        threads => threads,
    }
}

/// Asked once: the answer comes from files of the control group, which take longer to read than a
/// small product to compute.
fn default_threads() -> usize {
    static AVAILABLE: OnceLock<usize> = OnceLock::new();
    *AVAILABLE.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
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

#[cfg(test)]
mod tests {
    use super::super::openmp::tests::threads_anew;
    use super::*;
    use crate::error::without_panic;

    fn teams(threads: usize) -> [Team; 2] {
        [None, Some(threads_anew())].map(|openmp| Team::new(threads, openmp))
    }

    #[test]
    fn every_task_is_done_once_by_no_more_threads_than_asked_for() {
        // The region is of three threads, as the run-time would have it.
        for team in [1, 2, 3, 5].into_iter().flat_map(teams) {
            for count in [0, 1, 2, 40] {
                let done: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                let seen = Mutex::new(Vec::new());
                team.run((0..count).collect(), |task: usize| {
                    done[task].fetch_add(1, Ordering::Relaxed);
                    lock(&seen).push(thread::current().id());
                });
                assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
                let seen: std::collections::HashSet<_> = lock(&seen).iter().copied().collect();
                assert!(seen.len() <= team.threads().min(count));
            }
        }
    }

    #[test]
    fn tasks_may_have_tasks() {
        for team in teams(3) {
            let sum = AtomicUsize::new(0);
            team.run((0..6).collect(), |outer: usize| {
                team.run((0..7).collect(), |inner: usize| {
                    sum.fetch_add(10 * outer + inner, Ordering::Relaxed);
                });
            });
            assert_eq!(sum.into_inner(), 10 * 15 * 7 + 21 * 6);
        }
    }

    #[test]
    fn several_callers_may_use_one_team() {
        for team in teams(2) {
            let sum = AtomicUsize::new(0);
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        team.run((0..50).collect(), |task: usize| {
                            sum.fetch_add(task, Ordering::Relaxed);
                        });
                    });
                }
            });
            assert_eq!(sum.into_inner(), 4 * 1225);
        }
    }

    #[test]
    #[expect(clippy::panic, reason = "panics are what is tested")]
    fn a_panic_in_a_task_is_an_internal_error_and_the_team_goes_on() {
        for team in teams(3) {
            for bad in 0..4 {
                let outcome = without_panic(|| {
                    team.run((0..4).collect(), |task: usize| {
                        if task == bad {
                            panic!("task {task} failed");
                        }
                    });
                    Ok(())
                });
                assert_eq!(outcome, Err(Error::Internal(format!("task {bad} failed"))));
            }
            let done = AtomicUsize::new(0);
            team.run(vec![(); 9], |()| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 9);
        }
    }
}
