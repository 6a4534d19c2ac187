//! What calls of CUDA take and give: streams, and codes of failure.

use std::fmt::Debug;

use cudarc::driver::sys;

use crate::error::Error;

/// The error of a call that failed with this code.
pub(super) fn failed(call: &str, code: impl Debug) -> Error {
    let code = format!("{code:?}");
    if code == "CUDA_ERROR_OUT_OF_MEMORY" || code.ends_with("_ALLOC_FAILED") {
        Error::OutOfMemory(format!("{call} ran out of device memory ({code})"))
    } else {
        Error::Cuda(format!("{call} failed: {code}"))
    }
}

/// A stream of torch's.
pub(super) fn stream_handle(stream: usize) -> sys::CUstream {
    std::ptr::with_exposed_provenance_mut(stream)
}
