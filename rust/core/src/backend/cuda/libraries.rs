//! Finding the CUDA libraries, and saying what is wrong where one is missing or too old.
//!
//! Nothing here runs before the first tensor on a GPU or the first question about CUDA. A library
//! or a function that is not there would make `cudarc` panic, so both are looked for first.

use std::sync::OnceLock;

use cudarc::{cublas, cusolver, driver, nvrtc};

use super::calls::failed;
use crate::error::{Error, Result};

/// The libraries of CUDA that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// The driver, part of the system.
    Driver,
    /// Dense products and triangular solves.
    Cublas,
    /// Decompositions.
    Cusolver,
    /// The compiler of kernels.
    Nvrtc,
}

/// The oldest driver interface with everything used here.
const OLDEST_DRIVER: i32 = 12_000;

impl Library {
    /// Every library, the driver first.
    pub const ALL: [Self; 4] = [Self::Driver, Self::Cublas, Self::Cusolver, Self::Nvrtc];

    /// The name its file begins with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "libcuda",
            Self::Cublas => "libcublas",
            Self::Cusolver => "libcusolver",
            Self::Nvrtc => "libnvrtc",
        }
    }

    /// Where to get it.
    fn origin(self) -> &'static str {
        match self {
            Self::Driver => "it comes with the NVIDIA driver",
            _ => "it comes with the CUDA builds of torch, or with a CUDA toolkit",
        }
    }

    /// The functions that are called.
    fn functions(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &[
                "cuCtxGetCurrent",
                "cuCtxSetCurrent",
                "cuDeviceGet",
                "cuDeviceGetAttribute",
                "cuDeviceGetCount",
                "cuDeviceGetName",
                "cuDevicePrimaryCtxRetain",
                "cuDriverGetVersion",
                "cuEventCreate",
                "cuEventDestroy_v2",
                "cuEventRecord",
                "cuInit",
                "cuLaunchKernel",
                "cuMemcpyDtoHAsync_v2",
                "cuMemcpyHtoDAsync_v2",
                "cuMemsetD8Async",
                "cuModuleGetFunction",
                "cuModuleLoadData",
                "cuStreamIsCapturing",
                "cuStreamSynchronize",
                "cuStreamWaitEvent",
            ],
            Self::Cublas => &[
                "cublasCreate_v2",
                "cublasSetStream_v2",
                "cublasSetWorkspace_v2",
                "cublasSgemm_v2_64",
                "cublasDgemm_v2_64",
                "cublasSgemmStridedBatched_64",
                "cublasDgemmStridedBatched_64",
                "cublasGemmStridedBatchedEx_64",
                "cublasStrsm_v2_64",
                "cublasDtrsm_v2_64",
            ],
            Self::Cusolver => &[
                "cusolverDnCreate",
                "cusolverDnCreateParams",
                "cusolverDnCreateSyevjInfo",
                "cusolverDnDestroySyevjInfo",
                "cusolverDnDsyevjBatched",
                "cusolverDnDsyevjBatched_bufferSize",
                "cusolverDnSetStream",
                "cusolverDnSsyevjBatched",
                "cusolverDnSsyevjBatched_bufferSize",
                "cusolverDnXpotrf",
                "cusolverDnXpotrf_bufferSize",
                "cusolverDnXsyevBatched",
                "cusolverDnXsyevBatched_bufferSize",
                "cusolverDnXsyevd",
                "cusolverDnXsyevd_bufferSize",
            ],
            Self::Nvrtc => &[
                "nvrtcCompileProgram",
                "nvrtcCreateProgram",
                "nvrtcDestroyProgram",
                "nvrtcGetCUBIN",
                "nvrtcGetCUBINSize",
                "nvrtcGetProgramLog",
                "nvrtcGetProgramLogSize",
                "nvrtcVersion",
            ],
        }
    }

    /// Whether it can be loaded.
    pub fn is_present(self) -> bool {
        // SAFETY: a shared library is opened by name; its own initialisers are all that runs, and
        // they are safe to run at any time.
        unsafe {
            match self {
                Self::Driver => driver::sys::is_culib_present(),
                Self::Cublas => cublas::sys::is_culib_present(),
                Self::Cusolver => cusolver::sys::is_culib_present(),
                Self::Nvrtc => nvrtc::sys::is_culib_present(),
            }
        }
    }

    /// The address of a function, of a library that is present.
    fn address_of(self, function: &str) -> Option<usize> {
        type Function = unsafe extern "C" fn();
        // SAFETY: the library was found present, so that it loads; the function is only looked up,
        // not called, and the library is never unloaded.
        let found = unsafe {
            match self {
                Self::Driver => driver::sys::culib().get::<Function>(function.as_bytes()),
                Self::Cublas => cublas::sys::culib().get::<Function>(function.as_bytes()),
                Self::Cusolver => cusolver::sys::culib().get::<Function>(function.as_bytes()),
                Self::Nvrtc => nvrtc::sys::culib().get::<Function>(function.as_bytes()),
            }
        };
        found.ok().map(|function| *function as usize)
    }

    /// The functions it lacks; it must be present.
    pub(super) fn missing(self) -> Vec<&'static str> {
        let functions = self.functions().iter().copied();
        functions
            .filter(|function| self.address_of(function).is_none())
            .collect()
    }

    /// The file it was loaded from, where the system tells; it must be present.
    pub(super) fn file(self) -> Option<String> {
        let address = self.address_of(self.functions()[0])?;
        // A line of the map: "start-end permissions offset device inode path".
        let map = std::fs::read_to_string("/proc/self/maps").ok()?;
        map.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let bounds = [start, end].map(|bound| usize::from_str_radix(bound, 16).ok());
            let [Some(start), Some(end)] = bounds else {
                return None;
            };
            let path = rest.split_once('/')?.1;
            (start..end).contains(&address).then(|| format!("/{path}"))
        })
    }

    /// Fails unless it can be loaded and has every function.
    fn require(self) -> Result<()> {
        if !self.is_present() {
            return Err(Error::Cuda(format!(
                "{} was not found: {}",
                self.name(),
                self.origin()
            )));
        }
        let missing = self.missing();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Cuda(format!(
            "{} ({}) is too old: it lacks {}",
            self.name(),
            self.file().as_deref().unwrap_or("file unknown"),
            missing.join(", ")
        )))
    }
}

/// Fails unless every library is there, complete and new enough; once they are, asks no more.
pub(super) fn require_all() -> Result<()> {
    static COMPLETE: OnceLock<()> = OnceLock::new();
    if COMPLETE.get().is_none() {
        Library::ALL.into_iter().try_for_each(Library::require)?;
        let version = driver_version()?;
        if version < OLDEST_DRIVER {
            return Err(Error::Cuda(format!(
                "the driver (libcuda) is too old: it supports CUDA {}, expected {} or later",
                dotted(version),
                dotted(OLDEST_DRIVER)
            )));
        }
        let _ = COMPLETE.set(());
    }
    Ok(())
}

/// Fails unless kernels can be compiled.
pub(super) fn require_compiler() -> Result<()> {
    Library::Nvrtc.require()
}

/// The version of the driver's interface, 1000 times its major number plus 10 times its minor one.
pub(super) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the driver is present and complete; the call writes one number.
    unsafe { driver::sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| failed("cuDriverGetVersion", error.0))?;
    Ok(version)
}

/// A version as people write it.
pub(super) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
