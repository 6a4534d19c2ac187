//! Sums of Kronecker products `H = sum_k G_k (x) A_k`, acting on matrices as
//! `V -> sum_k G_k V A_k`.
//!
//! V is `[D, K]` and `vec` is row-major; each A is `[K, K]`, each G is `[D, D]`, all symmetric and
//! stored in full.
//!
//! Factors A `[groups, K, K]` and G `[groups, D / groups, D / groups]` make the operator block
//! diagonal: each group of `D / groups` consecutive rows of V has terms of its own. Whatever is
//! computed is then computed group by group.

mod basis;
mod compress;
mod conjugate;
mod decomposition;
mod eigenvalue;
mod inverse;
mod kept;
mod packed;
mod product;
mod root;
mod sum;

pub use self::conjugate::{Convergence, Stopping};
pub use self::inverse::KroneckerInverse;
pub use self::packed::{KroneckerOperator, Product, TensorFactor};
pub use self::root::KroneckerRoot;
pub use self::sum::KroneckerSum;
