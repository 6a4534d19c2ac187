//! The OpenMP team that torch runs its operations on, for work of our own.
//!
//! Its threads spin for a while after each operation, for the next one to find them awake: threads
//! of a second pool would wait behind them. Nothing is linked against: the run-time is whichever
//! the process has loaded for all to see, as torch does with its own.

use std::any::Any;
use std::cell::Cell;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What each thread of a region calls.
type Body = extern "C" fn(*mut c_void);

/// `GOMP_parallel(body, data, threads, flags)`, which libgomp, libiomp5 and libomp all export.
type Parallel = unsafe extern "C" fn(Body, *mut c_void, c_uint, c_uint);

/// `omp_get_max_threads()`, which is what `torch.get_num_threads` asks.
type MaxThreads = unsafe extern "C" fn() -> c_int;

/// An OpenMP run-time. A team belongs to the thread that opens regions: each one that calls torch
/// has its own, which it finds again here.
#[derive(Clone, Copy)]
pub(super) struct OpenMp {
    parallel: Parallel,
    max_threads: MaxThreads,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl OpenMp {
    /// The run-time that is loaded, if one is; looked up once.
    pub(super) fn loaded() -> Option<Self> {
        static LOADED: OnceLock<Option<OpenMp>> = OnceLock::new();
        *LOADED.get_or_init(|| {
            let parallel = address_of(c"GOMP_parallel")?;
            let max_threads = address_of(c"omp_get_max_threads")?;
            // SAFETY: whoever exports these names exports functions of these types: the first is
            // what GCC's compiled code calls, the second is in OpenMP's standard.
            Some(unsafe {
                Self {
                    parallel: std::mem::transmute::<*mut c_void, Parallel>(parallel),
                    max_threads: std::mem::transmute::<*mut c_void, MaxThreads>(max_threads),
                }
            })
        })
    }

    /// How many threads a region of the calling thread has unless it asks for another number.
    pub(super) fn max_threads(self) -> usize {
        // SAFETY: it takes nothing and reads a setting of the calling thread.
        let threads = unsafe { (self.max_threads)() };
        usize::try_from(threads).map_or(1, |threads| threads.max(1))
    }

    /// Whether the calling thread is in a region already.
    pub(super) fn is_inside() -> bool {
        INSIDE.get()
    }

    /// Calls the body once on each of a number of threads, of which the caller is one, and returns
    /// when all have come back. Fewer threads may be there than asked for. Must not be called in a
    /// forked child, where there is nothing of the team but what the run-time remembers of it.
    ///
    /// # Panics
    ///
    /// As the body does on any of the threads, once all have come back.
    pub(super) fn region(self, threads: usize, body: &(dyn Fn() + Sync)) {
        let region = Region {
            body,
            panics: Mutex::new(Vec::new()),
        };
        let data = (&raw const region).cast_mut().cast();
        let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
        // SAFETY: `enter` is given this region, which outlives the call: it returns when all
        // threads have come back from `enter`, which no panic leaves. No flags: threads stay
        // where they are.
        unsafe { (self.parallel)(enter, data, threads, 0) };
        let panics = region.panics.into_inner();
        if let Some(payload) = panics.unwrap_or_else(PoisonError::into_inner).pop() {
            resume_unwind(payload);
        }
    }
}

/// What the threads of a region share.
struct Region<'a> {
    body: &'a (dyn Fn() + Sync),
    panics: Mutex<Vec<Box<dyn Any + Send>>>,
}

/// Where each thread enters. A panic must not leave it: the frames above are not Rust's.
extern "C" fn enter(data: *mut c_void) {
    // SAFETY: `OpenMp::region` gave the address of a region that lives until all have come back;
    // everything in it may be shared between threads.
    let region = unsafe { &*data.cast::<Region<'_>>() };
    let before = INSIDE.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(region.body));
    INSIDE.set(before);
    if let Err(payload) = outcome {
        lock(&region.panics).push(payload);
    }
}

/// A panic while the lock was held cannot leave the data half-changed anywhere it is used here.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a symbol is that the process has loaded for all to see.
#[cfg(unix)]
fn address_of(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends with a zero; nothing is loaded and nothing is called.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// There is no one place to look.
#[cfg(not(unix))]
fn address_of(_: &CStr) -> Option<*mut c_void> {
    None
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// A run-time that starts the threads of each region anew.
    pub(in crate::backend::cpu) fn threads_anew() -> OpenMp {
        unsafe extern "C" fn parallel(body: Body, data: *mut c_void, threads: c_uint, _: c_uint) {
            let data = data as usize;
            let enter = || body(std::ptr::with_exposed_provenance_mut(data));
            thread::scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(enter);
                }
                enter();
            });
        }
        unsafe extern "C" fn max_threads() -> c_int {
            3
        }
        OpenMp {
            parallel,
            max_threads,
        }
    }

    #[test]
    fn each_thread_of_a_region_calls_the_body_once_and_knows_where_it_is() {
        let (calls, caller) = (AtomicUsize::new(0), thread::current().id());
        let calls_of_caller = AtomicUsize::new(0);
        assert!(!OpenMp::is_inside());
        threads_anew().region(4, &|| {
            assert!(OpenMp::is_inside());
            calls.fetch_add(1, Ordering::Relaxed);
            let own = usize::from(thread::current().id() == caller);
            calls_of_caller.fetch_add(own, Ordering::Relaxed);
        });
        assert!(!OpenMp::is_inside());
        assert_eq!(calls.into_inner(), 4);
        assert_eq!(calls_of_caller.into_inner(), 1);
    }

    #[test]
    #[expect(clippy::panic, reason = "panics are what is tested")]
    fn a_panic_on_any_thread_is_one_of_the_caller_after_all_have_come_back() {
        let caller = thread::current().id();
        for of_caller in [true, false] {
            let back = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                threads_anew().region(3, &|| {
                    if (thread::current().id() == caller) == of_caller {
                        panic!("a fault");
                    }
                    back.fetch_add(1, Ordering::Relaxed);
                });
            }));
            let payload = outcome.err().and_then(|x| x.downcast::<&str>().ok());
            assert_eq!(payload.as_deref(), Some(&"a fault"));
            assert_eq!(back.into_inner(), if of_caller { 2 } else { 1 });
            assert!(!OpenMp::is_inside());
        }
    }
}
