//! Patch and grouped factors against unfolded units.
#![allow(clippy::unwrap_used)]

mod common;

use common::strata::{approximation, expected, options};
use common::{Noise, mirrored, norm, view, view_mut};
use ekfac_core::element::Element;
use ekfac_core::geometry::Geometry;
use ekfac_core::gram::{GramOptions, accumulate, accumulate_patches};
use ekfac_core::strata::{Approximation, Role};
use ekfac_core::{Cancel, Error, Result, linalg};
use ndarray::{Array2, Array3, ArrayD, ArrayViewD, Axis, IxDyn, Slice, s};
use proptest::prelude::*;

/// A geometry of two dimensions, the same in both.
fn square(kernel: usize, stride: usize, dilation: usize, padding: usize) -> Geometry {
    Geometry {
        kernel: vec![kernel; 2],
        stride: vec![stride; 2],
        dilation: vec![dilation; 2],
        padding: vec![(padding, padding); 2],
    }
}

/// Where the elements of a `[N, C, *spatial]` array lie in memory.
#[derive(Debug, Clone, Copy)]
enum Memory {
    ChannelsFirst,
    ChannelsLast,
    EveryOther,
    Reversed,
}

fn memory() -> impl Strategy<Value = Memory> {
    proptest::sample::select(vec![
        Memory::ChannelsFirst,
        Memory::ChannelsLast,
        Memory::EveryOther,
        Memory::Reversed,
    ])
}

fn laid_out<T: Copy>(x: &ArrayD<T>, memory: Memory) -> ArrayD<T> {
    let dimensions = x.ndim();
    let stored = |order: Vec<usize>| {
        let mut back = vec![0; dimensions];
        for (place, &axis) in order.iter().enumerate() {
            back[axis] = place;
        }
        let stored = x
            .view()
            .permuted_axes(order)
            .as_standard_layout()
            .into_owned();
        stored.permuted_axes(back)
    };
    match memory {
        Memory::ChannelsFirst => stored((0..dimensions).collect()),
        Memory::ChannelsLast => {
            let spatial = 2..dimensions;
            stored([0].into_iter().chain(spatial).chain([1]).collect())
        }
        Memory::Reversed => stored((0..dimensions).rev().collect()),
        Memory::EveryOther => {
            let last = Axis(dimensions - 1);
            let mut shape = x.shape().to_vec();
            shape[dimensions - 1] *= 2;
            let mut wide = ArrayD::from_elem(IxDyn(&shape), x[IxDyn(&vec![0; dimensions])]);
            let every_other = Slice::from(..).step_by(2);
            wide.slice_axis_mut(last, every_other).assign(x);
            wide.slice_axis_inplace(last, every_other);
            wide
        }
    }
}

/// `[N, T, C * positions]`: every patch, element by element.
fn unfolded(x: ArrayViewD<'_, f64>, geometry: &Geometry) -> Array3<f64> {
    let (examples, channels) = (x.shape()[0], x.shape()[1]);
    let spatial = x.shape()[2..].to_vec();
    let outputs: Vec<usize> = (0..spatial.len())
        .map(|i| {
            let padded = spatial[i] + geometry.padding[i].0 + geometry.padding[i].1;
            (padded - geometry.dilation[i] * (geometry.kernel[i] - 1) - 1) / geometry.stride[i] + 1
        })
        .collect();
    let positions: usize = geometry.kernel.iter().product();
    let locations: usize = outputs.iter().product();
    Array3::from_shape_fn((examples, locations, channels * positions), |(n, t, f)| {
        let (location, position) = (
            unravel(t, &outputs),
            unravel(f % positions, &geometry.kernel),
        );
        let mut index = vec![n, f / positions];
        for i in 0..spatial.len() {
            let place = location[i] * geometry.stride[i] + position[i] * geometry.dilation[i];
            match place.checked_sub(geometry.padding[i].0) {
                Some(place) if place < spatial[i] => index.push(place),
                _ => return 0.0,
            }
        }
        x[IxDyn(&index)]
    })
}

