//! Eigendecompositions and Cholesky factors through cuSOLVER.

use std::ffi::c_void;

use super::calls::failed;
use super::elements::blocks;
use super::gpu::Handles;
use super::memory::DeviceMatrix;
use super::queue::Cuda;
use crate::element::{Dtype, Real};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, MatrixMut, Storage};
use cudarc::cusolver::sys::{
    self, cublasFillMode_t, cudaDataType, cusolverEigMode_t, cusolverStatus_t,
};

/// Matrices up to this size are decomposed many at a time.
const SMALL: usize = 512;

/// And up to this size by Jacobi's rotations, which are faster there: as many as torch has them do.
const TINY: usize = 32;

/// Matrices are stored row by row and read column by column: their lower triangle is the upper one
/// to cuSOLVER.
const LOWER: cublasFillMode_t = cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;

fn data_type<T: Real>() -> cudaDataType {
    match T::DTYPE {
        Dtype::Float32 => cudaDataType::CUDA_R_32F,
        _ => cudaDataType::CUDA_R_64F,
    }
}

fn check(status: cusolverStatus_t, call: &str) -> Result<()> {
    status.result().map_err(|error| failed(call, error.0))
}

/// What a routine works in, and bytes of it.
struct Room {
    device: *mut c_void,
    on_device: usize,
    host: *mut c_void,
    on_host: usize,
}

/// How rotations go on: by default until nothing is left beside the diagonal, with eigenvalues in
/// ascending order.
struct Rotations(sys::syevjInfo_t);

impl Rotations {
    fn new() -> Result<Self> {
        let mut settings = std::ptr::null_mut();
        // SAFETY: the call writes one pointer.
        let status = unsafe { sys::cusolverDnCreateSyevjInfo(&mut settings) };
        check(status, "cusolverDnCreateSyevjInfo")?;
        Ok(Self(settings))
    }
}

impl Drop for Rotations {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed once. Nothing could be done about a failure.
        let _ = unsafe { sys::cusolverDnDestroySyevjInfo(self.0) };
    }
}

impl Cuda {
    /// Asks a routine of cuSOLVER for how much room it wants, runs it with that much, and waits for
    /// it.
    fn with_room(
        &self,
        call: &str,
        ask: impl FnOnce(&Handles, &mut usize, &mut usize) -> cusolverStatus_t,
        work: impl FnOnce(&Handles, &Room) -> cusolverStatus_t,
    ) -> Result<()> {
        let handles = self.handles()?;
        // SAFETY: the handle lives, and the stream is the caller's current one.
        let status = unsafe { sys::cusolverDnSetStream(handles.cusolver, self.stream().cast()) };
        check(status, "cusolverDnSetStream")?;
        let (mut on_device, mut on_host) = (0, 0);
        let status = ask(&handles, &mut on_device, &mut on_host);
        check(status, &format!("{call}_bufferSize"))?;
        let device = self.buffer(on_device)?;
        let mut host = vec![0u8; on_host.max(1)];
        let room = Room {
            device: device.address() as *mut _,
            on_device,
            host: host.as_mut_ptr().cast(),
            on_host,
        };
        let status = work(&handles, &room);
        // The room on the host must last as long as the work, also of a call that failed.
        let waited = self.wait();
        check(status, call)?;
        waited
    }

