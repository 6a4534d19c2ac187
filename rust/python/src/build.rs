//! What this build is, and what threads it uses.

use std::collections::BTreeMap;

use ekfac_core::backend::cpu;
use pyo3::prelude::*;

use crate::error::to_python;

/// Version and profile; instruction sets and threads found at run time.
#[pyfunction]
pub fn build_info() -> BTreeMap<&'static str, &'static str> {
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    BTreeMap::from([
        ("version", env!("CARGO_PKG_VERSION")),
        ("profile", profile),
        ("simd", cpu::instruction_set()),
        ("threads", cpu::whose_threads()),
    ])
}

/// Sets the number of threads used from the next call on.
#[pyfunction]
pub fn set_num_threads(py: Python<'_>, threads: i64) -> PyResult<()> {
    cpu::set_num_threads(threads).map_err(|error| to_python(py, &error))
}

/// The number of threads used.
#[pyfunction]
pub fn num_threads() -> usize {
    cpu::num_threads()
}
