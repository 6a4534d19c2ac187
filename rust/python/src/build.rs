//! What this build is, and how many threads it uses.

use std::collections::BTreeMap;

use ekfac_core::backend::{cpu, cuda};
use pyo3::prelude::*;

use crate::error::to_python;

/// Version, profile, instruction sets found at run time and CUDA libraries found.
#[pyfunction]
pub fn build_info() -> BTreeMap<&'static str, &'static str> {
    let found = |present: bool| if present { "found" } else { "not found" };
    let libraries = cuda::probe();
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    BTreeMap::from([
        ("version", env!("CARGO_PKG_VERSION")),
        ("profile", profile),
        ("simd", cpu::simd()),
        ("cuda_backend", "not in this build"),
        ("cuda_driver", found(libraries.driver)),
        ("cublas", found(libraries.cublas)),
        ("cusolver", found(libraries.cusolver)),
        ("nvrtc", found(libraries.nvrtc)),
    ])
}

/// Sets the number of threads used from the next call on.
#[pyfunction]
pub fn set_num_threads(py: Python<'_>, threads: usize) -> PyResult<()> {
    cpu::set_num_threads(threads).map_err(|error| to_python(py, &error))
}

/// The number of threads used.
#[pyfunction]
pub fn num_threads() -> usize {
    cpu::num_threads()
}
