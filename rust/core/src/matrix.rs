//! Matrices of any device: where they begin, their extents and strides, their place.
//!
//! A [`Matrix`] cannot be read by whoever holds it. The backend of its place can, after making sure
//! that it is its own: on the CPU as a view of host memory, on a GPU by the address in a queued
//! call. It begins as one of three things: a tensor that was vouched for, host memory that Rust
//! itself vouches for, or memory that a backend vouches for ([`Memory`]).

use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

use faer::{Mat, MatMut, MatRef};

use crate::element::Real;
use crate::error::{Error, Result};
use crate::place::Place;
use crate::view::{Layout, Memory, MemoryMut, TensorView, TensorViewMut};

/// Where the elements of a matrix are; strides count elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outline {
    address: usize,
    rows: usize,
    columns: usize,
    row_stride: isize,
    column_stride: isize,
    place: Place,
}

impl Outline {
    /// A matrix that lies row by row, among this many elements.
    fn by_rows(address: usize, elements: usize, [rows, columns]: [usize; 2], place: Place) -> Self {
        assert!(
            rows.checked_mul(columns)
                .is_some_and(|size| size <= elements),
            "memory of {elements} elements has no room for {rows} x {columns}"
        );
        Self {
            address,
            rows,
            columns,
            row_stride: columns as isize,
            column_stride: 1,
            place,
        }
    }

    /// The matrices in the trailing two dimensions, in row-major order of the leading ones.
    fn of_stack<T: Real>(layout: &Layout, address: usize) -> Result<Vec<Self>> {
        layout.expect_dtype(T::DTYPE)?;
        let ([counts @ .., rows, columns], [steps @ .., down, right]) =
            (&layout.shape[..], &layout.strides[..])
        else {
            return Err(Error::Shape(format!(
                "expected a matrix or a stack of matrices, got shape {:?}",
                layout.shape
            )));
        };
        let mut starts = vec![0];
        for (&count, &step) in counts.iter().zip(steps) {
            let place = |&start: &usize| (0..count).map(move |index| start + index * step);
            starts = starts.iter().flat_map(place).collect();
        }
        let first = Self {
            address,
            rows: *rows,
            columns: *columns,
            row_stride: *down as isize,
            column_stride: *right as isize,
            place: layout.place(),
        };
        let at = |start| first.moved::<T>(start as isize);
        Ok(starts.into_iter().map(at).collect())
    }

    /// The same extents this many elements further on.
    fn moved<T>(self, elements: isize) -> Self {
        let bytes = elements.wrapping_mul(size_of::<T>() as isize);
        Self {
            address: self.address.wrapping_add_signed(bytes),
            ..self
        }
    }

    fn transpose(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn subrows<T>(self, start: usize, count: usize) -> Self {
        assert!(
            start <= self.rows && count <= self.rows - start,
            "{count} rows from {start} on are not among {}",
            self.rows
        );
        let part = Self {
            rows: count,
            ..self
        };
        // A part without rows begins nowhere: its address is never followed.
        part.moved::<T>(start as isize * self.row_stride)
    }

    fn subcolumns<T>(self, start: usize, count: usize) -> Self {
        self.transpose().subrows::<T>(start, count).transpose()
    }

    fn diagonal(self) -> Self {
        Self {
            rows: 1,
            columns: self.rows.min(self.columns),
            row_stride: 0,
            column_stride: self.row_stride + self.column_stride,
            ..self
        }
    }
}

/// The accessors that both kinds of matrices have.
macro_rules! accessors {
    () => {
        /// Number of rows.
        pub fn rows(&self) -> usize {
            self.outline.rows
        }

        /// Number of columns.
        pub fn columns(&self) -> usize {
            self.outline.columns
        }

        /// Elements from each row to the next one.
        pub fn row_stride(&self) -> isize {
            self.outline.row_stride
        }

        /// Elements from each column to the next one.
        pub fn column_stride(&self) -> isize {
            self.outline.column_stride
        }

        /// Device and stream.
        pub fn place(&self) -> Place {
            self.outline.place
        }

        /// The address of the first element, a number that only the place's own backend may follow.
        pub(crate) fn address(&self) -> usize {
            self.outline.address
        }
    };
}

/// A borrowed matrix that is only read.
#[derive(Debug)]
pub struct Matrix<'a, T> {
    outline: Outline,
    memory: PhantomData<&'a T>,
}

