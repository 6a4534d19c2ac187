//! A packed sum of Kronecker products on the CPU.
//!
//! Every term ends in a product of a `[D, c]` matrix L with a `[c, K]` matrix M, so all terms
//! share one last product of L's side by side with M's on top of one another. With roots
//! `A = S S^T` and `G = Q Q^T` of numerically deficient factors:
//!
//! | A | G | L | M | c |
//! |---|---|---|---|---|
//! | whole | whole | G | V A | D |
//! | any | thin | Q | (Q^T V) A | rank of G |
//! | thin | any | G (V S) | S^T | rank of A |
//!
//! "Any" is whole, a root and a multiple of the identity, or the identity itself. G, Q and S^T are
//! written once, when the sum is packed. The columns of M and of the result are independent of one
//! another: each thread takes its own.
//!
//! Each group of rows is packed like this. Where a group is a single row, G is a number: its terms
//! are added up to one matrix `[K, K]`, and the product with many of these runs along the groups.

use std::sync::Mutex;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::blas::{cut_rows, gemm, split_columns};
use super::elements::{add_scaled, dot, zip_elements};
use super::host::{self, HostTerm, read_terms};
use super::openmp::lock;
use super::simd;
use super::team::Team;
use crate::element::Real;
use crate::error::Result;
use crate::matrix::Matrix;
use crate::terms::{Combination, Factor, FactoredTerm, Group, Way};

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
        let groups: Vec<_> = groups.collect::<Result<_>>()?;
        let (groups, workspaces) = groups.into_iter().unzip();
        Ok(Self(Form::Groups(groups, Mutex::new(workspaces))))
    }

    /// Packs terms of one group, for V of this size, whose factors may be known by their roots.
    pub(super) fn of_factors(size: [usize; 2], terms: &[FactoredTerm<'_, T>]) -> Result<Self> {
        let sides = terms.iter().flat_map(|&(a, g)| [a, g]);
        let factors: Vec<_> = sides.map(copied).collect::<Result<_>>()?;
        let (group, workspace) = assemble(factors, Frame::whole(size))?;
        Ok(Self(Form::Groups(vec![group], Mutex::new(vec![workspace]))))
    }

    /// Floating-point operations of one product.
    pub(super) fn flops(&self) -> usize {
        match &self.0 {
            Form::Groups(groups, _) => groups.iter().map(|group| group.flops).sum(),
            Form::Rows(rows) => rows.flops(),
        }
    }

    /// Writes what is wanted of the product with V, and returns inner products with V.
    pub(super) fn apply(
        &self,
        team: &Team,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
        wanted: Combination,
    ) -> InnerProducts {
        match &self.0 {
            Form::Groups(groups, workspaces) => {
                apply_groups(team, groups, &mut lock(workspaces), v, out, wanted)
            }
            Form::Rows(rows) => rows.apply(team, v, out, wanted),
        }
    }
}

/// Inner products with V.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct InnerProducts {
    /// Of the product with the sum, unscaled and undamped.
    pub(super) curved: f64,
    /// Of V itself.
    pub(super) flat: f64,
}

impl std::iter::Sum for InnerProducts {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |sum, part| Self {
            curved: sum.curved + part.curved,
            flat: sum.flat + part.flat,
        })
    }
}

/// Makes what is wanted of a product with V, and returns inner products with V.
fn finish<T: Real>(v: MatRef<'_, T>, out: MatMut<'_, T>, wanted: Combination) -> InnerProducts {
    let inner = InnerProducts {
        curved: dot(v, out.as_ref()),
        flat: dot(v, v),
    };
    if wanted != Combination::PRODUCT {
        let [scale, damping] = [wanted.scale, wanted.damping].map(T::from_f64);
        zip_elements(out, v, |out, v| *out = scale * *out + damping * v);
    }
    inner
}

