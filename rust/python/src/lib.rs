//! Python bindings of `ekfac-core`: the module `ekfac_rs._core`.
//!
//! Nothing is computed here: arguments become views, the GIL is released, and errors become the
//! classes of `ekfac_rs.errors`. `_core.pyi` is the contract.

use pyo3::prelude::*;

mod batchnorm;
mod build;
mod call;
mod cuda;
mod error;
mod gram;
mod kronecker;
mod linalg;
mod tensor;

#[pymodule]
mod _core {
    use pyo3::prelude::*;
    use pyo3::types::PyTuple;

    /// Adds the type aliases of the contract, so that annotations may name them at run time, too.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        ekfac_core::backend::cpu::note_process();
        for alias in ["Tensor", "Note", "Term", "Factor", "Product", "Layer"] {
            module.add(alias, module.py().get_type::<PyTuple>())?;
        }
        Ok(())
    }

    #[pymodule_export]
    use crate::batchnorm::{batch_moments, merge, merge_backward, moments_backward};
    #[pymodule_export]
    use crate::build::{build_info, num_threads, set_num_threads};
    #[pymodule_export]
    use crate::cuda::{compile_cuda_kernels, cuda_info, cuda_kernels, set_cuda_allocator};
    #[pymodule_export]
    use crate::error::error_classes;
    #[pymodule_export]
    use crate::gram::{accumulate_gram, accumulate_patch_gram, strata};
    #[pymodule_export]
    use crate::kronecker::{
        KroneckerInverse, KroneckerOperator, KroneckerRoot, apply_operators, conjugate_gradients,
        kronecker_compress, kronecker_dense, kronecker_diagonal, kronecker_inner,
        kronecker_product, kronecker_quadratic, kronecker_top_eigenvalue, kronecker_trace,
    };
    #[pymodule_export]
    use crate::linalg::{eigh, symmetrize};
}
