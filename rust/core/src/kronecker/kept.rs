//! What is kept on a device between calls, whatever its backend and its element type.

use crate::backend::Backend;
use crate::cancel::Cancel;
use crate::error::Result;
use crate::place::Place;
use crate::view::{TensorView, TensorViewMut};

/// A map of tensors, with what it needs in a device's memory.
pub(super) trait Keep: Send + Sync + 'static {
    /// What computes it.
    type On: Backend;
    /// What is asked of it, beside its argument.
    type Task;
    /// What it answers, beside its result.
    type Answer;

    /// Writes the result for `v`, which is on the device of the map.
    fn apply(
        &self,
        backend: &Self::On,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        task: Self::Task,
        cancel: &Cancel,
    ) -> Result<Self::Answer>;
}

/// A map that is kept; its backend and types are left behind.
pub(super) struct Kept<Task, Answer>(Box<dyn Apply<Task, Answer>>);

impl<Task, Answer> Kept<Task, Answer> {
    /// Keeps a map that was made at this place, once it is complete: from now on it may be used on
    /// any stream.
    pub(super) fn new<K>(map: K, backend: &K::On, home: Place) -> Result<Self>
    where
        K: Keep<Task = Task, Answer = Answer>,
    {
        backend.settle()?;
        Ok(Self(Box::new(AtHome { map, home })))
    }

    /// Writes the result for `v`.
    pub(super) fn apply(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        task: Task,
        cancel: &Cancel,
    ) -> Result<Answer> {
        self.0.apply(v, out, task, cancel)
    }
}

/// A map of any backend and types.
trait Apply<Task, Answer>: Send + Sync {
    fn apply(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        task: Task,
        cancel: &Cancel,
    ) -> Result<Answer>;
}

/// A map and where its memory is.
struct AtHome<K> {
    map: K,
    home: Place,
}

impl<K: Keep> Apply<K::Task, K::Answer> for AtHome<K> {
    fn apply(
        &self,
        v: &TensorView<'_>,
        out: &mut TensorViewMut<'_>,
        task: K::Task,
        cancel: &Cancel,
    ) -> Result<K::Answer> {
        let work = |backend: &K::On| self.map.apply(backend, v, out, task, cancel);
        visit(v.place(), self.home, K::On::at, work)
    }
}

/// Works on something kept at home for an argument at another place of the same device.
pub(super) fn visit<B: Backend, R>(
    place: Place,
    home: Place,
    enter: impl FnOnce(Place) -> Result<B::Handle>,
    work: impl FnOnce(&B) -> Result<R>,
) -> Result<R> {
    place.device.expect(home.device)?;
    let backend = enter(place)?;
    let answer = work(&backend);
    // Also what a failed call queued may still be at work.
    backend.hold_for(home)?;
    answer
}