/// The threads share the groups; a single group has them all to itself.
fn apply_groups<T: Real>(
    team: &Team,
    groups: &[PackedGroup<T>],
    workspaces: &mut [Workspace<T>],
    v: MatRef<'_, T>,
    out: MatMut<'_, T>,
    wanted: Combination,
) -> InnerProducts {
    let height = v.nrows() / groups.len();
    let flops: usize = groups.iter().map(|group| group.flops).sum();
    let mut inner = vec![InnerProducts::default(); groups.len()];
    let blocks = cut_rows(out, height).into_iter().zip(&mut inner);
    let tasks = groups.iter().zip(workspaces).zip(blocks);
    let tasks = tasks.map(|((group, workspace), ((start, out), inner))| {
        let v = v.subrows(start, height);
        move || *inner = group.apply(team, workspace, v, out, wanted)
    });
    if team.pieces(flops as f64) > 1 {
        team.run(tasks.collect(), |task| task());
    } else {
        tasks.for_each(|task| task());
    }
    inner.into_iter().sum()
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

    fn apply(
        &self,
        team: &Team,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
        wanted: Combination,
    ) -> InnerProducts {
        let blocks = self.groups.div_ceil(LANES);
        let share = blocks.div_ceil(team.pieces(self.flops() as f64));
        let triangle = self.entries.len() / blocks;
        let parts = self.entries.chunks(share * triangle);
        let mut inner = vec![InnerProducts::default(); parts.len()];
        let tasks = cut_rows(out, share * LANES)
            .into_iter()
            .zip(parts)
            .zip(&mut inner);
        team.run(tasks.collect(), |(((start, mut out), entries), inner)| {
            let v = v.subrows(start, out.nrows());
            let target = out.as_mut();
            simd::run(MultiplyRows {
                entries,
                v,
                out: target,
            });
            *inner = finish(v, out, wanted);
        });
        inner.into_iter().sum()
    }
}

/// Multiplies each row with a matrix of its own.
struct MultiplyRows<'a, T> {
    entries: &'a [[T; LANES]],
    v: MatRef<'a, T>,
    out: MatMut<'a, T>,
}

impl<T: Real> simd::Loop for MultiplyRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            entries,
            v,
            mut out,
        } = self;
        let (rows, size) = (v.nrows(), v.ncols());
        let mut input = vec![[T::default(); LANES]; size];
        let mut output = input.clone();
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
            for (k, output) in output.iter().enumerate() {
                for (lane, &value) in output[..lanes].iter().enumerate() {
                    out[(first + lane, k)] = value;
                }
            }
        }
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

    fn of(x: MatRef<'_, T>) -> Self {
        Self::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)])
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

/// A whole factor, as a thin root if its rank is deficient.
fn whole_or_thin<T: Real>(x: MatRef<'_, T>) -> Factor<Padded<T>> {
    let size = x.nrows();
    match thin_root(x) {
        Some(columns) => Factor::Rooted {
            root: Padded::from_fn(size, columns.len(), |i, j| T::from_f64(columns[j][i])),
            shift: 0.0,
        },
        None => Factor::Whole(Padded::of(x)),
    }
}

/// A copy of a factor. Who knows the roots of some knows the ranks of the others.
fn copied<T: Real>(factor: Factor<Matrix<'_, T>>) -> Result<Factor<Padded<T>>> {
    let copy = |x| host::read(x).map(Padded::of);
    Ok(match factor {
        Factor::Whole(x) => Factor::Whole(copy(x)?),
        Factor::Rooted { root, shift } => Factor::Rooted {
            root: copy(root)?,
            shift,
        },
        Factor::Identity => Factor::Identity,
    })
}

