//! Which strata each approximation keeps, and their degrees of freedom.
//!
//! A unit is one location of one example: a mini-batch of N examples with T locations each has
//! U = N T units. A stratum is the range of an orthogonal projector on functions of the units; its
//! sum of squares and products, divided by its degrees of freedom, is a factor of the curvature.

use crate::error::{Error, Result};

/// One component of the analysis of variance of a mini-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stratum {
    /// Every unit as it is, not centred.
    Total,
    /// One row per example: inputs averaged, gradients summed over its locations.
    ExampleTotals,
    /// Units minus the mean of the mini-batch.
    WithinBatch,
    /// Units minus the mean of their example.
    WithinExample,
    /// Example means minus the mean of the mini-batch, each counted once per location.
    BetweenExamples,
    /// The mean of the mini-batch, counted once per unit: rank one.
    Mean,
}

impl Stratum {
    /// The name used in Python and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::ExampleTotals => "example-totals",
            Self::WithinBatch => "within-batch",
            Self::WithinExample => "within-example",
            Self::BetweenExamples => "between-examples",
            Self::Mean => "mean",
        }
    }

    /// Degrees of freedom for a mini-batch of `examples` with `locations` each, not counting
    /// further structure in the data.
    pub fn degrees_of_freedom(self, examples: usize, locations: usize) -> usize {
        match self {
            Self::Total => examples * locations,
            Self::ExampleTotals => examples,
            Self::WithinBatch => (examples * locations).saturating_sub(1),
            Self::WithinExample => examples * locations.saturating_sub(1),
            Self::BetweenExamples => examples.saturating_sub(1),
            Self::Mean => 1,
        }
    }

    /// Whether its units are told apart by the example they belong to.
    pub(crate) fn tells_examples_apart(self) -> bool {
        matches!(
            self,
            Self::ExampleTotals | Self::WithinExample | Self::BetweenExamples
        )
    }

    /// What the stratum amounts to when every example has one location; `None` where nothing is
    /// left of it.
    pub(crate) fn with_one_location(self) -> Option<Self> {
        match self {
            Self::ExampleTotals => Some(Self::Total),
            Self::BetweenExamples => Some(Self::WithinBatch),
            Self::WithinExample => None,
            other => Some(other),
        }
    }
}

/// A way to approximate the curvature block of a layer by a sum of Kronecker products, one per
/// stratum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Approximation {
    /// K-FAC, expand setting: one term.
    KfacExpand,
    /// K-FAC, reduce setting: one term.
    KfacReduce,
    /// XK-FAC of Lee et al. (2020): within batch and mean.
    Xkfac,
    /// XK-FAC with the locations of an example told apart from those of others.
    XkfacNested,
}

impl Approximation {
    /// Every approximation.
    pub const ALL: [Self; 4] = [
        Self::KfacExpand,
        Self::KfacReduce,
        Self::Xkfac,
        Self::XkfacNested,
    ];

    /// The name used in Python and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::KfacExpand => "kfac-expand",
            Self::KfacReduce => "kfac-reduce",
            Self::Xkfac => "xkfac",
            Self::XkfacNested => "xkfac-nested",
        }
    }

    /// The strata kept, in the order of their factors.
    pub fn strata(self) -> &'static [Stratum] {
        match self {
            Self::KfacExpand => &[Stratum::Total],
            Self::KfacReduce => &[Stratum::ExampleTotals],
            Self::Xkfac => &[Stratum::WithinBatch, Stratum::Mean],
            Self::XkfacNested => &[
                Stratum::WithinExample,
                Stratum::BetweenExamples,
                Stratum::Mean,
            ],
        }
    }

    /// The approximation of this name.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|approximation| approximation.name() == name)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::name).join(", ");
                Error::Option(format!(
                    "unknown approximation: expected one of {names}, got {name:?}"
                ))
            })
    }
}

/// Which side of the Kronecker product a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Inputs of the layer: sums of squares divided by the number of units U.
    Input,
    /// Gradients at the layer's outputs: sums of squares times `U / (degrees of freedom * N)`.
    Gradient,
}

impl Role {
    /// `input` or `gradient`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "input" => Ok(Self::Input),
            "gradient" => Ok(Self::Gradient),
            other => Err(Error::Option(format!(
                "unknown role: expected input or gradient, got {other:?}"
            ))),
        }
    }
}
