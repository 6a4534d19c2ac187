//! A packed sum of Kronecker products on the CPU.
//!
//! Every term ends in a product of a `[D, c]` matrix L with a `[c, K]` matrix M, so all terms
//! share one last product of L's side by side with M's on top of one another. With roots
//! `A = S S^T` and `G = Q Q^T` of numerically deficient factors:
//!
//! | A | G | L | M | c |
//! |---|---|---|---|---|
//! | full | full | G | V A | D |
//! | full | thin | Q | (Q^T V) A | rank of G |
//! | thin | any | G (V S) | S^T | rank of A |
//!
//! G, Q and S^T are written once, when the sum is packed. The columns of M and of the result are
//! independent of one another: each thread takes its own.
//!
//! Each group of rows is packed like this. Where a group is a single row, G is a number: its terms
//! are added up to one matrix `[K, K]`, and the product with many of these runs along the groups.

use std::sync::Mutex;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::blas::{cut_rows, gemm, split_columns};
use super::elements::dot;
use super::host::{HostTerm, read_terms};
use super::openmp::lock;
use super::simd;
use super::team::Team;
use crate::element::Real;
use crate::error::Result;
use crate::terms::Group;

/// A packed sum, with everything that is written during a product.
pub struct Packed<T>(Form<T>);

enum Form<T> {
    /// Each group by itself.
    Groups(Vec<PackedGroup<T>>, Mutex<Vec<Workspace<T>>>),
    /// Groups of a single row.
    Rows(PackedRows<T>),
}

