//! The one place where matrices become views of host memory that can be read and written.

use faer::{MatMut, MatRef};

use crate::error::Result;
use crate::matrix::{Matrix, MatrixMut};
use crate::place::{Device, Place};
use crate::terms::Term;

/// The matrix as one that can be read, if it is in host memory.
pub(super) fn read<T>(x: Matrix<'_, T>) -> Result<MatRef<'_, T>> {
    expect_host(x.place())?;
    let pointer: *const T = match x.address() {
        0 => std::ptr::NonNull::dangling().as_ptr(),
        address => std::ptr::with_exposed_provenance(address),
    };
    // SAFETY: a matrix at this place is part of a tensor in host memory, of a matrix that Rust
    // borrowed there, or of neither and then empty: its elements may be read for its lifetime.
    Ok(unsafe {
        MatRef::from_raw_parts(
            pointer,
            x.rows(),
            x.columns(),
            x.row_stride(),
            x.column_stride(),
        )
    })
}

/// The matrix as one that can be written, if it is in host memory.
pub(super) fn write<T>(x: MatrixMut<'_, T>) -> Result<MatMut<'_, T>> {
    expect_host(x.place())?;
    let pointer: *mut T = match x.address() {
        0 => std::ptr::NonNull::dangling().as_ptr(),
        address => std::ptr::with_exposed_provenance_mut(address),
    };
    // SAFETY: as in `read`, and nothing else refers to the elements of a matrix that is written to.
    Ok(unsafe {
        MatMut::from_raw_parts_mut(
            pointer,
            x.rows(),
            x.columns(),
            x.row_stride(),
            x.column_stride(),
        )
    })
}

/// As [`read`], for several matrices.
pub(super) fn read_all<'a, T>(x: &[Matrix<'a, T>]) -> Result<Vec<MatRef<'a, T>>> {
    x.iter().copied().map(read).collect()
}

/// As [`write`], for several matrices.
pub(super) fn write_all<T>(x: Vec<MatrixMut<'_, T>>) -> Result<Vec<MatMut<'_, T>>> {
    x.into_iter().map(write).collect()
}

/// A term (A, G) that can be read.
pub(super) type HostTerm<'a, T> = (MatRef<'a, T>, MatRef<'a, T>);

/// As [`read`], for both factors of each term.
pub(super) fn read_terms<'a, T>(terms: &[Term<'a, T>]) -> Result<Vec<HostTerm<'a, T>>> {
    let terms = terms.iter();
    terms.map(|&(a, g)| Ok((read(a)?, read(g)?))).collect()
}

fn expect_host(place: Place) -> Result<()> {
    place.device.expect(Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::view::{Memory, MemoryMut};

    #[test]
    fn what_is_on_a_gpu_is_refused_and_not_followed() {
        let place = Place {
            device: Device::Cuda(0),
            stream: 0,
        };
        // SAFETY: nothing follows the address, which is what is tested.
        let (memory, memory_mut) = unsafe {
            (
                Memory::<f32>::new(64, 6, place),
                MemoryMut::<f32>::new(64, 6, place),
            )
        };
        let x = Matrix::by_rows(memory, [2, 3]);
        assert!(matches!(read(x), Err(Error::Device(_))));
        assert!(matches!(
            read(x.transpose().subrows(1, 1)),
            Err(Error::Device(_))
        ));
        let x = MatrixMut::by_rows(memory_mut, [2, 3]);
        assert!(matches!(write(x), Err(Error::Device(_))));
    }
}