impl<T> Clone for Matrix<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Matrix<'_, T> {}

impl<'a, T> Matrix<'a, T> {
    accessors!();

    /// Rows and columns exchanged.
    pub fn transpose(self) -> Self {
        Self::of(self.outline.transpose())
    }

    /// Consecutive rows.
    pub fn subrows(self, start: usize, count: usize) -> Self {
        Self::of(self.outline.subrows::<T>(start, count))
    }

    /// Consecutive columns.
    pub fn subcolumns(self, start: usize, count: usize) -> Self {
        Self::of(self.outline.subcolumns::<T>(start, count))
    }

    /// The diagonal as a matrix of one row.
    pub fn diagonal(self) -> Self {
        Self::of(self.outline.diagonal())
    }

    /// A matrix that lies row by row in a backend's memory.
    pub(crate) fn by_rows(memory: Memory<'a, T>, size: [usize; 2]) -> Self {
        Self::of(Outline::by_rows(
            memory.address(),
            memory.elements(),
            size,
            memory.place(),
        ))
    }

    fn of(outline: Outline) -> Self {
        Self {
            outline,
            memory: PhantomData,
        }
    }
}

impl<'a, T: Real> Matrix<'a, T> {
    /// The matrices in the trailing two dimensions, in row-major order of the leading ones.
    pub fn stack_of(x: &TensorView<'a>) -> Result<Vec<Self>> {
        let outlines = Outline::of_stack::<T>(x.layout(), x.address())?;
        Ok(outlines.into_iter().map(Self::of).collect())
    }
}

/// A borrowed matrix that is written to; nothing else refers to its elements.
#[derive(Debug)]
pub struct MatrixMut<'a, T> {
    outline: Outline,
    memory: PhantomData<&'a mut T>,
}

impl<'a, T> MatrixMut<'a, T> {
    accessors!();

    /// Borrows the matrix.
    pub fn as_ref(&self) -> Matrix<'_, T> {
        Matrix::of(self.outline)
    }

    /// Borrows the matrix to write to it.
    pub fn as_mut(&mut self) -> MatrixMut<'_, T> {
        MatrixMut::of(self.outline)
    }

    /// Rows and columns exchanged.
    pub fn transpose(self) -> Self {
        Self::of(self.outline.transpose())
    }

    /// Consecutive rows.
    pub fn subrows(self, start: usize, count: usize) -> Self {
        Self::of(self.outline.subrows::<T>(start, count))
    }

    /// Consecutive columns.
    pub fn subcolumns(self, start: usize, count: usize) -> Self {
        Self::of(self.outline.subcolumns::<T>(start, count))
    }

    /// The rows before this one, and those from it on.
    pub fn split_at_row(self, row: usize) -> (Self, Self) {
        let above = self.outline.subrows::<T>(0, row);
        let below = self.outline.subrows::<T>(row, self.outline.rows - row);
        (Self::of(above), Self::of(below))
    }

    /// A matrix that lies row by row in a backend's memory.
    pub(crate) fn by_rows(memory: MemoryMut<'a, T>, size: [usize; 2]) -> Self {
        Self::of(Outline::by_rows(
            memory.lent().address(),
            memory.lent().elements(),
            size,
            memory.lent().place(),
        ))
    }

    fn of(outline: Outline) -> Self {
        Self {
            outline,
            memory: PhantomData,
        }
    }
}

impl<'a, T: Real> MatrixMut<'a, T> {
    /// As [`Matrix::stack_of`], to be written to.
    pub fn stack_of(x: &'a mut TensorViewMut<'_>) -> Result<Vec<Self>> {
        let outlines = Outline::of_stack::<T>(x.layout(), x.address())?;
        Ok(outlines.into_iter().map(Self::of).collect())
    }
}