impl<T: Real> Packed<T> {
    /// Packs the terms of all groups.
    pub(super) fn new(team: &Team, groups: &[Group<'_, T>]) -> Result<Self> {
        let single_rows = groups.len() > 1 && groups.iter().all(|group| group.rows.len() == 1);
        let terms = groups.iter().map(|group| read_terms(&group.terms));
        let terms: Vec<_> = terms.collect::<Result<_>>()?;
        if single_rows {
            return Ok(Self(Form::Rows(PackedRows::new(&terms))));
        }
        let groups = terms.iter().map(|terms| PackedGroup::new(team, terms));
        let (groups, workspaces) = groups.unzip();
        Ok(Self(Form::Groups(groups, Mutex::new(workspaces))))
    }

    /// Floating-point operations of one product.
    pub(super) fn flops(&self) -> usize {
        match &self.0 {
            Form::Groups(groups, _) => groups.iter().map(|group| group.flops).sum(),
            Form::Rows(rows) => rows.flops(),
        }
    }

    /// Writes the product with V and returns its inner product with V.
    pub(super) fn apply(&self, team: &Team, v: MatRef<'_, T>, out: MatMut<'_, T>) -> f64 {
        match &self.0 {
            Form::Groups(groups, workspaces) => {
                apply_groups(team, groups, &mut lock(workspaces), v, out)
            }
            Form::Rows(rows) => rows.apply(team, v, out),
        }
    }
}

/// The threads share the groups; a single group has them all to itself.
fn apply_groups<T: Real>(
    team: &Team,
    groups: &[PackedGroup<T>],
    workspaces: &mut [Workspace<T>],
    v: MatRef<'_, T>,
    out: MatMut<'_, T>,
) -> f64 {
    let height = v.nrows() / groups.len();
    let flops: usize = groups.iter().map(|group| group.flops).sum();
    let mut inner = vec![0.0; groups.len()];
    let blocks = cut_rows(out, height).into_iter().zip(&mut inner);
    let tasks = groups.iter().zip(workspaces).zip(blocks);
    let tasks = tasks.map(|((group, workspace), ((start, out), inner))| {
        let v = v.subrows(start, height);
        move || *inner = group.apply(team, workspace, v, out)
    });
    if team.pieces(flops as f64) > 1 {
        team.run(tasks.collect(), |task| task());
    } else {
        tasks.for_each(|task| task());
    }
    inner.iter().sum()
}

/// Groups of a single row, the terms of each added up to one symmetric matrix.
pub(super) struct PackedRows<T> {
    groups: usize,
    size: usize,
    /// The lower triangles, row by row, of this many groups at a time.
    entries: Vec<[T; LANES]>,
}

/// Groups multiplied at once.
const LANES: usize = 16;

impl<T: Real> PackedRows<T> {
    /// Adds up the terms of each group.
    fn new(groups: &[Vec<HostTerm<'_, T>>]) -> Self {
        let size = groups[0][0].0.nrows();
        let mut entries = Vec::with_capacity(groups.len().div_ceil(LANES) * size * (size + 1) / 2);
        for block in groups.chunks(LANES) {
            for i in 0..size {
                for j in 0..=i {
                    let mut entry = [T::default(); LANES];
                    for (entry, terms) in entry.iter_mut().zip(block) {
                        let sum = terms
                            .iter()
                            .map(|(a, g)| a[(i, j)].to_f64() * g[(0, 0)].to_f64());
                        *entry = T::from_f64(sum.sum());
                    }
                    entries.push(entry);
                }
            }
        }
        Self {
            groups: groups.len(),
            size,
            entries,
        }
    }

    fn flops(&self) -> usize {
        2 * self.groups * self.size * (self.size + 1)
    }

    fn apply(&self, team: &Team, v: MatRef<'_, T>, out: MatMut<'_, T>) -> f64 {
        let blocks = self.groups.div_ceil(LANES);
        let share = blocks.div_ceil(team.pieces(self.flops() as f64));
        let triangle = self.entries.len() / blocks;
        let parts = self.entries.chunks(share * triangle);
        let mut inner = vec![0.0; parts.len()];
        let tasks = cut_rows(out, share * LANES)
            .into_iter()
            .zip(parts)
            .zip(&mut inner);
        team.run(tasks.collect(), |(((start, out), entries), inner)| {
            let v = v.subrows(start, out.nrows());
            *inner = simd::run(MultiplyRows { entries, v, out });
        });
        inner.iter().sum()
    }
}

/// Multiplies each row with a matrix of its own; the result is the inner product.
struct MultiplyRows<'a, T> {
    entries: &'a [[T; LANES]],
    v: MatRef<'a, T>,
    out: MatMut<'a, T>,
}

impl<T: Real> simd::Loop for MultiplyRows<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let Self {
            entries,
            v,
            mut out,
        } = self;
        let (rows, size) = (v.nrows(), v.ncols());
        let mut input = vec![[T::default(); LANES]; size];
        let mut output = input.clone();
        let mut inner = [0.0; LANES];
        let mut entries = entries.iter();
        for first in (0..rows).step_by(LANES) {
            let lanes = LANES.min(rows - first);
            for (k, input) in input.iter_mut().enumerate() {
                *input = [T::default(); LANES];
                for (lane, value) in input[..lanes].iter_mut().enumerate() {
                    *value = v[(first + lane, k)];
                }
            }
            for i in 0..size {
                let (earlier, own) = input.split_at(i);
                let (sums, rest) = output.split_at_mut(i);
                let mut sum = [T::default(); LANES];
                for ((earlier, target), entry) in earlier.iter().zip(sums).zip(&mut entries) {
                    add_products(&mut sum, entry, earlier);
                    add_products(target, entry, &own[0]);
                }
                if let Some(entry) = entries.next() {
                    add_products(&mut sum, entry, &own[0]);
                }
                rest[0] = sum;
            }
            for (k, (input, output)) in input.iter().zip(&output).enumerate() {
                for ((inner, x), y) in inner.iter_mut().zip(input).zip(output) {
                    *inner += x.to_f64() * y.to_f64();
                }
                for (lane, &value) in output[..lanes].iter().enumerate() {
                    out[(first + lane, k)] = value;
                }
            }
        }
        inner.iter().sum()
    }
}

/// `sums += x * y`, lane by lane.
#[inline(always)]
fn add_products<T: Real>(sums: &mut [T; LANES], x: &[T; LANES], y: &[T; LANES]) {
    for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
        *sum += x * y;
    }
}

