//! BatchNorms' inputs, and weights merged with the BatchNorm after them, as matrices.

use crate::matrix::{Matrix, MatrixMut};
use crate::view::{TensorView, TensorViewMut};

/// A BatchNorm's input, and where its moments by channel go.
#[derive(Debug)]
pub struct Moments<'a, T> {
    /// `[N, C, S]`.
    pub x: TensorView<'a>,
    /// Over N and S, `[1, C]`.
    pub mean: MatrixMut<'a, T>,
    /// The mean of squared distances from it, `[1, C]`.
    pub variance: MatrixMut<'a, T>,
}

/// What the gradients of moments become in the input that they are of.
#[derive(Debug)]
pub struct MomentsGradient<'a, T> {
    /// `[N, C, S]`.
    pub x: TensorView<'a>,
    /// Over N and S, `[1, C]`.
    pub mean: Matrix<'a, T>,
    /// The gradient of the mean, where there is one, `[1, C]`.
    pub of_mean: Option<Matrix<'a, T>>,
    /// That of the population variance.
    pub of_variance: Option<Matrix<'a, T>>,
    /// Whether the result is added to what is there.
    pub keep: bool,
    /// `[N, C, S]`, of the input's type.
    pub out: TensorViewMut<'a>,
}

/// What merged weights are made of.
#[derive(Debug)]
pub struct Map<'a, T> {
    /// `[D, K]`, row by row.
    pub weight: Matrix<'a, T>,
    /// `[1, D]`, as everything that follows.
    pub bias: Option<Matrix<'a, T>>,
    /// The BatchNorm's scale.
    pub gamma: Option<Matrix<'a, T>>,
    /// The BatchNorm's statistics.
    pub mean: Matrix<'a, T>,
    /// Population variance.
    pub variance: Matrix<'a, T>,
    /// What is added to the variance.
    pub epsilon: f64,
}

/// How far merged weights are from an anchor.
#[derive(Debug)]
pub struct Deviation<'a, T> {
    /// What they are made of, but for the shift.
    pub map: Map<'a, T>,
    /// The BatchNorm's shift.
    pub beta: Option<Matrix<'a, T>>,
    /// `[D, K + 1]`, row by row.
    pub anchor: Matrix<'a, T>,
    /// `[D, K + 1]`, row by row.
    pub out: MatrixMut<'a, T>,
}

/// What the gradient of merged weights becomes.
#[derive(Debug)]
pub struct MapGradient<'a, T> {
    /// What they are made of, but for the shift.
    pub map: Map<'a, T>,
    /// Their gradient, `[D, K + 1]`, row by row.
    pub gradient: Matrix<'a, T>,
    /// `[D, K]`, row by row.
    pub weight: Option<MatrixMut<'a, T>>,
    /// Of bias, gamma, beta, mean and variance.
    pub rows: [Option<MatrixMut<'a, T>>; 5],
}
