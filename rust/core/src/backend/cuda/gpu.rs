//! What is kept for each device: torch's context, library handles, compiled kernels.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::{result, sys};
use cudarc::{cublas, cusolver};

use super::calls::{failed, stream_handle};
use super::kernels::Kernels;
use super::libraries;
use super::memory::Buffer;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::place::{Device, Place};

/// A device and everything made for it once; never given back, as torch keeps its context as long.
pub(super) struct Gpu {
    pub(super) ordinal: usize,
    context: sys::CUcontext,
    /// As the compiler names it.
    architecture: String,
    pub(super) multiprocessors: usize,
    handles: OnceLock<Mutex<Handles>>,
    kernels: Mutex<HashMap<(Dtype, Dtype), Arc<Kernels>>>,
}

// SAFETY: contexts may be used by any thread; library handles are behind a mutex.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// The device of this ordinal.
    ///
    /// # Errors
    ///
    /// [`Error::Cuda`] naming the library or call that failed; the next call tries again.
    pub(super) fn of(ordinal: usize) -> Result<&'static Self> {
        static GPUS: LazyLock<Mutex<HashMap<usize, &'static Gpu>>> = LazyLock::new(Mutex::default);
        let mut gpus = lock(&GPUS);
        if let Some(&gpu) = gpus.get(&ordinal) {
            return Ok(gpu);
        }
        let gpu: &'static Self = Box::leak(Box::new(Self::new(ordinal)?));
        gpus.insert(ordinal, gpu);
        Ok(gpu)
    }

    /// Makes the device's context current on this thread until the result goes.
    pub(super) fn enter(&self) -> Result<Entered> {
        let before =
            result::ctx::get_current().map_err(|error| failed("cuCtxGetCurrent", error.0))?;
        if before == Some(self.context) {
            return Ok(Entered(None));
        }
        // SAFETY: the context was retained and is never released.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| failed("cuCtxSetCurrent", error.0))?;
        Ok(Entered(Some(before.unwrap_or(std::ptr::null_mut()))))
    }

    fn new(ordinal: usize) -> Result<Self> {
        let device = device(ordinal)?;
        // SAFETY: the driver is initialised and the device is one of its own.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(|error| failed("cuDevicePrimaryCtxRetain", error.0))?;
        let (major, minor) = capability(device)?;
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            ordinal,
            context,
            architecture: format!("sm_{major}{minor}"),
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1).max(1),
            handles: OnceLock::new(),
            kernels: Mutex::default(),
        })
    }

    /// The kernels for these types; compiled on the first call.
    pub(super) fn kernels(&self, element: Dtype, real: Dtype) -> Result<Arc<Kernels>> {
        let mut kernels = lock(&self.kernels);
        if let Some(found) = kernels.get(&(element, real)) {
            return Ok(Arc::clone(found));
        }
        let loaded = Arc::new(Kernels::load(element, real, &self.architecture)?);
        kernels.insert((element, real), Arc::clone(&loaded));
        Ok(loaded)
    }

    /// The library handles, set to this stream for as long as they are held.
    pub(super) fn handles(
        &self,
        stream: usize,
        capturing: bool,
    ) -> Result<MutexGuard<'_, Handles>> {
        if self.handles.get().is_none() {
            // Two threads may both come here; one pair of handles is then left unused.
            let _ = self.handles.set(Mutex::new(Handles::new()?));
        }
        let Some(handles) = self.handles.get() else {
            return Err(Error::Internal("library handles were lost".to_owned()));
        };
        let mut handles = lock(handles);
        let place = Place {
            device: Device::Cuda(self.ordinal),
            stream,
        };
        handles.turn_to(place, capturing)?;
        Ok(handles)
    }
}

/// What puts the context back that was current before: torch takes its current device from it.
pub(super) struct Entered(Option<sys::CUcontext>);

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            // SAFETY: the context was current a moment ago. Nothing could be done about a failure.
            let _ = unsafe { result::ctx::set_current(before) };
        }
    }
}