/// The row-major index of this number.
fn unravel(mut number: usize, extents: &[usize]) -> Vec<usize> {
    let mut index = vec![0; extents.len()];
    for (place, extent) in index.iter_mut().zip(extents).rev() {
        (*place, number) = (number % extent, number / extent);
    }
    index
}

/// The factors of each group of features of these units, by definition.
fn expected_groups(
    units: &Array3<f64>,
    groups: usize,
    options: GramOptions,
) -> Vec<Vec<Array2<f64>>> {
    let blocks = units.axis_chunks_iter(Axis(2), units.dim().2 / groups);
    let by_group: Vec<_> = blocks.map(|block| expected(block, options)).collect();
    let strata = 0..options.approximation.strata().len();
    strata
        .map(|k| by_group.iter().map(|group| group[k].clone()).collect())
        .collect()
}

/// Outputs starting from zero.
fn zeros<T: Element + Default>(groups: usize, size: usize, options: GramOptions) -> Vec<ArrayD<T>> {
    let shape = if groups == 1 {
        vec![size, size]
    } else {
        vec![groups, size, size]
    };
    vec![ArrayD::from_elem(IxDyn(&shape), T::default()); options.approximation.strata().len()]
}

fn patch_factors<S: Element, T: Element + Default>(
    x: ArrayViewD<'_, S>,
    geometry: &Geometry,
    groups: usize,
    options: GramOptions,
) -> Result<Vec<ArrayD<T>>> {
    let features = x.shape()[1] / groups * geometry.positions();
    let mut out = zeros::<T>(groups, features + usize::from(options.append_one), options);
    let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
    accumulate_patches(&view(x), geometry, &mut views, options, &Cancel::new())?;
    Ok(out)
}

/// The largest error of any group of any stratum.
fn largest_error<T: Element>(got: &[ArrayD<T>], expected: &[Vec<Array2<f64>>]) -> f64 {
    largest_error_relative_to(got, expected, |stratum, group| {
        norm(&expected[stratum][group])
    })
}

/// As [`largest_error`], relative to all strata of the group together. Where chance makes means
/// nearly equal, what is left of their stratum has the rounding of the units themselves; data
/// whose mean and spread are alike lose nothing by this.
fn largest_error_of_whole<T: Element>(got: &[ArrayD<T>], expected: &[Vec<Array2<f64>>]) -> f64 {
    largest_error_relative_to(got, expected, |_, group| {
        expected.iter().map(|groups| norm(&groups[group])).sum()
    })
}

fn largest_error_relative_to<T: Element>(
    got: &[ArrayD<T>],
    expected: &[Vec<Array2<f64>>],
    scale: impl Fn(usize, usize) -> f64,
) -> f64 {
    let mut largest = 0.0f64;
    for (stratum, (got, expected)) in got.iter().zip(expected).enumerate() {
        let size = expected[0].nrows();
        let got = got.to_shape((expected.len(), size, size)).unwrap();
        for (group, (got, expected)) in got.outer_iter().zip(expected).enumerate() {
            let distance = norm(&(mirrored(&got.mapv(T::to_f64)) - expected));
            let scale = scale(stratum, group);
            largest = largest.max(distance / if scale > 0.0 { scale } else { 1.0 });
        }
    }
    largest
}

/// One dimension: input extent, kernel, stride, dilation, padding.
type OneDimension = (usize, usize, usize, usize, (usize, usize));

fn one_dimension() -> impl Strategy<Value = OneDimension> {
    (
        1usize..8,
        1usize..4,
        1usize..4,
        1usize..3,
        (0usize..4, 0usize..4),
    )
        .prop_filter(
            "an output location",
            |&(extent, kernel, _, dilation, (before, after))| {
                extent + before + after > dilation * (kernel - 1)
            },
        )
}

