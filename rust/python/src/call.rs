//! The one way from Python into the core: GIL released, Ctrl-C heard, panics caught.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ekfac_core::error::without_panic;
use ekfac_core::{Cancel, Result};
use pyo3::prelude::*;

use crate::error::to_python;

/// How often Ctrl-C is looked for: the GIL, which that takes, may be some milliseconds away.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// Runs work without the GIL, on this very thread: a team of OpenMP belongs to the one that opens
/// its regions.
///
/// Long work looks for signals itself, wherever this thread checks whether to stop; what a
/// signal's handler raises is raised once the work has stopped touching the caller's memory.
pub fn run<T: Send>(py: Python<'_>, work: impl FnOnce(&Cancel) -> Result<T> + Send) -> PyResult<T> {
    let raised = Arc::new(Mutex::new(None));
    let cancel = Cancel::looking_out(SIGNAL_INTERVAL, {
        let raised = Arc::clone(&raised);
        move || match Python::try_attach(|py| py.check_signals()) {
            None | Some(Ok(())) => false,
            Some(Err(error)) => {
                *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                true
            }
        }
    });
    let result = py.detach(|| without_panic(|| work(&cancel)));
    let raised = raised.lock().unwrap_or_else(PoisonError::into_inner).take();
    match raised {
        Some(error) => Err(error),
        None => result.map_err(|error| to_python(py, &error)),
    }
}
