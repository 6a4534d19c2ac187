//! The CUDA backend; so far only the question of what a machine has.

/// Whether each library that the CUDA backend needs can be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Libraries {
    /// The driver, `libcuda`.
    pub driver: bool,
    /// cuBLAS.
    pub cublas: bool,
    /// cuSOLVER.
    pub cusolver: bool,
    /// NVRTC.
    pub nvrtc: bool,
}

/// Looks for the libraries without calling into any of them.
pub fn probe() -> Libraries {
    // SAFETY: each call only tries to open a shared library by name; the libraries' own
    // initialisers are all that runs, and they are safe to run at any time.
    unsafe {
        Libraries {
            driver: cudarc::driver::sys::is_culib_present(),
            cublas: cudarc::cublas::sys::is_culib_present(),
            cusolver: cudarc::cusolver::sys::is_culib_present(),
            nvrtc: cudarc::nvrtc::sys::is_culib_present(),
        }
    }
}
