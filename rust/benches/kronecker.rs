//! Time per product with the curvature of three tasks, two strata each.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use ekfac_core::Cancel;
use ekfac_core::kronecker::{KroneckerOperator, KroneckerSum};
use ekfac_core::units::Precision;
use ekfac_core::view::{TensorView, TensorViewMut};
use ndarray::Array2;

/// A positive semi-definite matrix of this rank.
fn psd(size: usize, rank: usize, seed: usize) -> Array2<f32> {
    let root = Array2::from_shape_fn((size, rank), |(i, j)| {
        (((i + 1) * 7919 + (j + seed) * 104_729) % 997) as f32 / 997.0 - 0.5
    });
    root.dot(&root.t()) / rank as f32
}

fn products(criterion: &mut Criterion) {
    for (outputs, inputs) in [(100, 785), (100, 101), (10, 101), (1024, 1025)] {
        let terms: Vec<_> = (0..6)
            .map(|index| match index % 2 {
                0 => (
                    psd(inputs, 2 * inputs, index),
                    psd(outputs, 2 * outputs, index),
                ),
                _ => (psd(inputs, 8, index), psd(outputs, 8, index)),
            })
            .collect();
        let views = terms
            .iter()
            .map(|(a, g)| Ok((TensorView::new(a.view())?, TensorView::new(g.view())?)));
        let sum = KroneckerSum::new(views.collect::<ekfac_core::Result<_>>().unwrap()).unwrap();
        let operator = KroneckerOperator::new(&sum, Precision::Ieee).unwrap();
        let v = Array2::<f32>::from_elem((outputs, inputs), 0.5);
        let mut out = Array2::<f32>::zeros((outputs, inputs));
        let mut group = criterion.benchmark_group(format!("product D={outputs} K={inputs}"));
        group.bench_function("sum", |bencher| {
            bencher.iter(|| {
                let v = TensorView::new(v.view()).unwrap();
                let mut out = TensorViewMut::new(out.view_mut()).unwrap();
                sum.product(black_box(&v), &mut out, 0.0, &Cancel::new())
                    .unwrap();
            });
        });
        group.bench_function("packed operator", |bencher| {
            bencher.iter(|| {
                let v = TensorView::new(v.view()).unwrap();
                let mut out = TensorViewMut::new(out.view_mut()).unwrap();
                black_box(operator.apply(&v, &mut out).unwrap());
            });
        });
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