/// A matrix in rows, each a little longer than needed: a stride that is a power of two would put
/// whole columns into one cache set.
struct Padded<T> {
    data: Vec<T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<T: Real> Padded<T> {
    fn zeros(rows: usize, columns: usize) -> Self {
        let stride = columns.next_multiple_of(16) + 16;
        Self {
            data: vec![T::default(); rows * stride],
            rows,
            columns,
            stride,
        }
    }

    fn from_fn(rows: usize, columns: usize, entry: impl Fn(usize, usize) -> T) -> Self {
        let mut matrix = Self::zeros(rows, columns);
        for (i, row) in matrix.data.chunks_exact_mut(matrix.stride).enumerate() {
            for (j, value) in row[..columns].iter_mut().enumerate() {
                *value = entry(i, j);
            }
        }
        matrix
    }

    fn view(&self) -> MatRef<'_, T> {
        let whole = MatRef::from_row_major_slice(&self.data, self.rows, self.stride);
        whole.subcols(0, self.columns)
    }

    fn view_mut(&mut self) -> MatMut<'_, T> {
        let whole = MatMut::from_row_major_slice_mut(&mut self.data, self.rows, self.stride);
        whole.subcols_mut(0, self.columns)
    }
}

/// A symmetric factor, in full or as a thin root.
enum Factor<T> {
    Full(Padded<T>),
    Thin(Padded<T>),
}

impl<T: Real> Factor<T> {
    fn new(x: MatRef<'_, T>) -> Self {
        let size = x.nrows();
        match thin_root(x) {
            Some(columns) => Self::Thin(Padded::from_fn(size, columns.len(), |i, j| {
                T::from_f64(columns[j][i])
            })),
            None => Self::Full(Padded::from_fn(size, size, |i, j| x[(i, j)])),
        }
    }
}

/// What remains to be computed of L or M for a term.
struct Step<T> {
    factor: Padded<T>,
    /// A root Q in place of the factor: multiply by `Q Q^T`.
    thin: bool,
    /// Where in the stack of roots that were multiplied with V the input is.
    input: Option<usize>,
    /// Where the result goes.
    start: usize,
    count: usize,
}

/// All terms of a group, packed.
pub(super) struct PackedGroup<T> {
    frame: Frame,
    /// Roots S of A side by side, `[K, sum of ranks]`.
    right_roots: Padded<T>,
    /// Roots Q of G side by side, `[D, sum of ranks]`, for the terms whose A is full.
    left_roots: Padded<T>,
    /// Products that give columns of L.
    left_steps: Vec<Step<T>>,
    /// Products that give rows of M.
    right_steps: Vec<Step<T>>,
    flops: usize,
}

/// Everything written during a product, allocated once.
pub(super) struct Workspace<T> {
    /// V without the rows and columns that no factor reaches, and the product with it.
    v: Padded<T>,
    out: Padded<T>,
    parts: Parts<T>,
}

/// Intermediate products.
struct Parts<T> {
    /// L of all terms side by side, M of all terms on top of one another.
    left: Padded<T>,
    right: Padded<T>,
    /// V times the roots of A; the roots of G times V.
    v_right: Padded<T>,
    left_v: Padded<T>,
    /// The roots of G times a part of `v_right`.
    middle: Padded<T>,
}

/// How the packed problem relates to the one asked for.
struct Frame {
    /// (D, K) as asked for.
    size: (usize, usize),
    /// The rows and columns of V that a factor reaches.
    rows: Vec<usize>,
    columns: Vec<usize>,
    /// Whether the packed problem is the transposed one, so that its columns outnumber its rows:
    /// the factors are symmetric, so this only exchanges them.
    transposed: bool,
}

