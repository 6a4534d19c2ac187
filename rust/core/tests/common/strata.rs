//! The strata by their definition.

use ekfac_core::gram::GramOptions;
use ekfac_core::strata::{Approximation, Role};
use ekfac_core::units::Precision;
use ndarray::{Array1, Array2, Array3, ArrayView3, Axis};
use proptest::prelude::Strategy;

pub fn options(
    approximation: Approximation,
    role: Role,
    append_one: bool,
    scale: f64,
) -> GramOptions {
    GramOptions {
        approximation,
        role,
        append_one,
        scale,
        precision: Precision::Ieee,
        note: None,
    }
}

fn with_one(x: ArrayView3<'_, f64>) -> Array3<f64> {
    let (examples, locations, _) = x.dim();
    let ones = Array3::ones((examples, locations, 1));
    ndarray::concatenate(Axis(2), &[x, ones.view()]).unwrap()
}

/// One row per unit.
pub fn flattened(x: &Array3<f64>) -> Array2<f64> {
    let (examples, locations, features) = x.dim();
    let rows = x.to_shape((examples * locations, features)).unwrap();
    rows.into_owned()
}

/// Method, strata: each stratum by its projector, divided as its role asks.
pub fn expected(x: ArrayView3<'_, f64>, options: GramOptions) -> Vec<Array2<f64>> {
    let x = if options.append_one {
        with_one(x)
    } else {
        x.to_owned()
    };
    let (examples, locations, _) = x.dim();
    let units = flattened(&x);
    let square = |rows: &Array2<f64>| rows.t().dot(rows);
    let mean = units.mean_axis(Axis(0)).unwrap();
    let example_means = x.mean_axis(Axis(1)).unwrap();
    let within_example = flattened(&(&x - &example_means.view().insert_axis(Axis(1))));
    let outer = |v: &Array1<f64>| square(&v.view().insert_axis(Axis(0)).to_owned());
    let count = (examples * locations) as f64;
    let mean_square = outer(&mean) * count;
    let between = square(&(&example_means - &mean)) * locations as f64;
    let strata = match options.approximation {
        Approximation::KfacExpand => vec![(square(&units), count)],
        Approximation::KfacReduce => match options.role {
            Role::Input => vec![(square(&example_means), examples as f64)],
            Role::Gradient => vec![(square(&x.sum_axis(Axis(1))), examples as f64)],
        },
        Approximation::Xkfac => vec![(square(&(&units - &mean)), count - 1.0), (mean_square, 1.0)],
        Approximation::XkfacNested => vec![
            (square(&within_example), count - examples as f64),
            (between, examples as f64 - 1.0),
            (mean_square, 1.0),
        ],
    };
    let rows = match options.approximation {
        Approximation::KfacReduce => examples as f64,
        _ => count,
    };
    let weigh = |(square, dof): (Array2<f64>, f64)| match options.role {
        _ if dof == 0.0 => square * 0.0,
        Role::Gradient => square * (options.scale * rows / dof),
        Role::Input => square * (options.scale * examples as f64 / rows),
    };
    strata.into_iter().map(weigh).collect()
}

pub fn approximation() -> impl Strategy<Value = Approximation> {
    proptest::sample::select(Approximation::ALL.to_vec())
}