/// What remains to be computed of L or M for a term.
struct Step<T> {
    other: Factor<Padded<T>>,
    /// Where in the stack of roots that were multiplied with V the input is; V itself without.
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
    /// Roots Q of G side by side, `[D, sum of ranks]`, for the terms that go through them.
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
    /// Parts of `left_v` times the roots of A, in the rows of the parts.
    left_v_right: Padded<T>,
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
        Self::reaching(size, reached(sides_g, size.0), reached(sides_a, size.1))
    }

    fn whole([rows, columns]: [usize; 2]) -> Self {
        Self::reaching((rows, columns), (0..rows).collect(), (0..columns).collect())
    }

    fn reaching(size: (usize, usize), rows: Vec<usize>, columns: Vec<usize>) -> Self {
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
    fn new(team: &Team, terms: &[HostTerm<'_, T>]) -> Result<(Self, Workspace<T>)> {
        let (sides_a, sides_g): (Vec<_>, Vec<_>) = terms.iter().copied().unzip();
        let frame = Frame::new(&sides_a, &sides_g);
        let sides = terms
            .iter()
            .flat_map(|&(a, g)| [(a, &frame.columns), (g, &frame.rows)]);
        let reduced = |(x, kept): (MatRef<'_, T>, &Vec<usize>)| {
            Padded::from_fn(kept.len(), kept.len(), |i, j| x[(kept[i], kept[j])])
        };
        let mut factors: Vec<Option<Factor<Padded<T>>>> = Vec::new();
        factors.resize_with(2 * terms.len(), || None);
        team.run(factors.iter_mut().zip(sides).collect(), |(slot, side)| {
            *slot = Some(whole_or_thin(reduced(side).view()));
        });
        assemble(factors.into_iter().flatten().collect(), frame)
    }

    /// Writes what is wanted of the product with V, and returns inner products with V.
    fn apply(
        &self,
        team: &Team,
        workspace: &mut Workspace<T>,
        v: MatRef<'_, T>,
        mut out: MatMut<'_, T>,
        wanted: Combination,
    ) -> InnerProducts {
        let frame = &self.frame;
        if frame.is_whole() {
            let (v, out) = (frame.orient(v), frame.orient_mut(out));
            return self.multiply(team, v, out, &mut workspace.parts, wanted);
        }
        frame.gather(v, workspace.v.view_mut());
        let (packed, result) = (workspace.v.view(), workspace.out.view_mut());
        let product = Combination::PRODUCT;
        self.multiply(team, packed, result, &mut workspace.parts, product);
        frame.scatter(workspace.out.view(), out.as_mut());
        finish(v, out, wanted)
    }

    fn multiply(
        &self,
        team: &Team,
        v: MatRef<'_, T>,
        out: MatMut<'_, T>,
        parts: &mut Parts<T>,
        wanted: Combination,
    ) -> InnerProducts {
        if self.right_roots.columns > 0 {
            multiply_shared(team, parts.v_right.view_mut(), v, self.right_roots.view());
            let (left, middle) = (parts.left.view_mut(), &mut parts.middle);
            self.fill_left(team, left, parts.v_right.view(), middle);
        }
        if self.left_roots.columns > 0 {
            let roots = self.left_roots.view().transpose();
            multiply_shared(team, parts.left_v.view_mut(), roots, v);
            let target = parts.left_v_right.view_mut();
            self.through_right_roots(team, target, parts.left_v.view());
        }
        let pieces = team.pieces(self.flops as f64).clamp(1, out.ncols().max(1));
        let mut inner = vec![InnerProducts::default(); pieces];
        let blocks = split_columns(out, pieces).into_iter();
        let rights = split_columns(parts.right.view_mut(), pieces).into_iter();
        let tasks = blocks.zip(rights).zip(&mut inner).collect();
        let left = parts.left.view();
        let sources = (v, parts.left_v.view(), parts.left_v_right.view());
        team.run(tasks, |(((start, mut block), (_, mut right)), inner)| {
            let width = block.ncols();
            for step in &self.right_steps {
                let target = right.as_mut().subrows_mut(step.start, step.count);
                step.fill_right(target, start, sources);
            }
            let right = right.as_ref();
            matmul(block.as_mut(), Accum::Replace, left, right, one(), Par::Seq);
            *inner = finish(v.subcols(start, width), block, wanted);
        });
        inner.into_iter().sum()
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
            let mut target = left.as_mut().subcols_mut(step.start, step.count);
            match &step.other {
                Factor::Whole(g) => multiply_shared(team, target, g.view(), source),
                Factor::Rooted { root, shift } => {
                    let (rank, root) = (root.columns, root.view());
                    let mut middle = middle.view_mut().submatrix_mut(0, 0, rank, step.count);
                    multiply_shared(team, middle.as_mut(), root.transpose(), source);
                    multiply_shared(team, target.as_mut(), root, middle.as_ref());
                    add_unless_zero(*shift, source, target);
                }
                Factor::Identity => target.copy_from(source),
            }
        }
    }

    /// Computes `(Q^T V) R` for the terms with a thin G whose A is `R R^T` and a multiple of the
    /// identity.
    fn through_right_roots(&self, team: &Team, mut out: MatMut<'_, T>, left_v: MatRef<'_, T>) {
        for step in &self.right_steps {
            if let (Factor::Rooted { root, .. }, Some(first)) = (&step.other, step.input) {
                let source = left_v.subrows(first, step.count);
                let target = out.as_mut().subrows_mut(first, step.count);
                multiply_shared(
                    team,
                    target.subcols_mut(0, root.columns),
                    source,
                    root.view(),
                );
            }
        }
    }
}

