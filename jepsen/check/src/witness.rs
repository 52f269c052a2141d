//! The linear-time check: is this order, which the system itself claims, a linearization?
//!
//! A passed check is a proof, whoever made up the order: the model explains each answer along it, and no operation
//! stands behind one that was only called after it had returned. A failed one says only that this order is none,
//! unless no other order was possible.
//!
//! Invariants: each operation is looked at once; nothing is searched.

use crate::linear::{Item, Model};

/// Why an order is not a linearization. Positions in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The model would have answered something else here.
    Answer {
        /// Where.
        at: usize,
    },
    /// The one returned before the other was called, and yet stands behind it.
    Time {
        /// It stands first, and was called last.
        called: usize,
        /// It stands behind, and had returned.
        returned: usize,
    },
}

/// Walks along the order; the number of operations looked at when it is a linearization.
///
/// # Errors
/// The first place at which it is none.
pub fn walk<'a, M, I>(model: &M, order: I) -> Result<usize, Broken>
where
    M: Model,
    M::Call: 'a,
    I: IntoIterator<Item = &'a Item<M::Call>>,
{
    let mut state = model.initial();
    let mut latest: Option<(u64, usize)> = None;
    let mut steps = 0;
    for (at, item) in order.into_iter().enumerate() {
        steps += 1;
        if let (Some((start, called)), Some(stop)) = (latest, item.stop)
            && stop < start
        {
            return Err(Broken::Time { called, returned: at });
        }
        state = model.step(&state, &item.call).ok_or(Broken::Answer { at })?;
        if latest.is_none_or(|(start, _)| item.start > start) {
            latest = Some((item.start, at));
        }
    }
    Ok(steps)
}
