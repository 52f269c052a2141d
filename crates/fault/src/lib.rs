//! Planted bugs and failpoints, for the fault harness to find and to use.
//!
//! A check that no bug can trip checks nothing. So the product's own code has places where it can be made wrong on
//! purpose, one named bug at a time ([`planted`]), and the harness must catch each. And it has named places at which a
//! process can be made to die or to wait ([`hit`]). Without the feature `planted` both are constants, the wrong
//! branch is not compiled, and no name is left in the binary; with it a release build does not compile at all.
//!
//! Never here: what a bug does, which stands at its place in the product, and the list of bugs, which the harness keeps
//! and compares with the places.

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!(
    "the feature `planted` puts bugs into the product on purpose: it is for debug builds of the harness only"
);

#[cfg(feature = "planted")]
mod armed;

#[cfg(feature = "planted")]
pub use armed::{hit, plant, planted, serve};

/// What a failpoint does to whoever passes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: it is not armed.
    Pass,
    /// The process ends at once, as by SIGKILL.
    Crash,
    /// It waits so long.
    Sleep(std::time::Duration),
}

/// Whether this bug is planted in this process: never.
#[cfg(not(feature = "planted"))]
#[inline(always)]
#[must_use]
pub const fn planted(_bug: &str) -> bool {
    false
}

/// What happens at this place: nothing.
#[cfg(not(feature = "planted"))]
#[inline(always)]
#[must_use]
pub const fn hit(_point: &str) -> Action {
    Action::Pass
}

/// Listens for commands of the harness: never.
///
/// # Errors
/// None.
#[cfg(not(feature = "planted"))]
pub fn serve() -> std::io::Result<()> {
    Ok(())
}