impl<T: Real> Step<T> {
    /// Computes columns of M from `start` on, out of V, `Q^T V` and `(Q^T V) R`.
    fn fill_right(
        &self,
        mut target: MatMut<'_, T>,
        start: usize,
        (v, left_v, left_v_right): (MatRef<'_, T>, MatRef<'_, T>, MatRef<'_, T>),
    ) {
        let width = target.ncols();
        let source = match self.input {
            Some(first) => left_v.subrows(first, self.count),
            None => v,
        };
        match &self.other {
            Factor::Whole(a) => {
                let a = a.view().subcols(start, width);
                matmul(target, Accum::Replace, source, a, one(), Par::Seq);
            }
            Factor::Rooted { root, shift } => {
                let turned = root.view().transpose().subcols(start, width);
                let inside = left_v_right.subcols(0, root.columns);
                let inside = inside.subrows(self.input.unwrap_or(0), self.count);
                matmul(
                    target.as_mut(),
                    Accum::Replace,
                    inside,
                    turned,
                    one(),
                    Par::Seq,
                );
                add_unless_zero(*shift, source.subcols(start, width), target);
            }
            Factor::Identity => target.copy_from(source.subcols(start, width)),
        }
    }
}

fn one<T: Real>() -> T {
    T::from_f64(1.0)
}

/// `y += alpha * x`.
fn add_unless_zero<T: Real>(alpha: f64, x: MatRef<'_, T>, y: MatMut<'_, T>) {
    if alpha != 0.0 {
        add_scaled(alpha, x, y);
    }
}

/// `out = a b` on as many threads as the size deserves.
fn multiply_shared<T: Real>(team: &Team, out: MatMut<'_, T>, a: MatRef<'_, T>, b: MatRef<'_, T>) {
    gemm(team, out, Accum::Replace, a, b, one());
}

/// Lays out the terms of a group, whose factors A and G follow one another.
fn assemble<T: Real>(
    factors: Vec<Factor<Padded<T>>>,
    frame: Frame,
) -> Result<(PackedGroup<T>, Workspace<T>)> {
    let (outputs, inputs) = frame.packed_size();
    let (mut factors, mut ways) = (factors.into_iter(), Vec::new());
    while let (Some(a), Some(g)) = (factors.next(), factors.next()) {
        let (a, g) = if frame.transposed { (g, a) } else { (a, g) };
        let size = [outputs, inputs];
        ways.push(Way::of(a, g, size, |x: &Padded<T>| x.columns)?);
    }
    // The shared dimension of L and M: computed rows of M first, those of fixed roots after them.
    let computed: usize = ways.iter().map(|way| way.columns().0).sum();
    let fixed: usize = ways.iter().map(|way| way.columns().1).sum();
    let left_rank: usize = ways.iter().map(Way::rank_of_g).sum();
    let (across, back) = ways.iter().map(Way::inner_ranks).fold((0, 0), |most, own| {
        (usize::max(most.0, own.0), usize::max(most.1, own.1))
    });

    let mut left = Padded::zeros(outputs, computed + fixed);
    let mut right = Padded::zeros(computed + fixed, inputs);
    let mut right_roots = Padded::zeros(inputs, fixed);
    let mut left_roots = Padded::zeros(outputs, left_rank);
    let (mut left_steps, mut right_steps) = (Vec::new(), Vec::new());
    let (mut at_computed, mut at_fixed, mut at_left) = (0, 0, 0);
    let mut flops = 2 * outputs * inputs * (computed + fixed + fixed + left_rank + 1);
    for way in ways {
        match way {
            Way::Whole { a, g } => {
                let count = g.columns;
                let mut place = left.view_mut().subcols_mut(at_computed, count);
                place.copy_from(g.view());
                flops += 2 * count * inputs * inputs;
                right_steps.push(Step {
                    other: Factor::Whole(a),
                    input: None,
                    start: at_computed,
                    count,
                });
                at_computed += count;
            }
            Way::ThroughG { root, other } => {
                let count = root.columns;
                let mut place = left.view_mut().subcols_mut(at_computed, count);
                place.copy_from(root.view());
                let mut place = left_roots.view_mut().subcols_mut(at_left, count);
                place.copy_from(root.view());
                flops += flops_of(&other, inputs) * count;
                right_steps.push(Step {
                    other,
                    input: Some(at_left),
                    start: at_computed,
                    count,
                });
                (at_computed, at_left) = (at_computed + count, at_left + count);
            }
            Way::ThroughA { root, other } => {
                let count = root.columns;
                let mut place = right_roots.view_mut().subcols_mut(at_fixed, count);
                place.copy_from(root.view());
                let start = computed + at_fixed;
                let mut place = right.view_mut().subrows_mut(start, count);
                place.copy_from(root.view().transpose());
                flops += flops_of(&other, outputs) * count;
                left_steps.push(Step {
                    other,
                    input: Some(at_fixed),
                    start,
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
        middle: Padded::zeros(across, fixed),
        left_v_right: Padded::zeros(left_rank, back),
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
    Ok((packed, workspace))
}

/// Floating-point operations of a vector's product with a factor of this size.
fn flops_of<T>(factor: &Factor<Padded<T>>, size: usize) -> usize {
    match factor {
        Factor::Whole(_) => 2 * size * size,
        Factor::Rooted { root, .. } => 4 * size * root.columns,
        Factor::Identity => 0,
    }
}

impl<T> Way<Padded<T>> {
    /// How many columns of L and M are computed for M, and how many for L.
    fn columns(&self) -> (usize, usize) {
        match self {
            Self::Whole { g, .. } => (g.columns, 0),
            Self::ThroughG { root, .. } => (root.columns, 0),
            Self::ThroughA { root, .. } => (0, root.columns),
        }
    }

    /// How many rows of `Q^T V` it needs.
    fn rank_of_g(&self) -> usize {
        match self {
            Self::ThroughG { root, .. } => root.columns,
            _ => 0,
        }
    }

    /// The rank of the other factor, of a G and of an A.
    fn inner_ranks(&self) -> (usize, usize) {
        let rank = |other: &Factor<Padded<T>>| match other {
            Factor::Rooted { root, .. } => root.columns,
            _ => 0,
        };
        match self {
            Self::Whole { .. } => (0, 0),
            Self::ThroughG { other, .. } => (0, rank(other)),
            Self::ThroughA { other, .. } => (rank(other), 0),
        }
    }
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