/// A matrix that a backend allocated.
pub trait Storage<T> {
    /// Borrows the matrix.
    fn view(&self) -> Matrix<'_, T>;
    /// Borrows the matrix to write to it.
    fn view_mut(&mut self) -> MatrixMut<'_, T>;
}

/// A matrix in host memory, which everybody may read.
#[derive(Debug, Clone)]
pub struct HostMatrix<T>(Mat<T>);

impl<T: Real> HostMatrix<T> {
    /// A matrix of zeros.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self(Mat::zeros(rows, columns))
    }

    /// A matrix with these entries.
    pub fn from_fn(rows: usize, columns: usize, entry: impl FnMut(usize, usize) -> T) -> Self {
        Self(Mat::from_fn(rows, columns, entry))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.0.nrows()
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.0.ncols()
    }
}

impl<T> Index<(usize, usize)> for HostMatrix<T> {
    type Output = T;

    fn index(&self, index: (usize, usize)) -> &T {
        &self.0[index]
    }
}

impl<T> IndexMut<(usize, usize)> for HostMatrix<T> {
    fn index_mut(&mut self, index: (usize, usize)) -> &mut T {
        &mut self.0[index]
    }
}

impl<T> Storage<T> for HostMatrix<T> {
    fn view(&self) -> Matrix<'_, T> {
        let x: MatRef<'_, T> = self.0.as_ref();
        Matrix::of(Outline {
            address: x.as_ptr().expose_provenance(),
            rows: x.nrows(),
            columns: x.ncols(),
            row_stride: x.row_stride(),
            column_stride: x.col_stride(),
            place: Place::HOST,
        })
    }

    fn view_mut(&mut self) -> MatrixMut<'_, T> {
        let x: MatMut<'_, T> = self.0.as_mut();
        MatrixMut::of(Outline {
            address: x.as_ptr_mut().expose_provenance(),
            rows: x.nrows(),
            columns: x.ncols(),
            row_stride: x.row_stride(),
            column_stride: x.col_stride(),
            place: Place::HOST,
        })
    }
}

/// The error for a matrix that contains NaN or infinity.
pub(crate) fn non_finite(name: &str, value: f64, i: usize, j: usize) -> Error {
    Error::NonFinite(format!("{name} contains {value} at [{i}, {j}]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Device;

    fn outline(place: Place) -> Outline {
        Outline {
            address: 4096,
            rows: 4,
            columns: 6,
            row_stride: 10,
            column_stride: 2,
            place,
        }
    }

    #[test]
    fn parts_begin_where_their_first_element_is() {
        let x = Matrix::<f32>::of(outline(Place::HOST));
        let part = x.subrows(1, 2).subcolumns(3, 3);
        assert_eq!((part.rows(), part.columns()), (2, 3));
        assert_eq!(part.address(), 4096 + 4 * (10 + 6));
        let turned = x.transpose().subrows(3, 3).subcolumns(1, 2);
        assert_eq!(turned.address(), part.address());
        assert_eq!((turned.row_stride(), turned.column_stride()), (2, 10));
        let diagonal = x.diagonal();
        assert_eq!((diagonal.rows(), diagonal.columns()), (1, 4));
        assert_eq!(diagonal.column_stride(), 12);
    }

    #[test]
    #[should_panic(expected = "2 rows from 3 on are not among 4")]
    fn parts_stay_inside() {
        Matrix::<f32>::of(outline(Place::HOST)).subrows(3, 2);
    }

    #[test]
    fn parts_stay_at_their_place() {
        let place = Place {
            device: Device::Cuda(1),
            stream: 7,
        };
        let (above, below) = MatrixMut::<f64>::of(outline(place)).split_at_row(1);
        assert_eq!((above.place(), below.place()), (place, place));
        assert_eq!((above.rows(), below.rows()), (1, 3));
        assert_eq!(below.address(), 4096 + 8 * 10);
    }
}
