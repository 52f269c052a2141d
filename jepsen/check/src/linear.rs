//! What the two checks of linearizability share: the sequential model, and the operations that it must explain.
//!
//! Never here: how an order is found; see [`crate::witness`] and [`crate::wgl`].

use std::fmt::Debug;
use std::hash::Hash;

/// A sequential object.
pub trait Model {
    /// What it holds.
    type State: Clone + Eq + Hash + Debug;
    /// An operation together with its answer.
    type Call;

    /// What it holds at first.
    fn initial(&self) -> Self::State;

    /// What it holds after the operation; `None` when it would have answered something else.
    fn step(&self, state: &Self::State, call: &Self::Call) -> Option<Self::State>;
}

/// An operation as the checks see it.
#[derive(Clone, Debug)]
pub struct Item<C> {
    /// What was asked and answered.
    pub call: C,
    /// Index of the event that called it.
    pub start: u64,
    /// Index of the event that ended it; `None` when nobody knows that it ended.
    pub stop: Option<u64>,
    /// It may have had no effect at all.
    pub optional: bool,
}
