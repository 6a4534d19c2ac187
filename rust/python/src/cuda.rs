//! Bindings of `ekfac_core::backend::cuda`: what was found, where memory comes from, the compiler.

use std::sync::Arc;

use ekfac_core::backend::cuda::{self, Allocator, Found};
use ekfac_core::element::Dtype;
use ekfac_core::{Error, Result};
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::call::run;

/// Memory from two Python functions, `allocate(bytes, device, stream) -> address` and
/// `release(address)`.
struct FromPython {
    allocate: Py<PyAny>,
    release: Py<PyAny>,
}

impl Allocator for FromPython {
    fn allocate(&self, bytes: usize, device: usize, stream: usize) -> Result<usize> {
        Python::attach(|py| {
            let address = self.allocate.call1(py, (bytes, device, stream));
            address
                .and_then(|address| address.extract(py))
                .map_err(|error| refused(py, &error, bytes, device))
        })
    }

    fn release(&self, address: usize) {
        // Without an interpreter there is nobody left to take the memory back.
        let _ = Python::try_attach(|py| {
            // An object may be dropped while an exception is on its way; it must still be there
            // afterwards.
            let on_its_way = PyErr::take(py);
            if let Err(error) = self.release.call1(py, (address,)) {
                error.write_unraisable(py, None);
            }
            if let Some(error) = on_its_way {
                error.restore(py);
            }
        });
    }
}

/// Why there is no memory: Ctrl-C and a device in trouble are not a lack of it.
fn refused(py: Python<'_>, error: &PyErr, bytes: usize, device: usize) -> Error {
    if error.is_instance_of::<PyKeyboardInterrupt>(py) {
        return Error::Interrupted;
    }
    let message = format!("{bytes} bytes could not be allocated on cuda:{device}: {error}");
    let of_torch = py
        .import("torch")
        .and_then(|torch| torch.getattr("OutOfMemoryError"))
        .is_ok_and(|class| error.is_instance(py, &class));
    if of_torch || error.is_instance_of::<PyMemoryError>(py) {
        Error::OutOfMemory(message)
    } else {
        Error::Cuda(message)
    }
}

/// Sets where device memory comes from.
#[pyfunction]
pub fn set_cuda_allocator(allocate: Py<PyAny>, release: Py<PyAny>) {
    cuda::set_allocator(Arc::new(FromPython { allocate, release }));
}

/// What was found of CUDA on this machine.
#[pyfunction]
pub fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let findings = run(py, |_| Ok(cuda::look()))?;
    let libraries = PyDict::new(py);
    for Found {
        library,
        present,
        file,
        missing,
    } in findings.libraries
    {
        let found = PyDict::new(py);
        found.set_item("found", present)?;
        found.set_item("file", file)?;
        found.set_item("missing", missing)?;
        libraries.set_item(library.name(), found)?;
    }
    let info = PyDict::new(py);
    info.set_item("usable", findings.problem.is_none())?;
    info.set_item(
        "problem",
        findings.problem.map(|problem| problem.to_string()),
    )?;
    info.set_item("driver_version", findings.driver_version)?;
    info.set_item("devices", findings.devices)?;
    info.set_item("libraries", libraries)?;
    Ok(info)
}

/// Compiles the kernels that read one dtype and compute in another, for an architecture.
#[pyfunction]
pub fn compile_cuda_kernels<'py>(
    py: Python<'py>,
    element: &str,
    real: &str,
    architecture: &str,
) -> PyResult<Bound<'py, PyBytes>> {
    let code = run(py, |_| {
        cuda::compile(
            Dtype::from_name(element)?,
            Dtype::from_name(real)?,
            architecture,
        )
    })?;
    Ok(PyBytes::new(py, &code))
}

/// Names of all kernels.
#[pyfunction]
pub fn cuda_kernels() -> Vec<&'static str> {
    cuda::kernel_names()
}