    /// Eigenvalues in ascending order, and eigenvectors as columns, of matrices of one size.
    pub(super) fn decompose<T: Real>(
        &self,
        x: &[Matrix<'_, T>],
        vectors: Vec<MatrixMut<'_, T>>,
    ) -> Result<Vec<Vec<f64>>> {
        let Some(first) = x.first() else {
            return Ok(Vec::new());
        };
        let size = first.rows();
        if size == 0 {
            return Ok(vec![Vec::new(); x.len()]);
        }
        // The documentation bounds the elements of a batch by the largest 32-bit integer.
        let at_once = match size {
            ..=SMALL => (i32::MAX as usize / (size * size)).clamp(1, x.len()),
            _ => 1,
        };
        let mut values = Vec::with_capacity(x.len());
        let mut vectors = vectors.into_iter();
        for x in x.chunks(at_once) {
            let mut work = self.matrix_of::<T>(x.len() * size, size)?;
            self.copy_stack(x, blocks(work.view_mut(), size, size))?;
            values.extend(self.decompose_in_place(&mut work, x.len(), size)?);
            // Each eigenvector is a column to cuSOLVER, so it is a row here.
            let found = work.view();
            let rows = (0..x.len()).map(|index| found.subrows(index * size, size).transpose());
            let targets = vectors.by_ref().take(x.len()).collect();
            self.copy_stack(&rows.collect::<Vec<_>>(), targets)?;
        }
        Ok(values)
    }

    /// Overwrites a stack of matrices with their eigenvectors and returns their eigenvalues.
    fn decompose_in_place<T: Real>(
        &self,
        x: &mut DeviceMatrix<T>,
        count: usize,
        size: usize,
    ) -> Result<Vec<Vec<f64>>> {
        let values = self.matrix_of::<T>(count, size)?;
        let info = self.buffer(4 * count)?;
        let (n, kind, vectors) = (
            size as i64,
            data_type::<T>(),
            cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR,
        );
        let (a, w) = (x.address() as *mut _, values.address() as *mut _);
        let info_address = info.address() as *mut _;
        // SAFETY (of both calls): the handles live; sizes are those of `x` and `values`, whose
        // memory outlives the work, as `with_room` waits for it; there is a number for each matrix
        // in `info`.
        if count == 1 {
            self.with_room(
                "cusolverDnXsyevd",
                |handles, on_device, on_host| {
                    // SAFETY: as above.
                    unsafe {
                        sys::cusolverDnXsyevd_bufferSize(
                            handles.cusolver,
                            handles.parameters,
                            vectors,
                            LOWER,
                            n,
                            kind,
                            a,
                            n,
                            kind,
                            w,
                            kind,
                            on_device,
                            on_host,
                        )
                    }
                },
                |handles, room| {
                    // SAFETY: as above.
                    unsafe {
                        sys::cusolverDnXsyevd(
                            handles.cusolver,
                            handles.parameters,
                            vectors,
                            LOWER,
                            n,
                            kind,
                            a,
                            n,
                            kind,
                            w,
                            kind,
                            room.device,
                            room.on_device,
                            room.host,
                            room.on_host,
                            info_address,
                        )
                    }
                },
            )?;
        } else if size <= TINY {
            let values = (values.address(), info.address());
            self.rotate::<T>(x.address(), values, size, count)?;
        } else {
            let batch = count as i64;
            self.with_room(
                "cusolverDnXsyevBatched",
                |handles, on_device, on_host| {
                    // SAFETY: as above.
                    unsafe {
                        sys::cusolverDnXsyevBatched_bufferSize(
                            handles.cusolver,
                            handles.parameters,
                            vectors,
                            LOWER,
                            n,
                            kind,
                            a,
                            n,
                            kind,
                            w,
                            kind,
                            on_device,
                            on_host,
                            batch,
                        )
                    }
                },
                |handles, room| {
                    // SAFETY: as above.
                    unsafe {
                        sys::cusolverDnXsyevBatched(
                            handles.cusolver,
                            handles.parameters,
                            vectors,
                            LOWER,
                            n,
                            kind,
                            a,
                            n,
                            kind,
                            w,
                            kind,
                            room.device,
                            room.on_device,
                            room.host,
                            room.on_host,
                            info_address,
                            batch,
                        )
                    }
                },
            )?;
        }
        if self
            .download::<i32>(&info, count)?
            .iter()
            .any(|&info| info != 0)
        {
            return Err(Error::Numerical(format!(
                "the eigendecomposition of a {size} x {size} matrix did not converge"
            )));
        }
        let values = self.to_host(values.view())?;
        Ok(values.chunks(size).map(<[f64]>::to_vec).collect())
    }

    /// Queues the rotations of many small matrices, and waits for them.
    fn rotate<T: Real>(
        &self,
        x: u64,
        (values, info): (u64, u64),
        size: usize,
        count: usize,
    ) -> Result<()> {
        let settings = Rotations::new()?;
        let (n, batch) = (size as i32, count as i32);
        let vectors = cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR;
        macro_rules! call {
            ($type:ty, $ask:path, $work:path) => {{
                let (x, values) = (x as *mut $type, values as *mut $type);
                self.with_room(
                    stringify!($work)
                        .rsplit("::")
                        .next()
                        .unwrap_or_default()
                        .trim(),
                    |handles, on_device, _| {
                        let (handle, mut elements) = (handles.cusolver, 0);
                        // SAFETY: the handle and the settings live; sizes are those of the stack
                        // and of its eigenvalues.
                        let status = unsafe {
                            $ask(
                                handle,
                                vectors,
                                LOWER,
                                n,
                                x,
                                n,
                                values,
                                &mut elements,
                                settings.0,
                                batch,
                            )
                        };
                        *on_device = elements.max(0) as usize * size_of::<$type>();
                        status
                    },
                    |handles, room| {
                        let elements = (room.on_device / size_of::<$type>()) as i32;
                        // SAFETY: as above; the memory outlives the work, as `with_room` waits for
                        // it, and there is a number for each matrix in `info`.
                        unsafe {
                            $work(
                                handles.cusolver,
                                vectors,
                                LOWER,
                                n,
                                x,
                                n,
                                values,
                                room.device.cast(),
                                elements,
                                info as *mut i32,
                                settings.0,
                                batch,
                            )
                        }
                    },
                )
            }};
        }
        match T::DTYPE {
            Dtype::Float32 => call!(
                f32,
                sys::cusolverDnSsyevjBatched_bufferSize,
                sys::cusolverDnSsyevjBatched
            ),
            _ => call!(
                f64,
                sys::cusolverDnDsyevjBatched_bufferSize,
                sys::cusolverDnDsyevjBatched
            ),
        }
    }

    /// Replaces the lower triangle of a matrix by its Cholesky factor, or returns the index of the
    /// first pivot that is not positive.
    pub(super) fn factor<T: Real>(&self, x: MatrixMut<'_, T>) -> Result<Option<usize>> {
        let size = x.rows();
        let work = self.copied(x.as_ref())?;
        let info = self.buffer(4)?;
        let (n, kind, a) = (size as i64, data_type::<T>(), work.address() as *mut _);
        let info_address = info.address() as *mut _;
        // SAFETY (of both calls): as in `decompose_in_place`.
        self.with_room(
            "cusolverDnXpotrf",
            |handles, on_device, on_host| {
                // SAFETY: as above.
                unsafe {
                    sys::cusolverDnXpotrf_bufferSize(
                        handles.cusolver,
                        handles.parameters,
                        LOWER,
                        n,
                        kind,
                        a,
                        n,
                        kind,
                        on_device,
                        on_host,
                    )
                }
            },
            |handles, room| {
                // SAFETY: as above.
                unsafe {
                    sys::cusolverDnXpotrf(
                        handles.cusolver,
                        handles.parameters,
                        LOWER,
                        n,
                        kind,
                        a,
                        n,
                        kind,
                        room.device,
                        room.on_device,
                        room.host,
                        room.on_host,
                        info_address,
                    )
                }
            },
        )?;
        match self.download::<i32>(&info, 1)?[0] {
            0 => {
                let mut x = x;
                self.convert(work.view(), x.as_mut())?;
                self.zero_upper(x)?;
                Ok(None)
            }
            pivot if pivot > 0 => Ok(Some(pivot as usize - 1)),
            other => Err(Error::Cuda(format!(
                "cusolverDnXpotrf refused its argument {}",
                -other
            ))),
        }
    }
}