fn geometry(dimensions: &[OneDimension]) -> Geometry {
    Geometry {
        kernel: dimensions.iter().map(|d| d.1).collect(),
        stride: dimensions.iter().map(|d| d.2).collect(),
        dilation: dimensions.iter().map(|d| d.3).collect(),
        padding: dimensions.iter().map(|d| d.4).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn patches_match_the_unfolded_input(
        seed: u64, n in 1usize..4, groups in 1usize..4, channels in 1usize..4,
        dimensions in proptest::collection::vec(one_dimension(), 1..4),
        memory in memory(), approximation in approximation(), append_one: bool,
    ) {
        let geometry = geometry(&dimensions);
        let mut shape = vec![n, groups * channels];
        shape.extend(dimensions.iter().map(|d| d.0));
        let x = Noise::new(seed).array(IxDyn(&shape)) + 0.5;
        let options = options(approximation, Role::Input, append_one, 0.3);
        let expected = expected_groups(&unfolded(x.view(), &geometry), groups, options);
        let x = laid_out(&x, memory);
        let got = patch_factors::<f64, f64>(x.view(), &geometry, groups, options).unwrap();
        prop_assert!(largest_error_of_whole(&got, &expected) < 1e-12);
        let single = laid_out(&x.mapv(|value| value as f32), memory);
        let got = patch_factors::<f32, f32>(single.view(), &geometry, groups, options).unwrap();
        prop_assert!(largest_error_of_whole(&got, &expected) < 1e-5);
    }

    #[test]
    fn groups_of_features_match_their_definition(
        seed: u64, n in 1usize..8, t in 1usize..5, groups in 1usize..40, k in 1usize..5,
        outside: bool, approximation in approximation(), input: bool, append_one: bool,
    ) {
        let role = if input { Role::Input } else { Role::Gradient };
        let options = options(approximation, role, append_one && input, 0.7);
        let mut noise = Noise::new(seed);
        let x: Array3<f64> = if outside {
            noise.array((n, groups * k, t)).permuted_axes([0, 2, 1])
        } else {
            noise.array((n, t, groups * k))
        } + 0.5;
        let mut out = zeros::<f64>(groups, k + usize::from(options.append_one), options);
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        accumulate(&view(x.view()), &mut views, options, &Cancel::new()).unwrap();
        prop_assert!(largest_error_of_whole(&out, &expected_groups(&x, groups, options)) < 1e-12);
    }
}

/// Large enough for every way of cutting the work: tall and wide factors, several chunks within an
/// example, groups shared by threads and groups one after the other.
#[test]
fn large_patches_match_the_unfolded_input() {
    for (seed, shape, geometry, groups) in [
        (1, [40, 3, 30, 30], square(5, 1, 1, 2), 1),
        (2, [30, 40, 5, 5], square(3, 1, 1, 1), 1),
        (3, [12, 24, 20, 20], square(3, 2, 1, 1), 24),
        (4, [12, 36, 17, 17], square(3, 1, 2, 2), 2),
        (5, [300, 33, 3, 3], square(1, 1, 1, 0), 33),
    ] {
        let x = Noise::new(seed).array(IxDyn(&shape)) + 1.0;
        let units = unfolded(x.view(), &geometry);
        let approximations = [
            (Approximation::KfacExpand, Memory::ChannelsFirst),
            (Approximation::KfacReduce, Memory::ChannelsLast),
            (Approximation::Xkfac, Memory::ChannelsLast),
            (Approximation::XkfacNested, Memory::ChannelsFirst),
        ];
        // Two for each shape, in turns: the definition takes seconds.
        let turn = approximations.into_iter().cycle().skip(seed as usize);
        for (approximation, memory) in turn.step_by(2).take(2) {
            let options = options(approximation, Role::Input, true, 1.0);
            let expected = expected_groups(&units, groups, options);
            let x = laid_out(&x, memory);
            let got = patch_factors::<f64, f64>(x.view(), &geometry, groups, options).unwrap();
            assert!(largest_error(&got, &expected) < 1e-12);
            let single = laid_out(&x.mapv(|value| value as f32), memory);
            let got = patch_factors::<f32, f32>(single.view(), &geometry, groups, options).unwrap();
            assert!(largest_error(&got, &expected) < 1e-5);
        }
    }
}

/// Images so large that offsets of kernel positions take less work than patches.
#[test]
fn offsets_match_the_unfolded_input() {
    let padded = |kernel: [usize; 2], dilation: usize, padding: [(usize, usize); 2]| Geometry {
        kernel: kernel.to_vec(),
        stride: vec![1; 2],
        dilation: vec![dilation; 2],
        padding: padding.to_vec(),
    };
    for (seed, shape, geometry) in [
        (1, [5, 17, 12, 14], square(3, 1, 1, 1)),
        (2, [2, 32, 13, 18], square(3, 1, 2, 2)),
        (3, [3, 16, 16, 11], square(5, 1, 1, 2)),
        (4, [3, 20, 14, 9], square(3, 1, 1, 0)),
        (5, [4, 16, 10, 15], padded([2, 3], 1, [(0, 1), (2, 3)])),
        (6, [3, 18, 9, 30], padded([1, 5], 1, [(0, 0), (2, 2)])),
    ] {
        let x = Noise::new(seed).array(IxDyn(&shape)) + 0.7;
        let units = unfolded(x.view(), &geometry);
        for (approximation, memory) in [
            (Approximation::KfacExpand, Memory::ChannelsFirst),
            (Approximation::KfacReduce, Memory::EveryOther),
            (Approximation::Xkfac, Memory::ChannelsLast),
            (Approximation::XkfacNested, Memory::Reversed),
        ] {
            let options = options(approximation, Role::Input, true, 0.4);
            let expected = expected_groups(&units, 1, options);
            let x = laid_out(&x, memory);
            let got = patch_factors::<f64, f64>(x.view(), &geometry, 1, options).unwrap();
            assert!(largest_error(&got, &expected) < 1e-12);
            let single = laid_out(&x.mapv(|value| value as f32), memory);
            let got = patch_factors::<f32, f32>(single.view(), &geometry, 1, options).unwrap();
            assert!(largest_error(&got, &expected) < 1e-5);
        }
    }
}

/// Found by the property test: each of these sees padding in some dimension and nothing else.
#[test]
fn outputs_that_see_only_padding_count_as_zeros() {
    // Input extent, kernel, stride, dilation, padding.
    let hidden: OneDimension = (1, 2, 3, 1, (3, 0));
    let behind: OneDimension = (2, 1, 3, 1, (1, 0));
    let seen: OneDimension = (4, 2, 1, 1, (0, 1));
    let cases: [&[OneDimension]; 6] = [
        &[hidden],
        &[behind],
        &[seen, hidden],
        &[hidden, seen],
        &[hidden, hidden],
        &[behind, hidden],
    ];
    for dimensions in cases {
        let geometry = geometry(dimensions);
        let mut shape = vec![3, 4];
        shape.extend(dimensions.iter().map(|d| d.0));
        let x = Noise::new(8).array(IxDyn(&shape)) + 1.0;
        let options = options(Approximation::XkfacNested, Role::Input, true, 1.0);
        let expected = expected_groups(&unfolded(x.view(), &geometry), 2, options);
        let got = patch_factors::<f64, f64>(x.view(), &geometry, 2, options).unwrap();
        assert!(largest_error(&got, &expected) < 1e-12, "{dimensions:?}");
    }
}

#[test]
fn patches_survive_a_mean_of_a_thousand_spreads() {
    for (padding, groups) in [(0, 1), (0, 16), (1, 1), (1, 16)] {
        let x = Noise::new(5).array(IxDyn(&[30, 16, 9, 9])) + 1000.0;
        let single = x.mapv(|value| value as f32);
        let exact = single.mapv(f64::from);
        let geometry = square(3, 1, 1, padding);
        let units = unfolded(exact.view(), &geometry);
        for approximation in [Approximation::Xkfac, Approximation::XkfacNested] {
            let options = options(approximation, Role::Input, true, 1.0);
            let got = patch_factors::<f32, f32>(single.view(), &geometry, groups, options).unwrap();
            let expected = expected_groups(&units, groups, options);
            let lost = largest_error(&got, &expected);
            assert!(
                lost < 1e-5,
                "{approximation:?}, padding {padding}, {groups} groups: {lost}"
            );
        }
    }
}

/// Centred by subtraction up to some mean, and before squaring from there on.
#[test]
fn no_mean_costs_digits() {
    for exponent in [-2, 1, 2, 3, 7] {
        let mean = 4f64.powi(exponent);
        let x = Noise::new(9).array(IxDyn(&[6, 16, 20, 20])) + mean;
        let single = x.mapv(|value| value as f32);
        let exact = single.mapv(f64::from);
        for geometry in [square(3, 1, 1, 0), square(1, 1, 1, 0)] {
            let units = unfolded(exact.view(), &geometry);
            for approximation in [Approximation::Xkfac, Approximation::XkfacNested] {
                let options = options(approximation, Role::Input, true, 1.0);
                let got = patch_factors::<f32, f32>(single.view(), &geometry, 1, options).unwrap();
                let lost = largest_error(&got, &expected_groups(&units, 1, options));
                assert!(
                    lost < 5e-6,
                    "{approximation:?}, mean {mean}, {geometry:?}: {lost}"
                );
            }
        }
    }
}

#[test]
fn patches_of_half_precision_are_read_exactly() {
    let x = Noise::new(6).array(IxDyn(&[3, 2, 5, 4]));
    let half = x.mapv(half::bf16::from_f64);
    let geometry = square(2, 1, 1, 1);
    let options = options(Approximation::XkfacNested, Role::Input, true, 1.0);
    let units = unfolded(half.mapv(f64::from).view(), &geometry);
    let got = patch_factors::<_, f32>(half.view(), &geometry, 1, options).unwrap();
    assert!(largest_error(&got, &expected_groups(&units, 1, options)) < 1e-6);
}

#[test]
fn triangles_are_divided_and_mirrored() {
    // Of one block and of many, on one thread and on several, in either layout.
    for (groups, size) in [(4, 5), (1, 1), (1, 700), (3, 130)] {
        for transposed in [false, true] {
            let mut x: Array3<f64> = Noise::new(7).array((groups, size, size));
            let lower = x.clone();
            if transposed {
                x = x.permuted_axes([0, 2, 1]).as_standard_layout().into_owned();
                x = x.permuted_axes([0, 2, 1]);
            }
            linalg::symmetrize(&mut view_mut(x.view_mut()), 3.0).unwrap();
            for (x, lower) in x.outer_iter().zip(lower.outer_iter()) {
                assert_eq!(x, mirrored(&lower.mapv(|value| value / 3.0)));
            }
        }
    }
}

#[test]
fn a_divisor_that_divides_nothing_is_refused() {
    for divisor in [0.0, f64::NAN, f64::INFINITY] {
        let mut x = Array2::<f64>::ones((3, 3));
        let outcome = linalg::symmetrize(&mut view_mut(x.view_mut()), divisor);
        assert!(matches!(outcome, Err(Error::Option(_))));
        assert_eq!(x, Array2::<f64>::ones((3, 3)));
    }
}

#[test]
fn non_finite_images_leave_the_outputs_as_they_were() {
    for groups in [1, 4] {
        let mut x = ArrayD::<f32>::ones(IxDyn(&[3, 4, 5, 6]));
        x[[1, 2, 3, 4]] = f32::NAN;
        let options = options(Approximation::Xkfac, Role::Input, false, 1.0);
        let geometry = square(3, 1, 1, 1);
        let mut out = zeros::<f32>(groups, 36 / groups, options);
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        let result = accumulate_patches(
            &view(x.view()),
            &geometry,
            &mut views,
            options,
            &Cancel::new(),
        );
        assert!(
            matches!(&result, Err(Error::NonFinite(message)) if message.contains("channel 2") && message.contains("[3, 4]")),
            "{result:?}"
        );
        assert!(out.iter().all(|out| out.iter().all(|&value| value == 0.0)));
    }
}

#[test]
fn wrong_geometries_and_groups_are_named() {
    let x = ArrayD::<f64>::ones(IxDyn(&[2, 6, 4, 4]));
    let fine = options(Approximation::Xkfac, Role::Input, false, 1.0);
    let run = |geometry: &Geometry| patch_factors::<f64, f64>(x.view(), geometry, 1, fine).err();
    assert_eq!(run(&square(3, 1, 1, 0)), None);
    for geometry in [
        square(0, 1, 1, 0),
        square(3, 0, 1, 0),
        square(3, 1, 0, 0),
        Geometry {
            stride: vec![1],
            ..square(3, 1, 1, 0)
        },
        Geometry {
            kernel: vec![],
            stride: vec![],
            dilation: vec![],
            padding: vec![],
        },
    ] {
        assert!(
            matches!(run(&geometry), Some(Error::Option(_))),
            "{geometry:?}"
        );
    }
    let one = Geometry {
        kernel: vec![2],
        stride: vec![1],
        dilation: vec![1],
        padding: vec![(0, 0)],
    };
    for geometry in [
        square(5, 1, 1, 0),
        square(3, 1, 2, 0),
        square(2, 1, usize::MAX, 0),
        square(2, 1, 1, usize::MAX / 2),
        square(2, 1, 1, usize::MAX / 5),
        one,
    ] {
        assert!(
            matches!(run(&geometry), Some(Error::Shape(_))),
            "{geometry:?}"
        );
    }
    let gradient = options(Approximation::Xkfac, Role::Gradient, false, 1.0);
    let refused = patch_factors::<f64, f64>(x.view(), &square(3, 1, 1, 0), 1, gradient);
    assert!(matches!(refused, Err(Error::Option(_))));

    let geometry = square(1, 1, 1, 0);
    let outputs = |shapes: [&[usize]; 2]| {
        let mut out = shapes.map(|shape| ArrayD::<f64>::zeros(IxDyn(shape)));
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        accumulate_patches(&view(x.view()), &geometry, &mut views, fine, &Cancel::new())
    };
    assert_eq!(outputs([&[3, 2, 2], &[3, 2, 2]]), Ok(vec![31, 1]));
    assert_eq!(outputs([&[1, 6, 6], &[1, 6, 6]]), Ok(vec![31, 1]));
    for shapes in [
        [&[4, 2, 2][..], &[4, 2, 2][..]],
        [&[3, 2, 2], &[2, 3, 3]],
        [&[6, 6], &[1, 6, 6]],
        [&[3, 2, 3], &[3, 2, 3]],
        [&[0, 2, 2], &[0, 2, 2]],
        [&[6], &[6]],
    ] {
        assert!(
            matches!(outputs(shapes), Err(Error::Shape(_))),
            "{shapes:?}"
        );
    }
    let row = Array2::<f64>::zeros((0, 3));
    let empty = patch_factors::<f64, f64>(row.view().into_dyn(), &geometry, 1, fine);
    assert!(matches!(empty, Err(Error::Shape(_))));
}

#[test]
fn cancelling_stops_long_patches() {
    let x = ArrayD::<f32>::ones(IxDyn(&[64, 64, 48, 48]));
    let options = options(Approximation::KfacExpand, Role::Input, false, 1.0);
    for groups in [1, 64] {
        let cancel = Cancel::new();
        let mut out = zeros::<f32>(groups, 64 / groups * 9, options);
        let mut views: Vec<_> = out.iter_mut().map(|out| view_mut(out.view_mut())).collect();
        cancel.cancel();
        let geometry = square(3, 1, 1, 1);
        let result = accumulate_patches(&view(x.view()), &geometry, &mut views, options, &cancel);
        assert_eq!(result, Err(Error::Interrupted));
    }
}

#[test]
fn expanded_images_are_welcome() {
    let image = Noise::new(8).array((1, 2, 4, 4));
    let expanded = image.broadcast((3, 2, 4, 4)).unwrap();
    let options = options(Approximation::XkfacNested, Role::Input, true, 1.0);
    let geometry = square(3, 1, 1, 1);
    let units = unfolded(expanded.into_dyn(), &geometry);
    let got = patch_factors::<_, f64>(expanded.into_dyn(), &geometry, 1, options).unwrap();
    assert!(largest_error(&got[..1], &expected_groups(&units, 1, options)[..1]) < 1e-12);
    assert!(
        got[1]
            .slice(s![.., ..])
            .iter()
            .all(|value| value.abs() < 1e-12)
    );
}
