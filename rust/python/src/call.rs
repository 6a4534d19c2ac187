//! The one way from Python into the core: GIL released, Ctrl-C heard, panics caught.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use ekfac_core::error::without_panic;
use ekfac_core::{Cancel, Error, Result};
use pyo3::prelude::*;

use crate::error::to_python;

/// Work below this many flops ends soon enough not to be interrupted.
const INTERRUPTIBLE_FLOPS: f64 = 1e9;
/// How often Ctrl-C is looked for.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// Runs work of about this many flops without the GIL.
///
/// Long work runs on a thread of its own while this one listens for signals; a signal cancels the
/// work, and its exception is raised once the work has stopped touching the caller's memory.
pub fn run<T: Send>(
    py: Python<'_>,
    flops: f64,
    work: impl FnOnce(&Cancel) -> Result<T> + Send,
) -> PyResult<T> {
    let cancel = Cancel::new();
    let result = if flops < INTERRUPTIBLE_FLOPS {
        py.detach(|| without_panic(|| work(&cancel)))
    } else {
        run_interruptibly(py, &cancel, work)?
    };
    result.map_err(|error| to_python(py, &error))
}

fn run_interruptibly<T: Send>(
    py: Python<'_>,
    cancel: &Cancel,
    work: impl FnOnce(&Cancel) -> Result<T> + Send,
) -> PyResult<Result<T>> {
    thread::scope(|scope| {
        let (done, mut finished) = channel();
        let worker = scope.spawn(move || {
            let result = without_panic(|| work(cancel));
            // The listener may have left already, after a signal.
            let _ = done.send(());
            result
        });
        let listener = &mut finished;
        let mut signal = Ok(());
        while signal.is_ok() {
            let listener = &mut *listener;
            match py.detach(move || listener.recv_timeout(SIGNAL_INTERVAL)) {
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => signal = py.check_signals(),
            }
        }
        if signal.is_err() {
            cancel.cancel();
        }
        let result = py.detach(|| worker.join());
        signal?;
        Ok(result.unwrap_or_else(|_| Err(Error::Internal("a thread was lost".to_owned()))))
    })
}