impl Frame {
    fn new<T: Real>(sides_a: &[MatRef<'_, T>], sides_g: &[MatRef<'_, T>]) -> Self {
        let extent = |side: &[MatRef<'_, T>]| side.first().map_or(0, |x| x.nrows());
        let size = (extent(sides_g), extent(sides_a));
        let (rows, columns) = (reached(sides_g, size.0), reached(sides_a, size.1));
        let transposed = rows.len() > columns.len();
        Self {
            size,
            rows,
            columns,
            transposed,
        }
    }

    fn is_whole(&self) -> bool {
        self.size == (self.rows.len(), self.columns.len())
    }

    /// Rows and columns of the packed problem.
    fn packed_size(&self) -> (usize, usize) {
        if self.transposed {
            (self.columns.len(), self.rows.len())
        } else {
            (self.rows.len(), self.columns.len())
        }
    }

    /// The whole of V as the packed problem sees it.
    fn orient<'a, T>(&self, v: MatRef<'a, T>) -> MatRef<'a, T> {
        if self.transposed { v.transpose() } else { v }
    }

    fn orient_mut<'a, T>(&self, v: MatMut<'a, T>) -> MatMut<'a, T> {
        if self.transposed {
            v.transpose_mut()
        } else {
            v
        }
    }

    fn gather<T: Real>(&self, v: MatRef<'_, T>, packed: MatMut<'_, T>) {
        let mut packed = self.orient_mut(packed);
        for (i, &row) in self.rows.iter().enumerate() {
            for (j, &column) in self.columns.iter().enumerate() {
                packed[(i, j)] = v[(row, column)];
            }
        }
    }

    fn scatter<T: Real>(&self, packed: MatRef<'_, T>, mut out: MatMut<'_, T>) {
        let packed = self.orient(packed);
        out.fill(T::default());
        for (i, &row) in self.rows.iter().enumerate() {
            for (j, &column) in self.columns.iter().enumerate() {
                out[(row, column)] = packed[(i, j)];
            }
        }
    }
}

