//! Stopping long work.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A flag that long loops look at between tiles and between iterations.
#[derive(Default)]
pub struct Cancel {
    cancelled: AtomicBool,
    lookout: Option<Lookout>,
}

impl Cancel {
    /// A token nobody has cancelled.
    pub const fn new() -> Self {
        Self {
            cancelled: AtomicBool::new(false),
            lookout: None,
        }
    }

    /// A token that the calling thread looks out for itself, at its own checks: where `reason` is
    /// found true the work has been asked to stop. It is looked for once an interval at most.
    pub fn looking_out(
        interval: Duration,
        reason: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        Self {
            cancelled: AtomicBool::new(false),
            lookout: Some(Lookout {
                owner: thread::current().id(),
                interval,
                since: Instant::now(),
                intervals: AtomicU64::new(0),
                reason: Box::new(reason),
            }),
        }
    }

    /// Asks the work to stop at its next check.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether the work has been asked to stop.
    pub fn is_cancelled(&self) -> bool {
        if self.cancelled.load(Ordering::Relaxed) {
            return true;
        }
        let found = self.lookout.as_ref().is_some_and(Lookout::finds_reason);
        if found {
            self.cancel();
        }
        found
    }

    /// [`Error::Interrupted`] once the work has been asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }
}

/// What one of the threads at work looks for from time to time.
struct Lookout {
    owner: ThreadId,
    interval: Duration,
    since: Instant,
    /// How many whole intervals had passed at the last look.
    intervals: AtomicU64,
    reason: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Lookout {
    fn finds_reason(&self) -> bool {
        thread::current().id() == self.owner && self.is_due() && (self.reason)()
    }

    fn is_due(&self) -> bool {
        let passed = self.since.elapsed().as_nanos() / self.interval.as_nanos().max(1);
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        self.intervals.swap(passed, Ordering::Relaxed) < passed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn only_the_thread_that_made_it_looks_and_all_are_told() {
        let looks = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&looks);
        let cancel = Cancel::looking_out(Duration::from_millis(1), move || {
            counted.fetch_add(1, Ordering::Relaxed);
            true
        });
        thread::sleep(Duration::from_millis(3));
        let elsewhere = || thread::scope(|scope| scope.spawn(|| cancel.check()).join());
        assert!(matches!(elsewhere(), Ok(Ok(()))));
        assert_eq!(looks.load(Ordering::Relaxed), 0);
        assert_eq!(cancel.check(), Err(Error::Interrupted));
        assert!(matches!(elsewhere(), Ok(Err(Error::Interrupted))));
        assert_eq!(cancel.check(), Err(Error::Interrupted));
        assert_eq!(looks.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn it_is_looked_for_once_an_interval() {
        let looks = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&looks);
        let interval = Duration::from_millis(20);
        let cancel = Cancel::looking_out(interval, move || {
            counted.fetch_add(1, Ordering::Relaxed);
            false
        });
        let start = Instant::now();
        while start.elapsed() < 4 * interval {
            assert!(!cancel.is_cancelled());
        }
        let looks = looks.load(Ordering::Relaxed);
        assert!((1..=4).contains(&looks), "{looks} looks");
        cancel.cancel();
        assert!(cancel.is_cancelled());
    }
}