/// Handles of cuBLAS and cuSOLVER, and the stream they are set to.
pub(super) struct Handles {
    pub(super) cublas: cublas::sys::cublasHandle_t,
    pub(super) cusolver: cusolver::sys::cusolverDnHandle_t,
    pub(super) parameters: cusolver::sys::cusolverDnParams_t,
    stream: Option<usize>,
    /// What cuBLAS works in, for each stream: its own pool would allocate in the middle of a graph
    /// that is being captured.
    workspaces: HashMap<usize, Buffer>,
    /// The same for a graph: it is replayed beside other work, and must share memory with none.
    of_graph: Option<Buffer>,
}

// SAFETY: handles may be used by one thread at a time, which the mutex around them sees to.
unsafe impl Send for Handles {}

/// Bytes for cuBLAS to work in; what NVIDIA recommends for its Hopper devices.
const WORKSPACE: usize = 32 << 20;

impl Handles {
    /// Makes handles in the current context.
    fn new() -> Result<Self> {
        let cublas = cublas::result::create_handle().map_err(|e| failed("cublasCreate", e.0))?;
        let mut cusolver = std::ptr::null_mut();
        let mut parameters = std::ptr::null_mut();
        // SAFETY: a context is current; each call writes one handle.
        unsafe {
            let status = cusolver::sys::cusolverDnCreate(&mut cusolver);
            status
                .result()
                .map_err(|e| failed("cusolverDnCreate", e.0))?;
            let status = cusolver::sys::cusolverDnCreateParams(&mut parameters);
            status
                .result()
                .map_err(|e| failed("cusolverDnCreateParams", e.0))?;
        }
        Ok(Self {
            cublas,
            cusolver,
            parameters,
            stream: None,
            workspaces: HashMap::new(),
            of_graph: None,
        })
    }

    fn turn_to(&mut self, place: Place, capturing: bool) -> Result<()> {
        let stream = place.stream;
        if self.stream != Some(stream) || capturing {
            self.stream = None;
            let workspace = if capturing {
                self.of_graph.insert(Buffer::new(WORKSPACE, place)?)
            } else {
                match self.workspaces.entry(stream) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => entry.insert(Buffer::new(WORKSPACE, place)?),
                }
            };
            let workspace = workspace.address() as *mut _;
            // SAFETY: the handle lives, the stream is the caller's current one, and the workspace
            // is kept. Setting the stream takes the workspace away, hence the order.
            unsafe {
                let handle = stream_handle(stream);
                let status = cublas::sys::cublasSetStream_v2(self.cublas, handle.cast());
                status
                    .result()
                    .map_err(|e| failed("cublasSetStream", e.0))?;
                let status = cublas::sys::cublasSetWorkspace_v2(self.cublas, workspace, WORKSPACE);
                status
                    .result()
                    .map_err(|e| failed("cublasSetWorkspace", e.0))?;
            }
            // A graph's workspace is for one call; whoever comes next sets another.
            self.stream = (!capturing).then_some(stream);
        }
        Ok(())
    }
}

/// Name and compute capability of every device.
pub(super) fn devices() -> Result<Vec<(String, String)>> {
    let count = count()?;
    let describe = |ordinal| {
        let device = device(ordinal)?;
        let name = result::device::get_name(device).map_err(|e| failed("cuDeviceGetName", e.0))?;
        let (major, minor) = capability(device)?;
        Ok((name, format!("{major}.{minor}")))
    };
    (0..count).map(describe).collect()
}

fn count() -> Result<usize> {
    libraries::require_all()?;
    result::init().map_err(|error| failed("cuInit", error.0))?;
    let count = result::device::get_count().map_err(|error| failed("cuDeviceGetCount", error.0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn device(ordinal: usize) -> Result<sys::CUdevice> {
    let count = count()?;
    if ordinal >= count {
        return Err(Error::Device(format!(
            "there is no device cuda:{ordinal}: the driver has {count}"
        )));
    }
    result::device::get(ordinal as i32).map_err(|error| failed("cuDeviceGet", error.0))
}

fn capability(device: sys::CUdevice) -> Result<(i32, i32)> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    Ok((
        attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32> {
    // SAFETY: the device is one of the driver's own.
    unsafe { result::device::get_attribute(device, which) }
        .map_err(|error| failed("cuDeviceGetAttribute", error.0))
}

/// A panic while the lock was held leaves at most an entry missing, which is made again.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