impl<T: Real> PackedGroup<T> {
    /// Packs terms (A, G).
    fn new(team: &Team, terms: &[HostTerm<'_, T>]) -> (Self, Workspace<T>) {
        let (sides_a, sides_g): (Vec<_>, Vec<_>) = terms.iter().copied().unzip();
        let frame = Frame::new(&sides_a, &sides_g);
        let mut factors: Vec<Option<Factor<T>>> = Vec::new();
        factors.resize_with(2 * terms.len(), || None);
        team.run(factors.iter_mut().enumerate().collect(), |(index, slot)| {
            let (x, kept) = match index % 2 {
                0 => (sides_a[index / 2], &frame.columns),
                _ => (sides_g[index / 2], &frame.rows),
            };
            let reduced = Padded::from_fn(kept.len(), kept.len(), |i, j| x[(kept[i], kept[j])]);
            *slot = Some(Factor::new(reduced.view()));
        });
        let mut factors = factors.into_iter().flatten();
        let mut pairs = Vec::new();
        while let (Some(a), Some(g)) = (factors.next(), factors.next()) {
            pairs.push(if frame.transposed { (g, a) } else { (a, g) });
        }
        assemble(pairs, frame)
    }

    /// Writes the product with V and returns its inner product with V.
    fn apply(
        &self,
        team: &Team,
        workspace: &mut Workspace<T>,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
    ) -> f64 {
        let frame = &self.frame;
        if frame.is_whole() {
            let (v, out) = (frame.orient(v), frame.orient_mut(out));
            return self.multiply(team, v, out, &mut workspace.parts);
        }
        frame.gather(v, workspace.v.view_mut());
        let (v, result) = (workspace.v.view(), workspace.out.view_mut());
        let inner = self.multiply(team, v, result, &mut workspace.parts);
        frame.scatter(workspace.out.view(), out);
        inner
    }

    fn multiply(
        &self,
        team: &Team,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
        parts: &mut Parts<T>,
    ) -> f64 {
        let one = T::from_f64(1.0);
        if self.right_roots.columns > 0 {
            multiply_shared(team, parts.v_right.view_mut(), v, self.right_roots.view());
            let (left, middle) = (parts.left.view_mut(), &mut parts.middle);
            self.fill_left(team, left, parts.v_right.view(), middle);
        }
        if self.left_roots.columns > 0 {
            let roots = self.left_roots.view().transpose();
            multiply_shared(team, parts.left_v.view_mut(), roots, v);
        }
        let pieces = team.pieces(self.flops as f64).clamp(1, out.ncols().max(1));
        let mut inner = vec![0.0; pieces];
        let blocks = split_columns(out, pieces).into_iter();
        let rights = split_columns(parts.right.view_mut(), pieces).into_iter();
        let tasks = blocks.zip(rights).zip(&mut inner).collect();
        let (left, left_v) = (parts.left.view(), parts.left_v.view());
        team.run(tasks, |(((start, mut block), (_, mut right)), inner)| {
            let width = block.ncols();
            for step in &self.right_steps {
                let source = match step.input {
                    Some(first) => left_v.subrows(first, step.count),
                    None => v,
                };
                let target = right.as_mut().subrows_mut(step.start, step.count);
                let factor = step.factor.view().subcols(start, width);
                matmul(target, Accum::Replace, source, factor, one, Par::Seq);
            }
            matmul(
                block.as_mut(),
                Accum::Replace,
                left,
                right.as_ref(),
                one,
                Par::Seq,
            );
            *inner = dot(v.subcols(start, width), block.as_ref());
        });
        inner.iter().sum()
    }

    /// Computes `G (V S)` for the terms with a thin A.
    fn fill_left(
        &self,
        team: &Team,
        mut left: MatMut<'_, T>,
        v_right: MatRef<'_, T>,
        middle: &mut Padded<T>,
    ) {
        for step in &self.left_steps {
            let source = v_right.subcols(step.input.unwrap_or(0), step.count);
            let target = left.as_mut().subcols_mut(step.start, step.count);
            let factor = step.factor.view();
            if step.thin {
                let rank = step.factor.columns;
                let mut middle = middle.view_mut().submatrix_mut(0, 0, rank, step.count);
                multiply_shared(team, middle.as_mut(), factor.transpose(), source);
                multiply_shared(team, target, factor, middle.as_ref());
            } else {
                multiply_shared(team, target, factor, source);
            }
        }
    }
}

/// `out = a b` on as many threads as the size deserves.
fn multiply_shared<T: Real>(team: &Team, out: MatMut<'_, T>, a: MatRef<'_, T>, b: MatRef<'_, T>) {
    gemm(team, out, Accum::Replace, a, b, T::from_f64(1.0));
}

fn assemble<T: Real>(
    pairs: Vec<(Factor<T>, Factor<T>)>,
    frame: Frame,
) -> (PackedGroup<T>, Workspace<T>) {
    let (outputs, inputs) = frame.packed_size();
    // The shared dimension of L and M: computed rows of M first, those of fixed roots after them.
    let computed: usize = pairs
        .iter()
        .map(|(a, g)| match (a, g) {
            (Factor::Full(_), Factor::Full(_)) => outputs,
            (Factor::Full(_), Factor::Thin(q)) => q.columns,
            _ => 0,
        })
        .sum();
    let rank = |factor: &Factor<T>| match factor {
        Factor::Full(_) => 0,
        Factor::Thin(root) => root.columns,
    };
    let fixed: usize = pairs.iter().map(|(a, _)| rank(a)).sum();
    let left_rank: usize = pairs
        .iter()
        .filter(|(a, _)| matches!(a, Factor::Full(_)))
        .map(|(_, g)| rank(g))
        .sum();
    let largest_rank = pairs.iter().map(|(_, g)| rank(g)).max().unwrap_or(0);

    let mut left = Padded::zeros(outputs, computed + fixed);
    let mut right = Padded::zeros(computed + fixed, inputs);
    let mut right_roots = Padded::zeros(inputs, fixed);
    let mut left_roots = Padded::zeros(outputs, left_rank);
    let (mut left_steps, mut right_steps) = (Vec::new(), Vec::new());
    let (mut at_computed, mut at_fixed, mut at_left) = (0, 0, 0);
    let mut flops = 2 * outputs * inputs * (computed + fixed + fixed + left_rank + 1);
    for (a, g) in pairs {
        match (a, g) {
            (Factor::Full(a), g) => {
                let (factor, thin) = match &g {
                    Factor::Full(g) => (g, false),
                    Factor::Thin(q) => (q, true),
                };
                let count = factor.columns;
                let mut place = left.view_mut().subcols_mut(at_computed, count);
                place.copy_from(factor.view());
                let input = thin.then_some(at_left);
                if thin {
                    let mut place = left_roots.view_mut().subcols_mut(at_left, count);
                    place.copy_from(factor.view());
                    at_left += count;
                }
                flops += 2 * count * inputs * inputs;
                right_steps.push(Step {
                    factor: a,
                    thin: false,
                    input,
                    start: at_computed,
                    count,
                });
                at_computed += count;
            }
            (Factor::Thin(s), g) => {
                let count = s.columns;
                let mut place = right_roots.view_mut().subcols_mut(at_fixed, count);
                place.copy_from(s.view());
                let mut place = right.view_mut().subrows_mut(computed + at_fixed, count);
                place.copy_from(s.view().transpose());
                let (factor, thin) = match g {
                    Factor::Full(g) => (g, false),
                    Factor::Thin(q) => (q, true),
                };
                flops += if thin { 4 } else { 2 } * outputs * factor.columns * count;
                left_steps.push(Step {
                    factor,
                    thin,
                    input: Some(at_fixed),
                    start: computed + at_fixed,
                    count,
                });
                at_fixed += count;
            }
        }
    }
    let parts = Parts {
        left,
        right,
        v_right: Padded::zeros(outputs, fixed),
        left_v: Padded::zeros(left_rank, inputs),
        middle: Padded::zeros(largest_rank, fixed),
    };
    let (gathered_rows, gathered_columns) = if frame.is_whole() {
        (0, 0)
    } else {
        (outputs, inputs)
    };
    let workspace = Workspace {
        v: Padded::zeros(gathered_rows, gathered_columns),
        out: Padded::zeros(gathered_rows, gathered_columns),
        parts,
    };
    let packed = PackedGroup {
        frame,
        right_roots,
        left_roots,
        left_steps,
        right_steps,
        flops,
    };
    (packed, workspace)
}

/// The indices whose row is not zero in every factor: dead pixels and dead units drop out. All of
/// them, if so few are zero that leaving them out would not pay.
fn reached<T: Real>(factors: &[MatRef<'_, T>], size: usize) -> Vec<usize> {
    let zero = T::default();
    let is_reached = |&i: &usize| {
        let mut entries = factors
            .iter()
            .flat_map(|x| (0..size).map(move |j| x[(i, j)]));
        entries.any(|value| value != zero)
    };
    let reached: Vec<usize> = (0..size).filter(is_reached).collect();
    if reached.len() * 8 > size * 7 {
        (0..size).collect()
    } else {
        reached
    }
}

/// The columns of S with `x = S S^T` up to rounding, if fewer than half as many as `x` has: a
/// Cholesky factorisation with pivoting, stopped when what remains is at the level of rounding.
fn thin_root<T: Real>(x: MatRef<'_, T>) -> Option<Vec<Vec<f64>>> {
    let size = x.nrows();
    let mut remaining: Vec<f64> = (0..size).map(|i| x[(i, i)].to_f64()).collect();
    let tolerance = 16.0 * T::EPSILON * remaining.iter().sum::<f64>();
    if tolerance.is_nan() || tolerance < 0.0 {
        return None;
    }
    let mut columns: Vec<Vec<f64>> = Vec::new();
    while remaining.iter().map(|value| value.max(0.0)).sum::<f64>() > tolerance {
        if 2 * (columns.len() + 1) >= size {
            return None;
        }
        let (pivot, &largest) = remaining
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(b.1))?;
        let mut column: Vec<f64> = (0..size).map(|i| x[(i, pivot)].to_f64()).collect();
        for earlier in &columns {
            simd::run(simd::SubtractScaled(&mut column, earlier[pivot], earlier));
        }
        let scale = largest.sqrt().recip();
        for (value, left) in column.iter_mut().zip(&mut remaining) {
            *value *= scale;
            *left -= *value * *value;
        }
        remaining[pivot] = 0.0;
        columns.push(column);
    }
    reproduces(x, &columns, tolerance).then_some(columns)
}

/// Small remaining diagonals bound everything only if `x` is positive semi-definite; later terms
/// of a compressed sum need not be.
fn reproduces<T: Real>(x: MatRef<'_, T>, columns: &[Vec<f64>], tolerance: f64) -> bool {
    let size = x.nrows();
    let mut error = 0.0;
    let mut row = vec![0.0; size];
    for i in 0..size {
        for (j, value) in row.iter_mut().enumerate() {
            *value = x[(i, j)].to_f64();
        }
        for column in columns {
            simd::run(simd::SubtractScaled(&mut row, column[i], column));
        }
        error += row.iter().map(|value| value * value).sum::<f64>();
    }
    error.sqrt() <= tolerance
}
