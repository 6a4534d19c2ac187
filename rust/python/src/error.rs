//! Errors of the core as the exceptions of `ekfac_rs.errors`.

use ekfac_core::Error;
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError};
use pyo3::prelude::*;

/// The Python exception for an error of the core.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Option(_) => "OptionError",
        Error::Shape(_) => "ShapeError",
        Error::Dtype(_) => "DtypeError",
        Error::Device(_) => "DeviceError",
        Error::NonFinite(_) => "NonFiniteError",
        Error::Numerical(_) => "NumericalError",
        Error::Cuda(_) => "CudaError",
        Error::OutOfMemory(_) => "OutOfMemoryError",
        Error::Interrupted => return PyKeyboardInterrupt::new_err(error.to_string()),
        _ => return PyRuntimeError::new_err(error.to_string()),
    };
    let raised = py
        .import("ekfac_rs.errors")
        .and_then(|errors| errors.getattr(class))
        .and_then(|class| class.call1((error.to_string(),)));
    match raised {
        Ok(exception) => PyErr::from_value(exception),
        Err(problem) => problem,
    }
}
